"""Find permutations of a transformer's hidden units that leave its function unchanged.

The tensors that write and read a unit are data, in one table per family of models; the algorithm knows no architecture.
A permutation acts on the units' axis of all these tensors, so that the model computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergelab.errors import ConfigError

Shape = tuple[int, ...]
Order = NDArray[np.intp]  # a model's unit at each position
# The units along a tensor's axes, by pattern of the tensor's name; {n} is the layer's number, the pattern's group.
# "residual" is the residual stream. "heads" are attention heads, or groups of heads that share keys and values. "fused"
# are the queries, keys and values of all heads, concatenated. "head_dim" runs within a head.
Table = tuple[tuple[str, dict[int, str]], ...]

BERT: Table = (
    (r"embeddings\.(?:word|position|token_type)_embeddings\.weight", {1: "residual"}),
    (r"embeddings\.LayerNorm\.(?:weight|bias)", {0: "residual"}),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(?:query|key|value)\.weight", {0: "heads.{n}", 1: "residual"}),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(?:query|key|value)\.bias", {0: "heads.{n}"}),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.weight", {0: "residual", 1: "heads.{n}"}),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.weight", {0: "ffn.{n}", 1: "residual"}),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.bias", {0: "ffn.{n}"}),
    (r"encoder\.layer\.(\d+)\.output\.dense\.weight", {0: "residual", 1: "ffn.{n}"}),
    (r"encoder\.layer\.(\d+)\.(?:attention\.)?output\.(?:dense\.bias|LayerNorm\.(?:weight|bias))", {0: "residual"}),
    (r"pooler\.dense\.weight", {0: "pooled", 1: "residual"}),
    (r"pooler\.dense\.bias", {0: "pooled"}),
    (r"classifier\.weight", {1: "pooled"}),
    (r"classifier\.dense\.weight", {0: "classified", 1: "residual"}),
    (r"classifier\.dense\.bias", {0: "classified"}),
    (r"classifier\.out_proj\.weight", {1: "classified"}),
    (r"qa_outputs\.weight", {1: "residual"}),
    (r"(?:classifier|classifier\.out_proj|qa_outputs)\.bias", {}),
)
GPT2: Table = (
    (r"(?:wte|wpe|lm_head|score)\.weight", {1: "residual"}),
    (r"h\.(\d+)\.ln_[12]\.(?:weight|bias)", {0: "residual"}),
    (r"ln_f\.(?:weight|bias)", {0: "residual"}),
    (r"h\.(\d+)\.attn\.c_attn\.weight", {0: "residual", 1: "fused.{n}"}),
    (r"h\.(\d+)\.attn\.c_attn\.bias", {0: "fused.{n}"}),
    (r"h\.(\d+)\.attn\.c_proj\.weight", {0: "heads.{n}", 1: "residual"}),
    (r"h\.(\d+)\.mlp\.c_fc\.weight", {0: "residual", 1: "ffn.{n}"}),
    (r"h\.(\d+)\.mlp\.c_fc\.bias", {0: "ffn.{n}"}),
    (r"h\.(\d+)\.mlp\.c_proj\.weight", {0: "ffn.{n}", 1: "residual"}),
    (r"h\.(\d+)\.(?:attn|mlp)\.c_proj\.bias", {0: "residual"}),
)
LLAMA: Table = (
    (r"(?:embed_tokens|lm_head|score)\.weight", {1: "residual"}),
    (r"layers\.(\d+)\.self_attn\.[qkv]_proj\.weight", {0: "heads.{n}", 1: "residual"}),
    (r"layers\.(\d+)\.self_attn\.[qkv]_proj\.bias", {0: "heads.{n}"}),
    (r"layers\.(\d+)\.self_attn\.[qk]_norm\.weight", {0: "head_dim.{n}"}),
    (r"layers\.(\d+)\.self_attn\.o_proj\.weight", {0: "residual", 1: "heads.{n}"}),
    (r"layers\.(\d+)\.mlp\.(?:gate|up)_proj\.weight", {0: "ffn.{n}", 1: "residual"}),
    (r"layers\.(\d+)\.mlp\.(?:gate|up)_proj\.bias", {0: "ffn.{n}"}),
    (r"layers\.(\d+)\.mlp\.down_proj\.weight", {0: "residual", 1: "ffn.{n}"}),
    (r"layers\.(\d+)\.(?:self_attn\.o_proj|mlp\.down_proj)\.bias", {0: "residual"}),
    (r"layers\.(\d+)\.(?:input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight", {0: "residual"}),
    (r"norm\.weight", {0: "residual"}),
)
FAMILIES: tuple[Table, ...] = (BERT, GPT2, LLAMA)


@dataclass(frozen=True)
class Slot:
    """The part of a tensor's axis that a permutation acts on: units of ``block`` entries, from entry ``offset`` on."""

    tensor: str
    axis: int
    block: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Permutation:
    """Hidden units whose order is arbitrary.

    Attributes:
        name: "residual", "ffn.3", "heads.3", …
        size: number of units.
        slots: the axes along which tensors write and read them.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]


def find_permutations(
    shapes: Mapping[str, Shape], outside: Collection[str] = (), *, heads: int
) -> tuple[Permutation, ...]:
    """Find the permutations that leave a model's function unchanged, from its tensors' names and shapes.

    Units are not permuted when a tensor outside the merge, or one that the family's table does not list, may write or
    read them. For an unlisted tensor these are the units of the layer whose number it has, and the residual stream.

    Args:
        shapes: shapes of the tensors that can be permuted, by name.
        outside: names of the model's other tensors, which are not permuted.
        heads: number of attention heads, or of groups of heads that share keys and values.

    Returns:
        The permutations, by name; none for a model of an unknown family.

    Raises:
        ConfigError: ``heads`` does not divide a projection's outputs.
    """
    table = _family(shapes)
    if table is None:
        return ()
    found: dict[str, list[tuple[str, int]]] = {}
    fixed: set[str] = set()
    for name in shapes:
        axes = _axes(table, name)
        for axis, unit in axes.items() if axes is not None else ():
            found.setdefault(unit, []).append((name, axis))
        fixed.update(_fixed_by(name) if axes is None else ())
    for name in outside:
        fixed.update(_fixed_by(name) if (axes := _axes(table, name)) is None else axes.values())
    if "pooled" in found and not any(axis == 0 for _, axis in found["pooled"]):  # a head that reads the last layer
        found.setdefault("residual", []).extend(found.pop("pooled"))
    permutations = [*_attention(found, fixed, shapes, heads), *_plain(found, fixed, shapes)]
    return tuple(sorted(permutations, key=lambda permutation: permutation.name))


def _family(names: Collection[str]) -> Table | None:
    """Choose the table that lists most of the names; None when it lists no attention among them."""
    known = {i: [a for name in names if (a := _axes(table, name))] for i, table in enumerate(FAMILIES)}
    best = max(known, key=lambda i: len(known[i]))
    units = {unit.split(".")[0] for axes in known[best] for unit in axes.values()}
    return FAMILIES[best] if "heads" in units else None


def _axes(table: Table, name: str) -> dict[int, str] | None:
    """Return the units along the axes of a tensor; None for a tensor that the table does not list."""
    for pattern, axes in table:
        if match := re.fullmatch(rf"(?:\w+\.)?{pattern}", name):
            number = match.group(1) if match.re.groups else ""
            return {axis: unit.format(n=number) for axis, unit in axes.items()}
    return None


def _fixed_by(name: str) -> Iterator[str]:
    """Yield the units that an unlisted tensor may write or read."""
    yield from ("residual", "pooled", "classified")
    for number in re.findall(r"\.(\d+)(?=\.)", name):
        yield from (f"heads.{number}", f"ffn.{number}", f"fused.{number}")


def _attention(
    found: Mapping[str, Sequence[tuple[str, int]]], fixed: set[str], shapes: Mapping[str, Shape], heads: int
) -> Iterator[Permutation]:
    for unit, places in found.items():
        kind, _, number = unit.partition(".")
        fused = found.get(f"fused.{number}", ())
        if kind != "heads" or fixed & {unit, f"fused.{number}"}:
            continue
        slots = [Slot(name, axis, _divided(name, shapes[name][axis], heads)) for name, axis in places]
        for name, axis in fused:
            third = shapes[name][axis] // 3
            slots += [Slot(name, axis, _divided(name, third, heads), start * third) for start in range(3)]
        norms = {shapes[name][axis] for name, axis in found.get(f"head_dim.{number}", ())}
        if norms <= {min(slot.block for slot in slots)}:  # else a norm runs over all heads
            yield Permutation(unit, heads, tuple(slots))


def _divided(name: str, length: int, heads: int) -> int:
    if length % heads:
        raise ConfigError(f"method.heads: {heads} heads or groups of heads do not divide the {length} units of {name}")
    return length // heads


def _plain(
    found: Mapping[str, Sequence[tuple[str, int]]], fixed: set[str], shapes: Mapping[str, Shape]
) -> Iterator[Permutation]:
    for unit, places in found.items():
        lengths = {shapes[name][axis] for name, axis in places}
        free = unit.split(".")[0] in ("residual", "ffn", "pooled", "classified") and unit not in fixed
        if free and len(lengths) == 1 and _is_read(unit, places):
            yield Permutation(unit, lengths.pop(), tuple(Slot(name, axis) for name, axis in places))


def _is_read(unit: str, places: Sequence[tuple[str, int]]) -> bool:
    """Return whether a tensor reads the units; else their order is that of the model's output."""
    return unit not in ("pooled", "classified") or any(axis == 1 for _, axis in places)


def write_indices(index: Tensor, slot: Slot, order: Order) -> None:
    """Write the permuted entries of a slot into the index of its axis."""
    entries = torch.from_numpy(order)[:, None] * slot.block + torch.arange(slot.block)
    index[slot.offset : slot.offset + entries.numel()] = slot.offset + entries.reshape(-1)
