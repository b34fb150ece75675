"""Consensus task arithmetic: whose entry it is, and how many must use it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_lambda": 0.2},
        {"mask_lambda": 0.9, "min_tasks": 1},
        {"min_tasks": 3},
        {"min_tasks": 4, "mask_lambda": 0.1},
        {"weights": [1.0, 2.0, 0.5, -1.0]},
    ],
    ids=str,
)
def test_it_is_the_papers_formula(options: dict[str, Any]) -> None:
    models = distinct_models(4)
    result = merged("consensus", models, lambda_=0.7, **options)
    assert models.base is not None
    for key in SHAPES:
        vectors = np.stack([task_vector(models, i, key).numpy() for i in range(4)])
        weights = np.array(options.get("weights", [1.0] * 4)).reshape(4, *[1] * (vectors.ndim - 1))
        multi_task = (weights * vectors).sum(axis=0)
        used = np.abs(vectors) > options.get("mask_lambda", 0.4) * np.abs(multi_task - vectors)
        mask = used.sum(axis=0) >= options.get("min_tasks", 2)
        expected = models.base.get(key).numpy() + 0.7 * mask * multi_task
        compared("consensus", FORMULA, result[key], expected, options=options)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_entries_that_too_few_tasks_use_are_dropped() -> None:
    # The first entry is used by three tasks, the second by two, the third by one.
    models = one_tensor([0.0] * 3, [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.1, 0.0])
    total = torch.tensor([3.0, 2.1, 1.0])
    for min_tasks, kept in ((1, [1, 1, 1]), (2, [1, 1, 0]), (3, [1, 0, 0])):
        result = merged_x("consensus", models, lambda_=1.0, min_tasks=min_tasks)
        torch.testing.assert_close(result, total * torch.tensor(kept))
    torch.testing.assert_close(merged_x("consensus", models, mask_lambda=0.5, lambda_=1.0)[0], torch.tensor(0.0))


def test_an_entry_that_nobody_changed_is_nobodys() -> None:
    models = one_tensor([1.0, 2.0], [1.0, 3.0], [1.0, 3.0])
    assert merged_x("consensus", models, mask_lambda=0.0, lambda_=1.0).tolist() == [1.0, 4.0]


def test_with_no_task_needed_it_is_task_arithmetic() -> None:
    models = toy_models(3)
    weights = [1.0, -2.0, 0.5]
    results = [
        merged("consensus", models, min_tasks=0, weights=weights),
        merged("task_arithmetic", models, weights=weights),
    ]
    assert all(torch.equal(results[0][key], results[1][key]) for key in SHAPES)


def test_more_tasks_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.min_tasks=3: must be at most the number of experts, 2"):
        merge(get_method("consensus"), {"min_tasks": 3}, toy_models(2))
    with pytest.raises(ConfigError, match=r"method\.min_tasks=2: must be at most the number of experts, 1"):
        merge(get_method("consensus"), {}, toy_models(1))
    models = toy_models(1)
    assert models.base is not None
    alone = merged("consensus", models, min_tasks=1, lambda_=1.0)
    torch.testing.assert_close(alone["embed"], models.experts[0].get("embed"))


def test_half_precision_models_are_compared_in_float32() -> None:
    models = one_tensor([1.0] * 2, [1.0078125, 1.5], [1.0078125, 1.0], dtype=torch.bfloat16)
    assert merged_x("consensus", models, lambda_=1.0).tolist() == [1.015625, 1.0]
