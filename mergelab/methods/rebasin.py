"""Git Re-Basin: bring the experts' hidden units into one order before any other method merges them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergelab.engine.chaining import ChainedWeights, chained, check_then
from mergelab.engine.method import Substitute, merge_method
from mergelab.errors import ConfigError, MergeWarning
from mergelab.ops.blocks import blocks
from mergelab.ops.permutations import Permutation, Slot, find_permutations
from mergelab.ops.philox import stream_key, words
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource, WrappedSource

Order = NDArray[np.intp]  # which of the expert's units comes in each place
Orders = Mapping[str, Order]
PART = 1 << 22  # entries of a tensor that are compared at once


@merge_method(
    check=check_then,
    order_matters=True,
    family="alignment",
    paper="Ainsworth et al. 2023, arXiv:2209.04836",
)
def rebasin(
    models: AlignedModels,
    *,
    seed: int = 0,
    then: str | Mapping[str, Any] = "soup",
    weights: ChainedWeights = None,
    max_sweeps: Annotated[int, Field(ge=1)] = 100,
    heads: Annotated[int, Field(ge=1)] | None = None,
    kv_heads: Annotated[int, Field(ge=1)] | None = None,
) -> Substitute:
    """Permute each expert's hidden units to match a reference, then merge by another method.

    The permutations P_ℓ that maximise Σ_ℓ ⟨W_ℓ, P_ℓ W'_ℓ P_{ℓ−1}ᵀ⟩, found by coordinate descent: one P at a time, in a
    random order for each sweep, by a linear sum assignment, until a sweep improves none (Ainsworth et al. 2023,
    arXiv:2209.04836, weight matching). The reference is the base, or else the expert whose name sorts first. In BERT-,
    GPT-2- and Llama-like models the units are: each layer's FFN hidden units, its attention heads (whole, those that
    share keys and values together), the residual stream (one permutation for the whole model, with the norms'
    parameters), and a pooler's outputs.

    Departures: the paper does not treat attention. Units keep their order where a tensor that is not merged (a head
    kept apart, a pass-through) or that is of no known layer reads or writes them; models of other families are merged
    as they are, with a warning. The order of a group's query heads is not searched.

    Args:
        models: base and experts.
        seed: of the sweeps' order.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters.
        weights: per expert, handed on; default 1.
        max_sweeps: most passes over all permutations.
        heads: number of attention heads; default: from the models' configs.
        kv_heads: number of key and value heads; default: from the configs, else ``heads``.

    Returns:
        What to merge instead: the experts in the reference's order, by ``then``.

    Raises:
        ConfigError: ``then`` is no method that can follow, or the number of heads is not known.
    """
    method, parameters = chained(then)
    reference = models.base if models.base is not None else min(models.experts, key=lambda expert: expert.name)
    shapes = {name: tuple(reference.shape(name)) for name in models.names}
    outside = (*models.ignored, *models.experts_only)
    if not find_permutations(shapes, outside, heads=1):
        message = "rebasin: knows no hidden units of these models, so the experts are merged in the order they have"
        warnings.warn(message, MergeWarning, stacklevel=2)
        return Substitute(method, parameters, models)
    groups = attention_head_groups((reference, *models.experts), heads, kv_heads)
    permutations = find_permutations(shapes, outside, heads=groups)

    def align(expert: TensorSource) -> TensorSource:
        if expert is reference:
            return expert
        orders = match(reference, expert, permutations, stream_key(seed, expert.name, "rebasin"), max_sweeps)
        return PermutedSource(expert, indices(permutations, orders, shapes))

    return Substitute(method, parameters, replace(models, experts=tuple(in_order(align, models.experts))))


def attention_head_groups(
    sources: Sequence[object], heads: int | None, kv_heads: int | None, method: str = "rebasin"
) -> int:
    """Return how many groups of attention heads there are: of those that share keys and values.

    Args:
        sources: models, some of them perhaps with a config.
        heads, kv_heads: where given, they count.
        method: for the error.

    Raises:
        ConfigError: neither the parameters nor a model's config tell.
    """
    config = next((config for source in sources if (config := config_of(source)) is not None), {})
    heads = heads or config.get("num_attention_heads") or config.get("n_head")
    groups = kv_heads or config.get("num_key_value_heads") or heads
    if groups is None:
        raise ConfigError(f"method.heads: {method} needs the number of attention heads, as the models have no config")
    if heads is not None and heads % groups:
        raise ConfigError(f"method.kv_heads={groups}: must divide the number of heads, {heads}")
    return int(groups)


def config_of(source: object) -> Mapping[str, Any] | None:
    """Return the config of the checkpoint that a source reads, through whatever wraps it."""
    while source is not None:
        config = getattr(source, "config", None)
        if isinstance(config, Mapping):
            return config
        source = getattr(source, "source", None)
    return None


@dataclass(frozen=True)
class PermutedSource(WrappedSource):
    """A source whose tensors' axes are in another order.

    Attributes:
        source: where the tensors are.
        indices: by tensor and axis, which entry comes in each place.
    """

    source: TensorSource
    indices: Mapping[str, Mapping[int, Tensor]]

    def get(self, key: str) -> Tensor:
        """Read ``key`` and put its axes in order."""
        tensor = self.source.get(key)
        for axis, index in self.indices.get(key, {}).items():
            tensor = tensor.index_select(axis, index)
        return tensor


def indices(
    permutations: Sequence[Permutation], orders: Orders, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[int, Tensor]]:
    """Return, by tensor and axis, which entry comes in each place once the units are in ``orders``."""
    result: dict[str, dict[int, Tensor]] = {}
    for permutation in permutations:
        for slot in permutation.slots:
            axes = result.setdefault(slot.tensor, {})
            index = axes.setdefault(slot.axis, torch.arange(shapes[slot.tensor][slot.axis]))
            place(index, slot, orders[permutation.name])
    return result


def place(index: Tensor, slot: Slot, order: Order) -> None:
    """Write where a slot's entries come from into the index of its axis."""
    entries = torch.from_numpy(order)[:, None] * slot.block + torch.arange(slot.block)
    index[slot.offset : slot.offset + entries.numel()] = slot.offset + entries.reshape(-1)


def match(
    reference: TensorSource, expert: TensorSource, permutations: Sequence[Permutation], key: int, max_sweeps: int
) -> dict[str, Order]:
    """Find the orders of an expert's units in which its weights are most like the reference's.

    Args:
        reference, expert: two models of one architecture.
        permutations: what can be put in order.
        key: of the sweeps' random order.
        max_sweeps: most passes over all permutations.
    """
    shapes = {slot.tensor: tuple(reference.shape(slot.tensor)) for each in permutations for slot in each.slots}
    on = {name: [each for each in permutations if any(s.tensor == name for s in each.slots)] for name in shapes}
    orders: dict[str, Order] = {each.name: np.arange(each.size) for each in permutations}
    waiting = {each.name for each in permutations}  # those whose neighbours have changed since they were solved
    for sweep in range(max_sweeps):
        for each in shuffled(permutations, key, sweep):
            if each.name not in waiting:
                continue
            waiting.discard(each.name)
            current = indices(permutations, orders, shapes)
            likeness = similarity(reference, expert, each, current)
            _, order = linear_sum_assignment(likeness, maximize=True)
            places = np.arange(each.size)
            gain = likeness[places, order].sum() - likeness[places, orders[each.name]].sum()
            if gain > 1e-12 * np.abs(likeness).max(initial=0.0):
                orders[each.name] = order
                waiting.update(other.name for slot in each.slots for other in on[slot.tensor] if other is not each)
        if not waiting:
            break
    return orders


def shuffled(permutations: Sequence[Permutation], key: int, sweep: int) -> list[Permutation]:
    """Put the permutations in a random order, which is another one in each sweep."""
    drawn = words(key, sweep * len(permutations), len(permutations))
    return [permutations[i] for i in np.argsort(drawn, kind="stable")]


def similarity(
    reference: TensorSource,
    expert: TensorSource,
    permutation: Permutation,
    current: Mapping[str, Mapping[int, Tensor]],
) -> NDArray[np.float64]:
    """Return ⟨unit i of the reference, unit j of the expert⟩ over all tensors that have these units, in float64.

    The expert's other axes are in the order that ``current`` gives them.
    """
    total = torch.zeros(permutation.size, permutation.size, dtype=torch.float64)
    for slot in permutation.slots:
        pair = reference.get(slot.tensor), expert.get(slot.tensor)
        other = current[slot.tensor].get(1 - slot.axis)
        for ours, theirs in _parts(pair, slot, permutation.size, other):
            total += ours @ theirs.T
    return total.numpy()


def _parts(pair: tuple[Tensor, Tensor], slot: Slot, size: int, other: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a slot of two tensors along the other axis; answer each as one row per unit."""
    ours, theirs = (t.narrow(slot.axis, slot.offset, size * slot.block).movedim(slot.axis, 0) for t in pair)
    if ours.ndim == 1:
        yield ours.double().reshape(size, -1), theirs.double().reshape(size, -1)
        return
    for part in blocks(ours.shape[1], max(1, PART // ours.shape[0])):
        matching = theirs[:, part] if other is None else theirs.index_select(1, other[part])
        yield ours[:, part].double().reshape(size, -1), matching.double().reshape(size, -1)
