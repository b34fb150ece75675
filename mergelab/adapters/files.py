"""Open an adapter's folder: its configuration and its tensors, which are plain data or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergelab.errors import ModelError
from mergelab.weights.adapters import ADAPTER_CONFIG, PEFT_WEIGHTS
from mergelab.weights.align import check_finite
from mergelab.weights.checkpoint import open_weight_file
from mergelab.weights.companions import leads_inside
from mergelab.weights.json_files import read_json
from mergelab.weights.source import DictSource


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder, read.

    Attributes:
        name: what errors call the adapter.
        folder: its path.
        config: the parsed ``adapter_config.json``.
        files: the files that its content depends on: configuration and weights.
        tensors: what the weight file holds, all finite.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]


def adapter_files(folder: Path, name: str) -> tuple[Path, ...]:
    """Return the files that an adapter's content depends on, its weights first.

    Raises:
        ModelError: one is missing, or is a link that leads out of the folder, other than a hub cache's own.
    """
    weights = next((folder / file for file in PEFT_WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        if broken := next((folder / file for file in PEFT_WEIGHTS if (folder / file).is_symlink()), None):
            raise ModelError(f"{name}: {broken} is a link that leads nowhere")
        raise ModelError(f"{name}: {folder} has {ADAPTER_CONFIG} but no weights; looked for {', '.join(PEFT_WEIGHTS)}")
    files = (weights, folder / ADAPTER_CONFIG)
    for file in files:
        if not leads_inside(file, folder):
            raise ModelError(f"{name}: {file} is a link that leads out of the adapter's folder; copy the file there")
    return files


def open_adapter_files(folder: Path, name: str) -> AdapterFiles:
    """Read an adapter's folder.

    Raises:
        ModelError: files are missing, damaged, links that lead elsewhere, or need arbitrary unpickling.
        NonFinite: a tensor holds NaN or infinity.
    """
    files = adapter_files(folder, name)
    weights = files[0]
    config = read_json(folder / ADAPTER_CONFIG, name)
    stored = open_weight_file(weights, name)
    tensors = {key: stored.get(key) for key in stored.infos}
    tensors |= {alias: tensors[key] for alias, key in stored.ties.items()}
    if not tensors:
        raise ModelError(f"{name}: {weights} holds no tensors")
    source = DictSource(name, tensors)
    for key, tensor in tensors.items():
        check_finite(source, key, tensor)
    return AdapterFiles(name, folder, config, files, tensors)
