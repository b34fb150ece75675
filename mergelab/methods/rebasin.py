"""Git Re-Basin: permute the experts' hidden units to match a reference before another method merges them."""

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
from mergelab.ops.permutations import Order, Permutation, Slot, find_permutations, write_indices
from mergelab.ops.philox import stream_key, words
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource, WrappedSource

Orders = Mapping[str, Order]
COMPARED_ENTRIES = 1 << 22  # entries of a tensor compared at once


@merge_method(
    check=check_then,
    order_matters=True,
    family="alignment",
    paper="Ainsworth et al. 2023, arXiv:2209.04836",
    work="solves a linear sum assignment for each permutation of each model, in a few sweeps",
    use="models trained from different starts, before another method",
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

    The permutations P_ℓ maximise Σ_ℓ ⟨W_ℓ, P_ℓ W'_ℓ P_{ℓ−1}ᵀ⟩. Coordinate descent solves for one P at a time, a linear
    sum assignment, in a random order for each sweep, until a sweep improves none (Ainsworth et al. 2023,
    arXiv:2209.04836, weight matching). The reference is the base, or else the expert whose name sorts first. In BERT-,
    GPT-2- and Llama-like models the units are each layer's FFN hidden units, its attention heads (whole heads, or whole
    groups that share keys and values), the residual stream (one permutation for the whole model, with the norms'
    parameters), and a pooler's outputs.

    Departures: the paper does not treat attention. Units are not permuted when a tensor that is not merged (a separate
    head, a passthrough), or that belongs to no known layer, reads or writes them. Models of other families are merged
    without permutation, with a warning. The order of query heads within a group is not searched.

    Args:
        models: base and experts.
        seed: of the sweeps' random order.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters.
        weights: per expert, passed on to ``then``; default 1.
        max_sweeps: maximum number of passes over all permutations.
        heads: number of attention heads; default: from the models' configs.
        kv_heads: number of key and value heads; default: from the configs, else ``heads``.

    Returns:
        The merge to run instead: the permuted experts, by ``then``.

    Raises:
        ConfigError: ``then`` cannot merge these models, or the number of heads is not known.
    """
    method, parameters = chained(then)
    units = units_to_permute(models, heads, kv_heads, "rebasin")
    if units is None:
        return Substitute(method, parameters, models)
    reference, permutations = units
    shapes = {name: tuple(reference.shape(name)) for name in models.names}

    def align(expert: TensorSource) -> TensorSource:
        if expert is reference:
            return expert
        orders = match(reference, expert, permutations, stream_key(seed, "rebasin"), max_sweeps)
        return PermutedSource(expert, axis_indices(permutations, orders, shapes))

    return Substitute(method, parameters, replace(models, experts=tuple(in_order(align, models.experts))))


def units_to_permute(
    models: AlignedModels, heads: int | None, kv_heads: int | None, method: str
) -> tuple[TensorSource, tuple[Permutation, ...]] | None:
    """Return the model whose order the others get, and the permutations of hidden units.

    Args:
        models: base and experts.
        heads, kv_heads: as for `attention_head_groups`.
        method: named in errors and in the warning.

    Returns:
        The base, or the expert whose name sorts first, and its units; None with a warning for models of no known
        family.
    """
    reference = models.base if models.base is not None else min(models.experts, key=lambda expert: expert.name)
    shapes = {name: tuple(reference.shape(name)) for name in models.names}
    outside = (*models.ignored, *models.experts_only)
    if not find_permutations(shapes, outside, heads=1):
        message = f"{method}: knows no hidden units of these models, so the experts are merged in the order they have"
        warnings.warn(message, MergeWarning, stacklevel=3)
        return None
    groups = attention_head_groups((reference, *models.experts), heads, kv_heads, method)
    return reference, find_permutations(shapes, outside, heads=groups)


def attention_head_groups(
    sources: Sequence[object], heads: int | None, kv_heads: int | None, method: str = "rebasin"
) -> int:
    """Return the number of groups of attention heads, where heads of a group share keys and values.

    Args:
        sources: models, with or without a config.
        heads, kv_heads: take precedence over the configs.
        method: named in errors.

    Raises:
        ConfigError: neither the parameters nor a config give the number of heads, or groups do not divide it.
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
    """Return the config of the checkpoint or module that a source, or the source it wraps, reads; None without one."""
    while source is not None:
        config = getattr(source, "config", None)
        if isinstance(config, Mapping):
            return config
        source = getattr(source, "source", None)
    return None


@dataclass(frozen=True)
class PermutedSource(WrappedSource):
    """A source with permuted axes.

    Attributes:
        source: the source to permute.
        indices: by tensor and axis, the source's entry at each position.
    """

    source: TensorSource
    indices: Mapping[str, Mapping[int, Tensor]]

    def get(self, key: str) -> Tensor:
        """Return ``key`` with its axes permuted."""
        tensor = self.source.get(key)
        for axis, index in self.indices.get(key, {}).items():
            tensor = tensor.index_select(axis, index)
        return tensor


def axis_indices(
    permutations: Sequence[Permutation], orders: Orders, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[int, Tensor]]:
    """Return, by tensor and axis, the entry at each position when the units are in ``orders``."""
    result: dict[str, dict[int, Tensor]] = {}
    for permutation in permutations:
        for slot in permutation.slots:
            axes = result.setdefault(slot.tensor, {})
            index = axes.setdefault(slot.axis, torch.arange(shapes[slot.tensor][slot.axis]))
            write_indices(index, slot, orders[permutation.name])
    return result


def match(
    reference: TensorSource, expert: TensorSource, permutations: Sequence[Permutation], key: int, max_sweeps: int
) -> dict[str, Order]:
    """Find the orders of an expert's units that maximise the inner product of its weights with the reference's.

    Args:
        reference, expert: two models of one architecture.
        permutations: the units to permute.
        key: of the random stream for the sweeps' order.
        max_sweeps: maximum number of passes over all permutations.

    Returns:
        The order of the units, by the permutation's name.
    """
    shapes = {slot.tensor: tuple(reference.shape(slot.tensor)) for each in permutations for slot in each.slots}
    on = {name: [each for each in permutations if any(s.tensor == name for s in each.slots)] for name in shapes}
    orders: dict[str, Order] = {each.name: np.arange(each.size) for each in permutations}
    pending = {each.name for each in permutations}  # those whose neighbours have changed since they were solved
    for sweep in range(max_sweeps):
        for each in shuffled(permutations, key, sweep):
            if each.name not in pending:
                continue
            pending.discard(each.name)
            current = axis_indices(permutations, orders, shapes)
            similarity = unit_similarity(reference, expert, each, current)
            _, order = linear_sum_assignment(similarity, maximize=True)
            rows = np.arange(each.size)
            gain = similarity[rows, order].sum() - similarity[rows, orders[each.name]].sum()
            if gain > 1e-12 * np.abs(similarity).max(initial=0.0):
                orders[each.name] = order
                pending.update(other.name for slot in each.slots for other in on[slot.tensor] if other is not each)
        if not pending:
            break
    return orders


def shuffled(permutations: Sequence[Permutation], key: int, sweep: int) -> list[Permutation]:
    """Return the permutations in a random order that depends on the sweep."""
    drawn = words(key, sweep * len(permutations), len(permutations))
    return [permutations[i] for i in np.argsort(drawn, kind="stable")]


def unit_similarity(
    reference: TensorSource,
    expert: TensorSource,
    permutation: Permutation,
    current: Mapping[str, Mapping[int, Tensor]],
) -> NDArray[np.float64]:
    """Return ⟨unit i of the reference, unit j of the expert⟩ over all tensors that have these units: (n, n) float64.

    The expert's other axes are permuted by ``current``.
    """
    total = torch.zeros(permutation.size, permutation.size, dtype=torch.float64)
    for slot in permutation.slots:
        pair = reference.get(slot.tensor), expert.get(slot.tensor)
        other = current[slot.tensor].get(1 - slot.axis)
        for ours, theirs in _parts(pair, slot, permutation.size, other):
            total += ours @ theirs.T
    return total.numpy()


def _parts(pair: tuple[Tensor, Tensor], slot: Slot, size: int, other: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of a slot of two tensors, divided along the other axis, with one row per unit."""
    ours, theirs = (t.narrow(slot.axis, slot.offset, size * slot.block).movedim(slot.axis, 0) for t in pair)
    if ours.ndim == 1:
        yield ours.double().reshape(size, -1), theirs.double().reshape(size, -1)
        return
    for part in blocks(ours.shape[1], max(1, COMPARED_ENTRIES // ours.shape[0])):
        matching = theirs[:, part] if other is None else theirs.index_select(1, other[part])
        yield ours[:, part].double().reshape(size, -1), matching.double().reshape(size, -1)
