"""SCE: select by variance, calculate coefficients, erase minority signs; values by mergekit 0.1.5."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.test_mergekit import recipe
from tests.methods.toy import SHAPES, distinct_models, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, FUSEAI, RECORDED_MERGEKIT, compared

GOLDEN = {
    1.0: [-0.45790544, 0.15146956, 0.58663821, -0.1666525, 0.26084456, -0.49148679, -0.057277501, 0.37021956,
          -0.38211182, 0.052097503, 0.52656251, -0.36415544, 0.071013182, 0.5052225, -0.25478044, 0.18038818],
    0.4: [-0.49767244, 0.0625, 0.62968236, -0.25, 0.1875, -0.44844264, -0.125, 0.3125,
          -0.33906764, 0, 0.4375, -0.40392244, 0.125, 0.5625, -0.29454744, 0.25],
}  # fmt: skip


@pytest.mark.parametrize("select_topk", GOLDEN)
def test_values_are_mergekits(select_topk: float) -> None:
    result = merged_x("sce", recipe("sce"), select_topk=select_topk)
    note = "mergekit's coefficients are equal where the mean squares add up to less than 1e-6"
    compared("sce", RECORDED_MERGEKIT, result, GOLDEN[select_topk], options={"select_topk": select_topk}, note=note)
    torch.testing.assert_close(result, torch.tensor(GOLDEN[select_topk]), rtol=1e-6, atol=1e-7)


def transcribed(vectors: np.ndarray, select_topk: float) -> np.ndarray:
    """The merged task vector of (T, …) task vectors, in float64, by sorting."""
    variance = vectors.var(axis=0)
    if select_topk < 1:
        kept = max(1, int(select_topk * np.count_nonzero(variance)))
        vectors = vectors * (variance >= np.sort(variance, axis=None)[-kept])
    energy = (vectors**2).reshape(len(vectors), -1).sum(axis=1)
    coefficients = (energy / energy.sum()).reshape(-1, *[1] * (vectors.ndim - 1))
    sign = np.where(vectors.sum(axis=0) >= 0, 1, -1)
    weights = coefficients * (np.sign(vectors) == sign)
    return (weights * vectors).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-300)


@pytest.mark.parametrize("select_topk", [1.0, 0.7, 0.1, 1e-5])
@pytest.mark.parametrize("spread", [1.0, 1e-4])  # of a mean square below 1e-6, the coefficients are mergekit's no more
def test_it_is_the_formula_per_tensor(select_topk: float, spread: float) -> None:
    models = distinct_models(4)
    assert models.base is not None
    for i, expert in enumerate(models.experts):  # coefficients that differ, also between tensors
        for j, key in enumerate(SHAPES):
            base = models.base.get(key)
            expert.get(key).sub_(base).mul_(spread * (1 + i * (j % 2))).add_(base)
    result = merged("sce", models, select_topk=select_topk)
    for key in SHAPES:
        vectors = np.stack([task_vector(models, i, key).numpy() for i in range(4)])
        expected = models.base.get(key).numpy() + transcribed(vectors, select_topk)
        compared("sce", FORMULA, result[key], expected, options={"select_topk": select_topk})
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_in_float32_it_is_the_formula_within_rounding() -> None:
    models = toy_models(3)
    assert models.base is not None
    result = merged("sce", models)
    for key in SHAPES:
        vectors = np.stack([task_vector(models, i, key).float().numpy() for i in range(3)]).astype(np.float64)
        expected = models.base.get(key).double().numpy() + transcribed(vectors, 1.0)
        compared("sce", FORMULA, result[key], expected, options="select_topk=1.0")
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_select_calculate_and_erase_by_hand() -> None:
    models = one_tensor([0.0] * 4, [3.0, 1.0, 2.0, 1.0], [-1.0, 1.0, 2.0, -2.0])
    # Variances 4, 0, 0, 2.25: of the two that vary, half is the first; the second expert's is a minority there.
    assert merged_x("sce", models, select_topk=0.5).tolist() == pytest.approx([3.0, 0.0, 0.0, 0.0])
    # Energies 15 and 10.
    torch.testing.assert_close(merged_x("sce", models), torch.tensor([3.0, 1.0, 2.0, -2.0]))
    weighted = merged_x("sce", one_tensor([0.0, 0.0], [3.0, 1.0], [1.0, 2.0]))
    torch.testing.assert_close(weighted, torch.tensor([(10 * 3 + 5 * 1) / 15, (10 * 1 + 5 * 2) / 15]))


def of_all(vectors: np.ndarray, select_topk: float) -> np.ndarray:
    """The authors' code: the selection counts for the coefficients, and the whole task vectors vote and are merged."""
    variance, chosen = vectors.var(axis=0), vectors
    if select_topk < 1:
        kept = max(1, int(select_topk * np.count_nonzero(variance)))
        chosen = vectors * (variance >= np.sort(variance, axis=None)[-kept])
    energy = np.array([np.square(each).mean() for each in chosen])
    shares = energy / energy.sum() if energy.sum() else np.full(len(vectors), 1 / len(vectors))
    majority = np.where(vectors.sum(axis=0) >= 0, 1, -1)
    erased = shares.reshape(-1, *[1] * (vectors.ndim - 1)) * (np.sign(vectors) == majority)
    divisor = erased.sum(axis=0)
    return (erased * vectors).sum(axis=0) / np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("select_topk", [1.0, 0.7, 0.1])
def test_entries_that_are_not_selected_are_merged_as_by_the_authors_code_where_asked_for(select_topk: float) -> None:
    models = distinct_models(4)
    assert models.base is not None
    options = {"select_topk": select_topk, "entries": "all"}
    result, others = merged("sce", models, **options), merged("sce", models, select_topk=select_topk)
    for key in SHAPES:
        vectors = np.stack([task_vector(models, i, key).numpy() for i in range(4)])
        expected = models.base.get(key).numpy() + of_all(vectors, select_topk)
        note = "FuseAI selects none of a scalar, and weighs the experts alike"
        compared("sce", FUSEAI, result[key], expected, options=options, note=note)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(result[key], others[key]) == (select_topk == 1 or key == "gate")


def test_a_tensor_that_is_equal_in_all_experts_is_theirs_where_all_entries_are_merged() -> None:
    twin = torch.rand(1000)
    models = one_tensor(torch.zeros(1000), twin, twin, twin)
    torch.testing.assert_close(merged_x("sce", models, select_topk=0.5, entries="all"), twin)


def test_entries_of_equal_variance_all_stay_and_one_at_least() -> None:
    models = one_tensor([0.0] * 4, [1.0, 2.0, 1.0, 3.0], [0.0, 2.0, 0.0, 3.0])
    assert merged_x("sce", models, select_topk=0.01).tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_where_the_experts_are_equal_nothing_is_selected(count: int) -> None:
    twin = torch.rand(1000)
    models = one_tensor(torch.zeros(1000), *[twin] * count)
    assert not merged_x("sce", models, select_topk=0.9).any()
    torch.testing.assert_close(merged_x("sce", models), twin)


def test_votes_that_cancel_count_as_positive() -> None:
    models = one_tensor([0.0, 0.0], [1.0, 2.0], [-1.0, 2.0])
    assert merged_x("sce", models).tolist() == [1.0, 2.0]


def test_scalars_zero_task_vectors_and_empty_tensors_are_no_trouble() -> None:
    torch.testing.assert_close(merged_x("sce", one_tensor(1.0, 2.0, 4.0)), torch.tensor(1 + (1 * 1 + 9 * 3) / 10))
    assert merged_x("sce", one_tensor(1.0, 2.0, 4.0), select_topk=0.5).item() == pytest.approx(3.8)
    assert merged_x("sce", one_tensor([1.0, 2.0], [1.0, 2.0], [1.0, 3.0])).tolist() == [1.0, 3.0]
    assert merged_x("sce", one_tensor(torch.zeros(0, 3), torch.zeros(0, 3)), select_topk=0.5).shape == (0, 3)
