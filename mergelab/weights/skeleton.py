"""Build models of transformers without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import MergelabError, ModelError

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress bars and advice while a model is opened."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def opened_by_transformers(model: str) -> Iterator[None]:
    """Turn what transformers raises about a model's files into one line: files that do not fit can raise anything.

    Raises:
        ModelError: names ``model``, and says why.
    """
    try:
        with quiet_transformers():
            yield
    except MergelabError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{model}: transformers cannot open it: {why}") from error


def skeleton(folder: Path, config: Mapping[str, Any]) -> nn.Module | None:
    """Build the model of a folder's config without weights: what transformers calls its tensors, and which it ties.

    Models of one config share the module that was built for the first of them.

    Args:
        folder: with the config.
        config: its content.

    Returns:
        The module on the meta device, not to be changed; None where transformers has no such class, or cannot build it.
    """
    try:
        key = str((config.get("architectures") or [""])[0]), (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return _built(folder, config)
    if key not in _known:
        while len(_known) >= _MOST:
            _known.pop(next(iter(_known)), None)
        _known[key] = _built(folder, config)
    return _known[key]


_known: dict[tuple[str, str], nn.Module | None] = {}  # by class and config
_MOST = 8


def _built(folder: Path, config: Mapping[str, Any]) -> nn.Module | None:
    import torch
    import transformers

    cls: Any = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    if cls is None or not hasattr(cls, "base_model_prefix"):
        return None
    try:
        with quiet_transformers(), torch.device("meta"):
            own = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            module: nn.Module = cls(own)
            module.tie_weights()  # type: ignore[operator]
    except Exception:  # a config that does not fit its class can raise anything
        return None
    return module
