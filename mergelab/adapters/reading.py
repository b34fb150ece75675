"""Read an adapter, of PEFT or the Adapters library, into canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.adapters.adapterhub import check_library_settings, is_of_library, named_base, read_library
from mergelab.adapters.canonical import Adapter
from mergelab.adapters.files import AdapterFiles
from mergelab.adapters.peft import check_settings, read_peft


def read_adapter(files: AdapterFiles) -> Adapter:
    """Bring an adapter into canonical form.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch: as for `read_peft` and `read_library`.
    """
    return read_library(files) if is_of_library(files.config) else read_peft(files)


def base_of(config: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    """Return the base that an ``adapter_config.json`` names, if it does, and its revision.

    Raises:
        ModelError: the adapter's type cannot be merged.
    """
    if is_of_library(config):
        check_library_settings(config, name)
        return named_base(config), None
    check_settings(config, name)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    named = base if isinstance(base, str) and base else None
    return named, revision if isinstance(revision, str) and revision else None
