"""Read a model folder in Hugging Face layout, tensor by tensor.

Safetensors files are memory-mapped: listing reads headers only, and ``get`` returns a view of the mapped file.
``.bin`` files are read by ``torch.load(weights_only=True)``, also mapped where their format allows it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mergelab.errors import KeyMismatch, ModelError, first_line, listed
from mergelab.weights.adapters import refuse_adapted, refuse_adapter
from mergelab.weights.files import find_weights, gguf_hint, is_inside
from mergelab.weights.hashing import file_sha256, joint_sha256
from mergelab.weights.json_files import CONFIG as CONFIG
from mergelab.weights.json_files import read_config, read_json
from mergelab.weights.quantised import open_quantised, refuse_quantised_folder
from mergelab.weights.skeleton import skeleton
from mergelab.weights.source import TensorInfo, tied_names
from mergelab.weights.wrappers import unwrapped

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # since PyTorch 2.7
    SAFETENSORS_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


# Python 3.11 does not name Linux's flag.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class WeightFile(Protocol):
    """A file of tensors by name."""

    infos: dict[str, TensorInfo]
    ties: dict[str, str]
    nested: bool  # whether the tensors are not at the top of the file

    def get(self, key: str) -> Tensor:
        """Return a tensor that must not be written to."""
        ...

    def prefetch(self, key: str) -> None:
        """Request that it be read ahead."""
        ...


class Checkpoint:
    """A `TensorSource` over the weight files of one folder; see `open_checkpoint`.

    Attributes:
        name: the model's name in error messages.
        folder: its path.
        config: the parsed ``config.json``.
        files: its weight files, in name order.
        standard: whether ``from_pretrained`` finds its weights and their names without further arguments.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: dict[str, Any],
        shards: Mapping[Path, WeightFile],
        *,
        standard: bool = True,
    ) -> None:
        self.name = name
        self.folder = folder
        self.config = config
        self.files = tuple(sorted(shards))
        home = {key: shards[path] for path in self.files for key in shards[path].infos}
        ties = {
            alias: key
            for path in self.files
            for alias, key in shards[path].ties.items()
            if key in home and alias not in home
        }
        refuse_adapted(name, home)
        clean = unwrapped([*home, *ties], name, lambda: self.skeleton)
        self.standard = standard and clean is None
        names = {stored: stored for stored in [*home, *ties]} if clean is None else _inverse(clean)
        self._stored = {names[stored]: stored for stored in home}
        self._aliases = {names[alias]: names[key] for alias, key in ties.items()}
        self._home = {names[stored]: file for stored, file in home.items()}
        infos = {key: file.infos[self._stored[key]]._replace(name=key) for key, file in self._home.items()}
        self._quantised = open_quantised(name, folder, config, infos, self._read)
        self._hidden = frozenset() if self._quantised is None else self._quantised.hidden
        self._dequantised = frozenset() if self._quantised is None else self._quantised.scales.keys()

    @cached_property
    def skeleton(self) -> nn.Module | None:
        """Its module in transformers without weights, which says how its tensors are called; None if there is none."""
        return skeleton(self.folder, self.config)

    @property
    def is_quantised(self) -> bool:
        """Whether it stores FP8 weights with scales, which are read as their products."""
        return self._quantised is not None

    @property
    def dequantised_dtype(self) -> torch.dtype | None:
        """What the products of FP8 weights and their scales are rounded to; None for other checkpoints."""
        return None if self._quantised is None else self._quantised.dtype

    def keys(self) -> list[str]:
        """List the stored tensors in the order of the files, one name per group of tied tensors.

        The scales of FP8 weights are not among them.
        """
        return [key for key in self._home if key not in self._hidden]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``, from the header."""
        return self._info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``, from the header; of an FP8 weight with a scale, that of their product."""
        info, held = self._info(key), self._aliases.get(key, key)
        return self._quantised.dtype if self._quantised is not None and held in self._dequantised else info.dtype

    def get(self, key: str) -> Tensor:
        """Return a view of ``key`` in the mapped file, or an FP8 weight times its scale; it must not be written to.

        Raises:
            ModelError: the file was changed, truncated or replaced after it was opened.
        """
        info, held = self._info(key), self._aliases.get(key, key)
        if self._quantised is not None and held in self._dequantised:
            return self._quantised.read(held)
        return self._file(key).get(info.name)

    def prefetch(self, key: str) -> None:
        """Request that the system read the data of ``key`` ahead, and return at once."""
        info = self._info(key)
        self._file(key).prefetch(info.name)

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors that the files record, each with its stored name."""
        return {alias: key for alias, key in self._aliases.items() if key not in self._hidden}

    def content_hash(self) -> str:
        """Return a SHA-256 of the weights' content, which does not depend on the folder's path.

        For one weight file it is the SHA-256 of its bytes, as the hub shows it. For several it is the SHA-256 of their
        digests in the order of their names. Digests are cached by path, size and modification time.
        """
        return joint_sha256([file_sha256(path) for path in self.files])

    def _info(self, key: str) -> TensorInfo:
        """Return shape and dtype of ``key``, and the name that it has in its file."""
        file = self._file(key)
        return file.infos[self._stored[self._aliases.get(key, key)]]

    def _file(self, key: str) -> WeightFile:
        held = self._aliases.get(key, key)
        if held not in self._home or held in self._hidden:
            raise KeyMismatch(f"{self.name}: has no tensor {key!r} in {self.folder}")
        return self._home[held]

    def _read(self, key: str) -> Tensor:
        """Read what is stored under a name, a quantised tensor or its scales as they are."""
        return self._home[key].get(self._stored[key])


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {stored: name for name, stored in names.items()}


def open_checkpoint(folder: Path | str, name: str | None = None) -> Checkpoint:
    """Open a model folder: read its config, its index and the headers of its weight files, but no weights.

    Args:
        folder: ``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards; see
            `mergelab.weights.files.weight_files`.
        name: the model's name in error messages; default: the folder as given.

    Raises:
        ModelError: the folder, its config or its weights are missing; a file is truncated, is not of the format that
            its name says, or needs arbitrary unpickling; the index and the shards do not agree.
    """
    folder = Path(folder)
    name = name if name is not None else str(folder)
    if not os.path.exists(folder):  # unlike Path.exists, also for names that no system takes
        raise ModelError(f"{name}: no such folder: {folder}")
    if not folder.is_dir():
        raise ModelError(f"{name}: {folder} is a file; a model folder with {CONFIG} and weights is needed")
    refuse_adapter(name, folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{name}: {folder} has no {CONFIG}{gguf_hint(folder)}")
    config = read_config(folder, name)
    refuse_quantised_folder(name, folder, config)
    found = find_weights(folder, config, name)
    if found.index is not None:
        shards = _open_shards(folder / found.index, name)
    else:
        shards = {folder / file: open_weight_file(folder / file, name) for file in found.files}
        _check_distinct(shards, name)
    read_as_stored = all(not file.nested for file in shards.values())
    return Checkpoint(name, folder, config, shards, standard=found.standard and read_as_stored)


def _check_distinct(shards: Mapping[Path, WeightFile], name: str) -> None:
    """Raise `ModelError` when a tensor is in two shards that no index divides the tensors among."""
    first: dict[str, Path] = {}
    for path, shard in shards.items():
        for key in shard.infos:
            if (other := first.setdefault(key, path)) != path:
                raise ModelError(f"{name}: {key} is in {other.name} and in {path.name}, and there is no index")


def _open_shards(index: Path, name: str) -> dict[Path, WeightFile]:
    """Open every shard that ``index`` names and check that each holds exactly the tensors that the index says."""
    weight_map = read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{name}: {index} has no weight_map from tensor names to files")
    indexed: dict[str, set[str]] = {}
    for key, file in weight_map.items():
        indexed.setdefault(file, set()).add(key)
    if outside := [file for file in indexed if not is_inside(index.parent, file)]:
        raise ModelError(f"{name}: {index} names files outside its folder: {listed(outside)}")
    if absent := [file for file in sorted(indexed) if not os.path.isfile(index.parent / file)]:
        raise ModelError(f"{name}: {index.name} names files that are not in {index.parent}: {listed(absent)}")
    _check_shard_count(index, set(indexed), name)
    shards: dict[Path, WeightFile] = {}
    for file, keys in indexed.items():
        shard = shards[index.parent / file] = open_weight_file(index.parent / file, name)
        if lost := sorted(keys - shard.infos.keys() - shard.ties.keys()):
            raise ModelError(f"{name}: {index.name} names tensors that {file} does not hold: {listed(lost)}")
        if extra := sorted(shard.infos.keys() - keys):
            raise ModelError(f"{name}: {file} holds tensors that {index.name} does not place there: {listed(extra)}")
    return shards


def _check_shard_count(index: Path, files: set[str], name: str) -> None:
    """Raise `ModelError` when the files' names (``-00001-of-00003``) show that the index omits one."""
    counts = {int(match[1]) for file in files if (match := re.search(r"-\d+-of-(\d+)\.", file))}
    if len(counts) == 1 and (count := counts.pop()) != len(files):
        raise ModelError(f"{name}: {index} names {len(files)} of {count} shards")


def open_weight_file(path: Path, name: str) -> WeightFile:
    """Open a safetensors or PyTorch file; ``name`` is the model's in errors.

    Raises:
        ModelError: it cannot be read, is truncated, or needs arbitrary unpickling.
    """
    try:
        return _SafetensorsFile(path, name) if path.suffix == ".safetensors" else _TorchFile(path, name)
    except OSError as error:
        raise ModelError(f"{name}: cannot read {path}: {error.strerror or first_line(error)}") from error


# Mapped files, while they are in use.
_OPEN: WeakSet[_SafetensorsFile] = WeakSet()


def changed_file() -> str | None:
    """Describe a mapped file that was changed after it was opened; None when there is none."""
    for file in tuple(_OPEN):
        try:
            file.check_unchanged()
        except ModelError as error:
            return str(error)
    return None


class _SafetensorsFile:
    """A safetensors file: header read and checked, data mapped."""

    nested = False

    def __init__(self, path: Path, name: str) -> None:
        try:
            metadata = _read_metadata(path)
        except SafetensorError as error:
            raise ModelError(f"{name}: {path} {_damage(path, error)}") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            # Private, so that a stray write cannot reach the file; no swap reserved, so that it may exceed the memory.
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            self._data = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._stamp = _stamp(os.fstat(file.fileno()))
        self._path, self._name = path, name
        _OPEN.add(self)
        header.pop("__metadata__", None)
        self.infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ModelError(f"{name}: {path}: tensor {key} has dtype {entry['dtype']}, which cannot be merged")
            self.infos[key] = TensorInfo(key, tuple(entry["shape"]), dtype)
            self._offsets[key] = 8 + length + entry["data_offsets"][0]
        # Writers that omit tied copies name them in the metadata: {"lm_head.weight": "transformer.wte.weight"}.
        self.ties = {alias: key for alias, key in metadata.items() if key in self.infos and alias not in self.infos}

    def get(self, key: str) -> Tensor:
        self.check_unchanged()
        _, shape, dtype = self.infos[key]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=self._offsets[key]).view(shape)

    def prefetch(self, key: str) -> None:
        _, shape, dtype = self.infos[key]
        start = self._offsets[key] // mmap.PAGESIZE * mmap.PAGESIZE
        length = self._offsets[key] + math.prod(shape) * dtype.itemsize - start
        if hasattr(mmap, "MADV_WILLNEED") and length:
            self._data.madvise(mmap.MADV_WILLNEED, start, length)

    def check_unchanged(self) -> None:
        """Raise `ModelError` when the path does not lead to the file as it was opened.

        Reading a truncated file's missing entries would make the system kill the process.
        """
        try:
            stamp = _stamp(os.stat(self._path))
        except FileNotFoundError:
            raise ModelError(f"{self._name}: {self._path} vanished while it was being read") from None
        if stamp != self._stamp:
            raise ModelError(f"{self._name}: {self._path} was changed while it was being read; merge again")


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_metadata(path: Path) -> dict[str, str]:
    """Return the file's metadata, after the safetensors library has checked the whole header."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


class _TorchFile:
    """A ``.bin`` file; a tensor stored under several names counts once."""

    def __init__(self, path: Path, name: str) -> None:
        content = _load_without_code(path, name)
        if not isinstance(content, Mapping):
            raise ModelError(f"{name}: {path} holds a {type(content).__name__}, not tensors by name")
        self.nested = (inner := _inner(content)) is not None
        content = content if inner is None else inner
        if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
            raise ModelError(f"{name}: {path} holds values that are not tensors: {listed(others)}")
        self._tensors: dict[str, Tensor] = {str(key): value.detach() for key, value in content.items()}
        self.ties = tied_names(self._tensors)
        self.infos = {
            key: TensorInfo(key, tuple(value.shape), value.dtype)
            for key, value in self._tensors.items()
            if key not in self.ties
        }

    def get(self, key: str) -> Tensor:
        return self._tensors[key]

    def prefetch(self, key: str) -> None:
        """Do nothing: the system reads ahead in mapped files by itself."""


# Under which training frameworks store a model's tensors in a file that holds more.
_NESTED = ("state_dict", "model", "model_state_dict", "module")


def _inner(content: Mapping[Any, Any]) -> Mapping[str, Tensor] | None:
    """Return the tensors that a file holds under one key, beside others that are no tensors; None for other files."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return None
    found = [content[key] for key in _NESTED if isinstance(content.get(key), Mapping) and content[key]]
    if len(found) != 1 or not all(isinstance(value, Tensor) for value in found[0].values()):
        return None
    return cast("Mapping[str, Tensor]", found[0])


def _load_without_code(path: Path, name: str) -> object:
    """Run ``torch.load`` with ``weights_only``; map zip files, read files of the old format into memory."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that torch is not sure of, before it refuses them
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return content
    except OSError:
        raise
    except Exception as error:  # a file that is no pickle can raise any exception
        if match := re.search(r"GLOBAL (\S+)|Unsupported (?:global|class)[^\n]*", str(error)):
            what = match[1] or match[0]
            raise ModelError(
                f"{name}: {path} needs arbitrary unpickling ({what}), which can run any code; "
                "save it as safetensors from a program that trusts it"
            ) from error
        raise ModelError(f"{name}: {path} {_damage(path, error)}") from error


def _damage(path: Path, error: Exception) -> str:
    """Describe what is wrong with a file that its library cannot read."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    if "not fully covered" in str(error) or "central directory" in str(error):
        return f"is truncated or damaged ({path.stat().st_size} bytes)"
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    why = re.search(r"(?<=WeightsUnpickler error: )[^\n]+", str(error))  # torch's first line advises to run its code
    return f"is not a {kind} file, or is damaged ({why[0] if why else first_line(error)})"
