"""C²M³: permute the hidden units of all models at once, consistently around every cycle, before another method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mergelab.engine.chaining import ChainedWeights, chained, check_then
from mergelab.engine.method import Substitute, merge_method
from mergelab.methods.rebasin import PermutedSource, axis_indices, match, units_to_permute
from mergelab.ops.permutations import Order, Permutation
from mergelab.ops.philox import stream_key
from mergelab.ops.soft_permutations import AxisView, SoftOrder, SoftOrders, best_order, views_of
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot
from mergelab.weights.source import TensorSource

Start = Literal["best", "identity", "matched"]
Orders = dict[str, Order]  # a model's, by the permutation's name
LEAST_GAIN = 1e-6  # relative gain of an iteration below which the search ends


@merge_method(
    check=check_then,
    order_matters=True,
    family="alignment",
    paper="Crisostomi et al. 2024, arXiv:2405.17897",
    work="solves a linear sum assignment for each permutation of each model, in some tens of iterations",
    authors={"start": "identity"},
    use="more than two models trained from different starts, before another method",
)
def c2m3(
    models: AlignedModels,
    *,
    seed: int = 0,
    then: str | Mapping[str, Any] = "soup",
    weights: ChainedWeights = None,
    start: Start = "best",
    max_iterations: Annotated[int, Field(ge=1)] = 200,
    heads: Annotated[int, Field(ge=1)] | None = None,
    kv_heads: Annotated[int, Field(ge=1)] | None = None,
) -> Substitute:
    """Permute all models' hidden units into a common order, then merge by another method.

    Each model t has permutations P_t,ℓ to a common order (the universe), so that the one from model s to model t, by
    way of the universe, is the same along any path. They maximise Σ_{s<t} Σ_ℓ ⟨P_s,ℓᵀ W_s,ℓ P_s,ℓ−1,
    P_t,ℓᵀ W_t,ℓ P_t,ℓ−1⟩. The Frank-Wolfe algorithm moves all of them at once over convex combinations of permutations:
    in each iteration towards the permutations of largest inner product with the gradient (a linear sum assignment for
    each), by the step that maximises the objective, which is a polynomial of degree 4 along the way. It ends where an
    iteration gains less than 1e-6 of the objective, and takes the nearest permutations (Crisostomi et al. 2024,
    arXiv:2405.17897). Which hidden units there are is said at `rebasin`. A base is one of the models.

    Departures: the search starts both at the models' own orders and at the orders that `rebasin` finds, and the
    permutations of the largest objective are taken, among them `rebasin`'s own. From the models' own orders alone, as
    in one of the authors' configurations, two models exchange their orders without end, since both move towards each
    other; the authors' other start, uniform matrices with random perturbations, is not offered. The step is found
    exactly, not by a bounded search. The models are brought from the universe into the order of the base (or of the
    expert whose name sorts first), so that what is not merged fits; for the merge that is the same. Activations are not
    renormalised (REPAIR).

    Args:
        models: base and experts.
        seed: of the random order in which `rebasin` goes through the permutations.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters.
        weights: per expert, passed on to ``then``; default 1.
        start: ``identity`` starts at the models' own orders, ``matched`` at `rebasin`'s; ``best`` tries both.
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
    found = synchronised(sources, permutations, max_iterations, start, stream_key(seed, "rebasin"))
    orders = dict(zip(map(id, sources), found, strict=True))
    shapes = {name: tuple(reference.shape(name)) for name in models.names}

    def moved(expert: TensorSource) -> TensorSource:
        if expert is reference:
            return expert
        return PermutedSource(expert, axis_indices(permutations, orders[id(expert)], shapes))

    return Substitute(method, parameters, replace(models, experts=tuple(map(moved, models.experts))))


def synchronised(
    sources: Sequence[TensorSource], permutations: Sequence[Permutation], max_iterations: int, start: Start, key: int
) -> list[Orders]:
    """Find the orders of each model's units in the order of the first model, by the permutation's name.

    Args:
        sources: models of one architecture.
        permutations: the units to permute.
        max_iterations: maximum number of iterations from a start.
        start: as for `c2m3`.
        key: of the random stream for `match`.
    """
    search = _Search(sources, views_of(permutations))
    own: list[Orders] = [{each.name: np.arange(each.size) for each in permutations} for _ in sources]
    candidates: list[list[Orders]] = []
    if start != "matched":
        candidates.append(search.run(own, max_iterations))
    if start != "identity":
        first, *others = sources
        matching = in_order(lambda other: match(first, other, permutations, key, max_sweeps=100), others)
        matched = [own[0], *matching]
        candidates += [search.run(matched, max_iterations), matched]
    best = (
        candidates[0] if len(candidates) == 1 else max(candidates, key=lambda orders: search.objective(_soft(orders)))
    )
    return [{name: _relative(best[0][name], order) for name, order in each.items()} for each in best]


def _soft(orders: Sequence[Orders]) -> list[dict[str, SoftOrder]]:
    return [{name: SoftOrder.of(order) for name, order in each.items()} for each in orders]


def _relative(reference: Order, order: Order) -> Order:
    """Return a model's unit at each unit of the reference, from the units of both at each position of the universe."""
    found = np.empty_like(order)
    found[reference] = order
    return found


@dataclass(frozen=True)
class _Search:
    """The objective over soft permutations of several models.

    Memory: for each model one similarity of all units of a permutation, in float64, and blocks of a tensor.
    """

    sources: Sequence[TensorSource]
    views: Mapping[str, Sequence[AxisView]]

    def run(self, start: Sequence[Orders], max_iterations: int) -> list[Orders]:
        """Return the orders that the Frank-Wolfe algorithm finds from a start."""
        soft = _soft(start)
        for _ in range(max_iterations):
            targets = self.targets(soft)
            step, gain = self.step(soft, targets)
            if step <= 0 or gain <= 0:
                break
            soft = [
                {name: own.towards(target[name], step) for name, own in each.items()}
                for each, target in zip(soft, targets, strict=True)
            ]
            if gain <= LEAST_GAIN:
                break
        return [{name: own.nearest() for name, own in each.items()} for each in soft]

    def targets(self, soft: Sequence[SoftOrders]) -> list[Orders]:
        """Return for each model the orders of largest inner product with the objective's gradient."""
        found: list[Orders] = [{} for _ in self.sources]
        for name, views in self.views.items():
            size = views[0].rows.size
            gradients = [torch.zeros(size, size, dtype=torch.float64) for _ in self.sources]
            for view in views:
                self._add_gradients(view, soft, gradients)
            for orders, gradient in zip(found, gradients, strict=True):
                orders[name] = best_order(gradient.numpy())
        return found

    def _add_gradients(self, view: AxisView, soft: Sequence[SoftOrders], gradients: Sequence[Tensor]) -> None:
        """Add what a tensor adds to the gradients by the permutation of its rows, (position, unit)."""
        matrices = self._matrices(view)
        for part in view.parts(matrices[0]):
            units = [view.columns_mapped(matrix, own, part) for matrix, own in zip(matrices, soft, strict=True)]
            positions = [view.rows_mapped(each, own) for each, own in zip(units, soft, strict=True)]
            total = torch.stack(positions).sum(0)
            pairs = ((total - moved, own) for moved, own in zip(positions, units, strict=True))
            similar = in_order(lambda pair: view.rows.similarity(*pair), pairs, ahead=1)
            for gradient, each in zip(gradients, similar, strict=True):
                gradient += each

    def objective(self, soft: Sequence[SoftOrders]) -> float:
        """Return Σ_{s<t} ⟨model s, model t⟩."""

        def summand(each: tuple[AxisView, list[Tensor], slice]) -> float:
            view, matrices, part = each
            moved = [_moved(view, matrix, part, own, own) for matrix, own in zip(matrices, soft, strict=True)]
            return float(_pair_products([[each] for each in moved])[0, 0])

        return math.fsum(in_order(summand, self._parts()))

    def step(self, soft: Sequence[SoftOrders], targets: Sequence[Orders]) -> tuple[float, float]:
        """Return the step towards ``targets`` of the largest objective, and how much it gains, relative to that."""
        ends = _soft(targets)

        def summand(each: tuple[AxisView, list[Tensor], slice]) -> NDArray[np.float64]:
            view, matrices, part = each
            return _pair_products([_along(view, *args, part) for args in zip(matrices, soft, ends, strict=True)])

        gram = sum(in_order(summand, self._parts()), start=np.zeros((3, 3)))
        ways = [np.poly1d([1, -2, 1]), np.poly1d([-1, 1, 0]), np.poly1d([1, 0, 0])]  # (1−s)², s(1−s), s²
        objective = np.poly1d([0])
        for u, row in zip(ways, gram, strict=True):
            for v, inner in zip(ways, row, strict=True):
                objective = objective + inner * (u * v)
        inside = [root.real for root in objective.deriv().roots if abs(root.imag) < 1e-12 and 0 < root.real < 1]
        best = max((0.0, 1.0, *inside), key=objective)
        size = max(abs(objective(0.0)), abs(objective(best)), np.finfo(float).tiny)
        return best, float(objective(best) - objective(0.0)) / size

    def _parts(self) -> Iterator[tuple[AxisView, list[Tensor], slice]]:
        """Yield parts of each tensor of all models, each tensor once."""
        for view in {view.tensor: view for views in self.views.values() for view in views}.values():
            matrices = self._matrices(view)
            yield from ((view, matrices, part) for part in view.parts(matrices[0]))

    def _matrices(self, view: AxisView) -> list[Tensor]:
        return [view.matrix(source.get(view.tensor)) for source in self.sources]


def _moved(view: AxisView, matrix: Tensor, part: slice, rows: SoftOrders, columns: SoftOrders) -> Tensor:
    return view.rows_mapped(view.columns_mapped(matrix, columns, part), rows)


def _along(view: AxisView, matrix: Tensor, start: SoftOrders, end: SoftOrders, part: slice) -> list[Tensor]:
    """Return what goes with (1−s)², s(1−s) and s² in a part of a tensor that is mapped by (1−s)·start + s·end."""
    first, last = _moved(view, matrix, part, start, start), _moved(view, matrix, part, end, end)
    if view.columns is None:
        return [first, first + last, last]
    return [first, _moved(view, matrix, part, start, end) + _moved(view, matrix, part, end, start), last]


def _pair_products(models: Sequence[Sequence[Tensor]]) -> NDArray[np.float64]:
    """Return Σ_{s<t} of the inner products of the parts of models s and t, symmetrised."""
    sums = [torch.stack(parts).sum(0) for parts in zip(*models, strict=True)]
    return 0.5 * (_inner(sums) - sum((_inner(parts) for parts in models), start=np.zeros((len(sums), len(sums)))))


def _inner(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.array([[dot(one, other) for other in parts] for one in parts])
