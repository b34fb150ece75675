"""Division that is defined everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def ratio(numerator: Array, denominator: Array) -> Array:
    """Divide, with 0 where the denominator is 0 or less."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
