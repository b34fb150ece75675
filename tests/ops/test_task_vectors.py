"""Trim, elect and reduce against PEFT's merge utilities and by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from mergelab.ops.task_vectors import (
    MajoritySign,
    Reduce,
    disjoint_reduce,
    elect,
    factors,
    just_below,
    resolve_zeros,
    task_vectors,
    trim,
    trim_,
    weighted_sum,
)
from tests.parity import compared


@pytest.fixture
def vectors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4001, generator=generator) for _ in range(5)]


def test_trim_keeps_what_peft_keeps(vectors: list[Tensor]) -> None:
    for vector in vectors:
        threshold = vector.abs().sort(descending=True).values[int(0.2 * 4001) - 1].item()
        assert torch.equal(trim_(vector.clone(), threshold), merge_utils.magnitude_based_pruning(vector, 0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trim_keeps_entries_equal_to_the_threshold(dtype: torch.dtype) -> None:
    vector = torch.tensor([0.1, -0.2, 0.2, 0.3, 0.0, -1e-42], dtype=dtype)
    threshold = vector[2].item()
    assert trim_(vector.clone(), threshold).tolist() == torch.tensor([0, -0.2, 0.2, 0.3, 0, 0], dtype=dtype).tolist()
    assert torch.equal(trim_(vector.clone(), 0.0), vector)
    kept = trim_(vector.clone(), abs(vector[5].item())) != 0
    assert kept.tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.25, 0.3, 0.0, 1e-42])
def test_in_place_and_by_a_bound_the_same_entries_stay(threshold: float, dtype: torch.dtype) -> None:
    bound = just_below(threshold, dtype)
    vector = torch.tensor([bound, -bound, threshold, -threshold, 0.0, 2 * threshold, 1.0, -1e-30], dtype=dtype)
    assert trim(vector, bound).tolist()[:2] == [0.0, 0.0] or threshold == 0
    assert torch.equal(trim(vector, bound), trim_(vector.clone(), threshold))


def test_trim_of_float32_by_a_float64_threshold_between_two_numbers() -> None:
    one = np.float32(1)
    above = np.nextafter(one, np.float32(2))
    middle = (float(one) + float(above)) / 2
    assert trim_(torch.tensor([float(one), float(above)]), middle).tolist() == [0.0, float(above)]


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
def test_elected_signs_and_disjoint_mean_are_pefts(vectors: list[Tensor], majority_sign: MajoritySign) -> None:
    trimmed = [merge_utils.magnitude_based_pruning(vector, 0.4) for vector in vectors]
    mask = merge_utils.calculate_majority_sign_mask(torch.stack(trimmed), method=majority_sign)
    expected = merge_utils.disjoint_merge(torch.stack(trimmed), mask)
    signs = resolve_zeros(elect(trimmed, majority_sign=majority_sign), 1.0)
    ours = disjoint_reduce(trimmed, signs, (1.0,) * 5)
    note = "election and mean of what PEFT trimmed"
    compared("ties", "PEFT's disjoint_merge", ours, expected, options=f"majority_sign={majority_sign}", note=note)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_weighted_sum_is_pefts_task_arithmetic(vectors: list[Tensor]) -> None:
    weights = [0.3, -1.0, 1.0, 2.5, 0.0]
    expected = merge_utils.task_arithmetic(vectors, torch.tensor(weights))
    ours = weighted_sum(vectors, weights)
    note = "the merged task vector"
    compared("task_arithmetic", "PEFT's task_arithmetic", ours, expected, options={"weights": weights}, note=note)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def reduced(reduce: Reduce, values: list[list[float]], signs: list[float], weights: tuple[float, ...]) -> list[float]:
    return disjoint_reduce([torch.tensor(v) for v in values], torch.tensor(signs), weights, reduce).tolist()


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", [(2 * 1 + 3 * 3.5) / 5, -2.0, 0.0, 0.0]),
        ("sum", [2 * 1 + 3 * 3.5, -2.0, 0.0, 0.0]),
        ("max", [10.5, -2.0, 0.0, 0.0]),
    ],
)
def test_only_agreeing_entries_count_each_with_its_weight(reduce: Reduce, expected: list[float]) -> None:
    values = [[1.0, 5.0, 1.0, 0.0], [3.5, 0.0, -1.0, 0.0], [-7.0, -2.0, 0.0, 0.0]]
    assert reduced(reduce, values, [1.0, -1.0, 0.0, 1.0], (2.0, 3.0, 1.0)) == expected


def test_an_agreeing_expert_of_weight_zero_gives_zero_not_nan() -> None:
    assert reduced("mean", [[1.0], [-1.0]], [1.0], (0.0, 1.0)) == [0.0]


@pytest.mark.parametrize(("sign", "expected"), [(1.0, [1, 1, -1]), (-1.0, [-1, 1, -1]), (0.0, [0, 1, -1])])
def test_zero_signs_take_the_given_one(sign: float, expected: list[float]) -> None:
    assert resolve_zeros(torch.tensor([0.0, 1.0, -1.0]), sign).tolist() == expected


def test_task_vectors_of_half_precision_are_differences_in_float32() -> None:
    base, expert = torch.tensor([1.0, 300.0]).half(), torch.tensor([1.001, 300.25]).half()
    (difference,) = task_vectors(base, [expert])
    assert difference.dtype == torch.float32
    assert torch.equal(difference, expert.float() - base.float())
    assert task_vectors(base.double(), [expert.double()])[0].dtype == torch.float64


@pytest.mark.parametrize("call", [lambda: factors({"a": 1.0}, 1), lambda: factors([1.0], 2)])
def test_factors_are_one_per_expert(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="weights are needed"):
        call()
