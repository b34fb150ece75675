"""Models made of layers of others: a folder in the cache for config and tokenizer; weights are read from theirs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, listed
from mergelab.models.adapted import open_model
from mergelab.models.architecture import tokenizer_folder
from mergelab.models.made import made
from mergelab.models.tokens import CHAT_TEMPLATE, copy_companions
from mergelab.models.vocabulary import check_vocabularies
from mergelab.weights.checkpoint import CONFIG, Checkpoint
from mergelab.weights.companions import companion_files
from mergelab.weights.hashing import joint_sha256
from mergelab.weights.json_files import read_config, read_json
from mergelab.weights.naming import places
from mergelab.weights.shards import write_json
from mergelab.weights.source import TensorSource

HOME, MARKER = "stacked", "mergelab_stack.json"
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_NUMBER = re.compile(r"^(.*?\.)(\d+)(\..*)$")
# Settings with an entry for each layer whose names do not say so.
_BY_LAYER = ("attention_types", "block_types", "attn_type_list", "full_attention_idxs")
Part = tuple[Path, int, int]


def stacked(parts: Sequence[Part], where: str) -> Path:
    """Describe the model that has layers of others: what comes before them is the first's, what comes after the last's.

    Args:
        parts: model folders, each with its first layer and the one after its last.
        where: the configuration's key of the model, for messages.

    Returns:
        A folder in the cache, for `open_stack`: config and tokenizer, but no weights.

    Raises:
        ModelError: a part has no such layers, or they are in more than one stack (encoder and decoder).
    """
    opened = [open_model(folder, where) for folder, _, _ in parts]
    config = _config(opened, parts, where)
    _stack(where, Path(), config, opened, parts)
    _check_ends(where, opened)
    first = parts[0][0]
    tokenizer = tokenizer_folder(dict.fromkeys(folder for folder, _, _ in parts))
    small = [first / name for name in companion_files(first)]
    small += [tokenizer / name for name in companion_files(tokenizer)] if tokenizer not in (None, first) else []
    described = {
        "parts": [[str(folder.absolute()), start, stop] for folder, start, stop in parts],
        "config": config,
        "files": [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in small],
    }

    def write(folder: Path) -> None:
        copy_companions(first, folder, tokenizer=False)
        if tokenizer is not None:
            copy_companions(tokenizer, folder, tokenizer=True)
            if (tokenizer / CHAT_TEMPLATE).is_file():
                (folder / CHAT_TEMPLATE).write_bytes((tokenizer / CHAT_TEMPLATE).read_bytes())
        write_json(folder / MARKER, {"parts": described["parts"]})
        write_json(folder / CONFIG, config)

    return made(HOME, described, write)


def is_stack(folder: Path) -> bool:
    """Return whether a folder is one that `stacked` made."""
    return (folder / MARKER).is_file()


def folders_of(folder: Path) -> list[Path]:
    """Return the models whose layers are in a stack, each once; of another model its folder alone."""
    if not is_stack(folder):
        return [folder]
    parts = read_json(folder / MARKER, folder.name)["parts"]
    return list(dict.fromkeys(Path(at) for at, _, _ in parts))


def open_stack(folder: Path, name: str) -> StackedCheckpoint:
    """Open a folder that `stacked` made.

    Raises:
        ModelError: as for `mergelab.models.adapted.open_model`.
    """
    parts = [(Path(at), int(start), int(stop)) for at, start, stop in read_json(folder / MARKER, name)["parts"]]
    opened = [open_model(at, name) for at, _, _ in parts]
    return _stack(name, folder, read_config(folder, name), opened, parts)


class StackedCheckpoint(Checkpoint):
    """A `TensorSource` over layers of several models.

    Args:
        name: the model's name in error messages.
        folder: where its config and its tokenizer are.
        config: the parsed config.
        parts: the models, each once for each of its ranges.
        stored: by name here, the number of a part and the name there.
        ties: further names of tied tensors, each with the name that holds it here.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: dict[str, Any],
        parts: Sequence[Checkpoint],
        stored: Mapping[str, tuple[int, str]],
        ties: Mapping[str, str],
    ) -> None:
        self.name, self.folder, self.config, self.standard = name, folder, config, False
        self.files = tuple(dict.fromkeys(file for part in parts for file in part.files))
        self._parts, self._places, self._ties = tuple(parts), dict(stored), dict(ties)

    @property
    def is_quantised(self) -> bool:
        """Whether a part stores FP8 weights with scales."""
        return any(part.is_quantised for part in self._parts)

    @property
    def dequantised_dtype(self) -> torch.dtype | None:
        """What products of FP8 weights and their scales are rounded to; None where no part has any."""
        return next((part.dequantised_dtype for part in self._parts if part.is_quantised), None)

    def keys(self) -> list[str]:
        """List the tensors: what comes before the layers, the layers in their order, and what comes after."""
        return list(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        source, at = self.read_from(key)
        return source.shape(at)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``."""
        source, at = self.read_from(key)
        return source.dtype(at)

    def get(self, key: str) -> Tensor:
        """Read ``key``; it must not be written to."""
        source, at = self.read_from(key)
        return source.get(at)

    def prefetch(self, key: str) -> None:
        """Request that the data of ``key`` be read ahead in the background."""
        source, at = self.read_from(key)
        source.prefetch(at)

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return dict(self._ties)

    def content_hash(self) -> str:
        """Return a SHA-256 of the content of the parts' weights and of what is taken from each."""
        taken = hashlib.sha256(repr(sorted(self._places.items())).encode()).hexdigest()
        return joint_sha256([*(part.content_hash() for part in self._parts), taken])

    def read_from(self, key: str) -> tuple[TensorSource, str]:
        """Return where ``key`` is read, as for `mergelab.weights.source.traced`."""
        found = self._places.get(self._ties.get(key, key))
        if found is None:
            raise KeyMismatch(f"{self.name}: has no tensor {key!r} in {self.folder}")
        return self._parts[found[0]], found[1]


def _stack(
    name: str, folder: Path, config: dict[str, Any], opened: Sequence[Checkpoint], parts: Sequence[Part]
) -> StackedCheckpoint:
    """Number the layers of the parts anew."""
    _check_alike(name, opened)
    before: dict[str, tuple[int, str]] = {}
    layers: dict[str, tuple[int, str]] = {}
    after: dict[str, tuple[int, str]] = {}
    height, last = 0, len(parts) - 1
    prefixes: set[str] = set()
    for at, (model, (_, start, stop)) in enumerate(zip(opened, parts, strict=True)):
        keys = model.keys()
        found = places(keys)
        stacks = {match[1] for key in keys if found[key].count and (match := _NUMBER.match(key))}
        count = max((place.count for place in found.values()), default=0)
        prefixes |= stacks
        if len(stacks) == 1 < len(prefixes):
            raise ModelError(f"{name}: the layers of the models are called differently: {listed(sorted(prefixes))}")
        if len(stacks) != 1:
            raise ModelError(
                f"{name}: layers of {model.folder} cannot be chosen: it has {len(stacks)} stacks of layers"
            )
        if stop > count:
            raise ModelError(f"{name}: layers {start} to {stop} of {model.folder}: it has {count} layers")
        for key in keys:
            place = found[key]
            if place.count and start <= place.layer < stop:
                match = _NUMBER.match(key)
                assert match is not None
                layers[f"{match[1]}{height + int(match[2]) - start}{match[3]}"] = (at, key)
            elif at == 0 and place.layer == -math.inf:
                before[key] = (at, key)
            elif at == last and place.layer == math.inf:
                after[key] = (at, key)
        height += stop - start
    stored = {**before, **layers, **after}
    ties = {
        alias: key
        for model in (opened[0], opened[-1])
        for alias, key in model.aliases().items()
        if key in stored and alias not in stored and not places([key])[key].count
    }
    return StackedCheckpoint(name, folder, config, opened, stored, ties)


_SIZES = ("model_type", "hidden_size", "n_embd", "d_model", "num_attention_heads", "num_key_value_heads", "head_dim")


def _check_alike(name: str, opened: Sequence[Checkpoint]) -> None:
    """Raise `ModelError` where layers of the models cannot be stacked."""
    first = opened[0]
    for model in opened[1:]:
        for key in _SIZES:
            one, other = first.config.get(key), model.config.get(key)
            if one != other:
                raise ModelError(f"{name}: {key} is {one} in {first.folder.name} and {other} in {model.folder.name}")


def _check_ends(name: str, opened: Sequence[Checkpoint]) -> None:
    """Raise `ModelError` where the rows of the first model's embedding and of the last one's head are other tokens'."""
    try:
        check_vocabularies([opened[0], opened[-1]], has_base=False)
    except ModelError as error:
        why = str(error).partition(": models.vocab")[0]
        raise ModelError(f"{name}: the first model has the embedding and the last one the head, but {why}") from None


def _config(opened: Sequence[Checkpoint], parts: Sequence[Part], where: str) -> dict[str, Any]:
    """Return the first model's config with the number of layers, and the entries for each layer, of the stack."""
    config = dict(opened[0].config)
    holder = next((key for key in ("text_config",) if isinstance(config.get(key), Mapping)), None)
    key = next((key for key in _COUNTS if key in (config if holder is None else config[holder])), None)
    if key is None:
        raise ModelError(
            f"{where}: the config of {parts[0][0]} does not say how many layers it has ({listed(_COUNTS)})"
        )
    own = [model.config if holder is None else model.config.get(holder, {}) for model in opened]
    changed = dict(own[0])
    changed[key] = sum(stop - start for _, start, stop in parts)
    for name, value in own[0].items():
        by_layer = "layer" in name or name in _BY_LAYER
        if by_layer and isinstance(value, list) and len(value) == own[0][key]:
            lists = [each.get(name) for each in own]
            if not all(
                isinstance(each, list) and len(each) == one.get(key) for each, one in zip(lists, own, strict=True)
            ):
                raise ModelError(
                    f"{where}: {name} of the config has an entry for each layer in some of the models alone"
                )
            changed[name] = [
                entry
                for entries, (_, start, stop) in zip(lists, parts, strict=True)
                for entry in (entries or [])[start:stop]
            ]
    return changed if holder is None else {**config, holder: changed}
