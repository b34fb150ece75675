"""Median: the entrywise median of the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.blocks import working


@merge_method(
    elementwise=True,
    family="averages",
    use="three or more experts, of which one may be broken",
)
def median(experts: Sequence[Tensor]) -> Tensor:
    """Return the median of the experts at each entry; for an even number of experts, the mean of the middle two.

    Args:
        experts: T tensors of one shape, any float dtype.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    ordered = [working(expert) for expert in experts]
    count = len(ordered)
    for end in range(count - 1, 0, -1):  # bubble sort of all entries at once
        for i in range(end):
            low, high = torch.minimum(ordered[i], ordered[i + 1]), torch.maximum(ordered[i], ordered[i + 1])
            ordered[i], ordered[i + 1] = low, high
    middle = ordered[count // 2]
    return middle.clone() if count % 2 else (ordered[count // 2 - 1] + middle) / 2
