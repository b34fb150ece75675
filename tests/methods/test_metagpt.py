"""Coefficients from norms, against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergelab.methods.metagpt import prepare_coefficients
from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


def transcribed(models: AlignedModels) -> dict[str, np.ndarray]:
    """The merged tensors, in float64."""
    count = len(models.experts)
    vectors = {key: [task_vector(models, i, key).numpy() for i in range(count)] for key in SHAPES}
    squares = np.array([sum((vectors[key][i] ** 2).sum() for key in SHAPES) for i in range(count)])
    shares = squares / squares.sum()
    assert models.base is not None
    return {
        key: models.base.get(key).double().numpy() + np.tensordot(shares, np.stack(vectors[key]), 1) for key in SHAPES
    }


def unequal_models(dtype: torch.dtype = torch.float64) -> AlignedModels:
    """Experts whose task vectors have different norms, in different proportions from tensor to tensor."""
    models = distinct_models(3) if dtype == torch.float64 else toy_models(3, dtype=dtype)
    assert models.base is not None
    for expert, factor in zip(models.experts, (0.5, 2.0, 7.0), strict=True):
        for key in ("embed", "head"):
            base = models.base.get(key)
            expert.get(key).copy_(base + (expert.get(key) - base) * (factor if key == "embed" else 1 / factor))
    return models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_papers_formula(dtype: torch.dtype) -> None:
    models = unequal_models(dtype)
    result, expected = merged("metagpt", models), transcribed(models)
    step = max(torch.finfo(dtype).eps, 1e-12)
    for key in SHAPES:
        compared("metagpt", FORMULA, result[key], expected[key])
        np.testing.assert_allclose(result[key].double().numpy(), expected[key], rtol=step, atol=step)


def test_coefficients_by_hand() -> None:
    models = one_tensor([0.0, 0.0], [3.0, 4.0], [0.0, 1.0])  # squared norms 25 and 1
    assert sorted(prepare_coefficients(models)) == pytest.approx([1 / 26, 25 / 26])
    torch.testing.assert_close(merged_x("metagpt", models), torch.tensor([75.0, 101.0]) / 26)


def test_a_tied_tensor_counts_once() -> None:
    models = unequal_models()
    assert models.aliases == {"tied": "embed"}
    assert sum(prepare_coefficients(models)) == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_whose_squares_float32_cannot_hold_count(size: float) -> None:
    models = one_tensor([0.0, 0.0], [3 * size, 4 * size], [0.0, size])
    assert sorted(prepare_coefficients(models)) == pytest.approx([1 / 26, 25 / 26])


def test_experts_equal_to_the_base_have_no_part() -> None:
    models = one_tensor([1.0, 2.0], [1.0, 2.0], [2.0, 0.0])
    assert merged_x("metagpt", models).tolist() == [2.0, 0.0]
