"""Model Stock against a float64 transcription."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from tests.methods.toy import SHAPES, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


def ratio(vectors: list[np.ndarray]) -> float:
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(vectors, 2)]
    c = np.clip(np.mean(cosines), 0, 1)
    return float(len(vectors) * c / (1 + (len(vectors) - 1) * c))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_step_towards_the_mean_follows_the_angle_between_task_vectors(count: int, scope: str) -> None:
    shared = toy_models(1, seed=9).experts[0]
    models = toy_models(count, spread=0.1)
    for expert in models.experts:  # something in common, so that the angles are not right ones
        for key in SHAPES:
            expert.get(key).add_(0.1 * shared.get(key))
    result = merged("model_stock", models, scope=scope)
    assert models.base is not None
    flat = {key: [task_vector(models, i, key).numpy().ravel() for i in range(count)] for key in SHAPES}
    whole = ratio([np.concatenate([flat[key][i] for key in SHAPES]) for i in range(count)])
    for key in SHAPES:
        r = ratio(flat[key]) if scope == "tensor" else whole
        mean = np.mean([expert.get(key).double().numpy() for expert in models.experts], axis=0)
        expected = r * mean + (1 - r) * models.base.get(key).double().numpy()
        compared("model_stock", FORMULA, result[key], expected, options=f"scope={scope}")
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert key == "gate" or 0.05 < r < 0.99


def test_two_task_vectors_at_sixty_degrees() -> None:
    models = one_tensor([1.0, 1.0], [2.0, 1.0], [1.5, 1 + 3**0.5 / 2])
    expected = torch.tensor([1.0, 1.0]) + 2 * 0.5 / 1.5 * torch.tensor([0.75, 3**0.5 / 4])
    torch.testing.assert_close(merged_x("model_stock", models), expected)


def test_task_vectors_that_oppose_leave_the_base() -> None:
    assert merged_x("model_stock", one_tensor([1.0, 1.0], [2.0, 1.0], [0.0, 1.5])).tolist() == [1.0, 1.0]


def test_an_expert_equal_to_the_base_counts_as_orthogonal() -> None:
    models = one_tensor([0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0])
    c = 1 / 3
    expected = 3 * c / (1 + 2 * c) * 2 / 3
    torch.testing.assert_close(merged_x("model_stock", models), torch.tensor([expected, 0.0]))
