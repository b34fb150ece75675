"""TALL masks, a model for each task, against the authors' recorded values and a float64 transcription."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.authors import authors_models, recorded, source
from tests.methods.toy import SHAPES, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


def flat_vectors(models: AlignedModels) -> np.ndarray:
    """The experts' flattened task vectors."""
    count = len(models.experts)
    rows = [[task_vector(models, i, key).numpy().ravel() for key in SHAPES] for i in range(count)]
    return np.stack([np.concatenate(parts) for parts in rows])


def multi_task(vectors: np.ndarray, merge_: str, density: float) -> np.ndarray:
    if merge_ == "sum":
        return vectors.sum(axis=0)
    count = int(density * vectors.shape[1])
    bounds = np.sort(np.abs(vectors), axis=1)[:, -count]
    trimmed = np.where(np.abs(vectors) >= bounds[:, None], vectors, 0)
    sign = np.sign(trimmed.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    return np.where(trimmed * sign > 0, trimmed, 0).sum(axis=0)


@pytest.mark.parametrize("merge_", ["sum", "ties"])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_it_makes_what_the_authors_code_makes(merge_: str, task: int) -> None:
    models = authors_models()
    name = f"tall_masks {merge_} 0.4 {task}"
    result, theirs = merged("tall_masks", models, merge=merge_, output=models.experts[task].name), recorded(name)
    note = "density such that as many entries are kept: theirs keeps one more" if merge_ == "ties" else ""
    options = f"merge={merge_}"
    compared("tall_masks", source(name), [result[k] for k in theirs], list(theirs.values()), options=options, note=note)
    for key, expected in theirs.items():
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("merge_", ["sum", "ties"])
def test_consensus_makes_what_the_authors_code_makes(merge_: str) -> None:
    name = f"consensus {merge_} 0.4"
    result, theirs = merged("consensus", authors_models(), merge=merge_), recorded(name)
    note = "density such that as many entries are kept: theirs keeps one more" if merge_ == "ties" else ""
    options = f"merge={merge_}"
    compared("consensus", source(name), [result[k] for k in theirs], list(theirs.values()), options=options, note=note)
    for key, expected in theirs.items():
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("merge_", ["sum", "ties"])
@pytest.mark.parametrize("output", [0, 2])
@pytest.mark.parametrize("kappa", [0.4, {"pear": 0.2, "apple": 0.3, "quince": 0.6, "fig": 0.5}])
def test_it_is_the_papers_formula_for_every_expert(merge_: str, output: int, kappa: Any) -> None:
    models = distinct_models(4)
    expert = models.experts[output].name
    result = merged("tall_masks", models, output=expert, merge=merge_, mask_lambda=kappa, density=0.3)
    vectors = flat_vectors(models)
    whole = multi_task(vectors, merge_, 0.3)
    own = vectors[output]
    factor = kappa if isinstance(kappa, float) else kappa[expert]
    masked = np.where(np.abs(own) > factor * np.abs(whole - own), whole, 0)
    assert models.base is not None
    expected = np.concatenate([models.base.get(key).numpy().ravel() for key in SHAPES]) + masked
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    compared("tall_masks", FORMULA, [result[key] for key in SHAPES], expected, options=f"merge={merge_}")
    np.testing.assert_allclose(answer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
@pytest.mark.parametrize("min_tasks", [1, 2])
def test_consensus_on_ties_is_the_papers_formula(weights: Any, min_tasks: int) -> None:
    models = distinct_models(3)
    options = {"merge": "ties", "density": 0.4, "min_tasks": min_tasks, "mask_lambda": 0.5, "lambda": 0.7}
    result = merged("consensus", models, weights=weights, **options)
    vectors = flat_vectors(models)
    count = int(0.4 * vectors.shape[1])
    bounds = np.sort(np.abs(vectors), axis=1)[:, -count]
    trimmed = np.where(np.abs(vectors) >= bounds[:, None], vectors, 0)
    sign = np.sign(trimmed.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    shares = np.ones(3) if weights is None else np.array(weights)
    whole = shares @ np.where(trimmed * sign > 0, trimmed, 0)
    users = (np.abs(vectors) > 0.5 * np.abs(whole - vectors)).sum(axis=0)
    assert models.base is not None
    base = np.concatenate([models.base.get(key).numpy().ravel() for key in SHAPES])
    expected = base + 0.7 * np.where(users >= min_tasks, whole, 0)
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    shown = f"merge=ties, min_tasks={min_tasks}"
    compared("consensus", FORMULA, [result[key] for key in SHAPES], expected, options=shown)
    np.testing.assert_allclose(answer, expected, rtol=1e-12, atol=1e-12)


def test_masks_by_hand() -> None:
    models = one_tensor([0.0] * 4, [1.0, 2.0, -1.0, 0.0], [3.0, -1.0, 2.0, 4.0])
    # the sum: 4, 1, 1, 4; the first uses an entry where |τ| > 0.4·|sum − τ|: 1 > 1.2 no, 2 > 0.4, 1 > 0.8, 0 no
    first, second = (merged_x("tall_masks", models, output=name) for name in ("pear", "apple"))
    assert first.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert second.tolist() == [4.0, 1.0, 1.0, 4.0]


def test_lambda_scales_the_masked_vector() -> None:
    models = one_tensor([0.0, 1.0], [1.0, 3.0], [0.5, 1.0])
    assert merged_x("tall_masks", models, output="pear", **{"lambda": 0.5}).tolist() == [0.75, 2.0]


def test_one_expert_keeps_all_that_it_changed() -> None:
    models = toy_models(1)
    result = merged("tall_masks", models)
    assert models.base is not None
    for key in SHAPES:
        base = models.base.get(key)
        assert torch.equal(result[key], base + (models.experts[0].get(key) - base))


def test_negative_weights_are_refused_on_ties_alone() -> None:
    with pytest.raises(ConfigError, match=r"method\.merge=ties: weights must be at least 0"):
        merge(get_method("consensus"), {"merge": "ties", "weights": [1.0, -1.0]}, toy_models(2))
    merge(get_method("consensus"), {"weights": [1.0, -1.0]}, toy_models(2))


def test_it_must_be_said_for_which_expert() -> None:
    with pytest.raises(ConfigError, match="method=tall_masks: makes one model for each expert; say for which"):
        merge(get_method("tall_masks"), {}, toy_models(2))


def test_votes_that_cancel_take_the_majoritys_sign_on_ties_and_none_where_there_is_no_majority() -> None:
    options = {"merge": "ties", "density": 1.0, "min_tasks": 0, "lambda": 1.0, "weights": [1.0, 3.0]}
    models = one_tensor([0.0] * 3, [1.0, 2.0, 3.0], [-1.0, 2.0, 3.0])
    assert merged_x("consensus", models, **options).tolist() == [1.0, 8.0, 12.0]
    models = one_tensor([0.0] * 3, [1.0, 2.0, -3.0], [-1.0, 2.0, -3.0])
    assert merged_x("consensus", models, **options).tolist() == [0.0, 8.0, -12.0]
