"""PCB-Merging against the authors' way of computing it, in float64 and by sorting whole models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, aligned, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, PCB_MERGING, compared


def clamped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values without the fractions ``low`` and ``high`` of smallest and largest ones, row by row."""
    count = values.shape[1]
    ordered = np.sort(values, axis=1)
    return np.clip(values, ordered[:, [int(count * low)]], ordered[:, [max(0, int(count * (1 - high) - 1))]])


def normalized(values: np.ndarray) -> np.ndarray:
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    return (values - low) / (high - low)


def transcribed(vectors: np.ndarray, ratio: float) -> np.ndarray:
    """The merged task vector of (T, d) task vectors."""
    magnitudes = clamped(np.abs(vectors), 1e-4, 1e-4)
    within = np.exp(len(vectors) * normalized(magnitudes) ** 2)
    between = np.tanh(vectors * vectors.sum(axis=0))
    scale = normalized(clamped(within * between, 1 - ratio, 0))
    return (np.sign(vectors) * magnitudes * scale).sum(axis=0) / np.maximum(scale.sum(axis=0), 1e-300)


def flat(models: AlignedModels) -> tuple[np.ndarray, np.ndarray]:
    """The base and the (T, d) task vectors."""
    assert models.base is not None
    vectors = [
        np.concatenate([task_vector(models, i, key).numpy().ravel() for key in SHAPES])
        for i in range(len(models.experts))
    ]
    return np.concatenate([models.base.get(key).double().numpy().ravel() for key in SHAPES]), np.stack(vectors)


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.97, 1.0])  # from half on, opposed entries are kept too
@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_the_authors_computation_on_the_flattened_models(count: int, ratio: float) -> None:
    models = distinct_models(count)
    result = merged("pcb", models, ratio=ratio, lambda_=1.2)
    base, vectors = flat(models)
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    expected = base + 1.2 * transcribed(vectors, ratio)
    compared("pcb", FORMULA, [result[key] for key in SHAPES], expected, options=f"ratio={ratio}")
    np.testing.assert_allclose(answer, expected, rtol=1e-9, atol=1e-9)


def as_in_the_experiments(vectors: np.ndarray, ratio: float, clamp: float, between: str) -> np.ndarray:
    """The merged task vector of (T, d) task vectors."""
    magnitudes = clamped(np.abs(vectors), clamp, clamp)
    inside = normalized(magnitudes)
    summed = (np.sign(vectors) * inside if between == "normalized" else vectors).sum(axis=0)
    scale = normalized(clamped(np.exp(len(vectors) * inside**2) * np.tanh(vectors * summed), 1 - ratio, 0))
    return (np.sign(vectors) * magnitudes * scale).sum(axis=0) / np.maximum(scale.sum(axis=0), 1e-300)


@pytest.mark.parametrize("between", ["raw", "normalized"])
@pytest.mark.parametrize("clamp", [0.01, 0.2, 0.0])
@pytest.mark.parametrize("ratio", [0.05, 0.7])
def test_the_variants_of_the_authors_experiments_are_their_computations(
    ratio: float, clamp: float, between: str
) -> None:
    models = distinct_models(3)
    options = {"ratio": ratio, "clamp": clamp, "between": between}
    result = merged("pcb", models, **options)
    base, vectors = flat(models)
    expected = base + as_in_the_experiments(vectors, ratio, clamp, between)
    compared("pcb", PCB_MERGING, [result[key] for key in SHAPES], expected, options=options)
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    np.testing.assert_allclose(answer, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(answer - base - transcribed(vectors, ratio)).max() > 1e-3


def test_task_vectors_of_very_different_sizes_have_ranges_of_their_own() -> None:
    models = distinct_models(3)
    assert models.base is not None
    for i, expert in enumerate(models.experts):
        for j, key in enumerate(SHAPES):
            base = models.base.get(key)
            expert.get(key).sub_(base).mul_(10.0 ** (i - 2) * (j + 1)).add_(base)
    result = merged("pcb", models)
    base, vectors = flat(models)
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    np.testing.assert_allclose(answer, base + transcribed(vectors, 0.1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_an_expert_that_opposes_the_others_everywhere_has_a_range_of_negative_scores(ratio: float) -> None:
    models = distinct_models(2)
    assert models.base is not None
    for key in SHAPES:
        base = models.base.get(key)
        models.experts[1].get(key).copy_(base - 0.1 * (models.experts[0].get(key) - base))
    result = merged("pcb", models, ratio=ratio)
    base, vectors = flat(models)
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    np.testing.assert_allclose(answer, base + transcribed(vectors, ratio), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_task_vectors_that_are_mostly_zero_are_no_trouble(share: float, ratio: float) -> None:
    models = distinct_models(3)
    assert models.base is not None
    generator = np.random.default_rng(0)
    for expert in models.experts:
        for key in SHAPES:
            same = torch.from_numpy(np.array(generator.random(models.base.shape(key)) > share))
            expert.get(key)[same] = models.base.get(key)[same]
    result = merged("pcb", models, ratio=ratio)
    base, vectors = flat(models)
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    np.testing.assert_allclose(answer, base + transcribed(vectors, ratio), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_the_same_within_rounding(dtype: torch.dtype) -> None:
    models = toy_models(3, dtype=dtype)
    result = merged("pcb", models)
    base, exact = flat(models)
    vectors = exact.astype(np.float32).astype(np.float64)  # what the engine hands over
    answer = np.concatenate([result[key].double().numpy().ravel() for key in SHAPES])
    step = torch.finfo(dtype).eps
    expected = base + transcribed(vectors, 0.1)
    compared("pcb", FORMULA, [result[key] for key in SHAPES], expected, options="ratio=0.1")
    np.testing.assert_allclose(answer, expected, rtol=step, atol=step)


def test_entries_with_low_scores_stay_at_the_base_and_one_at_least_moves() -> None:
    models = one_tensor([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 9.0], [0.5, -1.0, 1.0, -4.0, 1.0])
    kept = merged_x("pcb", models, ratio=0.01)
    assert (kept != 0).sum() == 1
    assert kept[4] == 4.0 or kept[4] == pytest.approx((4 * 1 + 1 * 1) / 2)
    moved = merged_x("pcb", models, ratio=0.7)
    assert moved[3] == 0  # the votes cancel: no score
    assert moved[4] > 0


@pytest.mark.parametrize("count", [30, 800])
def test_many_experts_do_not_overflow(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(100)
    experts = [{"x": torch.randn(100, generator=generator)} for _ in range(count)]
    result = merged("pcb", aligned({"x": base}, experts, names=[f"e{i}" for i in range(count)]), ratio=0.5)["x"]
    assert result.isfinite().all()
    assert result.abs().max() > 0.1


def test_zero_task_vectors_and_small_tensors_are_no_trouble() -> None:
    assert merged_x("pcb", one_tensor([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])).tolist() == [1.0, 2.0]
    assert merged_x("pcb", one_tensor(1.0, 3.0)).item() == 3.0
    assert merged_x("pcb", one_tensor(1.0, 3.0, 1.0), lambda_=0.5).item() == 2.0
    assert merged_x("pcb", one_tensor(torch.zeros(0), torch.zeros(0))).shape == (0,)
    beside_zero = merged_x("pcb", one_tensor([0.0] * 4, [0.0] * 4, [1.0, 2.0, 3.0, 4.0]), ratio=1.0)
    assert beside_zero[3] == 3.0  # the largest magnitude is an outlier
