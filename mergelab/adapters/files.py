"""Open an adapter's folder: its configuration and its tensors, which are plain data or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mergelab.errors import ModelError
from mergelab.weights.adapters import ADAPTER_CONFIG, HEAD_CONFIG, HEAD_WEIGHTS, LIBRARY_WEIGHTS, PEFT_WEIGHTS
from mergelab.weights.align import check_finite
from mergelab.weights.checkpoint import open_weight_file
from mergelab.weights.companions import leads_inside
from mergelab.weights.json_files import read_json
from mergelab.weights.source import DictSource

# What the Adapters library saves beside an adapter.
_UNMERGED = {
    "pytorch_model_adapter_fusion.bin": "an AdapterFusion layer",
    "model_adapter_fusion.safetensors": "an AdapterFusion layer",
    "embedding.pt": "an embedding of its own",
}


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder, read.

    Attributes:
        name: what errors call the adapter.
        folder: its path.
        config: the parsed ``adapter_config.json``.
        files: the files that its content depends on: configuration and weights.
        tensors: what the weight file holds, all finite.
        head_config, head_tensors: of a prediction head that the Adapters library has saved beside it.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    head_config: Mapping[str, Any] | None = None
    head_tensors: Mapping[str, Tensor] = field(default_factory=dict)


def adapter_files(folder: Path, name: str) -> tuple[Path, ...]:
    """Return the files that an adapter's content depends on, its weights first.

    Raises:
        ModelError: one is missing, or is a link that leads out of the folder, other than a hub cache's own; or the
            folder has parts of the Adapters library that no merge can hold.
    """
    known = (*PEFT_WEIGHTS, *LIBRARY_WEIGHTS)
    weights = _first(folder, known, name)
    if weights is None:
        raise ModelError(f"{name}: {folder} has {ADAPTER_CONFIG} but no weights; looked for {', '.join(known)}")
    files = [weights, folder / ADAPTER_CONFIG]
    if weights.name in LIBRARY_WEIGHTS:
        for other, what in _UNMERGED.items():
            if (folder / other).exists():
                raise ModelError(f"{name}: {folder / other} is {what}, which cannot be merged; move it elsewhere")
        if (head := _first(folder, HEAD_WEIGHTS, name)) is not None:
            files += [head, folder / HEAD_CONFIG]
            if not (folder / HEAD_CONFIG).is_file():
                raise ModelError(f"{name}: {folder} has {head.name} without {HEAD_CONFIG}")
    for file in files:
        if not leads_inside(file, folder):
            raise ModelError(f"{name}: {file} is a link that leads out of the adapter's folder; copy the file there")
    return tuple(files)


def _first(folder: Path, files: Sequence[str], name: str) -> Path | None:
    if found := next((folder / file for file in files if (folder / file).is_file()), None):
        return found
    if broken := next((folder / file for file in files if (folder / file).is_symlink()), None):
        raise ModelError(f"{name}: {broken} is a link that leads nowhere")
    return None


def open_adapter_files(folder: Path, name: str) -> AdapterFiles:
    """Read an adapter's folder.

    Raises:
        ModelError: files are missing, damaged, links that lead elsewhere, or need arbitrary unpickling.
        NonFinite: a tensor holds NaN or infinity.
    """
    files = adapter_files(folder, name)
    config, tensors = read_json(folder / ADAPTER_CONFIG, name), _tensors(files[0], name)
    if len(files) == 2:
        return AdapterFiles(name, folder, config, files, tensors)
    return AdapterFiles(name, folder, config, files, tensors, read_json(files[3], name), _tensors(files[2], name))


def _tensors(weights: Path, name: str) -> dict[str, Tensor]:
    stored = open_weight_file(weights, name)
    tensors = {key: stored.get(key) for key in stored.infos}
    tensors |= {alias: tensors[key] for alias, key in stored.ties.items()}
    if not tensors:
        raise ModelError(f"{name}: {weights} holds no tensors")
    source = DictSource(name, tensors)
    for key, tensor in tensors.items():
        check_finite(source, key, tensor)
    return tensors
