"""CAT Merging: task arithmetic without the components of task vectors that disturb other tasks' features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Samples, Weights
from mergelab.engine.sweep_range import SweepRange
from mergelab.estimation.layer_features import LayerFeatures
from mergelab.methods.lot import prepare_features
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import factors, weighted_sum

Trade = Annotated[float, Field(ge=0), SweepRange(0.0, 10.0)]
Removed = Annotated[int, Field(ge=0), SweepRange(0, 8)]


@merge_method(
    needs=("data",),
    lambda_=0.4,
    prepare=prepare_features,
    identical_at=None,
    family="data",
    work="decomposes a matrix of the outputs' size for every linear layer and expert",
    paper="Sun et al. 2025, arXiv:2505.06977",
    use="as task_arithmetic, for tasks that conflict, with a few unlabelled examples of each",
)
def cat(
    vectors: Sequence[Tensor],
    *,
    prepared: Sequence[LayerFeatures],
    site: Site,
    weights: Weights = None,
    components: Removed = 4,
    tradeoff: Trade = 5.0,
    scales: Removed = 4,
    scales_tradeoff: Trade = 10.0,
    shifts: Removed = 4,
    samples: Samples = 64,
) -> Tensor:
    """Add up task vectors after removing what of them changes the features of other tasks most.

    θ0 + λ·Σ_t w_t τ̂_t, where τ̂_t is τ_t after every other task k has removed its conflicts (Sun et al. 2025,
    arXiv:2505.06977). Linear layers (in, out): τ̂_t = τ_t Π_{k≠t} (1 − B_k B_kᵀ), with B_k the ``components`` leading
    eigenvectors, of positive eigenvalue, of Σ_{t≠k} τ_tᵀ(G_k − ω·G_t)τ_t; G_t = X_tᵀX_t of the layer's inputs in expert
    t, ω = ``tradeoff``. Scales of norms: task k sets to 0 in all others the ``scales`` entries of largest Σ_{t≠k}
    (s_k − ω'·s_t)·τ_t², with s_t the squares of the normalised inputs and ω' = ``scales_tradeoff``. Biases (one
    dimension and no features): the ``shifts`` entries of largest Σ_{t≠k} τ_t². Other tensors, such as embeddings, are
    not changed. Computed in float64.

    Departures: the projections of several tasks do not commute; their order is that of the experts' values, so that it
    does not depend on how they are given. G_t and s_t are means over an expert's real (unpadded) tokens, and the expert
    itself is run, not θ0 + λτ_t. A vector that is projected or masked is not scaled back to its norm, as a public port
    of the authors' code has it; their own code was not to be had. Entries with a conflict of 0 or less are not removed,
    so that a gain is not undone; the paper removes a fixed number.

    Args:
        vectors: T whole task vectors, float32 or float64.
        prepared: the second moments of the experts' features.
        site: names the tensor.
        weights: w_t per expert; default 1.
        components: number of directions of a linear layer's outputs that each task removes from the others.
        tradeoff: ω; the larger, the more a direction must matter to task k beside the task that has it.
        scales: number of entries of a norm's scale that each task removes.
        scales_tradeoff: ω'.
        shifts: number of entries of a bias that each task removes.
        samples: number of training examples of each expert.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        Σ w_t τ̂_t, of the vectors' shape and dtype.
    """
    grams = [gram for each in prepared if (gram := each.linear.of(site.name)) is not None]
    squares = [square for each in prepared if (square := each.norms.get(site.name)) is not None]
    trimmed = list(vectors)
    if vectors[0].dim() == 2 and len(grams) == len(vectors):
        trimmed = without_conflicts(vectors, grams, components, tradeoff, site.name in prepared[0].linear.input_first)
    elif vectors[0].dim() == 1 and len(squares) == len(vectors):
        trimmed = masked(vectors, scales, lambda k, t: squares[k] - scales_tradeoff * squares[t])
    elif vectors[0].dim() == 1:
        trimmed = masked(vectors, shifts, lambda k, t: torch.ones((), dtype=torch.float64))
    return weighted_sum(trimmed, factors(weights, len(vectors)))


def without_conflicts(
    vectors: Sequence[Tensor], grams: Sequence[Tensor], components: int, tradeoff: float, input_first: bool
) -> list[Tensor]:
    """Return the task vectors of a linear layer without the directions of its outputs that disturb other tasks.

    Args:
        vectors: T weights, (out, in), or (in, out) with ``input_first``.
        grams: the experts' G_t, (in, in).
        components: number of directions that each task removes from the others.
        tradeoff: ω.
        input_first: whether the weights are (in, out).
    """
    turned = [vector.T if input_first else vector for vector in vectors]  # (out, in)
    bases = [_conflicts(turned, grams, k, components, tradeoff) for k in range(len(turned))]
    trimmed = []
    for t, vector in enumerate(turned):
        rest = vector.double()
        for k, basis in enumerate(bases):
            if k != t:
                rest = rest - basis @ (basis.T @ rest)
        trimmed.append((rest.T if input_first else rest).to(vector.dtype))
    return trimmed


def _conflicts(turned: Sequence[Tensor], grams: Sequence[Tensor], k: int, components: int, tradeoff: float) -> Tensor:
    """Return B_k, (out, c) float64, from τ_t (out, in)."""
    device = turned[0].device
    own = grams[k].to(device, torch.float64)
    others = [vector for t, vector in enumerate(turned) if t != k]
    middles = [own - tradeoff * gram.to(device, torch.float64) for t, gram in enumerate(grams) if t != k]
    return leading_directions(others, middles, components) if others else own.new_zeros(len(turned[0]), 0)


def leading_directions(factors: Sequence[Tensor], middles: Sequence[Tensor], count: int) -> Tensor:
    """Return the ``count`` leading eigenvectors of Σ W_t M_t W_tᵀ, of positive eigenvalue, as columns in float64.

    Where W = [W_1, …] has more rows than columns, they come from the smaller R·diag(M)·Rᵀ with RᵀR = WᵀW, so that no
    matrix has the rows' number squared of entries.

    Args:
        factors: W_t, (m, n).
        middles: M_t, (n, n) symmetric, float64.
        count: number of eigenvectors.
    """
    rows = factors[0].shape[0]
    if rows <= sum(factor.shape[1] for factor in factors):
        product = middles[0].new_zeros(rows, rows)
        for factor, middle in zip(factors, middles, strict=True):
            product += factor.double() @ middle @ factor.double().T
        return _positive(product, count)
    inner = torch.cat([torch.cat([a.double().T @ b.double() for b in factors], dim=1) for a in factors])
    squares, basis = torch.linalg.eigh(inner)
    known = squares > len(squares) * torch.finfo(torch.float64).eps * squares[-1].clamp_min(0)
    root, inverse = basis[:, known] * squares[known].sqrt(), basis[:, known] / squares[known].sqrt()
    widths = [factor.shape[1] for factor in factors]
    pairs = zip(root.split(widths), middles, strict=True)
    smaller = sum((part.T @ middle @ part for part, middle in pairs), root.new_zeros(root.shape[1], root.shape[1]))
    inverse = inverse @ _positive(smaller, count)
    parts = inverse.split(widths)
    found = middles[0].new_zeros(rows, inverse.shape[1])
    for factor, part in zip(factors, parts, strict=True):
        found += factor.double() @ part
    return found


def _positive(matrix: Tensor, count: int) -> Tensor:
    """Return the ``count`` leading eigenvectors of eigenvalues above what rounding of float32 Gram matrices makes."""
    if not len(matrix):
        return matrix
    values, directions = torch.linalg.eigh((matrix + matrix.T) / 2)
    least = len(values) * torch.finfo(torch.float32).eps * values.abs().max()
    leading: Tensor = directions.flip(1)[:, :count]
    return leading[:, values.flip(0)[:count] > least]


def masked(vectors: Sequence[Tensor], count: int, factor: Callable[[int, int], Tensor]) -> list[Tensor]:
    """Return task vectors (d,) without the ``count`` entries that disturb each other task most, where above 0.

    Args:
        vectors: T vectors.
        count: number of entries that each task removes from the others.
        factor: returns, for task k and task t, what τ_t² is multiplied by; (d,) or a scalar, float64.
    """
    squares = [vector.double().square() for vector in vectors]
    kept = [torch.ones_like(vector, dtype=torch.bool) for vector in vectors]
    for k in range(len(vectors)):
        terms = (factor(k, t).to(squares[t].device) * squares[t] for t in range(len(vectors)) if t != k)
        conflict = sum(terms, torch.zeros_like(squares[k]))
        at = conflict.argsort(descending=True, stable=True)[:count]
        for t in range(len(vectors)):
            if t != k:
                kept[t][at[conflict[at] > 0]] = False
    return [torch.where(keep, vector, 0.0) for keep, vector in zip(kept, vectors, strict=True)]
