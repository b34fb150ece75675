"""Choose the files of a model's folder that hold its weights, as transformers does, and then some.

Transformers wants a variant named and an index with shards; here the only weights in a folder are its weights.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mergelab.errors import ModelError, listed

# Tried in this order, as transformers does.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_VARIANT = re.compile(
    r"(?:model\.(?P<a>[^.]+)\.safetensors|model\.safetensors\.index\.(?P<b>[^.]+)\.json"
    r"|pytorch_model\.(?P<c>[^.]+)\.bin|pytorch_model\.bin\.index\.(?P<d>[^.]+)\.json)"
)
_SHARD = re.compile(
    r"(?P<stem>model|pytorch_model)(?:\.(?P<variant>[^.]+?))?-(?P<number>\d+)-of-(?P<count>\d+)"
    r"(?:\.(?P<after>[^.]+))?(?P<suffix>\.safetensors|\.bin)"
)


@dataclass(frozen=True)
class StoredWeights:
    """Where a folder's weights are.

    Attributes:
        index: the file that says which tensor is in which file; None where there is none.
        files: the weight files, in order, where there is no index.
        standard: whether ``from_pretrained`` finds them without further arguments.
    """

    index: str | None
    files: tuple[str, ...] = ()
    standard: bool = True


def weight_files(names: Collection[str], chosen: str | None = None) -> StoredWeights | None:
    """Choose among the names of a folder's files.

    A variant (``model.fp16.safetensors``) and shards without an index count only where nothing else does.

    Args:
        names: of the files.
        chosen: what the folder's config says (``transformers_weights``).

    Returns:
        None where no file holds weights.

    Raises:
        ModelError: there are several variants, or a shard is missing.
    """
    order = [chosen] if chosen is not None else WEIGHT_FILES
    if (found := next((name for name in order if name in names), None)) is not None:
        return _one(found, standard=True)
    if chosen is not None:
        raise ModelError(f"its config.json says that its weights are in {chosen}, which is not there")
    variants: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: (not name.startswith("model."), name.endswith(".json"), name)):
        if (match := _SHARD.fullmatch(name)) is not None:
            variants[match["variant"] or match["after"] or ""].append(name)
        elif (match := _VARIANT.fullmatch(name)) is not None:
            variants[next(variant for variant in match.groups() if variant)].append(name)
    shards = variants.pop("", [])
    if not shards and len(variants) > 1:
        raise ModelError(
            f"it has several variants of its weights ({listed(sorted(variants))}) and no plain ones; copy one to a "
            "folder of its own, with the config and the tokenizer"
        )
    for group in [shards, *variants.values()]:
        if whole := [name for name in group if not _SHARD.fullmatch(name)]:
            return _one(whole[0], standard=False)
        if group:
            return StoredWeights(None, _complete(group), standard=False)
    return None


def _one(name: str, *, standard: bool) -> StoredWeights:
    return StoredWeights(name, (), standard) if name.endswith(".json") else StoredWeights(None, (name,), standard)


def _complete(names: Collection[str]) -> tuple[str, ...]:
    """Return the shards of one set, safetensors first, in order; all of them have to be there."""
    sets: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        match = _SHARD.fullmatch(name)
        assert match is not None
        same = sets[match["suffix"], match["count"]]
        if (other := same.setdefault(int(match["number"]), name)) != name:
            raise ModelError(f"it has {other} and {name}, which are one shard, and no index")
    kinds = sorted(sets, reverse=True)  # .safetensors before .bin
    of_one_kind = [kind for kind in kinds if kind[0] == kinds[0][0]]
    if len(of_one_kind) > 1:
        raise ModelError(f"it has shards of several sets and no index: {listed(sorted(names))}")
    (_, count), found = of_one_kind[0], sets[of_one_kind[0]]
    numbers = range(1, int(count) + 1)  # of a count that somebody wrote into a name
    if odd := [name for number, name in found.items() if number not in numbers]:
        raise ModelError(f"it has no index, and shards whose number is not among 1 to {int(count)}: {listed(odd)}")
    if absent := int(count) - len(found):
        first = [f"number {number}" for number in islice((each for each in numbers if each not in found), 3)]
        more = f" and {absent - len(first)} more" if absent > len(first) else ""
        raise ModelError(
            f"it has shards such as {next(iter(found.values()))} and no index, and of {int(count)} shards "
            f"{listed(first)}{more} {'is' if absent == 1 else 'are'} missing"
        )
    return tuple(found[number] for number in numbers)


def find_weights(folder: Path, config: Mapping[str, Any], name: str) -> StoredWeights:
    """Find the folder's weights.

    Raises:
        ModelError: there are none, several variants of them, or not all shards.
    """
    chosen = config.get("transformers_weights")
    if chosen is not None and (not isinstance(chosen, str) or not is_inside(folder, chosen)):
        raise ModelError(f"{name}: transformers_weights={chosen!r} in its config.json is not a file in {folder}")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if chosen is not None and (folder / chosen).is_file():
        names.append(chosen)
    try:
        found = weight_files(names, chosen)
    except ModelError as error:
        raise ModelError(f"{name}: {folder}: {error}") from None
    if found is None:
        raise ModelError(f"{name}: {folder} has no weights; looked for {', '.join(WEIGHT_FILES)}{gguf_hint(folder)}")
    return found


def is_inside(folder: Path, file: str) -> bool:
    """Return whether a relative path stays in ``folder``; the file itself may be a link, as in the hub's cache."""
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in file:
        return False
    real = os.path.realpath(folder / path.parent)  # of a loop of links too
    return Path(real).is_relative_to(os.path.realpath(folder))


def gguf_hint(folder: Path) -> str:
    """Return what to add to an error when the weights are in a format of llama.cpp."""
    found = next(folder.glob("*.gguf"), None)
    return (
        "" if found is None else f"; {found.name} is a GGUF file, quantised or not: merge the checkpoint it is made of"
    )
