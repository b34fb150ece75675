"""Task arithmetic and MagMax against NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.methods.toy import SHAPES, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


@pytest.mark.parametrize("weights", [None, [1.0, -2.0, 0.5]])
def test_task_arithmetic_adds_the_scaled_sum(weights: list[float] | None) -> None:
    models = toy_models(3)
    result = merged("task_arithmetic", models, lambda_=0.4, weights=weights)
    assert models.base is not None
    for key in SHAPES:
        total = sum(w * task_vector(models, i, key) for i, w in enumerate(weights or [1.0] * 3))
        expected = models.base.get(key).double() + 0.4 * total
        options = {"lambda_": 0.4} | ({"weights": weights} if weights else {})
        compared("task_arithmetic", FORMULA, result[key], expected, options=options)
        np.testing.assert_allclose(result[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_it_is_a_sum_and_not_a_mean() -> None:
    assert merged_x("task_arithmetic", one_tensor([1.0], [2.0], [2.0], [2.0]), lambda_=1.0).tolist() == [4.0]


def test_a_negative_weight_negates() -> None:
    assert merged_x("task_arithmetic", one_tensor([1.0], [3.0]), lambda_=1.0, weights=[-1]).tolist() == [-1.0]


def test_magmax_takes_the_largest_magnitude_and_of_equal_ones_the_later() -> None:
    models = one_tensor([0.0, 0.0, 0.0, 0.0], [1.0, -3.0, 2.0, 0.5], [-2.0, 1.0, -2.0, 0.25])
    assert merged_x("magmax", models, lambda_=1.0).tolist() == [-2.0, -3.0, -2.0, 0.5]
    turned = one_tensor([0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, -2.0, 0.25], [1.0, -3.0, 2.0, 0.5])
    assert merged_x("magmax", turned, lambda_=1.0).tolist() == [-2.0, -3.0, 2.0, 0.5]


def test_magmax_is_numpys_argmax() -> None:
    models = toy_models(4)
    result = merged("magmax", models, lambda_=0.5)
    assert models.base is not None
    for key in SHAPES:
        base = models.base.get(key).numpy()
        vectors = np.stack([expert.get(key).numpy() - base for expert in models.experts])
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)[0]
        compared("magmax", FORMULA, result[key], base + 0.5 * largest)
        np.testing.assert_allclose(result[key].numpy(), base + 0.5 * largest, rtol=1e-6, atol=1e-7)
