"""Metrics of how likely given text is to a model, from what each example contributes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergelab.tasks.metric_table import LIKELIHOOD

Array = np.ndarray[Any, Any]


def from_statistics(name: str, rows: Array) -> float:
    """Compute exp(Σ negative log likelihood / Σ tokens or words) of the examples with these ``rows`` (n, 3)."""
    total = rows.sum(axis=0)
    units = total[LIKELIHOOD[name]]
    # Past what a float holds it is infinite for every purpose.
    return math.exp(min(total[0] / units, 700.0)) if units else math.inf
