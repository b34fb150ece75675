"""DELLA: which probability an entry has, what becomes of it, and TIES' election after it; probabilities by mergekit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.methods.della import keep_probabilities
from mergelab.ops.philox import words
from mergelab.weights.align import AlignedModels
from tests.methods.toy import (
    SHAPES,
    aligned,
    distinct_models,
    mask_key,
    merged,
    merged_x,
    one_tensor,
    task_vector,
    toy_models,
)
from tests.parity import FORMULA, RECORDED_MERGEKIT, compared

OWN_NUMBERS = "the transcription takes the random numbers that were drawn"


def probabilities(vector: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Linear in the rank within the row."""
    lines = np.abs(vector.reshape(-1, vector.shape[-1]) if vector.ndim > 1 else vector.reshape(1, -1))
    if lines.shape[1] == 1:
        return np.full(vector.shape, density)
    ranks = lines.argsort(axis=1, kind="stable").argsort(axis=1)
    return (density - epsilon + 2 * epsilon * ranks / (lines.shape[1] - 1)).reshape(vector.shape)


def dropped(models: AlignedModels, key: str, density: float, epsilon: float, seed: int = 0) -> list[np.ndarray]:
    """Every expert's task vector in a tensor after the drop, in float64."""
    kept = []
    for i, expert in enumerate(models.experts):
        vector = task_vector(models, i, key).numpy()
        p = probabilities(vector, density, epsilon)
        drawn = words(mask_key(expert.get(key), key, seed), 0, vector.size).reshape(vector.shape) / 2**32
        kept.append(np.where(drawn < p, vector / p, 0))
    return kept


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.2), (0.85, 0.15), (0.5, 0.0)])
def test_kept_entries_are_divided_by_their_own_probability_and_added_up(density: float, epsilon: float) -> None:
    models = distinct_models(3)
    weights = [1.0, 2.0, -1.0]
    result = merged("della_linear", models, density=density, epsilon=epsilon, lambda_=0.7, weights=weights, seed=5)
    assert models.base is not None
    for key in SHAPES:
        kept = dropped(models, key, density, epsilon, seed=5)
        total = sum(weight * vector for weight, vector in zip(weights, kept, strict=True))
        expected = models.base.get(key).numpy() + 0.7 * total
        options = {"density": density, "epsilon": epsilon, "weights": weights}
        compared("della_linear", FORMULA, result[key], expected, options=options, note=OWN_NUMBERS)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_della_elects_and_averages_what_was_kept() -> None:
    models = distinct_models(4)
    weights = np.array([1.0, 2.0, 1.0, 3.0])
    result = merged("della", models, density=0.6, epsilon=0.3, lambda_=0.9, weights=weights.tolist())
    assert models.base is not None
    for key in SHAPES:
        kept = np.stack(dropped(models, key, 0.6, 0.3))
        agree = (kept * np.sign(kept.sum(axis=0)) > 0) * weights.reshape(4, *[1] * (kept.ndim - 1))
        mean = (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1e-30)
        expected = models.base.get(key).numpy() + 0.9 * mean
        options = {"density": 0.6, "epsilon": 0.3, "weights": weights.tolist()}
        compared("della", FORMULA, result[key], expected, options=options, note=OWN_NUMBERS)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(700, 300), (2, 140_000), (140_001,)])
def test_large_tensors_are_worked_through_in_parts(shape: tuple[int, ...]) -> None:
    expert = np.random.default_rng(0).normal(size=shape)
    models = one_tensor(torch.zeros(shape), torch.from_numpy(expert), dtype=torch.float64)
    result = merged_x("della_linear", models, density=0.4, epsilon=0.3)
    expected = dropped(models, "x", 0.4, 0.3)[0]
    compared("della_linear", FORMULA, result, expected, options="density=0.4, epsilon=0.3", note=OWN_NUMBERS)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


def test_probabilities_are_mergekits() -> None:
    # What its della_magprune gives torch.bernoulli for a row of five, density 0.4, epsilon 0.1, smallest entry first.
    theirs = torch.tensor([0.3, 0.35, 0.4, 0.45, 0.5])
    ours = keep_probabilities(5, 0.4, 0.1).float()
    note = "the keep-probabilities alone"
    for method in ("della", "della_linear"):
        compared(method, RECORDED_MERGEKIT, ours, theirs, options="density=0.4, epsilon=0.1", note=note)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def mean_of_kept(expert: Sequence[float], seeds: int, **parameters: float) -> np.ndarray:
    count = len(expert)
    rows = torch.tensor(expert).expand(2000, count)
    models = one_tensor(torch.zeros(2000, count), rows)
    results = [merged_x("della_linear", models, seed=seed, **parameters).numpy() for seed in range(seeds)]
    return np.concatenate(results)


def test_the_expectation_stays_and_larger_entries_are_kept_more_often() -> None:
    expert = [1.0, -3.0, 2.0, 4.0]
    kept = mean_of_kept(expert, 10, density=0.5, epsilon=0.3)
    np.testing.assert_allclose((kept != 0).mean(axis=0), [0.2, 0.6, 0.4, 0.8], atol=0.015)
    np.testing.assert_allclose(kept.mean(axis=0), expert, rtol=0.06)
    for place, p in enumerate([0.2, 0.6, 0.4, 0.8]):
        np.testing.assert_allclose(np.unique(kept[:, place])[[0, -1]], sorted([0, expert[place] / p]), rtol=1e-6)


def test_each_row_has_ranks_of_its_own_and_a_bias_is_one_row() -> None:
    expert = torch.tensor([[1.0, 2.0, 3.0], [60.0, 50.0, 40.0]])
    hits = {shape: np.zeros(shape) for shape in ((2, 3), (6,))}
    for seed in range(150):
        for shape in hits:
            models = one_tensor(torch.zeros(shape), expert.reshape(shape))
            hits[shape] += merged_x("della_linear", models, density=0.5, epsilon=0.4, seed=seed).numpy() != 0
    np.testing.assert_allclose(hits[2, 3] / 150, [[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]], atol=0.13)
    np.testing.assert_allclose(hits[6,] / 150, [0.1, 0.26, 0.42, 0.9, 0.74, 0.58], atol=0.13)


def test_an_entry_alone_in_its_row_is_kept_with_the_density() -> None:
    models = one_tensor(torch.zeros(50_000, 1), torch.ones(50_000, 1))
    result = merged_x("della_linear", models, density=0.25, epsilon=0.2)
    assert sorted(set(result.flatten().tolist())) == [0.0, 4.0]
    assert abs((result != 0).float().mean() - 0.25) < 0.01
    assert merged_x("della_linear", one_tensor(0.0, 1.0), density=0.25, epsilon=0.2).item() in (0.0, 4.0)


def test_density_one_drops_nothing_whatever_epsilon_is() -> None:
    models = toy_models(3)
    dense, plain = merged("della_linear", models, density=1.0, lambda_=0.3), merged("task_arithmetic", models)
    assert all(torch.equal(dense[key], plain[key]) for key in SHAPES)
    elected, ties = merged("della", models, density=1.0), merged("ties", models, density=1.0)
    assert all(torch.equal(elected[key], ties[key]) for key in SHAPES)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_the_seed_decides_and_another_expert_beside_it_does_not(method: str) -> None:
    models = toy_models(3)
    results = [merged(method, models, seed=seed)["embed"] for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    alone = dataclasses.replace(models, experts=models.experts[2:])
    together = merged("della_linear", models, weights=[0, 0, 1])
    assert all(torch.equal(together[key], value) for key, value in merged("della_linear", alone).items())


def test_the_majority_of_what_is_kept_decides_votes_that_cancel() -> None:
    base = {"x": torch.zeros(2), "y": torch.zeros(400)}
    mixed = torch.tensor([-1.0] * 150 + [1.0] * 250)
    mixed[:150] *= 9  # larger, so nearly all are kept, and of the small ones nearly none
    experts = [{"x": torch.tensor([first, 0.5]), "y": mixed} for first in (1.0, -1.0)]
    models = aligned(base, experts)
    options = {"density": 0.5, "epsilon": 0.49}
    seed = next(s for s in range(99) if _cancels(models, options, s))
    for tie_break, sign in (("majority", -1), ("positive", 1), ("zero", 0)):
        assert merged("della", models, tie_break=tie_break, seed=seed, **options)["x"][0].sign() == sign
    assert merged("della", models, density=1.0)["x"][0] == 1


def _cancels(models: AlignedModels, options: dict[str, float], seed: int) -> bool:
    """Both experts keep their first entry."""
    one, other = (kept[0] for kept in dropped(models, "x", seed=seed, **options))
    return bool(one + other == 0 and one != 0)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.15, 0.15)])
def test_probabilities_out_of_range_are_refused(method: str, density: float, epsilon: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.epsilon={epsilon}: must be less than density"):
        merge(get_method(method), {"density": density, "epsilon": epsilon}, toy_models(2))


def test_della_refuses_negative_weights() -> None:
    with pytest.raises(ConfigError, match=r"method\.weights: must be at least 0"):
        merge(get_method("della"), {"weights": [1, -1]}, toy_models(2))
