"""Statistics of task vectors are those of a float64 NumPy computation, whatever the blocks, threads and order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.analyze import measures
from mergelab.analyze.measures import Sums, by_layer, layer_labels, task_vector_sums, whole
from mergelab.errors import NonFinite
from tests.analyze import reference as ref

DENSITY = 0.2
LAYERS = ["embeddings", "layer 0", "layer 1", "layer 2", "layer 10", "other"]


def total(given: ref.Models, density: float = DENSITY) -> Sums:
    return whole(task_vector_sums(ref.aligned(given), density), len(given) - 1)


def matrix(read: Callable[[int, int], float | None], count: int) -> list[list[float | None]]:
    return [[read(one, other) for other in range(count)] for one in range(count)]


def check(sums: Sums, given: ref.Models, names: list[str] | None = None, density: float = DENSITY) -> None:
    """Compare sums with NumPy's; the bound is float32's rounding, which a block's sums of products have."""
    tau, kept = ref.vectors(given, names), ref.largest(given, density, names)
    conflict, size = ref.in_conflict(tau), np.abs(tau)
    near: Any = lambda value: pytest.approx(value, rel=2e-6, abs=1e-7)  # noqa: E731
    count = len(tau)
    assert sums.entries == tau.shape[1]
    assert sums.norms == near(list(ref.norms(tau)))
    assert np.array(matrix(sums.cosine, count)) == near(ref.cosines(tau))
    assert sums.conflict == near(size[:, conflict].sum() / size.sum())
    assert [sums.conflict_of(one) for one in range(count)] == near(
        list(size[:, conflict].sum(axis=1) / size.sum(axis=1))
    )
    assert sums.conflict_count == near(conflict.sum() / (tau != 0).any(axis=0).sum())
    assert np.array(matrix(sums.overlap, count)) == near(ref.overlaps(kept))
    trimmed = np.where(kept, tau, 0)
    assert sums.kept_conflict == near(ref.in_conflict(trimmed).sum() / kept.any(axis=0).sum())


@pytest.mark.parametrize("density", [0.01, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("experts", [2, 3, 6])
def test_sums_are_those_of_numpy(experts: int, density: float) -> None:
    given = ref.models(experts)
    check(total(given, density), given, density=density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_numpy_in_any_dtype(dtype: torch.dtype) -> None:
    given = ref.models(dtype=dtype)
    check(total(given), given)


def test_each_layer_has_its_own_tensors_sums() -> None:
    given = ref.models()
    found = by_layer(task_vector_sums(ref.aligned(given), DENSITY))
    assert list(found) == LAYERS
    labels = layer_labels(list(given[0]))
    for layer, sums in found.items():
        check(sums, given, [name for name, label in labels.items() if label == layer])


def test_blocks_and_threads_change_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ref.models(4)
    before = total(given)
    monkeypatch.setattr(measures, "BLOCK", 37)
    found = total(given)
    assert found.products == pytest.approx(before.products, rel=1e-6)
    assert np.array_equal(found.shared, before.shared)
    assert (found.conflicts, found.changed, found.kept) == (before.conflicts, before.changed, before.kept)
    check(found, given)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ref.models(3)
    one = total(given)
    monkeypatch.setattr("mergelab.ops.threads.thread_count", lambda: 3)
    assert np.array_equal(total(given).products, one.products)


def test_the_order_of_the_experts_changes_no_figure() -> None:
    given = ref.models(3)
    first = total(given)
    for order in permutations(range(3)):
        found = total([given[0], *(given[1 + index] for index in order)])
        assert np.array_equal(found.products, first.products[np.ix_(order, order)])
        assert np.array_equal(found.shared, first.shared[np.ix_(order, order)])
        assert found.conflict == first.conflict
        assert found.kept_conflict == first.kept_conflict


def test_a_longer_task_vector_keeps_its_directions() -> None:
    given = ref.models(3)
    base, first, *others = given
    # Twice a change whose sum with the base is exact: powers of two.
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    doubled = {name: 2 * tensor for name, tensor in first.items()}
    one, two = total([base, first, *others]), total([base, doubled, *others])
    assert two.norms[0] == pytest.approx(2 * one.norms[0], rel=1e-12)
    assert two.norms[1:] == one.norms[1:]
    assert np.array(matrix(two.cosine, 3)) == pytest.approx(np.array(matrix(one.cosine, 3)), rel=1e-12)
    assert np.array_equal(one.shared, two.shared)
    assert (one.conflicts, one.kept_conflicts) == (two.conflicts, two.kept_conflicts)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_squares_beyond_float32_are_added_up_all_the_same(factor: float) -> None:
    given = [{name: tensor * factor for name, tensor in model.items()} for model in ref.models(2)]
    tau = ref.vectors(given)
    found = total(given)
    assert found.norms == pytest.approx(list(ref.norms(tau)), rel=1e-6, abs=0)
    assert found.cosine(0, 1) == pytest.approx(ref.cosines(tau)[0, 1], rel=1e-5)


def test_an_expert_that_is_the_base_has_no_angles() -> None:
    base, other, _ = ref.models(2)
    found = total([base, {name: tensor.clone() for name, tensor in base.items()}, other])
    assert found.norms[0] == 0.0
    assert found.cosine(0, 0) is None
    assert found.cosine(0, 1) is None
    assert found.cosine(1, 1) == 1.0
    assert found.conflict_of(0) is None
    assert found.overlap(0, 0) is None
    assert found.overlap(0, 1) == 0.0  # the other's largest entries are among nobody else's
    assert found.conflict == 0.0


def test_one_expert_is_in_conflict_with_nobody() -> None:
    found = total(ref.models(1))
    assert (found.conflict, found.conflict_count, found.kept_conflict, found.conflict_of(0)) == (None,) * 4


def test_entries_that_are_0_are_never_among_the_largest() -> None:
    base = {"a.weight": torch.zeros(10, 10)}
    sparse = {"a.weight": torch.zeros(10, 10)}
    sparse["a.weight"][0, :3] = torch.tensor([1.0, -2.0, 3.0])
    found = total([base, sparse, {"a.weight": -sparse["a.weight"]}], density=0.5)
    assert found.shared[0, 0] == 3
    assert (found.overlap(0, 1), found.cosine(0, 1), found.conflict, found.kept_conflict) == (1.0, -1.0, 1.0, 1.0)


def test_equal_magnitudes_at_the_threshold_are_all_kept() -> None:
    base = {"a.weight": torch.zeros(4, 5)}
    ones = {"a.weight": torch.ones(4, 5)}
    assert total([base, ones, ones], density=0.2).shared[0, 0] == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", [0, 2])
def test_what_is_not_finite_is_named(model: int, bad: float) -> None:
    given = ref.models(2)
    given[model]["encoder.layer.1.dense.weight"][3, 4] = bad
    with pytest.raises(NonFinite, match=rf"model {model}: encoder\.layer\.1\.dense\.weight holds NaN or infinity"):
        total(given)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("bert.embeddings.word_embeddings.weight", "embeddings"),
        ("bert.encoder.layer.11.output.dense.weight", "layer 11"),
        ("transformer.h.3.attn.c_attn.weight", "layer 3"),
        ("transformer.ln_f.weight", "other"),
        ("bert.pooler.dense.weight", "other"),
    ],
)
def test_layers_are_named_after_their_number(name: str, label: str) -> None:
    assert layer_labels([name])[name] == label


def test_layers_of_encoder_and_decoder_are_told_apart() -> None:
    names = ["encoder.block.0.layer.0.weight", "decoder.block.0.layer.0.weight", "shared.weight"]
    assert layer_labels(names) == dict(zip(names, ["encoder layer 0", "decoder layer 0", "embeddings"], strict=True))
