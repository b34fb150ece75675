"""NearSwap and Arcee Fusion against mergekit and float64 transcriptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, aligned, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, RECORDED_MERGEKIT, compared

Vector = np.ndarray[Any, Any]
SCIPYS_PARTS = f"{FORMULA}, with SciPy's softmax and rel_entr"

BASE = [((7 * i + 3) % 19 - 9) / 16 for i in range(16)]
NEAR = [x + ((11 * i + 5) % 17 - 7.3) / 64 for i, x in enumerate(BASE)]
FAR = [x + ((3 * i * i + 1) % 11 - 5) ** 3 / 40 for i, x in enumerate(BASE)]


def matrix(values: list[float]) -> Vector:
    return np.array(values).reshape(4, 4)


def test_nearswaps_values_are_mergekits() -> None:
    result = merged_x("nearswap", one_tensor(BASE, NEAR, dtype=torch.float64), t=0.05)
    expected = [
        -0.4109375, 0.1125, 0.5421875, -0.3, 0.2375, -0.5359375, -0.175, 0.3625,
        -0.4265625, -0.05, 0.4875, -0.3171875, 0.075, 0.6125, -0.2078125, 0.2,
    ]  # fmt: skip
    note = "mergekit moves entries nearer than 1e-6 less far where t is less than that"
    compared("nearswap", RECORDED_MERGEKIT, result, expected, options="t=0.05", note=note)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (16,)])
def test_arcee_fusions_values_are_mergekits(shape: tuple[int, ...]) -> None:
    base, expert = (np.array(values).reshape(shape) for values in (BASE, FAR))
    result = merged_x("arcee_fusion", one_tensor(base, expert, dtype=torch.float64))
    expected = [
        -1.975, 0.0625, 0.5, -0.25, 0.1875, 2.5625, 3.0, 0.3125,
        -0.4375, 0.0, 0.4375, -1.9125, 0.125, 0.5625, -0.1875, 0.25,
    ]  # fmt: skip
    compared("arcee_fusion", RECORDED_MERGEKIT, result, expected)
    np.testing.assert_allclose(result.numpy().ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("t", [1e-4, 0.05, 0.3])
def test_an_entry_is_swapped_where_it_is_near_and_moved_where_it_is_not(t: float) -> None:
    models = toy_models(2, spread=0.1)
    result = merged("nearswap", models, t=t)
    for key in SHAPES:
        a, b = (expert.get(key).double().numpy() for expert in models.experts)
        share = np.clip(t / np.abs(a - b), 0, 1)
        compared("nearswap", FORMULA, result[key], share * b + (1 - share) * a, options=f"t={t}")
        np.testing.assert_allclose(result[key].numpy(), share * b + (1 - share) * a, rtol=1e-6, atol=1e-7)
        near = torch.from_numpy(np.asarray(np.abs(a - b) < 0.999 * t))
        assert torch.equal(result[key][near], models.experts[1].get(key)[near])


def test_t_of_zero_leaves_the_first_and_a_large_one_gives_the_second() -> None:
    models = toy_models(2)
    for t, index in ((0.0, 0), (1e3, 1), (1e300, 1)):
        result = merged("nearswap", models, t=t)
        assert all(torch.equal(result[key], models.experts[index].get(key)) for key in SHAPES)


def test_entries_nearer_than_mergekits_smallest_distance_are_swapped_too() -> None:
    assert merged_x("nearswap", one_tensor(None, [0.0], [5e-7]), t=5e-7).item() == torch.tensor(5e-7).item()


def test_t_is_not_negative() -> None:
    with pytest.raises(ConfigError, match=r"method\.t=-0\.1: must be at least 0"):
        merge(get_method("nearswap"), {"t": -0.1}, toy_models(2))


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion"])
def test_a_base_and_one_expert_are_a_pair_as_two_experts_are(method: str) -> None:
    models = toy_models(2, spread=0.5)
    first, second = ({key: expert.get(key) for key in SHAPES} for expert in models.experts)
    as_base = merged(method, aligned(first, [second]))
    with_another_base = merged(method, models)
    turned = merged(method, aligned(second, [first]))
    for key in SHAPES:
        assert torch.equal(as_base[key], with_another_base[key])
    assert not torch.equal(as_base["embed"], turned["embed"])


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion"])
def test_one_expert_alone_is_an_error_before_a_tensor_is_read(method: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.experts: one alone is given; two models are merged"):
        merge(get_method(method), {}, one_tensor(None, [1.0]))


def fused(a: Vector, b: Vector) -> Vector:
    """Arcee Fusion in float64."""
    p, q = (softmax(np.atleast_1d(x), axis=-1) + 1e-8 for x in (b, a))
    importance = np.abs(b - a) * rel_entr(p, q).sum(axis=-1, keepdims=True).reshape((*p.shape[:-1], 1))
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (third - first), b, a).reshape(a.shape)


@pytest.mark.parametrize("spread", [2e-3, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entries_that_matter_most_are_taken_over(spread: float, dtype: torch.dtype) -> None:
    models = toy_models(2, spread=spread, dtype=dtype)
    result = merged("arcee_fusion", models)
    for key in SHAPES:
        a, b = (expert.get(key).double().numpy() for expert in models.experts)
        compared("arcee_fusion", SCIPYS_PARTS, result[key], fused(a, b))
        np.testing.assert_array_equal(result[key].double().numpy(), fused(a, b))
    taken = (result["embed"] != models.experts[0].get("embed")).double().mean().item()
    assert 0.02 < taken < 0.4


def test_quartiles_are_exact_in_tensors_of_more_than_a_million_entries() -> None:
    a, b = torch.randn(2, 1100, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = merged_x("arcee_fusion", one_tensor(None, a, b, dtype=torch.float64))
    compared("arcee_fusion", SCIPYS_PARTS, result, fused(a.numpy(), b.numpy()))
    np.testing.assert_array_equal(result.numpy(), fused(a.numpy(), b.numpy()))


def test_a_row_that_differs_by_a_constant_has_no_divergence_and_stays() -> None:
    a = torch.randn(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=2)
    b = a + torch.randn(8, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b[3] = a[3] + 4.0
    result = merged_x("arcee_fusion", one_tensor(a, b, dtype=torch.float64))
    assert torch.equal(result[3], a[3])
    assert not torch.equal(result[2], a[2])


def test_where_three_quarters_are_unchanged_every_change_is_taken_over() -> None:
    a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[:4] += 0.1 * torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(merged_x("arcee_fusion", one_tensor(a, b)), b)


def test_scalars_are_taken_over() -> None:
    assert merged_x("arcee_fusion", one_tensor(1.5, 2.5)).item() == 2.5


def test_a_matrix_of_one_column_has_rows_of_one_entry() -> None:
    result = merged_x("arcee_fusion", one_tensor(np.zeros((3, 1)), np.array([[1.0], [2.0], [3.0]])))
    assert result.ravel().tolist() == [1.0, 2.0, 3.0]
