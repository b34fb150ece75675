"""DOGE TA: task vectors with a common change by projected gradient, weighted by their inverse norms layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Positive
from mergelab.ops.layout import inputs_first, is_embedding
from mergelab.ops.site import Site
from mergelab.ops.svd import decompose_leading, is_wide, self_product, tall_matrix
from mergelab.ops.task_vectors import just_below, open_task_vectors, weighted_sum
from mergelab.ops.thresholds import Thresholds, find_thresholds
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import norm


@dataclass(frozen=True)
class Layers:
    """What merging the layers' matrices needs to know of the whole models.

    Attributes:
        thresholds: by matrix that is merged, the magnitude for each expert below which entries are dropped.
        transposed: names of the matrices that are stored transposed.
    """

    thresholds: Mapping[str, Thresholds]
    transposed: frozenset[str]


def prepare_layers(models: AlignedModels, *, density: float) -> Layers:
    """Find the matrices of layers, and the magnitudes that ``density`` of their entries have."""
    assert models.base is not None
    shapes = {name: tuple(models.base.shape(name)) for name in models.names}
    sizes = {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and math.prod(shape) and not is_embedding(name)
    }
    thresholds = find_thresholds(partial(open_task_vectors, models), sizes, density, "model", models) if sizes else {}
    return Layers(thresholds, inputs_first(models))


@merge_method(
    prepare=prepare_layers,
    identical_at=None,
    family="spectral",
    work="multiplies every matrix hundreds of times",
    paper="Wei et al. 2025, arXiv:2501.01230",
)
def doge_ta(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Layers,
    eta: Positive = 0.07,
    density: Density = 0.3,
    subspace: Annotated[int, Field(ge=1)] = 6,
    steps: Annotated[int, Field(ge=0)] = 400,
    lr: Positive = 1e-4,
) -> Tensor:
    """Add up task vectors of equal norms, after a common change that makes the sum act on each as on itself.

    Per matrix (m, n) of a layer: θ0 + Σ λ_t m_t⊙(τ_t + Δ) with λ_t = η/‖τ_t‖_F and m_t = 1 at the ``density`` largest
    |τ_t| of all such matrices of the expert. Δ minimises Σ_t Σ_i ⟨τ_t,i, τ_t,i − Σ_s λ_s (τ_s,i + Δ_i)⟩² over rows i,
    the outputs, by ``steps`` steps of Adam from 0. Each gradient G is projected to G − P G, so that Δ leaves the tasks'
    common directions alone: P projects onto the ⌊min(m, n)/``subspace``⌋ leading left singular vectors of [U_1 … U_T],
    with U_t those of the ⌊min(m, n)/T⌋ largest singular values of τ_t (Wei et al. 2025, arXiv:2501.01230, DOGE with
    task arithmetic, as in the code that the authors gave to FusionBench). Embeddings and tensors that are no matrices
    stay the base's, as there.

    Departures: entries equal to the threshold of m_t all stay, and k is at least 1, as in `ties`; FusionBench keeps one
    entry more. A task vector of norm 0 has λ_t = 0. GPT-2's Conv1D matrices are transposed for rows to be outputs.

    Cost: a step takes 4·m·n·(T + min(m, n)/``subspace``) operations. For BERT-base with five experts that is 45 GFLOP a
    step, 18 TFLOP in all.

    Args:
        vectors: T task vectors, float32 or float64, whole tensors; Δ is optimised in their dtype.
        site: names the tensor.
        prepared: thresholds of the layers' matrices, and the names of those that are stored transposed.
        eta: η, the norm of each weighted task vector of a matrix.
        density: fraction of entries kept, over all layers' matrices of an expert.
        subspace: the share of the directions that Δ leaves alone is one in so many.
        steps: number of Adam's steps; 0 for Δ = 0.
        lr: Adam's learning rate, about the change of an entry in a step.

    Returns:
        Σ λ_t m_t⊙(τ_t + Δ), of the vectors' shape and dtype.
    """
    thresholds = prepared.thresholds.get(site.name)
    if thresholds is None:
        return torch.zeros_like(vectors[0])
    norms = [norm(vector) for vector in vectors]
    shares = [eta / length if length else 0.0 for length in norms]
    turned = site.name in prepared.transposed
    matrices = [vector.T for vector in vectors] if turned else list(vectors)
    change = _common_change(matrices, shares, _shared_directions(matrices, subspace), steps, lr)
    merged = torch.zeros_like(change)
    for matrix, share, threshold in zip(matrices, shares, thresholds, strict=True):
        dropped = matrix.abs() <= just_below(threshold, matrix.dtype)
        merged += (matrix + change).masked_fill_(dropped, 0).mul_(share)
    return merged.T if turned else merged


def _shared_directions(matrices: Sequence[Tensor], subspace: int) -> Tensor:
    """Return an orthonormal basis (m, r) of the leading directions that the experts' left singular vectors span."""
    least = min(matrices[0].shape)
    wanted, rank = least // subspace, least // len(matrices)
    found = [_outputs(matrix, rank) for matrix in matrices if rank]
    spanning = torch.cat(found, dim=1) if found else matrices[0].new_zeros(matrices[0].shape[0], 0).double()
    wanted = min(wanted, spanning.shape[1])
    if not wanted:
        return matrices[0].new_zeros(matrices[0].shape[0], 0)
    squares, directions = torch.linalg.eigh(self_product(spanning))
    leading = squares[-wanted:].clamp_min(torch.finfo(squares.dtype).eps)
    return (spanning @ (directions[:, -wanted:] / leading.sqrt())).to(matrices[0].dtype)


def _outputs(matrix: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` leading left singular vectors, (m, r) float64."""
    found = decompose_leading(tall_matrix(matrix), rank)
    if is_wide(matrix.shape):
        return found.right
    return torch.cat([found.left(part) for part in found.matrix.parts()])


def _common_change(matrices: Sequence[Tensor], shares: Sequence[float], fixed: Tensor, steps: int, lr: float) -> Tensor:
    """Return Δ after Adam's steps, (m, n)."""
    change = torch.zeros_like(matrices[0])
    whole = math.fsum(shares)
    if not steps or not whole:
        return change
    added = weighted_sum(matrices, shares)
    missing = [(matrix.double() * (matrix - added)).sum(dim=1).to(change.dtype) for matrix in matrices]  # at Δ = 0
    del added
    adam = torch.optim.Adam([change], lr=lr)
    change.grad = torch.empty_like(change)
    for _ in range(steps):
        gradient = change.grad.zero_()
        for matrix, at_start in zip(matrices, missing, strict=True):
            residual = at_start - whole * torch.linalg.vecdot(matrix, change)
            gradient.addcmul_(residual[:, None], matrix, value=-2 * whole)
        gradient -= fixed @ (fixed.T @ gradient)
        adam.step()
    return change.detach()
