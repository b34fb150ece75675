"""The geometric median against SciPy's minimiser, points known from geometry, and its own properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.methods.geometric_median import geometric_median
from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared

Vector = np.ndarray[Any, Any]


def points(models: AlignedModels, keys: tuple[str, ...]) -> Vector:
    return np.array([np.concatenate([e.get(k).double().numpy().ravel() for k in keys]) for e in models.experts])


def distances(point: Vector, experts: Vector) -> Vector:
    lengths: Vector = np.linalg.norm(experts - point, axis=1)
    return lengths


def least(experts: Vector) -> Vector:
    """Minimise the sum of distances with SciPy."""

    def value_and_slope(point: Vector) -> tuple[float, Vector]:
        ways = point - experts
        lengths = np.linalg.norm(ways, axis=1)
        return lengths.sum(), (ways / lengths[:, None]).sum(axis=0)

    start = experts.mean(axis=0) + 1e-3
    found = minimize(value_and_slope, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    point: Vector = found.x
    return point


@pytest.mark.parametrize(
    ("count", "size", "seed"), [(3, 2, 1), (3, 5, 0), (4, 2, 3), (5, 3, 4), (8, 20, 5), (15, 2, 6)]
)
def test_it_is_scipys_minimum(count: int, size: int, seed: int) -> None:
    experts = np.random.default_rng(seed).standard_normal((count, size))
    expected = least(experts)
    result = geometric_median([torch.from_numpy(expert) for expert in experts])
    compared("geometric_median", "SciPy's minimize (BFGS)", result, expected)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-7)
    assert distances(result.numpy(), experts).sum() <= distances(expected, experts).sum() + 1e-12


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_pulls_of_the_experts_cancel_in_each_tensor_or_in_the_whole_model(scope: str) -> None:
    models = toy_models(4, spread=0.3)
    result = merged("geometric_median", models, scope=scope)
    keys = tuple(key for key in SHAPES if key != "gate" or scope == "model")
    for group in [keys] if scope == "model" else [(key,) for key in keys]:
        experts = points(models, group)
        ways = experts - np.concatenate([result[key].double().numpy().ravel() for key in group])
        pulls = ways / np.linalg.norm(ways, axis=1)[:, None]
        assert np.linalg.norm(pulls.sum(axis=0)) < 2e-6


def test_the_scope_decides_whether_tensors_share_their_coefficients() -> None:
    models = toy_models(3, spread=0.3)
    models.experts[0].get("head").add_(5.0)  # far off in one small tensor, not in the model
    by_tensor, by_model = (merged("geometric_median", models, scope=scope) for scope in ("tensor", "model"))
    mean = merged("soup", models)
    off = [(result["head"] - mean["head"]).norm() for result in (by_tensor, by_model)]
    assert off[0] > 3 * off[1]
    flat = points(models, tuple(SHAPES))
    whole = np.concatenate([by_model[key].double().numpy().ravel() for key in SHAPES])
    tensorwise = np.concatenate([by_tensor[key].double().numpy().ravel() for key in SHAPES])
    assert distances(whole, flat).sum() < distances(tensorwise, flat).sum()


def test_a_right_triangles_median_is_its_fermat_point() -> None:
    result = merged_x("geometric_median", one_tensor(None, [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(result.numpy(), [(3 - 3**0.5) / 6] * 2, rtol=1e-9)


def test_four_corners_median_is_where_the_diagonals_cross() -> None:
    corners = [[0.0, 0.0], [4.0, 0.0], [1.0, 2.0], [0.0, 1.0]]
    result = merged_x("geometric_median", one_tensor(None, *corners, dtype=torch.float64))
    np.testing.assert_allclose(result.numpy(), crossing(corners), rtol=1e-8)


def crossing(corners: list[list[float]]) -> Vector:
    a, b, c, d = (np.array(corner) for corner in corners)
    along, _ = np.linalg.solve(np.stack([c - a, b - d], axis=1), b - a)
    return np.asarray(a + along * (c - a))


def test_a_corner_of_a_wide_angle_is_returned_bit_for_bit() -> None:
    experts = [[1.0, 0.0], [0.1, 0.123456789], [-1.0, 0.0]]
    assert merged_x("geometric_median", one_tensor(None, *experts)).tolist() == torch.tensor(experts[1]).tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_more_than_half_the_experts_outvote_any_other(count: int) -> None:
    truth = torch.randn(40, generator=torch.Generator().manual_seed(0))
    others = [truth + torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 100 for seed in (1, 2)][:count]
    models = one_tensor(None, *others, *[truth] * (count + 1))
    assert torch.equal(merged_x("geometric_median", models), truth)


def test_of_an_odd_number_of_scalars_it_is_the_median() -> None:
    assert merged_x("geometric_median", one_tensor(None, 3.0, -7.5, 0.3, 100.0, 0.2)).item() == torch.tensor(0.3).item()


def test_of_two_experts_it_is_the_mean() -> None:
    a, b = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged_x("geometric_median", one_tensor(None, a, b)), (a + b) / 2, rtol=1e-6, atol=1e-7)


def test_an_even_number_of_points_in_one_line_have_the_least_sum_between_the_middle_two() -> None:
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    models = one_tensor(None, *(direction * at for at in (0.0, 1.0, 2.0, 10.0)), dtype=torch.float64)
    result = merged_x("geometric_median", models)
    assert 1 - 1e-6 < result.norm().item() < 2 + 1e-6
    torch.testing.assert_close(result / result.norm(), direction, rtol=1e-9, atol=0)


def test_an_expert_that_goes_further_off_in_its_direction_changes_nothing() -> None:
    experts = np.random.default_rng(0).standard_normal((4, 10))
    median = merged_x("geometric_median", one_tensor(None, *experts, dtype=torch.float64)).numpy()
    experts[2] = median + 1000 * (experts[2] - median)
    again = merged_x("geometric_median", one_tensor(None, *experts, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(again, median, atol=1e-6)


def test_it_scales_and_moves_with_the_experts() -> None:
    experts = np.random.default_rng(1).standard_normal((4, 10))
    median = merged_x("geometric_median", one_tensor(None, *experts, dtype=torch.float64)).numpy()
    tiny = merged_x("geometric_median", one_tensor(None, *(experts * 2.0**-40), dtype=torch.float64)).numpy()
    moved = merged_x("geometric_median", one_tensor(None, *(experts + 1000.0), dtype=torch.float64)).numpy()
    np.testing.assert_allclose(tiny * 2.0**40, median, rtol=1e-12)  # the order of sums follows from the values
    np.testing.assert_allclose(moved - 1000, median, atol=1e-9)
    near = merged_x("geometric_median", one_tensor(None, *(experts * 1e-7 + 1000), dtype=torch.float64)).numpy()
    np.testing.assert_allclose((near - 1000) * 1e7, median, atol=1e-5)


def test_small_distances_between_large_weights_are_not_lost() -> None:
    base = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    experts = [base + 1e-4 * torch.randn(base.shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)]
    experts[0] = base + 20 * (experts[0] - base)
    result = merged_x("geometric_median", one_tensor(None, *experts)).double().numpy()
    apart = np.array([expert.double().numpy() for expert in experts])
    expected = transcribed(apart, 500)
    compared("geometric_median", FORMULA, result.astype(np.float32), expected, options="500 iterations")
    assert np.abs(result - expected).max() < 5e-7
    assert np.abs(result - apart.mean(axis=0)).max() > 1e-3


def transcribed(experts: Vector, iterations: int, eps: float = 1e-6) -> Vector:
    point: Vector = experts.mean(axis=0)
    floor = eps * distances(point, experts).mean()
    for _ in range(iterations):
        pulls = 1 / np.maximum(distances(point, experts), floor)
        point = (pulls[:, None] * experts).sum(axis=0) / pulls.sum()
    return point


@pytest.mark.parametrize("eps", [1e-6, 0.7, 0.99])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_each_iteration_is_weiszfelds(iterations: int, eps: float) -> None:
    experts = np.random.default_rng(2).standard_normal((5, 10)) * np.array([[0.3], [1], [2], [3], [1]])
    models = one_tensor(None, *experts, dtype=torch.float64)
    result = merged_x("geometric_median", models, iterations=iterations, eps=eps).numpy()
    expected = transcribed(experts, iterations, eps)
    compared("geometric_median", FORMULA, result, expected, options=f"eps={eps}")
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("key", "value"), [("eps", 0.0), ("eps", 1.0), ("iterations", 0), ("scope", "row")])
def test_parameters_out_of_range_are_errors(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key}={value!r}: must be "):
        merge(get_method("geometric_median"), {key: value}, toy_models(3))
