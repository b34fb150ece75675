"""C²M³: permute the hidden units of all models at once, consistently around every cycle, before another method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mergelab.engine.chaining import ChainedWeights, chained, check_then
from mergelab.engine.method import Substitute, merge_method
from mergelab.methods.rebasin import PermutedSource, axis_indices, units_to_permute
from mergelab.ops.blocks import working
from mergelab.ops.permutations import Permutation
from mergelab.ops.soft_permutations import Axis, Order, SoftOrder, axes_of, best_order, mapped
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot
from mergelab.weights.source import TensorSource

LEAST_GAIN = 1e-9  # relative gain of an iteration below which the search ends


@merge_method(
    check=check_then,
    order_matters=True,
    family="alignment",
    paper="Crisostomi et al. 2024, arXiv:2405.17897",
    use="more than two models trained from different starts, before another method",
)
def c2m3(
    models: AlignedModels,
    *,
    then: str | Mapping[str, Any] = "soup",
    weights: ChainedWeights = None,
    max_iterations: Annotated[int, Field(ge=1)] = 200,
    heads: Annotated[int, Field(ge=1)] | None = None,
    kv_heads: Annotated[int, Field(ge=1)] | None = None,
) -> Substitute:
    """Permute all models' hidden units into a common order, then merge by another method.

    Each model t has permutations P_t,ℓ to a common order (the universe), so that the one from model s to model t, by
    way of the universe, is the same along any path. They maximise Σ_{s<t} Σ_ℓ ⟨P_s,ℓᵀ W_s,ℓ P_s,ℓ−1,
    P_t,ℓᵀ W_t,ℓ P_t,ℓ−1⟩. The Frank-Wolfe algorithm moves all of them at once over convex combinations of permutations:
    in each iteration towards the permutations of largest inner product with the gradient (a linear sum assignment for
    each), by the step that maximises the objective, which is a polynomial of degree 4 along the way. It starts at the
    models' own orders, ends where an iteration gains nothing, and takes the nearest permutations (Crisostomi et al.
    2024, arXiv:2405.17897). Which hidden units there are is said at `rebasin`. A base is one of the models.

    Departures: the models are brought from the universe into the order of the base (or of the expert whose name sorts
    first), so that what is not merged fits; for the merge that is the same. The step is found exactly, not by a bounded
    search. The start is the authors' choice for matching to a reference; for the universe they start at perturbed
    uniform matrices. Activations are not renormalised (REPAIR).

    Args:
        models: base and experts.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters.
        weights: per expert, passed on to ``then``; default 1.
        max_iterations: maximum number of iterations.
        heads: number of attention heads; default: from the models' configs.
        kv_heads: number of key and value heads; default: from the configs, else ``heads``.

    Returns:
        The merge to run instead: the permuted experts, by ``then``.

    Raises:
        ConfigError: ``then`` cannot merge these models, or the number of heads is not known.
    """
    method, parameters = chained(then)
    units = units_to_permute(models, heads, kv_heads, "c2m3")
    if units is None:
        return Substitute(method, parameters, models)
    reference, permutations = units
    sources = [reference, *sorted((e for e in models.experts if e is not reference), key=lambda expert: expert.name)]
    orders = dict(zip(map(id, sources), synchronised(sources, permutations, max_iterations), strict=True))
    shapes = {name: tuple(reference.shape(name)) for name in models.names}

    def moved(expert: TensorSource) -> TensorSource:
        if expert is reference:
            return expert
        return PermutedSource(expert, axis_indices(permutations, orders[id(expert)], shapes))

    return Substitute(method, parameters, replace(models, experts=tuple(map(moved, models.experts))))


def synchronised(
    sources: Sequence[TensorSource], permutations: Sequence[Permutation], max_iterations: int
) -> list[dict[str, Order]]:
    """Find the orders of each model's units in the order of the first model, by the permutation's name.

    Args:
        sources: models of one architecture.
        permutations: the units to permute.
        max_iterations: maximum number of iterations.
    """
    search = _Search(sources, axes_of(permutations))
    soft = [{each.name: SoftOrder.of(np.arange(each.size)) for each in permutations} for _ in sources]
    for _ in range(max_iterations):
        targets = search.targets(soft)
        step, gain = search.step(soft, targets)
        if step <= 0 or gain <= 0:
            break
        soft = [
            {name: own.towards(target[name], step) for name, own in each.items()}
            for each, target in zip(soft, targets, strict=True)
        ]
        if gain <= LEAST_GAIN:
            break
    universe = [{name: own.nearest() for name, own in each.items()} for each in soft]
    return [{name: _relative(universe[0][name], order) for name, order in each.items()} for each in universe]


def _relative(reference: Order, order: Order) -> Order:
    """Return a model's unit at each unit of the reference, from the units of both at each position of the universe."""
    found = np.empty_like(order)
    found[reference] = order
    return found


@dataclass(frozen=True)
class _Search:
    """The objective over soft permutations of several models.

    Memory: for each tensor that is worked on, a copy of it for each model, and three more.
    """

    sources: Sequence[TensorSource]
    axes: Mapping[str, Sequence[Axis]]

    def targets(self, soft: Sequence[Mapping[str, SoftOrder]]) -> list[dict[str, Order]]:
        """Return for each model the orders of largest inner product with the objective's gradient."""
        totals: list[dict[str, Tensor]] = [{} for _ in self.sources]
        for found in in_order(lambda name: self._gradients(name, soft), self.axes):
            for total, own in zip(totals, found, strict=True):
                for name, gradient in own.items():
                    total[name] = total[name].add_(gradient) if name in total else gradient
        return [{name: best_order(gradient.numpy()) for name, gradient in total.items()} for total in totals]

    def _gradients(self, name: str, soft: Sequence[Mapping[str, SoftOrder]]) -> list[dict[str, Tensor]]:
        """Return the gradient of what a tensor adds to the objective, by model and permutation."""
        axes = self.axes[name]
        moved = [mapped(self._read(t, name), axes, own) for t, own in enumerate(soft)]
        total = moved[0].clone()
        for each in moved[1:]:
            total += each
        found = []
        for t, own in enumerate(soft):
            rest = total - moved[t]
            gradients: dict[str, Tensor] = {}
            for axis in axes:
                others = [other for other in axes if other is not axis]
                similar = axis.similarity(rest, mapped(self._read(t, name), others, own))
                known = gradients.get(axis.permutation)
                gradients[axis.permutation] = similar if known is None else known + similar
            found.append(gradients)
        return found

    def step(
        self, soft: Sequence[Mapping[str, SoftOrder]], targets: Sequence[Mapping[str, Order]]
    ) -> tuple[float, float]:
        """Return the step towards ``targets`` of the largest objective, and how much it gains, relative to that."""
        ends = [{name: SoftOrder.of(order) for name, order in each.items()} for each in targets]
        gram = np.zeros((3, 3))
        for found in in_order(lambda name: self._along(name, soft, ends), self.axes):
            gram += found
        ways = [np.poly1d([1, -2, 1]), np.poly1d([-1, 1, 0]), np.poly1d([1, 0, 0])]  # (1−s)², s(1−s), s²
        objective = np.poly1d([0])
        for u, row in zip(ways, gram, strict=True):
            for v, inner in zip(ways, row, strict=True):
                objective = objective + inner * (u * v)
        inside = [root.real for root in objective.deriv().roots if abs(root.imag) < 1e-12 and 0 < root.real < 1]
        best = max((0.0, 1.0, *inside), key=objective)
        size = max(abs(objective(0.0)), abs(objective(best)), np.finfo(float).tiny)
        return best, float(objective(best) - objective(0.0)) / size

    def _along(
        self, name: str, soft: Sequence[Mapping[str, SoftOrder]], ends: Sequence[Mapping[str, SoftOrder]]
    ) -> NDArray[np.float64]:
        """Return ½(⟨ΣU_t, ΣV_t⟩ − Σ⟨U_t, V_t⟩) for the parts of a tensor that go with (1−s)², s(1−s) and s²."""
        axes = self.axes[name]
        sums: list[Tensor] = []
        own = np.zeros((3, 3))
        for t, (start, end) in enumerate(zip(soft, ends, strict=True)):
            tensor = self._read(t, name)
            first, last = mapped(tensor, axes, start), mapped(tensor, axes, end)
            if len(axes) == 1:
                middle = first + last
            else:
                one, other = axes
                middle = mapped(mapped(tensor, [one], start), [other], end)
                middle += mapped(mapped(tensor, [one], end), [other], start)
            parts = [first, middle, last]
            own += _inner(parts)
            sums = parts if not sums else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
        return 0.5 * (_inner(sums) - own)

    def _read(self, model: int, name: str) -> Tensor:
        return working(self.sources[model].get(name))


def _inner(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the inner products of tensors, in float64."""
    found = np.zeros((len(parts), len(parts)))
    for u, one in enumerate(parts):
        for v, other in enumerate(parts[: u + 1]):
            found[u, v] = found[v, u] = dot(one, other)
    return found
