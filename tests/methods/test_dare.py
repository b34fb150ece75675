"""DARE: what is dropped, how the rest is scaled, and TIES' election after it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, mask_key, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared

OWN_MASKS = "the transcription takes the masks that were drawn"


def mask(models: AlignedModels, expert: int, tensor: str, density: float, seed: int = 0) -> np.ndarray:
    """Which entries an expert keeps, by NumPy's own Philox."""
    values = models.experts[expert].get(tensor)
    raw = np.random.Philox(key=mask_key(values, tensor, seed)).random_raw(values.numel() // 2 + 1)
    return (raw.view("<u4")[: values.numel()] < density * 2**32).reshape(values.shape)


@pytest.mark.parametrize("rescale", [True, False])
def test_kept_entries_are_divided_by_the_density_and_added_up(rescale: bool) -> None:
    models = toy_models(3)
    result = merged("dare", models, density=0.3, lambda_=0.7, weights=[1, 2, -1], rescale=rescale, seed=5)
    assert models.base is not None
    for key in SHAPES:
        total = np.zeros(models.base.shape(key))
        for i, weight in enumerate([1, 2, -1]):
            vector = task_vector(models, i, key).numpy()
            kept = mask(models, i, key, 0.3, seed=5)
            total += weight * vector * kept / (0.3 if rescale else 1)
        expected = models.base.get(key).double().numpy() + 0.7 * total
        options = f"density=0.3, weights=[1, 2, -1], rescale={rescale}"
        compared("dare", FORMULA, result[key], expected, options=options, note=OWN_MASKS)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_about_the_density_is_kept_and_the_expectation_stays() -> None:
    count = 200_000
    result = merged_x("dare", one_tensor(torch.zeros(count), torch.ones(count)), density=0.8)
    assert sorted(set(result.tolist())) == pytest.approx([0.0, 1.25])
    assert abs((result != 0).float().mean() - 0.8) < 0.005
    assert abs(result.mean() - 1) < 0.005


def test_density_one_drops_nothing() -> None:
    models = toy_models(3)
    dense, plain = merged("dare", models, density=1.0, lambda_=0.3), merged("task_arithmetic", models)
    assert all(torch.equal(dense[key], plain[key]) for key in SHAPES)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_the_seed_decides(method: str) -> None:
    models = toy_models(2)
    results = [merged(method, models, seed=seed)["embed"] for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_another_expert_beside_it_changes_nothing_about_an_experts_mask() -> None:
    models = toy_models(3)
    alone = dataclasses.replace(models, experts=models.experts[2:])
    together = merged("dare", models, weights=[0, 0, 1])
    assert all(torch.equal(together[key], value) for key, value in merged("dare", alone).items())


def test_dare_ties_elects_and_averages_what_was_kept() -> None:
    models = toy_models(4)
    result = merged("dare_ties", models, density=0.6, lambda_=0.9, weights=[1, 2, 1, 3])
    assert models.base is not None
    for key in SHAPES:
        kept = []
        for i in range(4):
            vector = task_vector(models, i, key).numpy()
            kept.append(vector * mask(models, i, key, 0.6) / 0.6)
        sign = np.sign(sum(kept))
        agree = [(vector * sign > 0) * weight for vector, weight in zip(kept, [1, 2, 1, 3], strict=True)]
        shares = np.maximum(sum(agree), 1e-30)
        mean = sum(vector * share for vector, share in zip(kept, agree, strict=True)) / shares
        expected = models.base.get(key).double().numpy() + 0.9 * mean
        options = "density=0.6, weights=[1, 2, 1, 3]"
        compared("dare_ties", FORMULA, result[key], expected, options=options, note=OWN_MASKS)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_second_trim_keeps_its_fraction_of_all_entries() -> None:
    models = toy_models(1)
    result = merged("dare_ties", models, density=0.5, trim_density=0.1)
    assert models.base is not None
    vectors = [task_vector(models, 0, key).float().numpy().ravel() for key in SHAPES]
    kept = np.concatenate(
        [v * mask(models, 0, key, 0.5).ravel() / np.float32(0.5) for key, v in zip(SHAPES, vectors, strict=True)]
    )
    threshold = np.sort(np.abs(kept))[::-1][int(0.1 * kept.size) - 1]
    trimmed = np.where(np.abs(kept) >= threshold, kept, 0)
    base = np.concatenate([models.base.get(key).numpy().ravel() for key in SHAPES])
    merged_flat = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    ours, options = [result[key] for key in SHAPES], "density=0.5, trim_density=0.1"
    compared("dare_ties", FORMULA, ours, base + trimmed, options=options, note=OWN_MASKS)
    np.testing.assert_allclose(merged_flat, base + trimmed, rtol=1e-6, atol=1e-6)
    assert (trimmed != 0).sum() == int(0.1 * kept.size)


def test_a_second_trim_of_more_than_was_kept_changes_nothing() -> None:
    models = toy_models(2)
    plain, trimmed = (merged("dare_ties", models, density=0.3, trim_density=d) for d in (None, 0.9))
    assert all(torch.equal(plain[key], trimmed[key]) for key in SHAPES)


def test_dare_ties_refuses_negative_weights() -> None:
    with pytest.raises(ConfigError, match=r"method\.weights: must be at least 0"):
        merge(get_method("dare_ties"), {"weights": [1, -1]}, toy_models(2))
