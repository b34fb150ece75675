"""Spherical linear interpolation of two experts."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Annotated

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction
from mergelab.engine.sweep_range import NotSwept
from mergelab.ops.blocks import blockwise
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot, norm

COLLINEAR = 1e-12  # sin²Ω up to which float64 does not resolve the direction of an arc


def arc(cosine: Tensor, t: float, threshold: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the coefficients of two vectors at position ``t`` of the arc between them.

    Args:
        cosine: cos Ω of each pair of vectors, float64; 1 where a vector is zero.
        t: 0 is the first vector, 1 the second; other values extrapolate.
        threshold: |cos Ω| above which the coefficients are linear, 1−t and t.

    Returns:
        sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω, of the shape and dtype of ``cosine``.
    """
    linear = (cosine.abs() > threshold) | (1 - cosine.square() <= COLLINEAR)
    angle = torch.where(linear, 0.0, cosine).acos()
    of_a, of_b = (torch.where(linear, part, (part * angle).sin() / angle.sin()) for part in (1 - t, t))
    return of_a, of_b


def cosine_of(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two flattened tensors; 1 where one is zero."""
    lengths = norm(a) * norm(b)
    return max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths else 1.0


def interpolated(a: Tensor, b: Tensor, cosine: float, t: float, threshold: float = 1.0) -> Tensor:
    """Interpolate between (parts of) two tensors with this cosine between the whole ones."""
    of_a, of_b = (part.item() for part in arc(torch.tensor(cosine, dtype=torch.float64), t, threshold))
    return blockwise(lambda x, y: of_a * x + of_b * y, a, b)


class Cosines:
    """The cosines between two models' tensors, each found in a pass of its own over the two when it is first needed."""

    def __init__(self, models: AlignedModels) -> None:
        self._models, self._known = models, dict[str, float]()
        self._lock, self._locks = Lock(), dict[str, Lock]()

    def __getitem__(self, name: str) -> float:
        with self._lock:
            own = self._locks.setdefault(name, Lock())
        with own:  # parts of a tensor wait for its pass, other tensors have theirs meanwhile
            if name not in self._known:
                self._known[name] = cosine_of(*(expert.get(name) for expert in self._models.experts))
            return self._known[name]


@merge_method(
    experts=(2, 2),
    elementwise=True,
    prepare=Cosines,
    order_matters=True,
    family="averages",
    paper="Shoemake 1985, doi:10.1145/325165.325242",
    use="two models of one base, half-way between them at full norm",
)
def slerp(
    experts: Sequence[Tensor],
    *,
    site: Site,
    prepared: Cosines,
    t: Fraction = 0.5,
    threshold: Annotated[Fraction, NotSwept()] = 0.9995,
) -> Tensor:
    """Interpolate between two experts along the arc between them, each tensor flattened to one vector.

    sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with cos Ω = a·b / (‖a‖‖b‖) (Shoemake 1985). The coefficients are applied to the
    vectors themselves, not to normalised ones. Where |cos Ω| > ``threshold``, and where a vector is zero, the
    interpolation is linear: (1−t)·a + t·b. Obtuse angles are not treated differently. Dot product and norms are
    accumulated in float64, in a first pass over the tensor's blocks.

    Args:
        experts: blocks of two experts.
        site: names the tensor.
        prepared: by tensor, the cosine between the experts.
        t: 0 gives the first expert, 1 the second.
        threshold: |cos Ω| above which the vectors count as collinear.

    Returns:
        Block, float32 (float64 for float64 inputs).
    """
    a, b = experts
    return interpolated(a, b, prepared[site.name], t, threshold)
