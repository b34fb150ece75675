"""Soup and median against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 0.0], [3.0, -1.0, 1.0, 1.0]])
def test_soup_is_the_weighted_average(weights: list[float] | None) -> None:
    models = toy_models(4)
    result = merged("soup", models, weights=weights)
    shares = np.array(weights or [1.0] * 4)
    for key in SHAPES:
        stacked = np.stack([expert.get(key).double().numpy() for expert in models.experts])
        expected = np.tensordot(shares, stacked, 1) / shares.sum()
        compared("soup", FORMULA, result[key], expected, options={"weights": weights} if weights else "")
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_soup_without_normalizing_is_the_weighted_sum() -> None:
    models = one_tensor(None, [1.0, 2.0], [10.0, 20.0])
    assert merged_x("soup", models, weights=[2, -1], normalize=False).tolist() == [-8.0, -16.0]
    assert merged_x("soup", models, weights=[1, -1], normalize=False).tolist() == [-9.0, -18.0]


def test_soup_of_weights_that_add_up_to_zero_is_an_error() -> None:
    models = one_tensor(None, [1.0], [2.0])
    with pytest.raises(ConfigError, match=r"method\.weights: \[1\.0, -1\.0\] add up to 0"):
        merge(get_method("soup"), {"weights": [1, -1]}, models)
    with pytest.raises(ConfigError, match="add up to 0"):
        merge(get_method("soup"), {}, models, weights=[1, -1])


def test_soup_of_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    experts = [torch.full((3,), value, dtype=torch.float16) for value in (40000.0, 49984.0, 59968.0)]
    assert merged_x("soup", one_tensor(None, *experts, dtype=torch.float16)).tolist() == [49984.0] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_median_is_numpys(count: int) -> None:
    models = toy_models(count)
    result = merged("median", models)
    for key in SHAPES:
        stacked = np.stack([expert.get(key).numpy() for expert in models.experts])
        compared("median", "NumPy's median", result[key], np.median(stacked, axis=0))
        np.testing.assert_allclose(result[key].numpy(), np.median(stacked, axis=0), rtol=1e-7)


def test_an_even_median_is_the_mean_of_the_middle_two() -> None:
    models = one_tensor(None, [1.0, 8.0], [2.0, 7.0], [30.0, 6.0], [4.0, -50.0])
    assert merged_x("median", models).tolist() == [3.0, 6.5]
