"""Spherical linear interpolation of two experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mergelab.methods.blocks import blockwise
from mergelab.methods.parameters import Fraction
from mergelab.methods.registry import merge_method
from mergelab.weights.numerics import dot, norm


@merge_method(experts=(2, 2), order_matters=True, family="averages", paper="Shoemake 1985, doi:10.1145/325165.325242")
def slerp(experts: Sequence[Tensor], *, t: Fraction = 0.5, threshold: Fraction = 0.9995) -> Tensor:
    """Interpolate between two experts along the arc between them, each tensor taken as one flat vector.

    sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with cos Ω = a·b / (‖a‖‖b‖) (Shoemake 1985). The coefficients are applied to the
    vectors as they are, not to the normalised ones. Where |cos Ω| > ``threshold``, and where a vector is zero, the
    interpolation is linear: (1−t)·a + t·b. An obtuse angle is an angle like any other. Dot product and norms are
    accumulated in float64.

    Args:
        experts: two tensors of one shape, any float dtype; whole tensors, not parts.
        t: 0 gives the first expert, 1 the second.
        threshold: |cos Ω| above which the vectors count as collinear.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    a, b = experts
    lengths = norm(a) * norm(b)
    cosine = max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths else 1.0
    if lengths == 0 or abs(cosine) > threshold:
        of_a, of_b = 1 - t, t
    else:
        angle = math.acos(cosine)
        of_a, of_b = (math.sin(part * angle) / math.sin(angle) for part in (1 - t, t))
    return blockwise(lambda x, y: of_a * x + of_b * y, a, b)
