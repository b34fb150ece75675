"""Models written in Hugging Face layout, tensor by tensor, so that a half-written one never looks like a model."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergelab.config import cache_dir
from mergelab.errors import ModelError
from mergelab.weights.checkpoint import CONFIG
from mergelab.weights.shards import PART, WeightFiles, as_stored, byte_size, write_json
from mergelab.weights.source import DictSource, TensorInfo, TensorPart

# Where an encoder-decoder has the tokenizer of what it writes, if that is not the one of what it reads.
DECODER_TOKENIZER = "decoder_tokenizer"
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
    DECODER_TOKENIZER,
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
MAX_SHARD_BYTES = 5_000_000_000
_PARTS = f"*.safetensors{PART}"
_KEY = "mergelab.key"  # what an unfinished folder was made for


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
    cannot be loaded; the next one that writes the target removes it. With ``layout`` the tensors are written as they
    arrive and none is kept.

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
    if layout is None:
        held = dict(tensors)
        aliases = aliases or DictSource("the tensors", held).aliases()
        tensors, layout = held, [TensorInfo(k, tuple(t.shape), t.dtype) for k, t in held.items()]
    ties = dict(aliases or {})
    arriving = tensors.items() if isinstance(tensors, Mapping) else tensors
    with writing_folder(
        folder,
        layout=layout,
        like=like,
        config_updates=config_updates,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        aliases=ties,
        inputs=inputs,
    ) as writer:
        for name, tensor in arriving:
            if name not in writer.ties:
                writer.write(name, tensor)
            del tensor  # let it go before the next one is made


class FolderWriter:
    """A model folder in the making; see `writing_folder`.

    Attributes:
        ties: further names of tensors; nothing is written under them.
    """

    def __init__(self, target: Path, files: WeightFiles, ties: Mapping[str, str]) -> None:
        self._target, self._files, self.ties = target, files, ties

    @property
    def missing(self) -> frozenset[str]:
        """The names of the tensors that are still to be written: not those that an interrupted merge left complete."""
        return self._files.missing

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was announced."""
        with _os_errors_named(self._target):
            self._files.write(name, tensor)

    def write_part(self, part: TensorPart) -> None:
        """Write a part of a tensor that was announced; its parts come in their order."""
        with _os_errors_named(self._target):
            self._files.write_part(part)


@contextmanager
def writing_folder(
    folder: Path | str,
    *,
    layout: Sequence[TensorInfo],
    like: Path | str,
    config_updates: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    aliases: Mapping[str, str] | None = None,
    inputs: Sequence[Path | str] = (),
    key: str | None = None,
) -> Iterator[FolderWriter]:
    """Open a model folder for writing, as `save_folder` describes; it is there when the block ends without an error.

    Args:
        folder, layout, like, config_updates, dtype, max_shard_bytes, aliases, inputs: as for `save_folder`.
        key: names everything that the content depends on. With a key, weight files that are complete when the block
            is left by an error, or the process killed, stay in ``.<name>.partial`` beside the folder, and are not
            written again by the next attempt of the same key; another key's remains are removed.

    Raises:
        ModelError: as for `save_folder`; with a key, also when another process is writing the folder.
    """
    folder, like = Path(folder), Path(like)
    config = _read_config(like)
    _check_target(folder, [like, *map(Path, inputs)])
    announced = {info.name for info in layout}
    ties = {alias: key for alias, key in (aliases or {}).items() if key in announced}  # else the alias is all there is
    stored = [as_stored(info, dtype) for info in layout if info.name not in ties]
    with _folder_in_making(folder, sum(map(byte_size, stored)), key) as making:
        files = WeightFiles(making, stored, max_shard_bytes, ties)
        try:
            yield FolderWriter(folder, files, ties)
            with _os_errors_named(folder):
                files.finish()
                _copy_companions(like, making)
                write_json(making / CONFIG, _config_for(config, stored, config_updates, dtype))
        finally:
            files.close()


@contextmanager
def _folder_in_making(folder: Path, size: int, key: str | None) -> Iterator[Path]:
    """Give a hidden sibling folder that becomes ``folder`` at the end; else it is gone, or kept for the same key."""
    with _os_errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if key is None:
        making = folder.parent / f".{folder.name}.{_here()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.partial"
        with _os_errors_named(folder):
            _remove_remains(folder)
            _check_room(folder, size)
            making.mkdir()
        try:
            yield making
            with _os_errors_named(folder):
                os.rename(making, folder)  # takes the place of an empty folder, fails on any other
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        return
    making = making_of(folder)
    with _only_writer(folder):
        try:
            with _os_errors_named(folder):
                _keep_only(making, key)
                _check_room(folder, size - sum(file.stat().st_size for file in making.iterdir()))
            yield making
            with _os_errors_named(folder):
                (making / _KEY).unlink()
                os.rename(making, folder)
        except BaseException as error:
            kept = _keep_complete(making)
            if not kept:
                shutil.rmtree(making, ignore_errors=True)
            elif isinstance(error, ModelError):
                raise ModelError(f"{error}; {stay(kept)} in {making} for the same merge again") from error
            raise


def complete_files(folder: Path, key: str) -> int:
    """Count the weight files that the next `writing_folder` with this key finds complete and does not write again."""
    with suppress(OSError):
        if (making_of(folder) / _KEY).read_text(encoding="utf-8") == key:
            return sum(map(_is_complete, making_of(folder).glob(_PARTS)))
    return 0


def stay(count: int) -> str:
    """Say that so many complete files are kept."""
    return f"{count} complete {'file stays' if count == 1 else 'files stay'}"


def is_unfinished(path: Path) -> bool:
    """Tell what an interrupted merge left, by its name."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def making_of(folder: Path) -> Path:
    """Return where ``folder`` is made, if it is with a key."""
    return folder.parent / f".{folder.name}.partial"


def _remove_remains(folder: Path) -> None:
    """Remove what processes of this machine left when they were killed while they wrote ``folder`` without a key."""
    import psutil

    for path in folder.parent.glob(f".{glob.escape(folder.name)}.{_here()}-*-*.partial"):
        process = path.name.split("-")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _here() -> str:
    """Name this machine, as others may write to the same disk."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on writing ``folder``; the system lets go of it when the process ends, however it does."""
    from filelock import FileLock, Timeout

    place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
    locks = cache_dir() / "locks"
    with _os_errors_named(folder):
        locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / f"{place}.lock", timeout=0):
            yield
    except Timeout:
        raise ModelError(
            f"{folder}: another process is writing it; wait for that one or choose another folder"
        ) from None


def _keep_only(making: Path, key: str) -> None:
    """Make the folder, or keep what is in it where it was made for the same key: complete files are known later."""
    with suppress(OSError):
        if (making / _KEY).read_text(encoding="utf-8") == key:
            (making / CONFIG).unlink(missing_ok=True)  # it is what a killed process wrote last
            return
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    (making / _KEY).write_text(key, encoding="utf-8")


def _keep_complete(making: Path) -> int:
    """Remove weight files that are not complete; count the others."""
    count = 0
    for path in making.glob(_PARTS):
        if _is_complete(path):
            count += 1
        else:
            path.unlink(missing_ok=True)  # it would fill the disk, and is begun anew in any case
    return count


def _is_complete(part: Path) -> bool:
    """Tell a weight file that begins with a header, whose length is never 0: it is written last."""
    with part.open("rb") as file:
        return any(file.read(8))


def _check_room(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder.parent).free) < size:
        raise ModelError(f"{folder}: needs {_bytes(size)} of disk space, but only {_bytes(free)} are free")


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
    """Return the config with the updates and the dtype that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for info in stored:
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + byte_size(info)
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


def _check_target(folder: Path, inputs: Sequence[Path]) -> None:
    if folder.exists():
        for path in inputs:
            if path.exists() and os.path.samefile(path, folder):
                raise ModelError(f"{folder} is the folder of an input model; choose another for the output")
        if not folder.is_dir():
            raise ModelError(f"{folder} is a file; a folder that does not exist yet is needed for the output")
        with _os_errors_named(folder):
            occupied = any(folder.iterdir())
        if occupied:
            raise ModelError(f"{folder} exists and is not empty; choose another folder for the output or remove it")


@contextmanager
def _os_errors_named(target: Path) -> Iterator[None]:
    """Turn what the system says about writing into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = 0
            with suppress(OSError):
                free = shutil.disk_usage(target.parent).free
            raise ModelError(f"{target}: the disk is full ({_bytes(free)} free)") from error
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
