"""Write safetensors files tensor by tensor, as one file or as shards with an index."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mergelab.errors import ModelError, listed
from mergelab.weights.agreement import dtype_and_shape
from mergelab.weights.checkpoint import SAFETENSORS_DTYPES
from mergelab.weights.source import TensorInfo, TensorPart

PARTIAL_SUFFIX = ".part"  # of an unfinished file: some versions of transformers load weights without a config
_BLOCK = 1 << 22  # entries converted at a time, so that no whole converted copy of a tensor is in memory
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class WeightFiles:
    """Unfinished weight files: tensors are written at their final offset in any order, the header of a file last.

    A file without a header cannot be opened. That marks an interrupted file, which is written again from the start. The
    files get their final names in `finish`.

    Args:
        folder: where the files are written.
        layout: the tensors to store, in order.
        max_bytes: size above which the tensors are divided into several files.
        ties: further names of stored tensors.

    Raises:
        OSError: from any method, unchanged.
    """

    def __init__(self, folder: Path, layout: Sequence[TensorInfo], max_bytes: int, ties: Mapping[str, str]) -> None:
        shards = _shards(layout, max_bytes)
        self._folder = folder
        self._shards = {_file_name(i, len(shards)): shard for i, shard in enumerate(shards)}
        self._headers = {file: _header(shard, ties) for file, shard in self._shards.items()}
        for file in self._shards:
            if (folder / file).exists():  # an earlier process was killed while it gave the files their final names
                os.replace(folder / file, self._partial_path(file))
        self.complete = [file for file in self._shards if self._is_complete(file)]
        incomplete = {file: shard for file, shard in self._shards.items() if file not in self.complete}
        self._pending = {
            info.name: (file, offset, info)
            for file, shard in incomplete.items()
            for info, offset in zip(shard, _offsets(shard, start=len(self._headers[file])), strict=True)
        }
        self._missing = {file: len(shard) for file, shard in incomplete.items()}
        self._written: dict[str, int] = {}  # number of entries written of each partly written tensor
        self._handles: dict[str, int] = {}

    @property
    def missing(self) -> frozenset[str]:
        """The names of the tensors that have not been written yet."""
        return frozenset(self._pending)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor of the layout.

        Raises:
            ModelError: it is not in the layout, is already written, or has another shape or kind of dtype.
        """
        info = self._pending_info(name)
        _check_kind(info, tensor, info.shape)
        self.write_part(TensorPart(name, 0, tensor.reshape(-1)))

    def write_part(self, part: TensorPart) -> None:
        """Write a part of a tensor; the parts of a tensor must be written in their order.

        Raises:
            ModelError: as for `write`; or it is not the next part.
        """
        info = self._pending_info(part.name)
        file, offset, _ = self._pending[part.name]
        count, written = math.prod(info.shape), self._written.get(part.name, 0)
        stop = part.start + part.entries.numel()
        if part.start != written or stop > count:
            raise ModelError(f"{part.name}: entries {part.start} to {stop} of {count} came where {written} was to come")
        _check_kind(info, part.entries)
        _write_entries(self._handle(file), offset + part.start * info.dtype.itemsize, info.dtype, part.entries)
        self._written[part.name] = stop
        if stop < count:
            return
        del self._pending[part.name], self._written[part.name]
        self._missing[file] -= 1
        if not self._missing[file]:
            self._complete(file)

    def finish(self) -> None:
        """Give the files their final names, and write the index when there are several.

        Raises:
            ModelError: tensors of the layout were not written.
        """
        if self._pending:
            raise ModelError(f"announced tensors did not arrive: {listed(self._pending)}")
        for file in self._missing:  # only an empty model has a file without tensors
            if file not in self.complete:
                self._complete(file)
        for file in self._shards:
            os.replace(self._partial_path(file), self._folder / file)
        if len(self._shards) > 1:
            places = {info.name: file for file, shard in self._shards.items() for info in shard}
            size = sum(byte_size(info) for shard in self._shards.values() for info in shard)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            write_json(self._folder / "model.safetensors.index.json", index)

    def close(self) -> None:
        """Close the open files."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _pending_info(self, name: str) -> TensorInfo:
        if name not in self._pending:
            raise ModelError(f"{name} is written twice, or was not announced")
        return self._pending[name][2]

    def _complete(self, file: str) -> None:
        handle = self._handle(file)
        if len(self._shards) > 1:  # a resumed merge relies on the content of this file
            os.fsync(handle)
        _write_at(handle, memoryview(self._headers[file]), 0)
        os.close(self._handles.pop(file))
        self.complete.append(file)

    def _is_complete(self, file: str) -> bool:
        path, header = self._partial_path(file), self._headers[file]
        if not path.is_file() or path.stat().st_size != len(header) + sum(map(byte_size, self._shards[file])):
            return False
        with path.open("rb") as opened:
            return opened.read(len(header)) == header

    def _partial_path(self, file: str) -> Path:
        return self._folder / f"{file}{PARTIAL_SUFFIX}"

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(self._partial_path(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        return self._handles[file]


def write_zeros(path: Path, layout: Sequence[TensorInfo]) -> None:
    """Write a safetensors file of tensors that are all zero; it is a hole where the file system has such.

    Raises:
        OSError: it cannot be written.
    """
    header = _header(layout, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(byte_size, layout)))


def _shards(layout: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Divide the tensors, in order, into files of at most ``limit`` bytes; a larger tensor is alone in its file.

    Within a file wider dtypes come first, so that every tensor is aligned to its entries' size.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in layout:
        if shards[-1] and filled + byte_size(info) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += byte_size(info)
    return [sorted(shard, key=lambda info: -info.dtype.itemsize) for shard in shards]


def _file_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _offsets(shard: Sequence[TensorInfo], start: int) -> list[int]:
    offsets = [start]
    for info in shard:
        offsets.append(offsets[-1] + byte_size(info))
    return offsets[:-1]


def _header(shard: Sequence[TensorInfo], aliases: Mapping[str, str]) -> bytes:
    """Build a safetensors header: its length in 8 bytes, then JSON padded with spaces to a multiple of 8."""
    names = {info.name for info in shard}
    tied = {alias: name for alias, name in aliases.items() if name in names}
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **tied}}
    for info, offset in zip(shard, _offsets(shard, start=0), strict=True):
        content[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + byte_size(info)],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_kind(info: TensorInfo, tensor: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise `ModelError` for a tensor that does not match the layout: another kind of dtype, or not of ``shape``."""
    kinds = (tensor.dtype.is_floating_point, info.dtype.is_floating_point)
    if (tensor.dtype == info.dtype or kinds == (True, True)) and shape in (None, tuple(tensor.shape)):
        return
    announced, arrived = dtype_and_shape(info.shape, info.dtype), dtype_and_shape(tensor.shape, tensor.dtype)
    raise ModelError(f"{info.name} was announced as {announced} but is {arrived}")


def _write_entries(handle: int, offset: int, dtype: torch.dtype, entries: Tensor) -> None:
    """Write flat entries at a file offset, converted to the stored dtype block by block."""
    for block in torch.split(entries.detach(), _BLOCK):
        content = memoryview(cast(Any, block.to("cpu", dtype).contiguous().view(torch.uint8).numpy()))
        _write_at(handle, content, offset)
        offset += len(content)


def _write_at(handle: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written


def as_stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """Return how a tensor is stored when floating-point tensors are converted to ``dtype`` (None: not converted).

    Raises:
        ModelError: safetensors has no such dtype.
    """
    chosen = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    if chosen not in _NAMES:
        raise ModelError(f"{info.name}: {chosen} cannot be stored as safetensors")
    return info._replace(dtype=chosen)


def byte_size(info: TensorInfo) -> int:
    """Return the size of a tensor's entries in bytes."""
    entries = 1
    for length in info.shape:
        entries *= length
    return entries * info.dtype.itemsize


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in the format of transformers' config files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
