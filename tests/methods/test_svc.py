"""Singular Value Calibration against the authors' recorded values and a float64 transcription."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.authors import authors_models, recorded, source
from tests.methods.toy import aligned, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared

THENS: list[Any] = [
    "task_arithmetic",
    {"name": "task_arithmetic", "lambda": 1.7},
    "ties",
    {"name": "dare", "density": 0.4},
    {"name": "breadcrumbs", "density": 0.5},
    "tsv_m",
    "consensus",
    {"name": "subspace_boosting", "beta": 1.0},
    {"name": "lines", "then": "ties", "beta": 0.7},
    "soup",
]


def calibrated(merged_vector: np.ndarray, vectors: list[np.ndarray], alpha: float) -> np.ndarray:
    """The formula, one singular direction after the other."""
    u, s, v = np.linalg.svd(merged_vector, full_matrices=False)
    for r in range(len(s)):
        response = u[:, r] @ merged_vector
        own = [u[:, r] @ vector for vector in vectors]
        s[r] *= len(vectors) / sum(max(alpha, response @ each / (each @ each)) for each in own)
    return u @ np.diag(s) @ v


def split(then: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(then, str):
        return then, {}
    return then["name"], {key: value for key, value in then.items() if key != "name"}


def changes(models: AlignedModels, name: str) -> list[np.ndarray]:
    assert models.base is not None
    base = models.base.get(name).double().numpy()
    return [expert.get(name).double().numpy() - base for expert in models.experts]


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_it_makes_what_the_authors_code_makes(alpha: float) -> None:
    result, theirs = merged("svc", authors_models(), alpha=alpha), recorded(f"svc alpha={alpha}")
    compared("svc", source(f"svc alpha={alpha}"), [result[key] for key in theirs], list(theirs.values()))
    for key, expected in theirs.items():
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("then", THENS, ids=str)
@pytest.mark.parametrize("name", ["layer.0.up.weight", "layer.0.down.weight", "layer.1.up.weight"])
def test_the_merge_of_any_other_method_is_calibrated(then: Any, name: str) -> None:
    models = authors_models()
    result = merged("svc", models, then=then, alpha=0.6)[name].numpy()
    other, options = split(then)
    assert models.base is not None
    base = models.base.get(name).numpy()
    expected = base + calibrated(merged(other, models, **options)[name].numpy() - base, changes(models, name), 0.6)
    compared("svc", FORMULA, torch.from_numpy(result), expected, options=f"then={other}, alpha=0.6")
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-8 if other == "soup" else 1e-10)


def test_in_float32_it_is_the_formula_within_rounding() -> None:
    models = toy_models(3)
    result = merged("svc", models, alpha=0.5)
    assert models.base is not None
    for name in ("layer.weight", "head"):
        base, vectors = models.base.get(name).double().numpy(), changes(models, name)
        expected = base + calibrated(0.3 * np.sum(vectors, axis=0), vectors, 0.5)
        compared("svc", FORMULA, result[name], expected, options="alpha=0.5")
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=0, atol=1e-6)


def test_embeddings_and_tensors_that_are_no_matrices_are_what_the_other_method_makes_of_them() -> None:
    models = toy_models(3, dtype=torch.float64)
    result, plain = merged("svc", models, then="ties"), merged("ties", models)
    for name in ("embed", "layer.bias", "gate"):
        torch.testing.assert_close(result[name], plain[name], rtol=0, atol=1e-14)
    assert not torch.allclose(result["layer.weight"], plain["layer.weight"], atol=1e-4)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (12, 12)])
def test_conv1d_matrices_are_calibrated_along_their_outputs(shape: tuple[int, int]) -> None:
    names = {"h.0.mlp.c_fc.weight": (10, 40), "h.0.attn.c_proj.weight": shape}
    generator = torch.Generator().manual_seed(0)
    models = [{k: torch.randn(v, generator=generator, dtype=torch.float64) for k, v in names.items()} for _ in range(4)]
    given = aligned(models[0], models[1:])
    result = merged("svc", given, alpha=0.2)["h.0.attn.c_proj.weight"].T.numpy()
    vectors = [vector.T for vector in changes(given, "h.0.attn.c_proj.weight")]
    expected = models[0]["h.0.attn.c_proj.weight"].T.numpy() + calibrated(0.3 * np.sum(vectors, axis=0), vectors, 0.2)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)


def test_equal_experts_are_counted_once() -> None:
    base, expert = torch.zeros(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    models = one_tensor(base, expert, expert, expert, expert, dtype=torch.float64)
    result = merged_x("svc", models, then={"name": "task_arithmetic", "lambda": 1.0})  # the sum has each four times
    torch.testing.assert_close(result, expert)


def test_small_task_vectors_are_calibrated_like_large_ones() -> None:
    base, first, second = (
        torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    ways = []
    for size in (1.0, 1e-8):
        models = one_tensor(0 * base, size * (base + first), size * (base + second), dtype=torch.float64)
        ways.append(merged_x("svc", models, then={"name": "task_arithmetic", "lambda": 1.0}) / size)
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-9, atol=1e-12)


def test_what_rounding_alone_is_of_an_expert_along_another_ones_directions_is_no_response() -> None:
    generator = np.random.default_rng(0)
    base = torch.from_numpy(0.04 * generator.standard_normal((60, 50))).bfloat16()
    left, right = (np.linalg.qr(generator.standard_normal((size, 6)))[0] for size in (60, 50))
    spectrum = np.array([9.0, 7.0, 5.0, 8.0, 6.0, 4.0])
    parts = [left[:, own] @ np.diag(spectrum[own]) @ right[:, own].T for own in (slice(0, 3), slice(3, 6))]
    exact = [base.double() + torch.from_numpy(part) for part in parts]
    stored = one_tensor(base, *(each.bfloat16() for each in exact), dtype=torch.bfloat16)
    options = {"then": {"name": "task_arithmetic", "lambda": 1.0}, "alpha": 0.5}
    result = dict(merge(get_method("svc"), options, stored, dtype=torch.float64))["x"] - base.double()
    # Along each direction one expert responds once and the other not at all: γ = 2 / (1 + 0.5).
    torch.testing.assert_close(result, torch.from_numpy(sum(parts)) * 2 / 1.5, rtol=0, atol=0.02)


def test_the_order_of_the_experts_changes_no_bit_where_the_other_method_does_not_depend_on_it() -> None:
    models = toy_models(5, dtype=torch.float64)
    found = [
        merged(
            "svc",
            dataclasses.replace(models, experts=(*models.experts[n:], *models.experts[:n])),
            then="ties",
            alpha=1e-3,
        )
        for n in range(3)
    ]
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in found[0])


def test_weights_and_seed_are_handed_on() -> None:
    models = authors_models()
    result = merged("svc", models, weights=[2, 0, 1], then={"name": "dare", "density": 0.5}, seed=3)
    plain = merged("dare", models, weights=[2, 0, 1], density=0.5, seed=3)
    name = "layer.1.up.weight"
    assert models.base is not None
    base = models.base.get(name).numpy()
    expected = base + calibrated(plain[name].numpy() - base, changes(models, name), 1.0)
    np.testing.assert_allclose(result[name].numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"alpha": 0.0}, r"method\.alpha=0\.0: must be greater than 0"),
        ({"then": "tise"}, r"method\.then='tise': must be the name of a merge method"),
        ({"then": "fisher"}, "must be a method that makes one model of weights alone"),
        ({"then": "rebasin"}, "must be a method that makes one model of weights alone"),
        ({"then": {"name": "lines", "then": "soup"}}, "must be a method with a parameter lambda"),
        ({"then": "emr"}, "must be a method that makes one model of weights alone"),
        ({"then": {"name": "ties", "density": 2.0}}, r"method\.density=2\.0"),
        ({"then": "slerp"}, "merges exactly 2 experts, and 3 are given"),
        ({"then": "ties", "weights": [1.0, -1.0, 1.0]}, "must be at least 0 for a weighted mean"),
    ],
)
@pytest.mark.parametrize("name", ["svc", "subspace_boosting"])
def test_what_cannot_be_merged_is_one_line(name: str, parameters: dict[str, Any], said: str) -> None:
    if name == "subspace_boosting" and "alpha" in parameters:
        pytest.skip("it has none")
    with pytest.raises(ConfigError, match=said) as error:
        merge(get_method(name), parameters, toy_models(3))
    assert "\n" not in str(error.value)
