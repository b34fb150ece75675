"""Divide examples: what a sweep selects on is not what it reports."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.errors import DataError

Array = np.ndarray[Any, Any]

# Scores of a regression are spread over this many equally filled bins, which are then divided like classes.
_BINS = 10


def holdout(labels: Array, fraction: float = 0.5, seed: int = 0) -> tuple[Array, Array]:
    """Divide examples in two, so that every class (or range of scores) is in both in its share.

    Args:
        labels: (n,) integer classes, or floating-point scores.
        fraction: of the examples, for the selecting part.
        seed: the same seed gives the same division.

    Returns:
        Positions of the selecting and of the reporting examples, each in ascending order; disjoint, together all.

    Raises:
        DataError: there are fewer than two examples, or ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"holdout_fraction={fraction}: must be greater than 0 and less than 1")
    if len(labels) < 2:
        raise DataError(f"holdout: {len(labels)} examples cannot be divided")
    wanted = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    select = stratified_sample(labels, wanted, seed)
    return select, np.setdiff1d(np.arange(len(labels)), select)


def stratified_sample(labels: Array, count: int, seed: int = 0) -> Array:
    """Draw ``count`` of the examples, every class (or range of scores) in its share; positions in ascending order.

    Shares are rounded by largest remainder, so that exactly ``count`` are drawn.
    """
    groups = _strata(labels)
    sizes = np.bincount(groups)
    shares = count * sizes / len(labels)
    taken = np.floor(shares).astype(int)
    order = np.argsort(taken - shares, kind="stable")
    taken[order[: count - int(taken.sum())]] += 1
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(groups == group))[:number] for group, number in enumerate(taken)]
    return np.sort(np.concatenate(drawn))


def shards(labels: Array, count: int, seed: int = 0) -> list[Array]:
    """Divide examples into ``count`` parts of like size, so that every class (or range of scores) is in each.

    Args:
        labels: (n,) integer classes, or floating-point scores.
        count: how many parts.
        seed: the same seed gives the same division.

    Returns:
        Positions of each part's examples in ascending order; disjoint, together all.

    Raises:
        DataError: there are fewer examples than parts.
    """
    if len(labels) < count:
        raise DataError(f"shards={count}: there are {len(labels)} examples")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_group = shuffled[np.argsort(_strata(labels)[shuffled], kind="stable")]
    return [np.sort(by_group[part::count]) for part in range(count)]


def _strata(labels: Array) -> Array:
    """Number the class or the range of scores of each example, from 0 on."""
    if np.issubdtype(labels.dtype, np.floating):
        if np.isnan(labels).all():
            return np.zeros(len(labels), dtype=np.int64)
        edges = np.quantile(labels, np.linspace(0, 1, _BINS + 1)[1:-1])
        labels = np.searchsorted(edges, labels, side="right")
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
