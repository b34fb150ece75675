"""A checkpoint in the place of one part of an encoder-decoder: a BERT as its encoder, a GPT-2 as its decoder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from mergelab.errors import ModelError, ShapeMismatch, listed
from mergelab.models.encoder_decoder import HOME, NEW, newly_initialised
from mergelab.models.made import made
from mergelab.weights.align import RenamedSource, align
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.companions import companion_files
from mergelab.weights.naming import modern_name
from mergelab.weights.source import TensorSource, layout_of
from mergelab.weights.writer import save_folder

ModelPart = Literal["encoder", "decoder"]
# What only a decoder with an encoder has; a checkpoint of a decoder alone lacks it.
_CROSS_ATTENTION = ("*crossattention*", "*cross_attn*", "*encoder_attn*", "*EncDecAttention*")
_PART = re.compile(r"((?:model\.|transformer\.)?(?:encoder|decoder)\.)")


def with_part(base: Path, checkpoint: Path, part: ModelPart, *, where: str) -> Path:
    """Make the model that is ``base`` with a checkpoint's weights in the place of its encoder or decoder.

    The checkpoint is an encoder (BERT, a classifier made of one), a decoder (GPT-2), or another whole encoder-decoder
    of which that part is taken. What it lacks of the part and need not have, cross-attention, output layers and
    poolers, stays the base's; heads that the base does not have are not taken.

    Args:
        base: the folder of a saved encoder-decoder.
        checkpoint: a model folder.
        part: which part.
        where: the configuration's key of the expert, for messages.

    Returns:
        A folder in the cache.

    Raises:
        ModelError: the base has no such part, its parts share their weights, or the checkpoint is not one for it.
    """
    whole, other = open_checkpoint(base, "base"), open_checkpoint(checkpoint, where)
    files = [base / name for name in companion_files(base)]
    parts = {
        "made": f"with {part}",
        "weights": [whole.content_hash(), other.content_hash()],
        "base": [
            whole.config,
            sorted(newly_initialised(base)),
            [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        ],
        "new": sorted(newly_initialised(checkpoint)),
    }
    return made(HOME, parts, lambda folder: _write(folder, whole, _exchanged(whole, other, part, where), other, part))


@dataclass(frozen=True)
class _PartSource(RenamedSource):
    """One part of a model under the names that it would have alone."""

    label: str

    @property
    def name(self) -> str:
        return self.label


def _exchanged(whole: Checkpoint, other: Checkpoint, part: ModelPart, where: str) -> dict[str, Tensor]:
    """Return the tensors, by their names in the whole model, that are the checkpoint's."""
    own = _part_of(whole, part, f"the {part} of the base")
    if own is None:
        raise ModelError(f"{where}.part={part}: the base is no encoder-decoder, of which one part could be exchanged")
    if any(
        _prefix(alias) and _prefix(name) and _prefix(alias) != _prefix(name) for alias, name in whole.aliases().items()
    ):
        raise ModelError(f"{where}.part={part}: the encoder and the decoder of the base share their weights")
    given: TensorSource = other
    same = _part_of(other, part, where)
    if same is not None and len(same.stored.keys() & own.stored.keys()) > len(own.stored) / 2:
        given = same
    aligned = align(given, [own], ignore=_CROSS_ATTENTION)
    assert isinstance(aligned.base, RenamedSource)
    has, names = {*aligned.base.keys(), *aligned.base.aliases()}, {*own.keys(), *own.aliases()}
    taken = [*aligned.names, *aligned.aliases, *(name for name in aligned.ignored if name in has and name in names)]
    stored = {modern_name(name): at for name, at in own.stored.items()}
    if odd := [name for name in taken if aligned.base.shape(name) != aligned.experts[0].shape(name)]:
        raise ShapeMismatch(f"{where}: {listed(odd)} are of another shape than the base's")
    return {stored[name]: aligned.base.get(name) for name in taken if name in stored}


def _part_of(model: Checkpoint, part: ModelPart, label: str) -> _PartSource | None:
    names = [*model.keys(), *model.aliases()]
    prefixes = {prefix for name in names if (prefix := _prefix(name))}
    halves = {prefix.rsplit(".", 2)[-2]: prefix for prefix in sorted(prefixes, key=len, reverse=True)}
    if halves.keys() != {"encoder", "decoder"} and not (part in halves and model.config.get("is_encoder_decoder")):
        return None
    prefix = halves[part]
    return _PartSource(model, {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}, label)


def _prefix(name: str) -> str:
    """Return what the names of an encoder's or decoder's tensors start with; "" for what is in neither."""
    match = _PART.match(name)
    return match[1] if match else ""


def _write(
    folder: Path, whole: Checkpoint, exchanged: Mapping[str, Tensor], other: Checkpoint, part: ModelPart
) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for info in layout_of(whole):
            yield info.name, exchanged.get(info.name, whole.get(info.name)).to(info.dtype)

    layout = layout_of(whole)
    save_folder(tensors(), folder, like=whole.folder, layout=layout, aliases=whole.aliases(), inputs=[other.folder])
    new_before = newly_initialised(whole.folder)
    new = {name for name in new_before if name not in exchanged}
    new |= newly_initialised(other.folder) & exchanged.keys()
    (folder / NEW).write_text(json.dumps(sorted(new), indent=1) + "\n", encoding="utf-8")
