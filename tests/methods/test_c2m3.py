"""Cycle-consistent alignment of several transformers, against dense matrices in NumPy's float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError, MergeWarning
from mergelab.methods.c2m3 import Orders as Found
from mergelab.methods.c2m3 import synchronised
from mergelab.methods.rebasin import match
from mergelab.ops.permutations import Permutation, find_permutations
from mergelab.ops.soft_permutations import SoftOrder
from tests.methods.test_rebasin import EACH, FAMILIES, HEADS, Family, Orders, State, aligned, state_of
from tests.methods.toy import merged
from tests.parity import C2M3, compared

Array = np.ndarray[Any, Any]
Dense = dict[str, Array]  # P by the permutation's name: P[unit, position]


def units_of(family: Family, states: Sequence[State]) -> tuple[list[Any], tuple[Permutation, ...]]:
    models = aligned(*states)
    shapes = {name: models.experts[0].shape(name) for name in models.names}
    return list(models.experts), find_permutations(shapes, heads=family.heads.get("kv_heads", HEADS))


def axis_matrix(permutations: Sequence[Permutation], dense: Dense, name: str, axis: int, length: int) -> Array:
    """The matrix that acts on an axis of a tensor, (entry, position)."""
    matrix = np.eye(length)
    for each in permutations:
        for slot in each.slots:
            if (slot.tensor, slot.axis) == (name, axis):
                part = slice(slot.offset, slot.offset + each.size * slot.block)
                matrix[part, part] = np.kron(dense[each.name], np.eye(slot.block))
    return matrix


class Authors:
    """The objective and its gradients with dense matrices, pair by pair."""

    def __init__(self, sources: Sequence[Any], permutations: Sequence[Permutation]) -> None:
        self.permutations = permutations
        names = dict.fromkeys(slot.tensor for each in permutations for slot in each.slots)
        self.tensors = [{n: np.atleast_2d(source.get(n).numpy().T).T for n in names} for source in sources]

    def moved(self, model: int, dense: Dense, name: str, *, rows: bool = True, columns: bool = True) -> Array:
        w = self.tensors[model][name]
        if rows:
            w = axis_matrix(self.permutations, dense, name, 0, w.shape[0]).T @ w
        return w @ axis_matrix(self.permutations, dense, name, 1, w.shape[1]) if columns else w

    def objective(self, dense: Sequence[Dense]) -> float:
        moved = [{n: self.moved(t, own, n) for n in self.tensors[0]} for t, own in enumerate(dense)]
        return sum(float((a[n] * b[n]).sum()) for a, b in combinations(moved, 2) for n in a)

    def gradient(self, dense: Sequence[Dense], model: int, permutation: Permutation) -> Array:
        """∂/∂P of a model, (unit, position)."""
        total = np.zeros((permutation.size, permutation.size))
        for slot in permutation.slots:
            own = self.moved(model, dense[model], slot.tensor, rows=slot.axis != 0, columns=slot.axis != 1)
            others = sum(self.moved(t, dense[t], slot.tensor) for t in range(len(dense)) if t != model)
            units, positions = (
                np.moveaxis(w, slot.axis, 0)[slot.offset : slot.offset + permutation.size * slot.block].reshape(
                    permutation.size, -1
                )
                for w in (own, others)
            )
            total += units @ positions.T
        return total

    def solved(self, iterations: int) -> list[Dense]:
        dense = [{each.name: np.eye(each.size) for each in self.permutations} for _ in self.tensors]
        for _ in range(iterations):
            target: list[Dense] = []
            for model in range(len(dense)):
                chosen: Dense = {}
                for each in self.permutations:
                    rows, columns = linear_sum_assignment(self.gradient(dense, model, each), maximize=True)
                    chosen[each.name] = np.zeros((each.size, each.size))
                    chosen[each.name][rows, columns] = 1
                target.append(chosen)

            def along(step: float, dense: list[Dense] = dense, target: list[Dense] = target) -> list[Dense]:
                return [
                    {name: (1 - step) * own[name] + step * end[name] for name in own}
                    for own, end in zip(dense, target, strict=True)
                ]

            five = np.linspace(0, 1, 5)
            quartic = np.poly1d(np.polyfit(five, [self.objective(along(s)) for s in five], 4))
            inside = [root.real for root in quartic.deriv().roots if abs(root.imag) < 1e-9 and 0 < root.real < 1]
            best = max((0.0, 1.0, *inside), key=quartic)
            if quartic(best) <= quartic(0) * (1 + 1e-9):
                break
            dense = along(best)
        return dense


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_orders_are_those_of_the_authors_algorithm_with_dense_matrices(name: str) -> None:
    family = FAMILIES[name]
    states = [state_of(family.model(seed)) for seed in range(3)]
    sources, permutations = units_of(family, states)
    reference = Authors(sources, permutations)
    found = synchronised(sources, permutations, 6, "identity", 0)
    universe = []
    for dense in reference.solved(6):
        orders = {}
        for key, matrix in dense.items():
            units, positions = linear_sum_assignment(matrix, maximize=True)
            orders[key] = units[np.argsort(positions)]
        universe.append(orders)
    for t in range(3):
        for key, order in universe[t].items():
            expected = np.empty_like(order)
            expected[universe[0][key]] = order
            ours, theirs = found[t][key].astype(float), expected.astype(float)
            options = f"{name}, start=identity, max_iterations=6"
            compared("c2m3", C2M3, ours, theirs, options=options, note="the units' orders are what is compared")
            np.testing.assert_array_equal(found[t][key], expected)


def dense_of(orders: Sequence[Mapping[str, Any]]) -> list[Dense]:
    return [{key: np.eye(len(order))[:, order] for key, order in own.items()} for own in orders]


@EACH
def test_shuffled_copies_are_recovered_exactly_and_the_base_stays(family: Family) -> None:
    state = state_of(family.model())
    copies = [family.shuffled(state, Orders(seed)) for seed in range(3)]
    result = merged("c2m3", aligned(state, *copies[:2]), max_iterations=2, **family.heads)
    for name, expected in state.items():
        torch.testing.assert_close(result[name], expected, rtol=0, atol=1e-15)
    result = merged("c2m3", aligned(*copies, base=state), start="matched", **family.heads)
    for name, expected in state.items():
        torch.testing.assert_close(result[name], expected, rtol=0, atol=1e-15)


def test_two_shuffled_copies_are_recovered_where_the_models_own_orders_lead_nowhere() -> None:
    family = FAMILIES["gpt2"]
    state = state_of(family.model())
    models = aligned(state, family.shuffled(state, Orders(1)))
    found = merged("c2m3", models, max_iterations=5, **family.heads)
    assert all(torch.equal(found[name], state[name]) for name in state)
    alone = merged("c2m3", models, start="identity", max_iterations=5, **family.heads)
    assert not all(torch.equal(alone[name], state[name]) for name in state)


def test_all_models_are_at_least_as_near_to_one_another_as_from_either_start_and_by_rebasin() -> None:
    family = FAMILIES["gpt2"]
    states = [state_of(family.model(seed)) for seed in range(3)]
    sources, permutations = units_of(family, states)
    reference = Authors(sources, permutations)
    found = {s: synchronised(sources, permutations, 4, s, 5) for s in ("identity", "matched", "best")}
    eye: list[Found] = [{each.name: np.arange(each.size) for each in permutations} for _ in states]
    pairs = [eye[0], *(match(sources[0], other, permutations, 5, 100) for other in sources[1:])]
    value = {name: reference.objective(dense_of(orders)) for name, orders in {**found, "rebasin": pairs}.items()}
    assert all((order == np.arange(len(order))).all() for order in found["best"][0].values())
    assert value["matched"] >= value["rebasin"] > 1.02 * reference.objective(dense_of(eye))
    assert value["best"] == pytest.approx(max(value.values()), rel=1e-12)
    assert value["best"] > 1.02 * value["rebasin"]


def test_the_method_that_follows_has_its_parameters_and_the_models_weights() -> None:
    family = FAMILIES["gpt2"]
    base = state_of(family.model())
    expert = {name: tensor + 0.01 * torch.sign(tensor) for name, tensor in base.items()}
    models = aligned(family.shuffled(expert, Orders(0)), expert, base=base)
    then = {"name": "task_arithmetic", "lambda": 0.5}
    found = merged("c2m3", models, then=then, weights=[2, 0], heads=HEADS)
    plain = merged("task_arithmetic", aligned(expert, base=base), **{"lambda": 1.0})
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)


def test_the_order_of_the_experts_changes_no_bit() -> None:
    family = FAMILIES["gpt2"]
    states = [state_of(family.model(seed)) for seed in range(3)]
    first, *others = aligned(*states).experts
    models = aligned(*states)
    turned = type(models)(**{**vars(models), "experts": (*others, first)})
    ways = [merged("c2m3", each, then="median", max_iterations=2, heads=HEADS) for each in (models, turned)]
    assert all(torch.equal(ways[0][name], ways[1][name]) for name in ways[0])


def test_a_soft_order_moves_and_is_rounded() -> None:
    soft = SoftOrder.of(np.arange(3)).towards(np.array([1, 0, 2]), 0.6)
    assert soft.nearest().tolist() == [1, 0, 2]
    again = soft.towards(np.array([1, 0, 2]), 0.5)
    assert again.factors.tolist() == pytest.approx([0.2, 0.8])
    assert again.towards(np.array([2, 1, 0]), 1.0).orders.tolist() == [[2, 1, 0]]


def test_what_cannot_be_aligned_says_so() -> None:
    state = {"embed.weight": torch.randn(9, 4), "block.0.weight": torch.randn(4, 4)}
    with pytest.warns(MergeWarning, match="c2m3: knows no hidden units of these models"):
        merged("c2m3", aligned(state, state))
    models = aligned(*[state_of(FAMILIES["gpt2"].model())] * 2)
    with pytest.raises(ConfigError, match=r"method\.heads: c2m3 needs the number of attention heads"):
        merged("c2m3", models)
    with pytest.raises(ConfigError, match="method=ties: needs a base"):
        merge(get_method("c2m3"), {"then": "ties"}, models)
