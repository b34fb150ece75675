"""A lambda that grows with depth, against the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.errors import ConfigError
from tests.engine.test_per_tensor import NAMES, models
from tests.methods.toy import aligned, merged
from tests.parity import FORMULA, LINES, compared


def depth(name: str) -> float:
    """Tensors outside of the layers have α, as the first layer."""
    return int(name.split(".")[2]) / 4 if ".layer." in name else 0.0


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.6), (None, 0.5), (0.5, -0.4)])
def test_task_arithmetic_is_scaled_layer_by_layer(alpha: float | None, beta: float) -> None:
    given = models(3)
    result = merged("lines", given, alpha=alpha, beta=beta)
    assert given.base is not None
    for name in NAMES:
        base = given.base.get(name).double().numpy()
        change = sum((expert.get(name).double().numpy() - base for expert in given.experts), np.zeros_like(base))
        scale = (1 / 3 if alpha is None else alpha) + beta * depth(name)
        compared("lines", FORMULA, result[name], base + scale * change, options=f"alpha={alpha}, beta={beta}")
        np.testing.assert_allclose(result[name].numpy(), base + scale * change, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("then", ["ties", {"name": "dare", "density": 0.4}, {"name": "iso_c"}])
def test_any_method_on_task_vectors_can_follow(then: Any) -> None:
    given = models(2)
    name, options = (
        (then, {}) if isinstance(then, str) else (then["name"], {k: v for k, v in then.items() if k != "name"})
    )
    result = merged("lines", given, then=then, alpha=0.1, beta=0.8)
    for tensor in ("encoder.layer.0.mlp.weight", "encoder.layer.3.mlp.weight", "norm"):
        expected = merged(name, given, lambda_=0.1 + 0.8 * depth(tensor), **options)[tensor]
        torch.testing.assert_close(result[tensor], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "then", ["ties", {"name": "dare", "density": 0.4, "weights": [1, 2, 0.5]}, "iso_c", "task_arithmetic"]
)
def test_the_default_of_alpha_is_the_ratio_of_the_norms_over_the_number_of_experts(then: Any) -> None:
    given = models(3)
    name, options = (then, {}) if isinstance(then, str) else (then["name"], dict(then))
    options.pop("name", None)
    weights = options.pop("weights", None)
    start = {n: given.base.get(n).double().numpy() for n in NAMES}
    once = merged(name, given, lambda_=1.0, seed=3, **({"weights": weights} if weights else {}), **options)
    change = {n: once[n].double().numpy() - start[n] for n in NAMES}
    total = sum(
        np.abs(
            sum(
                w * (e.get(n).double().numpy() - start[n])
                for w, e in zip(weights or [1] * 3, given.experts, strict=True)
            )
        ).sum()
        for n in NAMES
    )
    alpha = total / sum(np.abs(each).sum() for each in change.values()) / 3
    chained = {"name": name, **options}
    result = merged("lines", given, then=chained, beta=0.3, seed=3, **({"weights": weights} if weights else {}))
    assert (abs(alpha - 1 / 3) > 0.01) == (name != "task_arithmetic")
    for n in NAMES:
        expected = start[n] + (alpha + 0.3 * depth(n)) * change[n]
        compared("lines", LINES, result[n], expected, options={"then": name, "alpha": None, "beta": 0.3})
        np.testing.assert_allclose(result[n].numpy(), expected, rtol=3e-6, atol=3e-6)


def test_an_experts_own_rules_for_other_parameters_stay() -> None:
    given = models(2)
    then = {"name": "ties", "density": 0.5, "rules": [{"match": "norm", "density": 1.0}]}
    result = merged("lines", given, then=then, alpha=0.2, beta=0.6)
    expected = merged("ties", given, lambda_=0.2, **{k: v for k, v in then.items() if k != "name"})
    torch.testing.assert_close(result["norm"], expected["norm"], rtol=1e-6, atol=1e-6)


def test_where_the_merge_is_the_base_alpha_has_a_value() -> None:
    base = models(2).base
    same = {n: base.get(n) for n in NAMES}
    result = merged("lines", aligned(same, [same, dict(same)]), then="ties")
    assert all(torch.equal(result[n], same[n]) for n in NAMES)


def test_weights_are_handed_on() -> None:
    given = models(2)
    result, expected = (merged("lines", given, weights=weights, beta=0.0, alpha=1.0) for weights in ([2, 0], None))
    assert given.base is not None
    base, first = given.base.get("norm"), given.experts[0].get("norm")
    torch.testing.assert_close(result["norm"], base + 2 * (first - base))
    assert not torch.equal(result["norm"], expected["norm"])


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("soup", "method.then='soup': must be a method with a parameter lambda"),
        ("tise", "method.then='tise': must be the name of a merge method"),
        ({"name": "ties", "lambda": 0.3}, "its lambda is what lines sets"),
        ("fisher", "must be a method that makes one model of weights alone"),
    ],
)
def test_what_cannot_follow_is_one_line(then: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        merged("lines", models(2), then=then)
