"""Extrapolation against the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, distinct_models, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 2.5])
def test_one_expert_is_the_papers_formula(alpha: float) -> None:
    models = distinct_models(1)
    result = merged("expo", models, alpha=alpha)
    assert models.base is not None
    for key in SHAPES:
        sft, aligned = (source.get(key).numpy() for source in (models.base, models.experts[0]))
        expected = aligned + alpha * (aligned - sft)
        compared("expo", FORMULA, result[key], expected, options=f"alpha={alpha}, one expert")
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_several_experts_are_averaged_first(weights: Any) -> None:
    models = distinct_models(3)
    result = merged("expo", models, alpha=0.4, weights=weights)
    assert models.base is not None
    for key in SHAPES:
        base = models.base.get(key).numpy()
        average = np.average([expert.get(key).numpy() for expert in models.experts], axis=0, weights=weights)
        expected = average + 0.4 * (average - base)
        compared("expo", FORMULA, result[key], expected, options="alpha=0.4, average of three experts")
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_default_goes_three_tenths_of_the_way_beyond() -> None:
    assert merged_x("expo", one_tensor([1.0], [2.0])).tolist() == pytest.approx([2.3])


@pytest.mark.parametrize("alpha", [-0.1, float("inf")])
def test_a_factor_below_0_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.alpha=.*: must be a"):
        merge(get_method("expo"), {"alpha": alpha}, toy_models(1))


def test_weights_that_cancel_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.weights: \[1\.0, -1\.0\] add up to 0"):
        merge(get_method("expo"), {"weights": [1.0, -1.0]}, toy_models(2))


def test_half_precision_is_the_formula_within_rounding() -> None:
    models = toy_models(1, dtype=torch.bfloat16)
    result = merged("expo", models)
    assert models.base is not None
    sft, aligned = (source.get("embed").double() for source in (models.base, models.experts[0]))
    expected = aligned + 0.3 * (aligned - sft)
    compared("expo", FORMULA, result["embed"], expected, options="alpha=0.3, one expert")
    torch.testing.assert_close(result["embed"].double(), expected, rtol=2**-8, atol=0)
