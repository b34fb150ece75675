"""Orders of a transformer's hidden units that are arbitrary: which tensors a permutation of them acts on.

What is read from names and shapes is data, a table for each family of models; the algorithm knows no architecture. A
permutation acts on its units' axis of every tensor that writes or reads them, so that the model computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergelab.errors import ConfigError

Shape = tuple[int, ...]
# What an axis runs over, by pattern of the tensors' names. {n} stands for the number of the layer, the pattern's group.
# "residual" is the stream that all layers write to and read; "heads" are attention heads (those that share keys and
# values together), "fused" are queries, keys and values of all heads one after the other; "head_dim" is within a head.
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
    """Where a permutation acts: on runs of ``block`` entries of a tensor's axis, from entry ``offset`` on."""

    tensor: str
    axis: int
    block: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Permutation:
    """Units whose order is arbitrary.

    Attributes:
        name: "residual", "ffn.3", "heads.3", …
        size: how many there are.
        slots: where they are written and read.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]


def find_permutations(
    shapes: Mapping[str, Shape], outside: Collection[str] = (), *, heads: int
) -> tuple[Permutation, ...]:
    """Find the permutations that leave a model's function as it is, from its tensors' names and shapes.

    Units that a tensor outside the merge, or one that no table knows, may write or read keep their order: of an unknown
    tensor, those of the layer whose number it bears, and the residual stream.

    Args:
        shapes: of the tensors that can be permuted, by name.
        outside: further tensors that the model has, which keep their order.
        heads: number of attention heads, or of groups of them that share keys and values.

    Returns:
        The permutations; none for a model of no known family.

    Raises:
        ConfigError: ``heads`` does not divide a projection's outputs.
    """
    table = _family(shapes)
    if table is None:
        return ()
    found: dict[str, list[tuple[str, int]]] = {}
    kept: set[str] = set()
    for name in shapes:
        axes = _axes(table, name)
        for axis, unit in axes.items() if axes is not None else ():
            found.setdefault(unit, []).append((name, axis))
        kept.update(_kept_by(name) if axes is None else ())
    for name in outside:
        kept.update(_kept_by(name) if (axes := _axes(table, name)) is None else axes.values())
    if "pooled" in found and not any(axis == 0 for _, axis in found["pooled"]):  # a head that reads the last layer
        found.setdefault("residual", []).extend(found.pop("pooled"))
    permutations = [*_attention(found, kept, shapes, heads), *_plain(found, kept, shapes)]
    return tuple(sorted(permutations, key=lambda permutation: permutation.name))


def _family(names: Collection[str]) -> Table | None:
    """Choose the table that knows most of the names, if it knows attention among them."""
    known = {i: [a for name in names if (a := _axes(table, name))] for i, table in enumerate(FAMILIES)}
    best = max(known, key=lambda i: len(known[i]))
    units = {unit.split(".")[0] for axes in known[best] for unit in axes.values()}
    return FAMILIES[best] if "heads" in units else None


def _axes(table: Table, name: str) -> dict[int, str] | None:
    """Return what the axes of a tensor run over; None for a tensor that the table does not know."""
    for pattern, axes in table:
        if match := re.fullmatch(rf"(?:\w+\.)?{pattern}", name):
            number = match.group(1) if match.re.groups else ""
            return {axis: unit.format(n=number) for axis, unit in axes.items()}
    return None


def _kept_by(name: str) -> Iterator[str]:
    """Name the units that an unknown tensor may write or read."""
    yield from ("residual", "pooled", "classified")
    for number in re.findall(r"\.(\d+)(?=\.)", name):
        yield from (f"heads.{number}", f"ffn.{number}", f"fused.{number}")


def _attention(
    found: Mapping[str, Sequence[tuple[str, int]]], kept: set[str], shapes: Mapping[str, Shape], heads: int
) -> Iterator[Permutation]:
    for unit, places in found.items():
        kind, _, number = unit.partition(".")
        fused = found.get(f"fused.{number}", ())
        if kind != "heads" or kept & {unit, f"fused.{number}"}:
            continue
        slots = [Slot(name, axis, _divided(name, shapes[name][axis], heads)) for name, axis in places]
        for name, axis in fused:
            third = shapes[name][axis] // 3
            slots += [Slot(name, axis, _divided(name, third, heads), start * third) for start in range(3)]
        within = {shapes[name][axis] for name, axis in found.get(f"head_dim.{number}", ())}
        if within <= {min(slot.block for slot in slots)}:  # else a norm runs over all heads together
            yield Permutation(unit, heads, tuple(slots))


def _divided(name: str, length: int, heads: int) -> int:
    if length % heads:
        raise ConfigError(f"method.heads: {heads} heads or groups of heads do not divide the {length} units of {name}")
    return length // heads


def _plain(
    found: Mapping[str, Sequence[tuple[str, int]]], kept: set[str], shapes: Mapping[str, Shape]
) -> Iterator[Permutation]:
    for unit, places in found.items():
        lengths = {shapes[name][axis] for name, axis in places}
        free = unit.split(".")[0] in ("residual", "ffn", "pooled", "classified") and unit not in kept
        if free and len(lengths) == 1 and _is_read(unit, places):
            yield Permutation(unit, lengths.pop(), tuple(Slot(name, axis) for name, axis in places))


def _is_read(unit: str, places: Sequence[tuple[str, int]]) -> bool:
    """Return whether something reads the units, so that their order is not that of the model's output."""
    return unit not in ("pooled", "classified") or any(axis == 1 for _, axis in places)
