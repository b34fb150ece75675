"""Models written in Hugging Face layout, tensor by tensor, so that a half-written one never looks like a model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mergelab.errors import ModelError, listed
from mergelab.weights.agreement import described
from mergelab.weights.checkpoint import CONFIG, SAFETENSORS_DTYPES
from mergelab.weights.source import DictSource, TensorInfo

# What a model needs beside config and weights; training leftovers, code and other formats of the weights stay behind.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
MAX_SHARD_BYTES = 5_000_000_000
_BLOCK = 1 << 24  # entries that are converted at a time: a tensor's converted copy is never whole in memory
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def save_folder(
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    folder: Path | str,
    *,
    like: Path | str,
    config_updates: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    aliases: Mapping[str, str] | None = None,
    layout: Sequence[TensorInfo] | None = None,
    inputs: Sequence[Path | str] = (),
) -> None:
    """Write a model folder that ``from_pretrained`` loads: weights, config, tokenizer and the files that go with them.

    Everything is written into a hidden folder beside the target and renamed at the end; on any error that folder is
    removed. The config is written last and each file's header after its data, so what a killed process leaves behind
    cannot be loaded. With ``layout`` the tensors are written as they arrive and none is kept.

    Args:
        tensors: names and tensors, in any order; without ``layout`` they are all taken into memory first.
        folder: does not exist yet, or is empty.
        like: a model folder whose config, tokenizer, generation config and chat template are copied.
        config_updates: keys of ``config.json`` to set.
        dtype: for floating-point tensors; default: as ``layout`` says, else as they are.
        max_shard_bytes: above this the weights are divided into files with an index.
        aliases: further names of tied tensors, each with the name that is stored; tensors under such names are skipped
            where the other one is stored. Without ``aliases`` and ``layout``, found by shared memory.
        layout: what will arrive, in the order to be stored; aliases among them are skipped.
        inputs: folders that are being read and must not be the target.

    Raises:
        ModelError: the target is in use, is an input or cannot be written; ``like`` has no config; the disk is full; or
            what arrives is not what ``layout`` says.
    """
    folder, like = Path(folder), Path(like)
    config = _read_config(like)
    _check_target(folder, [like, *map(Path, inputs)])
    ties = dict(aliases or {})
    if layout is None:
        held = dict(tensors)
        ties = ties or DictSource("the tensors", held).aliases()
        tensors, layout = held, [TensorInfo(k, tuple(t.shape), t.dtype) for k, t in held.items()]
    announced = {info.name for info in layout}
    ties = {alias: key for alias, key in ties.items() if key in announced}  # else the alias is all there is
    stored = [_as_stored(info, dtype) for info in layout if info.name not in ties]
    arriving = tensors.items() if isinstance(tensors, Mapping) else tensors
    shards = _shards(stored, max_shard_bytes)
    with _folder_in_making(folder, sum(map(_size, stored))) as making:
        files = _Files(folder, making, shards, ties)
        try:
            for name, tensor in arriving:
                if name not in ties:
                    files.write(name, tensor)
                del tensor  # let it go before the next one is made
            files.finish()
        finally:
            files.close()
        with _told(folder):
            _copy_companions(like, making)
            _write_json(making / CONFIG, _config_for(config, stored, config_updates, dtype))


@contextmanager
def _folder_in_making(folder: Path, size: int) -> Iterator[Path]:
    """Give a hidden sibling folder that becomes ``folder`` at the end, or is gone."""
    making = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.partial"
    with _told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder.parent).free) < size:
            raise ModelError(f"{folder}: needs {_bytes(size)} of disk space, but only {_bytes(free)} are free")
        making.mkdir()
    try:
        yield making
        with _told(folder):
            os.rename(making, folder)  # takes the place of an empty folder, fails on any other
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


class _Files:
    """The weight files in the making: data where each tensor belongs as it arrives, headers when all of it is there."""

    def __init__(
        self, target: Path, making: Path, shards: Sequence[Sequence[TensorInfo]], ties: Mapping[str, str]
    ) -> None:
        self._target = target
        self._making = making
        self._shards = {_file_name(i, len(shards)): shard for i, shard in enumerate(shards)}
        self._headers = {file: _header(shard, ties) for file, shard in self._shards.items()}
        self._waiting = {
            info.name: (file, offset, info)
            for file, shard in self._shards.items()
            for info, offset in zip(shard, _offsets(shard, start=len(self._headers[file])), strict=True)
        }
        self._handles: dict[str, int] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was announced and has not been written yet."""
        if name not in self._waiting:
            raise ModelError(f"{name} is written twice, or was not announced")
        file, offset, info = self._waiting.pop(name)
        with _told(self._target):
            _write_tensor(self._handle(file), offset, info, tensor)

    def finish(self) -> None:
        """Write the headers, and the index when there are several files."""
        if self._waiting:
            raise ModelError(f"announced tensors did not arrive: {listed(self._waiting)}")
        with _told(self._target):
            for file, header in self._headers.items():
                _write_at(self._handle(file), memoryview(header), 0)
            if len(self._shards) > 1:
                places = {info.name: file for file, shard in self._shards.items() for info in shard}
                size = sum(_size(info) for shard in self._shards.values() for info in shard)
                index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
                _write_json(self._making / "model.safetensors.index.json", index)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(self._making / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return self._handles[file]


def _shards(layout: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Divide the tensors, in order, into files of at most ``limit`` bytes; a larger tensor has a file of its own.

    Within a file wider dtypes come first, so that every tensor lies at a multiple of its entries' size.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in layout:
        if shards[-1] and filled + _size(info) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += _size(info)
    return [sorted(shard, key=lambda info: -info.dtype.itemsize) for shard in shards]


def _file_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _offsets(shard: Sequence[TensorInfo], start: int) -> list[int]:
    offsets = [start]
    for info in shard:
        offsets.append(offsets[-1] + _size(info))
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
            "data_offsets": [offset, offset + _size(info)],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(handle: int, offset: int, wanted: TensorInfo, tensor: Tensor) -> None:
    """Write a tensor's entries at their place, converted block by block where the stored dtype is another."""
    kinds = (tensor.dtype.is_floating_point, wanted.dtype.is_floating_point)
    if tuple(tensor.shape) != wanted.shape or (tensor.dtype != wanted.dtype and kinds != (True, True)):
        raise ModelError(
            f"{wanted.name} was announced as {described(wanted.shape, wanted.dtype)} "
            f"but is {described(tensor.shape, tensor.dtype)}"
        )
    for block in torch.split(tensor.detach().reshape(-1), _BLOCK):
        content = memoryview(cast(Any, block.to("cpu", wanted.dtype).contiguous().view(torch.uint8).numpy()))
        _write_at(handle, content, offset)
        offset += len(content)


def _write_at(handle: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written


def _as_stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    chosen = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    if chosen not in _NAMES:
        raise ModelError(f"{info.name}: {chosen} cannot be stored as safetensors")
    return info._replace(dtype=chosen)


def _size(info: TensorInfo) -> int:
    entries = 1
    for length in info.shape:
        entries *= length
    return entries * info.dtype.itemsize


def _read_config(like: Path) -> dict[str, Any]:
    try:
        config = json.loads((like / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{like} has no readable {CONFIG} to copy") from error
    if not isinstance(config, dict):
        raise ModelError(f"{like / CONFIG} must hold a JSON object")
    return config


def _config_for(
    config: dict[str, Any], stored: Sequence[TensorInfo], updates: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Answer the config with the updates and the dtype that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for info in stored:
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + _size(info)
    keys = [key for key in ("torch_dtype", "dtype") if key in config]
    if dtype is not None and not keys:
        keys = ["dtype"]
    most = str(max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.") if sizes else None
    result = dict(config)
    if most is not None:
        result.update(dict.fromkeys(keys, most))
    return {**result, **(updates or {})}


def _copy_companions(like: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for path in sorted(like.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(folder: Path, inputs: Sequence[Path]) -> None:
    if folder.exists():
        for path in inputs:
            if path.exists() and os.path.samefile(path, folder):
                raise ModelError(f"{folder} is the folder of an input model; choose another for the output")
        if not folder.is_dir():
            raise ModelError(f"{folder} is a file; a folder that does not exist yet is needed for the output")
        with _told(folder):
            occupied = any(folder.iterdir())
        if occupied:
            raise ModelError(f"{folder} exists and is not empty; choose another folder for the output or remove it")


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Turn what the system says about writing into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = 0
            with suppress(OSError):
                free = shutil.disk_usage(target.parent).free
            raise ModelError(f"{target}: the disk is full ({_bytes(free)} free); nothing was kept") from error
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
