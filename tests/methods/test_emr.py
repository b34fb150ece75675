"""EMR-Merging: the unified task vector, and each expert's mask and rescaler."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, aligned, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared


def transcribed(models: AlignedModels, output: int) -> np.ndarray:
    """λ_t·M_t⊙τ_uni of the flattened models, in float64."""
    count = len(models.experts)
    flat = [[task_vector(models, i, key).numpy().ravel() for key in SHAPES] for i in range(count)]
    vectors = np.stack([np.concatenate(parts) for parts in flat])
    sign = np.sign(vectors.sum(axis=0))
    unified = sign * np.where(vectors * sign > 0, np.abs(vectors), 0).max(axis=0)
    mask = vectors[output] * unified > 0
    return mask * unified * np.abs(vectors[output]).sum() / np.abs(mask * unified).sum()


@pytest.mark.parametrize("output", [0, 1, 2, 3])
def test_it_is_the_papers_formula_for_every_expert(output: int) -> None:
    models = distinct_models(4)
    result = merged("emr", models, output=models.experts[output].name)
    assert models.base is not None
    base = np.concatenate([models.base.get(key).numpy().ravel() for key in SHAPES])
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    expected = base + transcribed(models, output)
    compared("emr", FORMULA, [result[key] for key in SHAPES], expected)
    np.testing.assert_allclose(answer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_the_formula_within_rounding(dtype: torch.dtype) -> None:
    models = toy_models(3, dtype=dtype)
    result = merged("emr", models, output="apple")
    assert models.base is not None
    base = np.concatenate([models.base.get(key).double().numpy().ravel() for key in SHAPES])
    answer = np.concatenate([result[key].double().numpy().ravel() for key in SHAPES])
    step = torch.finfo(dtype).eps
    expected = base + transcribed(models, 1)
    compared("emr", FORMULA, [result[key] for key in SHAPES], expected)
    np.testing.assert_allclose(answer, expected, rtol=step, atol=step)


def test_sign_largest_magnitude_mask_and_rescaler_by_hand() -> None:
    models = one_tensor([0.0] * 4, [1.0, 2.0, -1.0, 0.0], [3.0, -1.0, 2.0, 4.0])
    # unified: 3, 2, 2, 4; the first expert keeps 3 and 2 and is rescaled by 4/5, the second 3, 2, 4 and 10/9
    first, second = (merged_x("emr", models, output=name) for name in ("pear", "apple"))
    torch.testing.assert_close(first, torch.tensor([2.4, 1.6, 0.0, 0.0]))
    torch.testing.assert_close(second, torch.tensor([3.0, 0.0, 2.0, 4.0]) * 10 / 9)


def test_votes_that_cancel_leave_the_base() -> None:
    models = one_tensor([5.0, 5.0], [6.0, 6.0], [4.0, 7.0])
    assert merged_x("emr", models, output="pear").tolist() == [5.0, 7.0]


def test_the_rescaler_is_over_the_whole_model_and_counts_a_tied_tensor_once() -> None:
    models = distinct_models(2)
    assert models.aliases == {"tied": "embed"}
    for expert in models.experts:
        expert.get("head").mul_(100)
    result = merged("emr", models, output="pear")
    assert models.base is not None
    vectors = transcribed(models, 0)
    start = sum(models.base.get(key).numel() for key in list(SHAPES)[:-1])
    moved = (result["head"] - models.base.get("head")).numpy().ravel()
    np.testing.assert_allclose(moved, vectors[start:], rtol=1e-12, atol=1e-12)


def test_an_expert_that_equals_the_base_gives_the_base_and_one_that_never_agrees_too() -> None:
    models = one_tensor([1.0, 2.0], [1.0, 2.0], [2.0, 3.0], [0.75, 1.75])
    assert merged_x("emr", models, output="pear").tolist() == [1.0, 2.0]
    assert merged_x("emr", models, output="quince").tolist() == [1.0, 2.0]
    assert merged_x("emr", models, output="apple").tolist() == [2.0, 3.0]


def test_one_expert_is_answered_to_the_bit_of_its_task_vector() -> None:
    models = toy_models(1)
    result = merged("emr", models)
    assert models.base is not None
    for key in SHAPES:
        base = models.base.get(key)
        assert torch.equal(result[key], base + (models.experts[0].get(key) - base))


def test_the_order_of_the_experts_does_not_change_whose_model_it_is() -> None:
    models = toy_models(4)
    turned = dataclasses.replace(models, experts=models.experts[::-1])
    for name in ("pear", "quince"):
        one, other = merged("emr", models, output=name), merged("emr", turned, output=name)
        assert all(torch.equal(one[key], other[key]) for key in SHAPES)
    assert not torch.equal(one["embed"], merged("emr", models, output="fig")["embed"])


def test_it_must_be_said_for_which_expert() -> None:
    for output in (None, "plum"):
        with pytest.raises(
            ConfigError, match="method=emr: makes one model for each expert; say for which: pear, apple"
        ):
            merge(get_method("emr"), {}, toy_models(2), output=output)


def test_an_empty_tensor_and_a_scalar_are_no_trouble() -> None:
    base = {"x": torch.zeros(0, 3), "y": torch.tensor(1.0)}
    models = aligned(base, [{"x": torch.zeros(0, 3), "y": torch.tensor(y)} for y in (2.0, 3.0)])
    result = merged("emr", models, output="pear")
    assert result["x"].shape == (0, 3)
    assert result["y"] == 2.0
