"""Write models in Hugging Face layout, tensor by tensor, so that an unfinished one never looks like a model."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import ModelError
from mergelab.weights.checkpoint import CONFIG
from mergelab.weights.companions import companion_files, copy_files, without_unmerged
from mergelab.weights.json_files import read_config
from mergelab.weights.locking import only_writer, place_of
from mergelab.weights.quantised import quantisation, without_quantisation
from mergelab.weights.shards import PARTIAL_SUFFIX, WeightFiles, as_stored, byte_size, write_json
from mergelab.weights.source import DictSource, TensorInfo, TensorPart
from mergelab.weights.unfinished import hidden_folder

# Subfolder for an encoder-decoder's output tokenizer, when it differs from the input tokenizer.
DECODER_TOKENIZER = "decoder_tokenizer"
MAX_SHARD_BYTES = 5_000_000_000
_PARTS = f"*.safetensors{PARTIAL_SUFFIX}"
_KEY = "mergelab.key"  # file that holds the key of an unfinished folder


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
    """Write a model folder that ``from_pretrained`` loads: weights, config, tokenizer and their companion files.

    Everything is written into a hidden sibling of the target and renamed at the end; on an error the hidden folder is
    removed. The config is written last, and each file's header after its data, so that the remains of a killed process
    cannot be loaded. The next process that writes the target removes them. With ``layout`` each tensor is written when
    it is produced and then released.

    Args:
        tensors: names and tensors, in any order; without ``layout`` all are collected in memory first.
        folder: the target, which must not exist or be empty.
        like: a model folder whose config and companion files are copied: tokenizer, generation config, chat template,
            licence, and all else that is neither weights nor left by training.
        config_updates: keys of ``config.json`` to set.
        dtype: stored dtype of floating-point tensors; default: that of ``layout``, else the tensors' own.
        max_shard_bytes: size above which the weights are divided into shards with an index.
        aliases: further names of tied tensors, each with the stored name; a tensor under such a name is skipped when
            the stored name is written. Without ``aliases`` and ``layout``, found by shared memory.
        layout: the tensors to expect, in the order to be stored; aliases among them are skipped.
        inputs: folders that are being read and must not be the target.

    Raises:
        ModelError: the target is not empty, is an input or cannot be written; ``like`` has no config; the disk is full;
            or a tensor does not match ``layout``.
    """
    if layout is None:
        held = dict(tensors)
        aliases = aliases or DictSource("the tensors", held).aliases()
        tensors, layout = held, [TensorInfo(k, tuple(t.shape), t.dtype) for k, t in held.items()]
    ties = dict(aliases or {})
    produced = tensors.items() if isinstance(tensors, Mapping) else tensors
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
        for name, tensor in produced:
            if name not in writer.ties:
                writer.write(name, tensor)
            del tensor  # release it before the next one is made


class FolderWriter:
    """An unfinished model folder; see `writing_folder`.

    Attributes:
        ties: further names of tied tensors, under which nothing is written.
        companions: the files that are copied, by their paths in the folder.
    """

    def __init__(
        self, target: Path, files: WeightFiles, ties: Mapping[str, str], companions: Sequence[str] = ()
    ) -> None:
        self._target, self._files, self.ties, self.companions = target, files, ties, tuple(companions)

    @property
    def missing(self) -> frozenset[str]:
        """The names of the tensors that are not written yet; a resumed merge finds some written."""
        return self._files.missing

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor of the layout; errors as for `WeightFiles.write`."""
        with _os_errors_named(self._target):
            self._files.write(name, tensor)

    def write_part(self, part: TensorPart) -> None:
        """Write the next part of a tensor of the layout; errors as for `WeightFiles.write_part`."""
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
    documents: Mapping[str, str] | None = None,
) -> Iterator[FolderWriter]:
    """Open a model folder for writing, as `save_folder` describes; it exists once the block ends without an error.

    Args:
        folder, layout, like, config_updates, dtype, max_shard_bytes, aliases, inputs: as for `save_folder`.
        key: identifies everything that the content depends on. With a key, weight files that are complete when the
            block fails or the process is killed stay in the sibling folder ``.<name>.partial``. The next attempt with
            the same key does not write them again; an attempt with another key removes them.
        documents: the texts of further files, by their names; they take the place of companion files.

    Raises:
        ModelError: as for `save_folder`; with a key, also when another process is writing the folder.
    """
    folder, like = Path(folder), Path(like)
    config = read_config(like, str(like))
    check_target(folder, [like, *map(Path, inputs)])
    names = {info.name for info in layout}
    ties = {alias: key for alias, key in (aliases or {}).items() if key in names}  # else only the alias is stored
    stored = [as_stored(info, dtype) for info in layout if info.name not in ties]
    with _os_errors_named(folder):
        companions = without_unmerged(companion_files(like), like, [Path(model) for model in inputs])
    with _partial_folder(folder, sum(map(byte_size, stored)), key) as partial:
        files = WeightFiles(partial, stored, max_shard_bytes, ties)
        try:
            yield FolderWriter(folder, files, ties, companions)
            with _os_errors_named(folder):
                files.finish()
                copy_files(like, companions, partial)
                write_texts(partial, documents or {})
                write_json(partial / CONFIG, _config_for(config, stored, config_updates, dtype))
        finally:
            files.close()


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files, by their names, into a folder."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def _partial_folder(folder: Path, size: int, key: str | None) -> Iterator[Path]:
    """Create a hidden sibling that is renamed to ``folder`` at the end.

    On an error it is removed, unless there is a key and complete weight files that the next attempt can use.
    """
    with _os_errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if key is None:
        with ExitStack() as stack:
            with _os_errors_named(folder):
                partial = stack.enter_context(hidden_folder(place_of(folder)))
                _check_free_space(folder, size)
            yield partial
            with _os_errors_named(folder):
                os.rename(partial, place_of(folder))  # replaces an empty folder, fails on any other
        return
    partial = making_of(folder)
    with _locked(folder):
        try:
            with _os_errors_named(folder):
                _open_partial(partial, key)
                _check_free_space(folder, size - sum(file.stat().st_size for file in partial.iterdir()))
            yield partial
            with _os_errors_named(folder):
                _check_key(partial, key)
                (partial / _KEY).unlink()
                os.rename(partial, place_of(folder))
        except BaseException as error:
            complete = _remove_incomplete(partial)
            if not complete:
                shutil.rmtree(partial, ignore_errors=True)
            elif isinstance(error, ModelError):
                raise ModelError(f"{error}; {stay(complete)} in {partial} for the same merge again") from error
            raise


def complete_files(folder: Path, key: str) -> int:
    """Count the complete weight files that the next `writing_folder` with this key will not write again."""
    with suppress(OSError):
        if (making_of(folder) / _KEY).read_text(encoding="utf-8") == key:
            return sum(map(_is_complete, making_of(folder).glob(_PARTS)))
    return 0


def stay(count: int) -> str:
    """Return the phrase that ``count`` complete files stay: ``"2 complete files stay"``."""
    return f"{count} complete {'file stays' if count == 1 else 'files stay'}"


def is_unfinished(path: Path) -> bool:
    """Return whether a name is that of an interrupted merge's folder, or of its lock."""
    return path.name.startswith(".") and path.name.endswith((".partial", ".lock"))


def making_of(folder: Path) -> Path:
    """Return the hidden folder in which ``folder`` is written when it has a key: beside the place its path leads to."""
    place = place_of(folder)
    return place.parent / f".{place.name}.partial"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `mergelab.weights.locking.only_writer`, and name the target where the lock cannot be made."""
    with ExitStack() as stack:
        with _os_errors_named(folder):
            stack.enter_context(only_writer(folder))
        yield


def _check_key(partial: Path, key: str) -> None:
    """Raise `ModelError` when what is about to become the model is not what this merge wrote."""
    with suppress(OSError):
        if (partial / _KEY).read_text(encoding="utf-8") == key:
            return
    raise ModelError(f"{partial} was changed by another process while it was being written; merge again")


def _open_partial(partial: Path, key: str) -> None:
    """Reuse the folder when it was written for the same key; else create it empty."""
    with suppress(OSError):
        if (partial / _KEY).read_text(encoding="utf-8") == key:
            (partial / CONFIG).unlink(missing_ok=True)  # the last file that a killed process wrote
            return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / _KEY).write_text(key, encoding="utf-8")


def _remove_incomplete(partial: Path) -> int:
    """Remove incomplete weight files; return the number of complete ones."""
    count = 0
    for path in partial.glob(_PARTS):
        if _is_complete(path):
            count += 1
        else:
            path.unlink(missing_ok=True)  # it would occupy disk space, and is written again in any case
    return count


def _is_complete(part: Path) -> bool:
    """Return whether a weight file begins with a header's length, which is never 0 and is written last."""
    with part.open("rb") as file:
        return any(file.read(8))


def _check_free_space(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder.parent).free) < size:
        raise ModelError(f"{folder}: needs {_bytes(size)} of disk space, but only {_bytes(free)} are free")


def _config_for(
    config: dict[str, Any], stored: Sequence[TensorInfo], updates: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return the config with the updates, with the dtype that most of the weights have, and unquantised."""
    sizes: dict[torch.dtype, int] = {}
    for info in stored:
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + byte_size(info)
    keys = [key for key in ("torch_dtype", "dtype") if key in config]
    if not keys and (dtype is not None or quantisation(config) is not None):
        keys = ["dtype"]
    most = str(max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.") if sizes else None
    result = without_quantisation(config)
    if most is not None:
        result.update(dict.fromkeys(keys, most))
    return {**result, **(updates or {})}


def check_target(folder: Path, inputs: Sequence[Path]) -> None:
    """Raise `ModelError` for a target that is in use, is a file, or is the folder of one of ``inputs``."""
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
    """Turn the system's errors on writing into a one-line `ModelError` that names the target."""
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
