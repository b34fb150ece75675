"""Options that mergekit's methods have: weights divided by their sum, sums of magnitudes restored, rows, scales."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, merged, toy_models

WEIGHTS = [1.0, 2.0, -0.5]
MATRIX = "layer.weight"


def vectors(models: Any, key: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base's tensor and the task vectors, in float64."""
    base = models.base.get(key).double().numpy()
    return base, [expert.get(key).double().numpy() - base for expert in models.experts]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"lambda": 0.7}),
        ("dare", {"density": 1.0, "lambda": 0.7}),
        ("della_linear", {"density": 1.0, "lambda": 0.7}),
        ("breadcrumbs", {"density": 1.0, "lambda": 0.7}),
    ],
)
def test_sums_can_be_divided_by_the_weights(method: str, options: dict[str, Any]) -> None:
    models = toy_models()
    found = merged(method, models, weights=WEIGHTS, normalize=True, **options)
    for key in SHAPES:
        base, changes = vectors(models, key)
        expected = base + 0.7 * sum(w * tau for w, tau in zip(WEIGHTS, changes, strict=True)) / sum(WEIGHTS)
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match=r"method\.weights: \[1\.0, -1\.0, 0\.0\] add up to 0"):
        merged(method, models, weights=[1.0, -1.0, 0.0], normalize=True, **options)


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della", "della_linear"])
def test_what_is_kept_has_the_sum_of_magnitudes_of_the_whole(method: str) -> None:
    models = toy_models(1)
    options: dict[str, Any] = {"density": 0.6} | ({"epsilon": 0.2} if "della" in method else {})
    found = merged(method, models, rescale="magnitudes", **options)
    bare = merged(method, models, rescale=False, **options)
    for key in ("embed", MATRIX):
        base, (change,) = vectors(models, key)
        kept, restored = (each[key].double().numpy() - base for each in (bare, found))
        mask = kept != 0
        assert 0.5 < mask.mean() < 0.7
        np.testing.assert_allclose(np.abs(restored[mask]).sum(), np.abs(change).sum(), rtol=1e-4)
        factor = np.abs(change).sum() / np.abs(change[mask]).sum()
        np.testing.assert_allclose(restored[mask], change[mask] * factor, rtol=0, atol=1e-6)
        np.testing.assert_allclose(kept[mask], change[mask], rtol=0, atol=1e-6)


def stock(base: np.ndarray, changes: list[np.ndarray], *, clamp: bool) -> np.ndarray:
    """Model Stock's formula for one row or one tensor."""
    cosines = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(changes, 2)]
    c = float(np.mean(cosines))
    c = min(1.0, max(0.0, c)) if clamp else c
    ratio = len(changes) * c / (1 + (len(changes) - 1) * c)
    return np.asarray(base + ratio * np.mean(changes, axis=0))


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_model_stock_by_row_and_without_the_clamp(scope: str, clamp: bool) -> None:
    models = toy_models()
    found = merged("model_stock", models, scope=scope, clamp=clamp)
    for key in (MATRIX, "layer.bias"):
        base, changes = vectors(models, key)
        if scope == "tensor" or base.ndim == 1:
            expected = stock(base, changes, clamp=clamp)
        else:
            expected = np.stack([stock(base[i], [tau[i] for tau in changes], clamp=clamp) for i in range(len(base))])
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=0, atol=2e-6)
    signs = {np.sign((a * b).sum()) for _, c in [vectors(models, MATRIX)] for a, b in combinations(c, 2)}
    assert -1.0 in signs  # else the clamp would do nothing


def test_multislerp_takes_weights_as_they_are() -> None:
    models = toy_models()
    found = merged("multislerp", models, weights=[1.0, 2.0, 0.5], normalize=False)
    base, changes = vectors(models, MATRIX)
    weights, norms = np.array([1.0, 2.0, 0.5]), np.array([np.linalg.norm(tau) for tau in changes])
    mean = sum(w * tau / n for w, tau, n in zip(weights, changes, norms, strict=True))
    expected = base + mean / np.linalg.norm(mean) * float(weights @ norms)
    np.testing.assert_allclose(found[MATRIX].numpy(), expected, rtol=0, atol=2e-6)


def test_ram_plus_can_count_in_each_tensor() -> None:
    models = toy_models()
    options = {"epsilon": 0.05, "r": 0.3, "alpha": 1.5}
    found = merged("ram_plus", models, scope="tensor", **options)
    for key in (MATRIX, "embed"):
        base, changes = vectors(models, key)
        kept = np.stack([np.where(np.abs(tau) > 0.05, tau, 0) for tau in changes])
        count = (kept != 0).sum(axis=0)
        merged_vector = kept.sum(axis=0) / np.maximum(count, 1)
        scales = []
        for own in kept:
            shared, unique = ((own != 0) & (count > 1)).sum(), ((own != 0) & (count == 1)).sum()
            scales.append(1 + 0.3 * min(shared / unique, 1.5))
        unique_part = sum(scale * own for scale, own in zip(scales, kept, strict=True))
        expected = base + np.where(count == 1, unique_part, merged_vector)
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=0, atol=2e-6)
    assert not torch.equal(found[MATRIX], merged("ram_plus", models, **options)[MATRIX])


def test_passthrough_is_the_model_itself_or_scaled() -> None:
    models = toy_models(1)
    for key in SHAPES:
        own = models.experts[0].get(key)
        assert torch.equal(merged("passthrough", models)[key], own)
        assert torch.equal(merged("passthrough", models, scale=-0.5)[key], own * -0.5)
