"""Breadcrumbs: which entries of a row stay, and TIES' election after it; values by mergekit 0.1.5."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.test_mergekit import recipe
from tests.methods.toy import SHAPES, aligned, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, RECORDED_MERGEKIT, compared

# mergekit ranks whole tensors, weighs before the election and counts zeros as positive.
GOLDEN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "breadcrumbs": (
        {"lambda": 0.7},
        [-0.375, 0.0625, 0.5, -0.16578126, 0.35593751, -0.52039063, -0.051718757, 0.45906252,
         -0.45882812, -0.053593755, 0.53320312, -0.35023436, -0.012812495, 0.52804691, -0.24164061, 0.090312496],
    ),
    "breadcrumbs_ties": (
        {"weights_stage": "elect", "tie_break": "positive"},
        [-0.375, 0.0625, 0.5, -0.1296875, 0.30781251, -0.44218749, -0.020312503, 0.41718751,
         -0.52031249, -0.082812503, 0.52656251, -0.41093749, 0.026562497, 0.46406251, -0.30156249, 0.1359375],
    ),
}  # fmt: skip


def sparse(vector: np.ndarray, density: float, gamma: float, scope: str = "row") -> np.ndarray:
    """The entries between the outliers and the small ones, by sorting."""
    lines = vector.reshape(-1, vector.shape[-1]) if scope == "row" and vector.ndim > 1 else vector.reshape(1, -1)
    count = lines.shape[1]
    kept = max(1, int(density * count))
    dropped = min(int(gamma * count), count - kept)
    order = np.argsort(-np.abs(lines), axis=1)
    result = np.zeros_like(lines)
    places = order[:, dropped : dropped + kept]
    np.put_along_axis(result, places, np.take_along_axis(lines, places, axis=1), axis=1)
    return result.reshape(vector.shape)


@pytest.mark.parametrize("method", GOLDEN)
def test_values_are_mergekits(method: str) -> None:
    options, values = GOLDEN[method]
    result = merged_x(
        method, recipe(method), density=0.4, gamma=0.1, scope="tensor", weights=[1.0, 2.0, 0.5], **options
    )
    note = "mergekit ranks whole tensors; its ties weighs before the election and counts zeros as positive"
    compared(method, RECORDED_MERGEKIT, result, values, options="density=0.4, gamma=0.1, scope=tensor", note=note)
    torch.testing.assert_close(result, torch.tensor(values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize(("density", "gamma"), [(0.1, 0.01), (0.3, 0.0), (0.5, 0.2), (0.9, 0.3), (0.001, 0.5)])
def test_the_largest_and_the_smallest_entries_of_every_row_are_dropped(
    density: float, gamma: float, scope: str
) -> None:
    models = distinct_models(3)
    weights = [1.0, 2.0, -0.5]
    result = merged(
        "breadcrumbs", models, density=density, gamma=gamma, scope=scope, weights=weights, **{"lambda": 0.7}
    )
    assert models.base is not None
    for key in SHAPES:
        vectors = [task_vector(models, i, key).numpy() for i in range(3)]
        total = sum(w * sparse(vector, density, gamma, scope) for w, vector in zip(weights, vectors, strict=True))
        expected = models.base.get(key).numpy() + 0.7 * total
        compared(
            "breadcrumbs", FORMULA, result[key], expected, options={"density": density, "gamma": gamma, "scope": scope}
        )
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(700, 300), (2, 140_000), (140_001,)])
def test_large_tensors_are_worked_through_in_parts(shape: tuple[int, ...], scope: str) -> None:
    expert = np.random.default_rng(0).normal(size=shape)
    models = one_tensor(torch.zeros(shape), torch.from_numpy(expert), dtype=torch.float64)
    result = merged_x("breadcrumbs", models, density=0.4, gamma=0.1, scope=scope)
    expected = sparse(expert, 0.4, 0.1, scope)
    compared("breadcrumbs", FORMULA, result, expected, options=f"density=0.4, gamma=0.1, scope={scope}")
    assert np.array_equal(result.numpy(), expected)


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_with_ties_signs_are_elected_among_what_is_left(scope: str) -> None:
    models = distinct_models(4)
    weights = np.array([1.0, 2.0, 1.0, 3.0])
    result = merged(
        "breadcrumbs_ties", models, density=0.6, gamma=0.1, scope=scope, weights=weights.tolist(), lambda_=0.9
    )
    assert models.base is not None
    for key in SHAPES:
        kept = np.stack([sparse(task_vector(models, i, key).numpy(), 0.6, 0.1, scope) for i in range(4)])
        agree = (kept * np.sign(kept.sum(axis=0)) > 0) * weights.reshape(4, *[1] * (kept.ndim - 1))
        mean = (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1e-30)
        expected = models.base.get(key).numpy() + 0.9 * mean
        options = {"density": 0.6, "gamma": 0.1, "scope": scope, "weights": weights.tolist()}
        compared("breadcrumbs_ties", FORMULA, result[key], expected, options=options)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_each_row_of_a_matrix_has_thresholds_of_its_own_and_a_bias_is_one_row() -> None:
    expert = [[1.0, 2.0, 3.0, 4.0], [50.0, -20.0, 30.0, 40.0]]
    models = one_tensor([[0.0] * 4] * 2, expert)
    result = merged_x("breadcrumbs", models, density=0.5, gamma=0.25)
    assert result.tolist() == [[0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 30.0, 40.0]]
    result = merged_x("breadcrumbs", models, density=0.5, gamma=0.25, scope="tensor")
    assert result.tolist() == [[0.0, 0.0, 3.0, 4.0], [0.0, -20.0, 30.0, 0.0]]
    bias = merged_x("breadcrumbs", one_tensor([0.0] * 4, expert[1]), density=0.5, gamma=0.25)
    assert bias.tolist() == [0.0, 0.0, 30.0, 40.0]


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0])
def test_every_row_of_a_small_tensor_keeps_an_entry(method: str, gamma: float) -> None:
    for shape in ((), (1,), (3,), (2, 1), (2, 3), (2, 2, 3)):
        models = one_tensor(torch.zeros(shape), torch.rand(shape) + 1)
        changed = (merged_x(method, models, density=0.01, gamma=gamma) != 0).sum()
        assert changed == (1 if len(shape) < 2 else torch.zeros(shape).numel() // shape[-1])


def test_an_empty_tensor_stays_empty() -> None:
    for shape in ((0,), (0, 3), (3, 0)):
        models = one_tensor(torch.zeros(shape), torch.zeros(shape))
        assert merged_x("breadcrumbs_ties", models).shape == shape


def test_density_one_drops_nothing_not_even_outliers() -> None:
    models = toy_models(3)
    dense, plain = merged("breadcrumbs", models, density=1.0, lambda_=0.3), merged("task_arithmetic", models)
    assert all(torch.equal(dense[key], plain[key]) for key in SHAPES)


def test_fewer_outliers_are_dropped_where_the_density_leaves_no_room() -> None:
    models = one_tensor([0.0] * 4, [1.0, 2.0, 3.0, 4.0])
    assert merged_x("breadcrumbs", models, density=0.75, gamma=0.5).tolist() == [1.0, 2.0, 3.0, 0.0]


def test_entries_that_equal_a_threshold_all_stay() -> None:
    models = one_tensor([0.0] * 6, [3.0, -2.0, 2.0, 1.0, -1.0, 0.5])
    assert merged_x("breadcrumbs", models, density=0.5, gamma=0.2).tolist() == [0.0, -2.0, 2.0, 1.0, -1.0, 0.0]


def test_tensors_that_are_not_contiguous_are_merged_alike() -> None:
    models = toy_models(2)
    assert models.base is not None
    turned = [{"x": source.get("embed").T.contiguous().T} for source in (models.base, *models.experts)]
    plain = [{"x": source.get("embed")} for source in (models.base, *models.experts)]
    for method in ("breadcrumbs", "della"):
        results = [merged(method, aligned(base, experts))["x"] for base, *experts in (turned, plain)]
        assert torch.equal(*results)


def test_the_majority_of_what_is_left_decides_votes_that_cancel() -> None:
    base = {"x": torch.zeros(2), "y": torch.zeros(9)}
    large_negative = torch.tensor([-9.0] * 4 + [0.1] * 5)
    experts = [{"x": torch.tensor([first, 0.5]), "y": large_negative} for first in (1.0, -1.0)]
    models = aligned(base, experts)
    for tie_break, first in (("majority", -1.0), ("positive", 1.0), ("zero", 0.0)):
        result = merged("breadcrumbs_ties", models, density=0.5, gamma=0.0, tie_break=tie_break)
        assert result["x"].tolist() == [first, 0.0]
    assert merged("breadcrumbs_ties", models, density=1.0)["x"].tolist() == [1.0, 0.5]


def test_breadcrumbs_ties_refuses_negative_weights() -> None:
    with pytest.raises(ConfigError, match=r"method\.weights: must be at least 0"):
        merge(get_method("breadcrumbs_ties"), {"weights": [1, -1]}, toy_models(2))
