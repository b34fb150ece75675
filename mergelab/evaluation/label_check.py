"""Whether a classifier's outputs stand for the labels that its configuration says, told by its answers."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# All orders of more labels are too many to try.
_MOST_LABELS = 5
# Standard deviations by which another order must be better, so that chance does not make it so.
_SIGNIFICANT = 4.0


class BetterOrder(NamedTuple):
    """The output that stands for each label, and a classifier's accuracy as it is read and in that order."""

    order: tuple[int, ...]
    given: float
    accuracy: float


def better_order(outputs: Array, truth: Array) -> BetterOrder | None:
    """Find an order of the outputs in which a classifier is right significantly more often.

    The difference between two orders is tested as McNemar's test does, on the examples where one alone is right.

    Args:
        outputs: (n, C) scores.
        truth: (n,) labels, −1 where hidden.

    Returns:
        None where no order is better, or where there are too many to try.
    """
    known = truth >= 0
    labels = outputs.shape[1] if outputs.ndim == 2 else 0
    if not 2 <= labels <= _MOST_LABELS or not known.any():
        return None
    answers, right = outputs[known].argmax(axis=1), truth[known].astype(np.int64)
    given = answers == right
    found = None
    best = given.mean()
    for order in itertools.permutations(range(labels)):
        other = answers == np.asarray(order)[right]
        better, worse = int((other & ~given).sum()), int((given & ~other).sum())
        if other.mean() > best and better - worse > _SIGNIFICANT * math.sqrt(better + worse):
            best, found = other.mean(), order
    return None if found is None else BetterOrder(found, float(given.mean()), float(best))
