"""Subspace Boosting against a float64 transcription."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from tests.methods.authors import authors_models
from tests.methods.test_svc import THENS, split
from tests.methods.toy import merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared


def boosted(merged_vector: np.ndarray, beta: float) -> np.ndarray:
    u, s, v = np.linalg.svd(merged_vector, full_matrices=False)
    at = int(np.argmax(np.cumsum(s) / s.sum() >= beta))
    return u @ np.diag(np.maximum(s, s[at])) @ v


@pytest.mark.parametrize("then", [each for each in THENS if split(each)[0] != "subspace_boosting"], ids=str)
@pytest.mark.parametrize("beta", [0.01, 0.4, 0.7])
def test_the_merge_of_any_other_method_is_boosted(then: Any, beta: float) -> None:
    models = authors_models()
    result = merged("subspace_boosting", models, then=then, beta=beta)
    other, options = split(then)
    plain = merged(other, models, **options)
    assert models.base is not None
    for name in ("layer.0.up.weight", "layer.0.down.weight", "layer.1.up.weight"):
        base = models.base.get(name).numpy()
        if np.linalg.matrix_rank(plain[name].numpy() - base, tol=1e-10) < min(base.shape):
            continue
        expected = base + boosted(plain[name].numpy() - base, beta)
        compared("subspace_boosting", FORMULA, result[name], expected, options=f"then={other}, beta={beta}")
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=0, atol=1e-10)


def test_in_float32_it_is_the_formula_within_rounding() -> None:
    models = toy_models(3)
    result = merged("subspace_boosting", models)
    assert models.base is not None
    for name in ("layer.weight", "head"):
        base = models.base.get(name).double().numpy()
        change = 0.3 * sum(expert.get(name).double().numpy() - base for expert in models.experts)
        expected = base + boosted(change, 0.01)
        compared("subspace_boosting", FORMULA, result[name], expected)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.0, [4.0, 4.0, 4.0]), (0.5, [4.0, 4.0, 4.0]), (0.6, [4.0, 3.0, 3.0]), (1.0, [4.0, 3.0, 1.0])],
)
def test_the_level_is_where_the_sum_reaches_the_fraction(beta: float, expected: list[float]) -> None:
    models = one_tensor(torch.zeros(3, 3), torch.diag(torch.tensor([4.0, 3.0, 1.0])), dtype=torch.float64)
    result = merged_x("subspace_boosting", models, beta=beta, then={"name": "task_arithmetic", "lambda": 1.0})
    torch.testing.assert_close(result, torch.diag(torch.tensor(expected, dtype=torch.float64)))


def test_directions_that_no_expert_changes_stay_the_bases() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(20, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    models = one_tensor(torch.eye(20), torch.eye(20, dtype=torch.float64) + left @ right.T, dtype=torch.float64)
    change = merged_x("subspace_boosting", models, beta=0.0) - torch.eye(20)
    values = torch.linalg.svdvals(change)
    torch.testing.assert_close(values[:3], values[:1].expand(3))
    assert values[3] < 1e-12 * values[0]


SUMS: list[Any] = ["task_arithmetic", {"name": "task_arithmetic", "lambda": 1.7}, "soup"]


@pytest.mark.parametrize(("method", "options"), [("subspace_boosting", {"beta": 0.3}), ("svc", {"alpha": 0.01})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", SUMS, ids=str)
def test_what_rounding_alone_adds_to_experts_of_low_rank_is_no_direction_of_theirs(
    method: str, options: dict[str, Any], dtype: torch.dtype, then: Any
) -> None:
    generator = np.random.default_rng(0)
    base = torch.from_numpy(0.04 * generator.standard_normal((60, 50))).to(dtype)
    parts = [(generator.standard_normal((60, 3)), generator.standard_normal((3, 50))) for _ in range(2)]
    exact = [base.double() + torch.from_numpy(0.05 * a @ b) for a, b in parts]
    wanted = merged_x(method, one_tensor(base.double(), *exact, dtype=torch.float64), then=then, **options)
    stored = one_tensor(base, *(each.to(dtype) for each in exact), dtype=dtype)
    result = dict(merge(get_method(method), {"then": then, **options}, stored, dtype=torch.float64))["x"]
    change, expected = (each.numpy() - base.double().numpy() for each in (result, wanted))
    spans = np.linalg.qr(np.concatenate([a for a, _ in parts], axis=1))[0]
    unit = torch.finfo(dtype).eps
    assert np.linalg.norm(change - spans @ (spans.T @ change)) < 5 * unit * np.linalg.norm(change)
    np.testing.assert_allclose(change, expected, rtol=0, atol=20 * unit * np.abs(expected).max())


def test_embeddings_and_tensors_that_are_no_matrices_are_what_the_other_method_makes_of_them() -> None:
    models = toy_models(3, dtype=torch.float64)
    result, plain = merged("subspace_boosting", models, then="ties"), merged("ties", models)
    for name in ("embed", "layer.bias", "gate"):
        torch.testing.assert_close(result[name], plain[name], rtol=0, atol=1e-14)
