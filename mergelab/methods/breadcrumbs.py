"""Model Breadcrumbs: drop the largest and the smallest entries of the task vectors; alone, or before TIES' election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities, Fractions, SumWeights
from mergelab.engine.sweep_range import SweepRange
from mergelab.ops.blocks import blocks
from mergelab.ops.kth_largest import rank_of
from mergelab.ops.sparsify import ranked_magnitudes, row_blocks, rows, summed
from mergelab.ops.task_vectors import factors, of_each

Gammas = Annotated[Fractions, SweepRange(0.0, 0.05)]
RowScope = Literal["row", "tensor"]


def keep_middle(
    vectors: Sequence[Tensor], density: float | Sequence[float], gamma: float | Sequence[float], scope: RowScope
) -> list[Tensor]:
    """Set the largest and the smallest entries of every row to zero.

    Args:
        vectors: whole tensors; written into.
        density: fraction of a row's entries to keep, at least one of them; of all experts or of each.
        gamma: fraction of a row's entries to drop from the top; fewer where ``density`` leaves fewer; likewise.
        scope: whether the whole tensor counts as one row.

    Returns:
        The tensors with the entries of ranks int(γn) + 1 … int(γn) + int(density·n), and those equal to the first or
        the last of these.
    """
    count, sparse = len(vectors), []
    for vector, share, top in zip(vectors, of_each(density, count), of_each(gamma, count), strict=True):
        if share >= 1:
            sparse.append(vector)
            continue
        whole = vector.contiguous()
        lines = rows(whole) if scope == "row" else whole.view(1, -1)
        kept = rank_of(share, lines.shape[1])
        dropped = min(int(top * lines.shape[1]), lines.shape[1] - kept)
        for part in row_blocks(lines):
            _keep_between(lines[part], dropped + 1, dropped + kept)
        sparse.append(whole)
    return sparse


def _keep_between(lines: Tensor, first: int, last: int) -> None:
    high, low = ranked_magnitudes(lines, (first, last))
    for part in blocks(lines.shape[1]):
        entries = lines[:, part]
        magnitudes = entries.abs()
        entries.masked_fill_((magnitudes < low).logical_or_(magnitudes > high), 0)


@merge_method(
    lambda_=1.0,
    identical_at=None,
    family="task vectors",
    paper="Davari & Belilovsky 2023, arXiv:2312.06795",
    authors={"density": 0.2, "gamma": 0.1, "lambda_": 0.4},
    use="many experts, where outliers and small changes both disturb the sum",
)
def breadcrumbs(
    vectors: Sequence[Tensor],
    *,
    density: Densities = 0.1,
    gamma: Gammas = 0.01,
    weights: SumWeights = None,
    scope: RowScope = "row",
    normalize: bool = False,
) -> Tensor:
    """Add up task vectors without their outliers and without their small entries.

    θ0 + λ·Σ w_t m_t⊙τ_t, where the mask m_t drops of every row the ``gamma`` entries of largest magnitude and keeps the
    ``density`` next largest (Davari & Belilovsky 2023, arXiv:2312.06795). A row runs along the last dimension, as in
    the authors' code (the paper says "layer"); a bias is one row.

    Departures: at least one entry of a row is kept; entries that equal the largest or the smallest magnitude kept stay
    too; where density and gamma add up to more than 1 fewer outliers are dropped, so that ``density=1`` keeps all; the
    weights are an addition, the paper's are 1. ``scope="tensor"`` is what mergekit does. The defaults are mergekit's
    too, with λ = 1; the authors keep more (0.2 after dropping 0.1) and scale by λ = 0.4.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors, not parts.
        density: fraction of a row's entries kept; may be given for each expert.
        gamma: fraction of a row's entries dropped as outliers; may be given for each expert.
        lambda_: scale of the sum; the engine applies it.
        weights: per expert, any sign; default 1.
        scope: what the fractions are of: each row, or the whole tensor.
        normalize: whether to divide by the sum of the weights, as mergekit can.

    Returns:
        Σ w_t m_t⊙τ_t, of the vectors' shape and dtype.
    """
    return summed(keep_middle(vectors, density, gamma, scope), factors(weights, len(vectors), normalize))
