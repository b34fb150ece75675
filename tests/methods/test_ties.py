"""TIES against PEFT, against the authors' way of computing it, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, aligned, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


def flat_vectors(models: AlignedModels, keys: Sequence[str] = tuple(SHAPES)) -> np.ndarray:
    """(T, d) task vectors, in float32 as the methods see them."""
    return np.stack(
        [
            np.concatenate([task_vector(models, i, key).float().numpy().ravel() for key in keys])
            for i in range(len(models.experts))
        ]
    )


def transcribed(
    vectors: np.ndarray,
    density: float,
    *,
    pooled: bool = False,
    majority_sign: str = "total",
    reduce: str = "mean",
    tie_break: str = "majority",
    weights: Sequence[float] | None = None,
    weights_stage: str = "reduce",
) -> np.ndarray:
    """The merged task vector of (T, d) task vectors, in float64, by sorting."""
    magnitudes = np.abs(vectors)
    rows = magnitudes.reshape(1, -1) if pooled else magnitudes
    thresholds = np.sort(rows, axis=1)[:, ::-1][:, max(1, int(density * rows.shape[1])) - 1][:, None]
    trimmed = np.where(magnitudes >= thresholds, vectors, 0).astype(np.float64)
    shares = np.array(weights or [1.0] * len(vectors))[:, None]
    voting = trimmed * shares if weights_stage == "elect" else trimmed
    sign = np.sign((voting if majority_sign == "total" else np.sign(voting)).sum(axis=0))
    fallback = {"majority": np.sign(sign.sum()), "positive": 1, "zero": 0}[tie_break]
    sign = np.where(sign == 0, fallback, sign)
    agree = (trimmed * sign > 0) * shares
    if reduce == "max":
        return (np.abs(trimmed) * agree).max(axis=0) * sign
    total = (trimmed * agree).sum(axis=0)
    return total if reduce == "sum" else total / np.maximum(agree.sum(axis=0), 1e-30)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"majority_sign": "frequency"},
    {"reduce": "sum"},
    {"reduce": "max"},
    {"weights": [1.0, 3.0, 0.5, 0.0]},
    {"weights": [1.0, 3.0, 0.5, 0.0], "reduce": "max"},
    {"weights": [1.0, 3.0, 0.5, 0.0], "weights_stage": "elect"},
    {"weights": [1.0, 3.0, 0.5, 0.0], "weights_stage": "elect", "majority_sign": "frequency", "reduce": "sum"},
    {"tie_break": "positive", "majority_sign": "frequency"},
    {"tie_break": "zero", "majority_sign": "frequency"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.7, 1.0])
def test_per_model_it_is_the_paper_on_the_flattened_models(density: float, options: dict[str, Any]) -> None:
    models = toy_models(4)
    result = merged("ties", models, density=density, lambda_=0.8, **options)
    assert models.base is not None
    expected = transcribed(flat_vectors(models), density, **options)
    base = np.concatenate([models.base.get(key).double().numpy().ravel() for key in SHAPES])
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    compared("ties", FORMULA, [result[key] for key in SHAPES], base + 0.8 * expected, options=options)
    np.testing.assert_allclose(answer, base + 0.8 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.4, 0.7])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16, torch.float64])
def test_a_difference_is_as_exact_as_its_models_and_what_is_made_of_all_as_the_most_exact(
    start: torch.dtype, reduce: str, density: float
) -> None:
    generator = torch.Generator().manual_seed(4)
    dtypes = (torch.float64, torch.bfloat16, torch.float32)
    base = {"x": torch.randn(700, generator=generator, dtype=torch.float64).to(start)}
    steps = [0.1 * torch.randn(700, generator=generator, dtype=torch.float64) for _ in dtypes]
    models = aligned(base, [{"x": (base["x"] + step).to(d)} for step, d in zip(steps, dtypes, strict=True)])
    found = dict(merge(get_method("ties"), {"density": density, "reduce": reduce}, models, dtype=torch.float64))["x"]
    wide = [t if t.dtype == torch.float64 else t.float() for t in (base["x"], *(e.get("x") for e in models.experts))]
    vectors = np.stack([(expert - wide[0]).double().numpy() for expert in wide[1:]])
    expected = base["x"].double().numpy() + transcribed(vectors, density, reduce=reduce)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_pooled_one_threshold_holds_for_all_experts(density: float) -> None:
    models = toy_models(3)
    for i, expert in enumerate(models.experts):  # task vectors of different lengths
        expert.get("embed").add_(0.1 * i)
    result = merged("ties", models, density=density, scope="pooled")
    assert models.base is not None
    expected = transcribed(flat_vectors(models), density, pooled=True)
    base = np.concatenate([models.base.get(key).double().numpy().ravel() for key in SHAPES])
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    compared("ties", FORMULA, [result[key] for key in SHAPES], base + expected, options="scope=pooled")
    np.testing.assert_allclose(answer, base + expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(answer, base + transcribed(flat_vectors(models), density), atol=1e-4)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_per_tensor_it_is_pefts_ties(density: float, majority_sign: str) -> None:
    models = toy_models(3)
    result = merged("ties", models, density=density, scope="tensor", majority_sign=majority_sign, tie_break="positive")
    assert models.base is not None
    for key in [key for key in SHAPES if key != "gate"]:  # PEFT keeps no entry of a scalar
        vectors = [task_vector(models, i, key).float() for i in range(3)]
        expected = merge_utils.ties(vectors, torch.ones(3), density, majority_sign)
        options = f"scope=tensor, tie_break=positive, majority_sign={majority_sign}"
        note = "PEFT keeps no entry of a scalar"
        compared("ties", "PEFT's ties", result[key], models.base.get(key) + expected, options=options, note=note)
        torch.testing.assert_close(result[key], models.base.get(key) + expected, rtol=1e-6, atol=1e-6)


def test_pefts_weighted_ties_divides_by_the_count_where_this_divides_by_the_weights() -> None:
    weights = [2.0, 0.5, 1.0]
    models = toy_models(3)
    result = merged("ties", models, density=0.5, scope="tensor", weights=weights, tie_break="positive")
    assert models.base is not None
    vectors = [task_vector(models, i, "embed").float() for i in range(3)]
    trimmed = torch.stack([merge_utils.prune(vector, 0.5, "magnitude") for vector in vectors])
    agree = merge_utils.calculate_majority_sign_mask(trimmed)
    shares = (agree * torch.tensor(weights).view(3, 1, 1)).sum(0)
    theirs = merge_utils.ties(vectors, torch.tensor(weights), 0.5)
    expected = theirs * agree.sum(0).clamp(min=1) / shares.clamp(min=1e-9)
    options = "scope=tensor, tie_break=positive, weights=[2, 0.5, 1]"
    note = "PEFT divides by the count, this by the weights: multiplied back"
    compared("ties", "PEFT's ties", result["embed"], models.base.get("embed") + expected, options=options, note=note)
    torch.testing.assert_close(result["embed"], models.base.get("embed") + expected, rtol=1e-6, atol=1e-6)


def test_per_tensor_every_tensor_keeps_at_least_one_entry() -> None:
    models = toy_models(2)
    result = merged("ties", models, density=1e-6, scope="tensor")
    assert models.base is not None
    for key in SHAPES:
        assert 1 <= (result[key] != models.base.get(key)).sum() <= 2


def test_per_model_a_tensor_of_small_changes_may_lose_all_of_them() -> None:
    models = toy_models(1)
    assert models.base is not None
    models.experts[0].get("head").copy_(models.base.get("head") + 1e-4)
    result = merged("ties", models, density=0.2)
    assert torch.equal(result["head"], models.base.get("head"))
    changed = sum(int((result[key] != models.base.get(key)).sum()) for key in SHAPES)
    assert changed == int(0.2 * sum(models.base.get(key).numel() for key in SHAPES))


def test_entries_that_equal_the_threshold_all_stay() -> None:
    models = one_tensor([0.0] * 5, [1.0, -1.0, 1.0, 0.5, 2.0])
    assert merged_x("ties", models, density=0.4).tolist() == [1.0, -1.0, 1.0, 0.0, 2.0]


def test_thresholds_of_half_precision_models_do_not_underflow() -> None:
    base = torch.full((1000,), 1.0, dtype=torch.float16)
    expert = base.clone()
    expert[:200] = 1 + 2.0**-10  # the smallest change that float16 can hold there
    result = merged_x("ties", one_tensor(base, expert, expert, dtype=torch.float16), density=0.1)
    assert torch.equal(result, expert)
    tiny = torch.zeros(1000, dtype=torch.float16)
    steps = torch.arange(1000).mul(2.0**-24).half()  # subnormal numbers
    kept = merged_x("ties", one_tensor(tiny, steps, dtype=torch.float16), density=0.1)
    assert int((kept != 0).sum()) == 100


CANCELLING = [[1.0, 1.0, 3.0, -2.0], [-1.0, 1.0, 3.0, -2.0]]


@pytest.mark.parametrize(("tie_break", "first"), [("majority", 1.0), ("positive", 1.0), ("zero", 0.0)])
def test_votes_that_cancel_take_the_asked_sign(tie_break: str, first: float) -> None:
    models = one_tensor([0.0] * 4, *CANCELLING)
    assert merged_x("ties", models, density=1.0, tie_break=tie_break).tolist() == [first, 1.0, 3.0, -2.0]


def test_a_negative_majority_makes_cancelled_votes_negative() -> None:
    models = one_tensor([0.0] * 4, *[[-x for x in vector] for vector in CANCELLING])
    assert merged_x("ties", models, density=1.0).tolist() == [-1.0, -1.0, -3.0, 2.0]


def test_a_balanced_majority_leaves_cancelled_votes_at_the_base() -> None:
    models = one_tensor([5.0] * 3, [6.0, 6.0, 4.0], [4.0, 6.0, 4.0])
    assert merged_x("ties", models, density=1.0).tolist() == [5.0, 6.0, 4.0]


def test_the_majority_is_counted_over_the_model_or_over_the_tensor() -> None:
    from tests.methods.toy import aligned

    base = {"x": torch.zeros(2), "y": torch.zeros(9)}
    experts = [
        {"x": torch.tensor([1.0, -1.0]), "y": torch.ones(9)},
        {"x": torch.tensor([-1.0, -1.0]), "y": torch.ones(9)},
    ]
    models = aligned(base, experts)
    assert merged("ties", models, density=1.0)["x"].tolist() == [1.0, -1.0]
    assert merged("ties", models, density=1.0, scope="tensor")["x"].tolist() == [-1.0, -1.0]


def test_a_tied_embedding_counts_once_in_the_threshold() -> None:
    models = toy_models(1)
    assert models.aliases == {"tied": "embed"}
    result = merged("ties", models, density=0.5)
    assert models.base is not None
    changed = sum(int((result[key] != models.base.get(key)).sum()) for key in SHAPES)
    assert changed == int(0.5 * sum(models.base.get(key).numel() for key in SHAPES))


@pytest.mark.parametrize(
    ("weights", "said"), [([1, -1], "must be at least 0"), ([0, 0], "at least one must be above 0")]
)
def test_weights_that_no_mean_can_take_are_refused(weights: list[float], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.weights: {said}"):
        merge(get_method("ties"), {"weights": weights}, toy_models(2))
    with pytest.raises(ConfigError, match=rf"^models\.experts\.\*\.weight: {said}"):
        merge(get_method("ties"), {}, toy_models(2), weights=weights)


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_experts_that_are_searched_in_groups_have_the_same_thresholds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = toy_models(5)
    options = {"trim_density": 0.3} if name == "dare_ties" else {"density": 0.3}
    together = merged(name, models, **options)
    monkeypatch.setattr("mergelab.ops.thresholds.HELD", 200_000)  # two toy experts
    apart = merged(name, models, **options)
    assert all(torch.equal(together[key], apart[key]) for key in together)
