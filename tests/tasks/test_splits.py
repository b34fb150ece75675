from __future__ import annotations

import numpy as np
import pytest

from mergelab.errors import DataError
from mergelab.tasks.splits import holdout, stratified_sample


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.73])
@pytest.mark.parametrize("count", [2, 3, 71, 277])
def test_a_holdout_is_disjoint_exhaustive_and_of_the_size_asked_for(count: int, fraction: float) -> None:
    labels = np.random.default_rng(0).integers(3, size=count)
    select, report = holdout(labels, fraction, seed=1)
    assert sorted([*select, *report]) == list(range(count))
    assert len(select) == min(max(round(fraction * count), 1), count - 1)


def test_every_class_is_in_both_parts_in_its_share() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    select, report = holdout(labels, 0.5, seed=3)
    assert (labels[select] == 1).sum() == (labels[report] == 1).sum() == 5


def test_scores_are_divided_by_range() -> None:
    labels = np.random.default_rng(0).uniform(0, 5, size=1500).astype(np.float32)
    select, report = holdout(labels, 0.3, seed=0)
    for low in (0.0, 0.5, 4.5):
        shares = [((labels[part] >= low) & (labels[part] < low + 0.5)).mean() for part in (select, report)]
        assert shares[0] == pytest.approx(shares[1], abs=0.02)


def test_the_seed_alone_decides() -> None:
    labels = np.arange(100) % 2
    np.testing.assert_array_equal(holdout(labels, 0.5, 7)[0], holdout(labels, 0.5, 7)[0])
    assert not np.array_equal(holdout(labels, 0.5, 7)[0], holdout(labels, 0.5, 8)[0])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_outside_zero_to_one_is_an_error(fraction: float) -> None:
    with pytest.raises(DataError, match="greater than 0 and less than 1"):
        holdout(np.zeros(10, dtype=int), fraction)


def test_a_single_example_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="1 examples cannot be divided"):
        holdout(np.zeros(1, dtype=int))


@pytest.mark.parametrize("count", [1, 2, 7, 50, 99, 100])
def test_a_sample_has_exactly_the_count_asked_for_in_the_classes_shares(count: int) -> None:
    labels = np.array([0] * 61 + [1] * 29 + [2] * 10)
    kept = stratified_sample(labels, count, seed=0)
    assert len(set(kept)) == count
    assert list(kept) == sorted(kept)
    found = np.bincount(labels[kept], minlength=3)
    assert np.abs(found - count * np.array([0.61, 0.29, 0.10])).max() < 1


def test_examples_without_labels_can_be_sampled() -> None:
    assert len(stratified_sample(np.full(20, -1), 5)) == 5
    assert len(stratified_sample(np.full(20, np.nan, dtype=np.float32), 5)) == 5
