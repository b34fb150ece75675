"""Effective ranks are those of NumPy's singular values, and what their definitions say of known matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergelab.analyze.ranks import effective_rank, matrix_ranks, mean_rank, stable_rank
from tests.analyze import reference as ref


def ranks_of(given: ref.Models) -> dict[tuple[str, int], tuple[float | None, float | None]]:
    found = matrix_ranks(ref.aligned(given), lambda _message, _done: None)
    return {(rank.name, rank.expert): (rank.effective, rank.stable) for rank in found}


def test_ranks_are_those_of_numpys_singular_values() -> None:
    given = ref.models(2)
    found = ranks_of(given)
    matrices = [name for name, shape in ref.SHAPES.items() if len(shape) == 2]
    assert found.keys() == {(name, expert) for name in matrices for expert in range(2)}
    for (name, expert), (effective, stable) in found.items():
        tau = ref.vectors(given, [name])[expert].reshape(ref.SHAPES[name])
        values = np.linalg.svd(tau, compute_uv=False)
        shares = values / values.sum()
        assert effective == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
        assert stable == pytest.approx((np.linalg.norm(tau) / values[0]) ** 2, rel=1e-9)


def test_equal_singular_values_have_the_full_rank() -> None:
    values = torch.full((7,), 3.0, dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(7)
    assert stable_rank(values) == pytest.approx(7)


def test_one_direction_has_rank_one() -> None:
    base = {"a.weight": torch.zeros(6, 4)}
    change = torch.outer(torch.arange(1.0, 7), torch.tensor([1.0, -2, 0.5, 3]))
    assert ranks_of([base, {"a.weight": change}])["a.weight", 0] == (pytest.approx(1), pytest.approx(1))


def test_a_matrix_that_is_not_changed_has_no_rank() -> None:
    base = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 3)}
    expert = {"a.weight": base["a.weight"].clone(), "b.weight": base["b.weight"] + 1}
    assert ranks_of([base, expert])["a.weight", 0] == (None, None)
    assert mean_rank([None, 2.0, 4.0]) == 3.0
    assert mean_rank([None]) is None
