"""Passthrough: a model as it is, or scaled; with slices, layers of several models stacked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Lambda
from mergelab.methods import MERGEKIT


@merge_method(
    experts=(1, 1),
    elementwise=True,
    identical_at={"scale": 1.0},
    family="averages",
    paper=MERGEKIT,
    use="a deeper model of several models' layers (models.slices), to be trained on",
)
def passthrough(experts: Sequence[Tensor], *, scale: Lambda = 1.0) -> Tensor:
    """Return the only expert's weights, times a factor.

    s·θ (Goddard et al. 2024, arXiv:2403.13257). With ``models.slices`` it stacks layers of several models, and the
    scale can differ between layers and tensors.

    Args:
        experts: one tensor, any float dtype.
        scale: s; 1 changes no bit.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    (only,) = experts
    return only if scale == 1 else only * scale
