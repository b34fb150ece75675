"""KnOTS against a float64 transcription of its formula, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import check_parameters, get_method
from mergelab.engine.warm_session import MergeSession
from mergelab.errors import ConfigError
from mergelab.methods import knots as module
from mergelab.weights.align import AlignedModels
from tests.methods.toy import NAMES, SHAPES, aligned, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared

Matrix = np.ndarray[Any, np.dtype[np.float64]]
CUT = 1e-5
MATRICES = [(40, 30), (30, 40), (130, 20), (20, 130), (64, 64)]


def ties_transcribed(vectors: Sequence[Matrix], density: float | Sequence[float], weights: Sequence[float]) -> Matrix:
    """TIES of flat vectors, with 0 where votes cancel."""
    kept = []
    for vector, share in zip(vectors, density if isinstance(density, list) else [density] * len(vectors), strict=True):
        order = np.argsort(-np.abs(vector), kind="stable")
        keep = np.zeros(len(vector))
        keep[order[: max(1, int(share * len(vector)))]] = 1
        kept.append(vector * keep)
    sign = np.sign(sum(kept))
    agree = [(np.sign(vector) == sign) & (sign != 0) for vector in kept]
    total = sum(w * a for w, a in zip(weights, agree, strict=True))
    summed = sum(w * a * v for w, a, v in zip(weights, agree, kept, strict=True))
    return np.asarray(np.divide(summed, total, out=np.zeros_like(kept[0]), where=total > 0))


def transcribed(
    tensors: Sequence[Mapping[str, Matrix]],
    density: float | Sequence[float],
    weights: Sequence[float] | None = None,
) -> dict[str, Matrix]:
    """U · TIES(Σ V_tᵀ) of every matrix, the entries of all matrices of an expert ranked together."""
    parts: list[list[Matrix]] = [[] for _ in tensors]
    lefts = {}
    for name in tensors[0]:
        u, s, v = np.linalg.svd(np.concatenate([each[name] for each in tensors], axis=1), full_matrices=False)
        kept = s > CUT
        lefts[name] = u[:, kept]
        for t, part in enumerate(np.split(s[kept, None] * v[kept], len(tensors), axis=1)):
            parts[t].append(part)
    flat = [np.concatenate([part.ravel() for part in own]) for own in parts]
    merged = ties_transcribed(flat, density, weights or [1.0] * len(tensors))
    result, start = {}, 0
    for name, example in zip(tensors[0], parts[0], strict=True):
        result[name] = lefts[name] @ merged[start : start + example.size].reshape(example.shape)
        start += example.size
    return result


def drawn(shape: tuple[int, int], count: int, seed: int = 0, spread: float = 1.0) -> list[Matrix]:
    """Matrices whose columns' scales fall by ``spread`` decades."""
    generator = np.random.default_rng(seed)
    decay = np.logspace(0, -spread, shape[1])
    return [0.1 * generator.standard_normal(shape) * decay for _ in range(count)]


def merged_matrix(vectors: Sequence[Matrix], dtype: torch.dtype = torch.float64, **options: Any) -> Matrix:
    result: Matrix = merged_x("knots", one_tensor(np.zeros(vectors[0].shape), *vectors, dtype=dtype), **options).numpy()
    return result


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize(("count", "density"), [(1, 0.2), (2, 0.2), (3, 0.5), (5, 1.0)])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_matrix_is_merged_by_the_papers_formula(
    shape: tuple[int, int], count: int, density: float, scope: str
) -> None:
    vectors = drawn(shape, count)
    result = merged_matrix(vectors, density=density, scope=scope, **{"lambda": 1.0})
    expected = transcribed([{"x": vector} for vector in vectors], density)["x"]
    compared("knots", FORMULA, result, expected, options={"density": density, "scope": scope})
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_small_singular_values_are_as_exact_as_large_ones() -> None:
    vectors = drawn((50, 40), 2, spread=3.5)
    assert np.linalg.svd(np.concatenate(vectors, axis=1), compute_uv=False)[-1] < 2e-3
    vectors.append(drawn((50, 1), 1)[0] @ drawn((1, 40), 1)[0] * 1e5)  # so far above that squares would drown the rest
    result = merged_matrix(vectors, density=0.3, **{"lambda": 1.0})
    expected = transcribed([{"x": vector} for vector in vectors], 0.3)["x"]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-9)


def small_models(dtype: torch.dtype) -> tuple[AlignedModels, list[dict[str, Matrix]]]:
    """Three experts with two matrices, of which one changed more than the other; and their task vectors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (40, 30), "head.weight": (12, 50), "bias": (7,)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    scale = {"layer.weight": 0.05, "head.weight": 0.15, "bias": 0.1}
    experts = [
        {k: v + (scale[k] * torch.randn(v.shape, generator=generator)).to(dtype) for k, v in base.items()}
        for _ in range(3)
    ]
    vectors = [{k: (v - base[k]).double().numpy() for k, v in each.items() if v.ndim == 2} for each in experts]
    return aligned(base, experts), vectors


def test_all_matrices_of_an_expert_are_trimmed_together_or_each_alone() -> None:
    models, vectors = small_models(torch.float64)
    weights = [2.0, 0.5, 1.0]
    options: dict[str, Any] = {"density": 0.3, "lambda": 1.0, "weights": dict(zip(NAMES, weights, strict=False))}
    together, alone = merged("knots", models, **options), merged("knots", models, scope="tensor", **options)
    expected = transcribed(vectors, 0.3, weights)
    assert models.base is not None
    for name, both in expected.items():
        start = models.base.get(name).numpy()
        own = transcribed([{name: each[name]} for each in vectors], 0.3, weights)[name]
        shown = {"density": 0.3, "weights": weights}
        compared("knots", FORMULA, together[name], start + both, options=shown)
        compared("knots", FORMULA, alone[name], start + own, options=shown | {"scope": "tensor"})
        np.testing.assert_allclose(together[name].numpy() - start, both, rtol=0, atol=1e-12)
        np.testing.assert_allclose(alone[name].numpy() - start, own, rtol=0, atol=1e-12)
        assert np.abs(both - own).max() > 0.01


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_each_expert_may_have_a_density_of_its_own(scope: str) -> None:
    models, vectors = small_models(torch.float64)
    densities = [0.5, 0.1, 1.0]
    given = dict(zip(NAMES, densities, strict=False))
    result = merged("knots", models, scope=scope, density=given, **{"lambda": 1.0})
    together = transcribed(vectors, densities)
    assert models.base is not None
    for name in together:
        alone = transcribed([{name: each[name]} for each in vectors], densities)
        expected = together[name] if scope == "model" else alone[name]
        np.testing.assert_allclose((result[name] - models.base.get(name)).numpy(), expected, rtol=0, atol=1e-12)


def test_float32_weights_are_decomposed_in_float64() -> None:
    models, vectors = small_models(torch.float32)
    result = merged("knots", models)
    assert models.base is not None
    for name, vector in transcribed(vectors, 0.2).items():
        theirs = models.base.get(name).double().numpy() + 0.6 * vector
        compared("knots", FORMULA, result[name], theirs)
        np.testing.assert_allclose(result[name].double().numpy(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_what_is_no_matrix_is_merged_by_ties_among_itself(scope: str) -> None:
    models = toy_models(3)
    assert models.base is not None
    for expert, step in zip(models.experts, (8.0, -8.0, 0.0), strict=True):  # these votes cancel
        expert.get("layer.bias")[:2] = models.base.get("layer.bias")[:2].round() + step
        models.base.get("layer.bias")[:2].round_()
    options = {"density": 0.4, "lambda": 0.7, "scope": scope, "weights": [1.0, 2.0, 0.5]}
    result = merged("knots", models, **options)
    base, *experts = (
        {k: source.get(k) for k in ("layer.bias", "gate")} for source in (models.base, *models.experts) if source
    )
    expected = merged("ties", aligned(base, experts), **options)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_low_rank_updates_in_rounded_weights_count_by_their_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(96, 80, generator=generator)
    updates = [
        (torch.randn(96, 4, generator=generator) @ torch.randn(4, 80, generator=generator)).mul_(1e-2) for _ in "ab"
    ]
    experts = [base + update for update in updates]
    assert torch.linalg.matrix_rank((experts[0] - base).double()) == 80  # of rounding
    result = merged_x("knots", one_tensor(base, *experts), **{"lambda": 1.0}) - base
    expected = transcribed([{"x": update.double().numpy()} for update in updates], 0.2)["x"]
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=5e-7)
    noisy = merged_x("knots", one_tensor(base, *experts), tolerance=0, **{"lambda": 1.0}) - base
    assert np.abs(noisy.numpy() - expected).max() > 1e-3


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("count", [1, 3])
def test_identical_experts_untrimmed_give_that_expert(count: int, scope: str) -> None:
    vector, *_ = drawn((30, 50), 1)
    result = merged_matrix([vector] * count, density=1.0, scope=scope, **{"lambda": 1.0})
    np.testing.assert_allclose(result, vector, rtol=0, atol=1e-14)


def test_experts_that_write_to_different_outputs_do_not_compete() -> None:
    left, right = drawn((24, 20), 2)
    left[12:], right[:12] = 0, 0
    result = merged_matrix([left, right], density=1.0, **{"lambda": 1.0})
    np.testing.assert_allclose(result, left + right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_gpt2s_matrices_are_turned_so_that_outputs_are_shared(scope: str) -> None:
    shapes = {"h.0.mlp.c_fc.weight": (12, 48), "h.0.attn.c_proj.weight": (12, 12), "wte.weight": (30, 12)}
    generator = np.random.default_rng(0)
    vectors = [{name: generator.standard_normal(shape) for name, shape in shapes.items()} for _ in range(3)]
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    models = aligned(base, [{name: torch.from_numpy(v) for name, v in each.items()} for each in vectors])
    result = merged("knots", models, scope=scope, **{"lambda": 1.0})
    turned = [{name: v.T if "c_" in name else v for name, v in each.items()} for each in vectors]
    expected = transcribed(turned, 0.2)
    for name in shapes:
        wanted = expected[name] if scope == "model" else transcribed([{name: e[name]} for e in turned], 0.2)[name]
        wanted = wanted.T if "c_" in name else wanted
        np.testing.assert_allclose(result[name].numpy(), wanted, rtol=0, atol=1e-12)


def test_the_largest_matrix_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = drawn((200, 30), 3)
    whole = merged_matrix(vectors)
    monkeypatch.setattr("mergelab.ops.svd.ROWS", 64)
    np.testing.assert_allclose(merged_matrix(vectors), whole, rtol=0, atol=1e-14)


def test_a_session_decomposes_once_for_all_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    models = toy_models(3)
    method, calls, original = get_method("knots"), [], module.common_basis

    def counted(matrices: Sequence[torch.Tensor], tolerance: float) -> module.Basis:
        calls.append(tuple(matrices[0].shape))
        return original(matrices, tolerance)

    monkeypatch.setattr(module, "common_basis", counted)
    targets = {name: torch.empty(models.base.shape(name)) for name in models.names}
    warm = MergeSession(models, targets)
    for density, scale, way in [(0.2, 0.6, "merged"), (0.2, 0.9, "scaled"), (0.5, 0.9, "merged")]:
        assert warm.merge(method, {"density": density, "lambda": scale}) == way
    assert sorted(calls) == sorted(shape for shape in SHAPES.values() if len(shape) == 2)
    fresh = merged("knots", models, density=0.5, **{"lambda": 0.9})
    assert all(torch.equal(targets[name], fresh[name]) for name in models.names)


def test_what_it_cannot_be_told_is_one_line() -> None:
    for values, said in [
        ({"tolerance": -1.0}, r"method\.tolerance=-1\.0: must be at least 0"),
        ({"scope": "pooled"}, r"method\.scope='pooled': must be 'model' or 'tensor'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_parameters(get_method("knots"), values)
    with pytest.raises(ConfigError, match=r"method\.weights: must be at least 0"):
        merged("knots", toy_models(2), weights=[1, -1])
