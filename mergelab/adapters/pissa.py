"""PiSSA: the base that an adapter was trained on is what is left of the stored one without its leading directions.

Meng et al. 2024, arXiv:2404.02948. At the start ``scale · B₀ · A₀`` is the best approximation of rank r of a weight,
and the rest of the weight is frozen. B₀ · A₀ follows from the stored weight, whatever the signs of singular vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergelab.adapters.changes import Change, Shape
from mergelab.errors import ModelError, NonFinite

# In float32, directions whose singular values are nearer than this share of the largest are mixed by 1 % or more.
_NEAR = 1e-5


@dataclass(frozen=True, eq=False)
class Residual:
    """Subtract the best approximation of rank r from a weight.

    The approximation is computed once, in float64.

    Attributes:
        rank: r.
        where: the adapter and its layer, for errors.
    """

    rank: int
    where: str
    _leading: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it is a matrix."""
        return stored if len(stored) == 2 else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the rest.

        Raises:
            ModelError: the singular values at the rank are so near that rounding decides what is subtracted.
        """
        if self.rank >= min(tensor.shape):
            return tensor.zero_()
        if not self._leading:
            self._leading.append(leading(tensor, self.rank, self.where))
        left, right = (factor.to(tensor) for factor in self._leading[0])
        return torch.addmm(tensor, left, right, alpha=-1)

    def same_as(self, other: Change) -> bool:
        """Return whether the ranks are equal."""
        return isinstance(other, Residual) and self.rank == other.rank


def leading(matrix: Tensor, rank: int, where: str) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a matrix as (rows, r) and (r, columns), in its dtype.

    The eigenvectors of the smaller Gram matrix, in float64, span what its leading singular vectors span.

    Args:
        matrix: (rows, columns).
        rank: r, below both sizes.
        where: what errors call the matrix.

    Raises:
        ModelError: the singular values r and r + 1 are equal within rounding, and not small. NonFinite: it holds NaN.
    """
    wide = matrix.double()
    if not bool(wide.isfinite().all()):
        raise NonFinite(f"{where}: the base's weight holds NaN or infinity")
    rows, columns = wide.shape
    values, vectors = torch.linalg.eigh(wide @ wide.T if rows < columns else wide.T @ wide)
    singular = values.clamp(min=0).sqrt()
    last, following, largest = (float(singular[at]) for at in (-rank, -rank - 1, -1))
    if last - following < _NEAR * largest < last:
        raise ModelError(
            f"{where}: init_lora_weights='pissa' cannot be undone: the singular values {rank} and {rank + 1} of the "
            f"base's weight are {last:.6g} and {following:.6g}, too near to tell apart; save the adapter again with "
            "path_initial_model_for_weight_conversion, which converts it"
        )
    basis = vectors[:, -rank:]
    left, right = (basis, basis.T @ wide) if rows < columns else (wide @ basis, basis.T)
    return left.to(matrix.dtype), right.to(matrix.dtype)
