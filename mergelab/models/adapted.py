"""Adapters as experts: a folder in the cache for the config and the tokenizer of a base with an adapter.

The folder holds no weights: it says where the base and the adapter are, and `open_model` computes the weights from the
two when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.adapters.canonical import Adapter
from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.adapters.files import AdapterFiles, open_adapter_files
from mergelab.adapters.placing import Placement, place
from mergelab.adapters.reading import base_of, read_adapter
from mergelab.errors import ModelError
from mergelab.models.architecture import tokenizer_folder
from mergelab.models.configs import untied_config
from mergelab.models.encoder_decoder import NEW, newly_initialised
from mergelab.models.made import made
from mergelab.models.parts import ModelPart, with_part
from mergelab.models.tokens import CHAT_TEMPLATE, copy_companions
from mergelab.weights.adapters import ADAPTER_CONFIG
from mergelab.weights.checkpoint import CONFIG, Checkpoint, open_checkpoint
from mergelab.weights.companions import companion_files
from mergelab.weights.content import content_digest
from mergelab.weights.json_files import read_config, read_json
from mergelab.weights.shards import write_json

HOME, SAVED = "adapted", "saved_adapters"  # in the cache
MARKER = "mergelab_adapter.json"


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder is an adapter, of PEFT or the Adapters library."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_reference(folder: Path, where: str) -> str:
    """Return the reference to the base that an adapter names.

    Raises:
        ModelError: it names none, or its type cannot be merged.
    """
    base, revision = base_of(read_json(folder / ADAPTER_CONFIG, where), where)
    if base is None:
        raise ModelError(f"{where}: the adapter does not name its base (base_model_name_or_path); give it as the base")
    return f"{base}@{revision}" if revision and not Path(base).is_dir() else base


def saved_adapter(module: Any, where: str) -> Path:
    """Save the active adapter of a `peft.PeftModel` in the cache, as it would save it, and return its folder.

    Args:
        module: the model; what it has in its base is not looked at.
        where: what errors call it.

    Raises:
        ModelError: several adapters are active, or it cannot be saved.
    """
    from peft import get_peft_model_state_dict

    active = module.active_adapters
    if len(active) != 1:
        raise ModelError(f"{where} has {len(active)} active adapters ({', '.join(active)}); activate one: set_adapter")
    (name,) = active
    tensors = get_peft_model_state_dict(module, adapter_name=name)
    described = json.dumps(module.peft_config[name].to_dict(), default=lambda value: str(sorted(value, key=str)))
    config: Any = getattr(module.get_base_model(), "config", None)
    own = json.dumps(config.to_dict() if hasattr(config, "to_dict") else {}, default=str)
    parts = {
        "tensors": {key: content_digest(tensor.detach().cpu()) for key, tensor in tensors.items()},
        "adapter": described,
        "config": own,
    }

    def write(folder: Path) -> None:
        module.save_pretrained(folder, selected_adapters=[name])
        if name != "default":
            for file in list((folder / name).iterdir()):
                file.rename(folder / file.name)
        write_json(folder / CONFIG, json.loads(own))

    return made(SAVED, parts, write)


def on_base(base: Path, adapter: Path, *, where: str, part: str | None = None) -> Path:
    """Describe the model that ``base`` is with an adapter.

    Args:
        base: a model folder.
        adapter: an adapter's folder.
        where: the configuration's key of the expert, for messages.
        part: ``encoder`` or ``decoder`` for an adapter of a model that is one part of the base.

    Returns:
        A folder in the cache, for `open_model`: config and tokenizer, but no weights.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch, NonFinite: the adapter cannot be read, or is not one of this base.
    """
    opened = _open(base, adapter, part, where, "the base")
    files, read, whole, placement = opened
    while len(_opened) >= _MOST:
        _opened.pop(next(iter(_opened)), None)
    _opened[_state(base, adapter, part)] = opened
    config = _config(read, files, whole, placement)
    tokenizer = tokenizer_folder([adapter, base])
    small = [base / name for name in companion_files(base)]
    small += [adapter / name for name in companion_files(adapter)] if tokenizer == adapter else []
    parts = {
        "base": str(base.absolute()),
        "adapter": str(adapter.absolute()),
        "part": part,
        "config": config,
        "new": sorted(newly_initialised(base) - placement.changes.keys()),
        "files": [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in small],
    }

    def write(folder: Path) -> None:
        copy_companions(base, folder, tokenizer=False)
        if tokenizer is not None:
            copy_companions(tokenizer, folder, tokenizer=True)
            if (tokenizer / CHAT_TEMPLATE).is_file():
                (folder / CHAT_TEMPLATE).write_bytes((tokenizer / CHAT_TEMPLATE).read_bytes())
        if parts["new"]:
            (folder / NEW).write_text(json.dumps(parts["new"]), encoding="utf-8")
        write_json(folder / MARKER, {key: parts[key] for key in ("base", "adapter", "part")})
        write_json(folder / CONFIG, config)

    return made(HOME, parts, write)


def in_part(base: Path, model: Path, part: ModelPart, *, where: str) -> Path:
    """Make the model that ``base`` is with a checkpoint, or with an adapter, in its encoder or decoder.

    Args, errors: as for `mergelab.models.parts.with_part` and `on_base`.
    """
    if is_adapter_folder(model):
        return on_base(base, model, where=where, part=part)
    return with_part(base, model, part, where=where)


def open_model(folder: Path, name: str | None = None) -> Checkpoint:
    """Open a model folder, or one that `on_base` made.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch, NonFinite: as for `open_checkpoint` and `on_base`.
    """
    if not (folder / MARKER).is_file():
        return open_checkpoint(folder, name)
    name = name if name is not None else str(folder)
    marked = read_json(folder / MARKER, name)
    place_of = Path(marked["base"]), Path(marked["adapter"]), marked["part"]
    opened = _opened.pop(_state(*place_of), None) or _open(*place_of, name, f"the base of {name}")
    files, _, base, placement = opened
    return AdaptedCheckpoint(name, folder, read_config(folder, name), base, placement, files.files)


Opened = tuple[AdapterFiles, Adapter, Checkpoint, Placement]
_opened: dict[object, Opened] = {}  # by `on_base`, for the next `open_model` of the same
_MOST = 64


def _open(base: Path, adapter: Path, part: str | None, name: str, base_name: str) -> Opened:
    files = open_adapter_files(adapter, name)
    read = read_adapter(files)
    whole = open_checkpoint(base, base_name)
    return files, read, whole, place(read, whole, part)


def _state(base: Path, adapter: Path, part: str | None) -> object:
    """Name the files of two folders as they are now: their sizes and times of change."""
    found: list[object] = [part]
    for folder in (base, adapter):
        found.append(str(folder.absolute()))
        with contextlib.suppress(OSError):
            stats = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
            found += sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return tuple(found)


def _config(adapter: Adapter, files: AdapterFiles, base: Checkpoint, placement: Placement) -> dict[str, Any]:
    """Return the config of the adapted model: its base's, with what the adapter changes in it."""
    config = dict(base.config)
    if placement.class_name != (config.get("architectures") or [""])[0]:
        config["architectures"] = [placement.class_name]
    if placement.apart:
        config.update(untied_config(config))
    if (tokens := placement.sizes.get("vocab_size")) is not None:
        holder = next((key for key in ("text_config", "decoder") if "vocab_size" not in config and key in config), None)
        config.update({"vocab_size": tokens} if holder is None else {holder: {**config[holder], "vocab_size": tokens}})
    own = files.folder / CONFIG
    given = read_config(files.folder, adapter.name) if own.is_file() else {}
    if adapter.label2id:
        given = {"id2label": {str(at): label for label, at in adapter.label2id.items()}}
    labels = _labels(given, placement.sizes, config) if placement.class_name.endswith("Classification") else None
    if labels is not None:
        config.update(id2label=labels, label2id={name: int(at) for at, name in labels.items()}, num_labels=len(labels))
    return config


def _labels(own: Mapping[str, Any], sizes: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the names of a classifier's outputs: the adapter's own, the base's, or numbers; None: as in the base."""
    base = {str(at): str(name) for at, name in (config.get("id2label") or {}).items()}
    given = {str(at): str(name) for at, name in (own.get("id2label") or {}).items()}
    count = sizes.get("num_labels")
    if given and (count or len(base) or config.get("num_labels", 2)) == len(given):
        return given
    if count is None or count == len(base):
        return None
    return {str(at): f"LABEL_{at}" for at in range(count)}
