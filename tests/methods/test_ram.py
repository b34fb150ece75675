"""RAM: unique and shared changes; values by mergekit 0.1.5 (``ram``, and ``ramplus_tl`` on a model of one tensor)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergelab.weights.align import AlignedModels
from tests.methods.test_mergekit import recipe
from tests.methods.toy import SHAPES, aligned, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, RECORDED_MERGEKIT, compared

GOLDEN = {
    "ram": [-0.41093749, 0.1046875, 0.54218751, -0.2078125, 0.21927083, -0.62968749, -0.1921875, 0.2453125,
            -0.42656249, 0.089062497, 0.52656251, -0.2234375, 0.1125, 0.54218751, -0.2078125, 0.2296875],
    "ram_plus": [-0.41093749, 0.11734374, 0.55484378, -0.19832031, 0.21927083, -0.64984375, -0.21234375, 0.23019531,
                 -0.42656249, 0.11578124, 0.55328125, -0.20339844, 0.1125, 0.53609377, -0.21390626, 0.22511718],
}  # fmt: skip


def thinned(models: AlignedModels) -> AlignedModels:
    """The experts with the base's values at half of the entries: shared ones, and unique ones of each."""
    assert models.base is not None
    for i, expert in enumerate(models.experts):
        for key in set(models.names):
            places = torch.arange(expert.get(key).numel()).view(expert.get(key).shape)
            same = places * (i + 1) % 4 >= 2
            expert.get(key)[same] = models.base.get(key)[same]
    return models


@pytest.mark.parametrize(("method", "options"), [("ram", {}), ("ram_plus", {"r": 0.3, "alpha": 1.5})])
def test_values_are_mergekits(method: str, options: dict[str, float]) -> None:
    result = merged_x(method, thinned(recipe(method)), epsilon=0.01, **options)
    note = "" if method == "ram" else "mergekit counts per tensor, so on a model of one tensor"
    compared(method, RECORDED_MERGEKIT, result, GOLDEN[method], options={"epsilon": 0.01, **options}, note=note)
    torch.testing.assert_close(result, torch.tensor(GOLDEN[method]), rtol=1e-6, atol=1e-7)


def transcribed(vectors: np.ndarray, epsilon: float, r: float = 0.0, alpha: float = 0.0) -> np.ndarray:
    """The merged task vector of (T, d) task vectors, in float64."""
    changed = np.abs(vectors) > epsilon
    count = changed.sum(axis=0)
    unique = (changed & (count == 1)).sum(axis=1)
    shared = (changed & (count > 1)).sum(axis=1)
    scale = 1 + r * np.minimum(shared / np.maximum(unique, 1e-30), alpha)
    kept = vectors * changed
    return np.where(count == 1, (kept * scale[:, None]).sum(axis=0), kept.sum(axis=0) / np.maximum(count, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 1e-5},
        {"epsilon": 0.0},
        {"epsilon": 0.05},
        {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
        {"epsilon": 0.03, "r": 0.5, "alpha": 0.9},
        {"epsilon": 0.03, "r": 0.5, "alpha": 50.0},
    ],
    ids=str,
)
def test_it_is_the_papers_formula_over_the_whole_model(options: dict[str, float]) -> None:
    models = thinned(distinct_models(4))
    models.experts[1].get("head").add_(1)
    result = merged("ram_plus" if "r" in options else "ram", models, **options)
    assert models.base is not None
    flat = [[task_vector(models, i, key).numpy().ravel() for key in SHAPES] for i in range(4)]
    expected = transcribed(np.stack([np.concatenate(parts) for parts in flat]), **options)
    base = np.concatenate([models.base.get(key).numpy().ravel() for key in SHAPES])
    answer = np.concatenate([result[key].numpy().ravel() for key in SHAPES])
    method = "ram_plus" if "r" in options else "ram"
    compared(method, FORMULA, [result[key] for key in SHAPES], base + expected, options=options)
    np.testing.assert_allclose(answer, base + expected, rtol=1e-12, atol=1e-12)


def test_unique_entries_are_kept_and_shared_ones_averaged() -> None:
    models = one_tensor([1.0] * 4, [3.0, 2.0, 1.0, 1.0], [5.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -2.0])
    assert merged_x("ram", models).tolist() == [4.0, 2.0, 1.0, -2.0]
    # One entry shared and one unique: 1 + 0.5·min(1/1, 0.4) for the first expert; nothing shared: 1 for the third.
    assert merged_x("ram_plus", models, r=0.5, alpha=0.4).tolist() == pytest.approx([4.0, 2.2, 1.0, -2.0])
    assert merged_x("ram_plus", models, r=0.5, alpha=9.0).tolist() == pytest.approx([4.0, 2.5, 1.0, -2.0])


def test_changes_up_to_epsilon_count_as_none() -> None:
    models = one_tensor([0.0] * 3, [0.5, 0.25, -0.5], [1.0, 1.0, 0.0])
    assert merged_x("ram", models, epsilon=0.25).tolist() == [0.75, 1.0, -0.5]


def test_scales_are_of_the_whole_model_and_a_tied_tensor_counts_once() -> None:
    base = {"x": torch.zeros(2), "y": torch.zeros(3)}
    tied = {"x": torch.ones(2), "y": torch.ones(3)}
    models = aligned(
        {**base, "z": base["x"]},
        [{**tied, "z": tied["x"]}, (other := {"x": torch.ones(2), "y": torch.zeros(3)}) | {"z": other["x"]}],
    )
    assert models.aliases == {"z": "x"}
    result = merged("ram_plus", models, r=1.0, alpha=9.0)  # the first expert: two shared, three unique
    assert result["x"].tolist() == [1.0, 1.0]
    assert result["y"].tolist() == pytest.approx([1 + 2 / 3] * 3)


def test_one_expert_alone_loses_only_its_smallest_changes() -> None:
    models = toy_models(1)
    for method in ("ram", "ram_plus"):
        torch.testing.assert_close(
            merged(method, models)["embed"], models.experts[0].get("embed"), rtol=0, atol=1e-5 + 3e-7
        )
