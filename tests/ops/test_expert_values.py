"""What weights a mean and a quotient can take, and what can be given for each expert."""

from __future__ import annotations

import pytest

from mergelab.errors import ConfigError
from mergelab.ops.expert_values import DividedBySum, OfExperts, OfMean

NAMES = ("pear", "apple", "quince")


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 0.0, 1e-20), (1.0, 1e-30, 0.0), (1e20, 1.0, 3.0)], ids=str)
def test_a_mean_takes_weights_of_which_one_is_above_zero(weights: tuple[float, ...]) -> None:
    OfMean().check("method.weights", weights, {}, NAMES)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0, -0.5, 1.0), "must be at least 0 for a weighted mean, and that of apple is -0.5 "),
        ((0.0, 0.0, 0.0), "at least one must be above 0 for a weighted mean"),
        ((1.0, 1.0, 1e-31), "must be 0 or at least 1e-30, and that of quince is 1e-31"),
    ],
)
def test_a_mean_takes_no_other_weights(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: {said}"):
        OfMean().check("here", weights, {}, NAMES)


@pytest.mark.parametrize(
    "weights", [(1.0, -1.0, 0.5), (-1.0, -1.0, -1.0), (1.0, -1.0, 1e-6), (1e-9, -2e-9, 3e-9)], ids=str
)
def test_a_quotient_takes_weights_of_any_sign_whose_sum_is_more_than_rounding(weights: tuple[float, ...]) -> None:
    DividedBySum().check("method.weights", weights, {}, NAMES)


@pytest.mark.parametrize(
    ("weights", "shown"),
    [
        ((1.0, -1.0, 0.0), "1.0, -1.0, 0.0"),
        ((0.1, 0.2, -0.3), "0.1, 0.2, -0.3"),
        ((1e6, 2e6, -3e6 - 0.3), "1000000.0, 2000000.0, -3000000.3"),
        ((0.0, 0.0, 0.0), "0.0, 0.0, 0.0"),
        ((1e-31, 1e-31, 0.0), "1e-31, 1e-31, 0.0"),
    ],
)
def test_weights_that_cancel_but_for_float32_rounding_are_no_divisor(weights: tuple[float, ...], shown: str) -> None:
    with pytest.raises(ConfigError, match=r"add up to 0, and they are divided by their sum$") as error:
        DividedBySum().check("here", weights, {}, NAMES)
    assert f"[{shown}]" in str(error.value)


def test_weights_that_are_not_divided_may_cancel() -> None:
    mark = DividedBySum(when="normalize")
    mark.check("here", (1.0, -1.0), {"normalize": False}, NAMES)
    with pytest.raises(ConfigError, match=r"; normalize=false only adds them up$"):
        mark.check("here", (1.0, -1.0), {"normalize": True}, NAMES)


def test_numbers_of_experts_that_are_ranked_together_must_be_one() -> None:
    mark = OfExperts(float, one_where=("scope", "pooled"))
    for value, scope in ((0.3, "pooled"), (None, "pooled"), ((0.3, 0.4), "model"), ({"pear": 0.3}, "tensor")):
        mark.check("here", value, {"scope": scope}, NAMES)
    for value in ((0.3, 0.4), {"pear": 0.3}):
        with pytest.raises(ConfigError, match=r"^here: must be one number for all experts where scope=pooled"):
            mark.check("here", value, {"scope": "pooled"}, NAMES)
