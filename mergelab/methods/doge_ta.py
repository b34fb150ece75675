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
from mergelab.ops.blocks import blocks, working
from mergelab.ops.layout import inputs_first, is_embedding
from mergelab.ops.site import Site
from mergelab.ops.svd import TallMatrix, Triplets, decompose_leading, is_wide, self_product
from mergelab.ops.task_vectors import just_below, mean, open_task_vectors, task_vectors, weighted_sum
from mergelab.ops.thresholds import Thresholds, find_thresholds
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import norm

ROWS = 512  # rows in float64 at once
ENTRIES = 1 << 16  # entries of the columns of Δ that Adam changes at once
RESOLVED = 1e-10  # eigenvalues of the Gram matrix of unit vectors up to this one are rounding


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
    shapes = {name: torch.Size(models.base.shape(name)) for name in models.names}
    sizes = {
        name: shape.numel()
        for name, shape in shapes.items()
        if len(shape) == 2 and shape.numel() and not is_embedding(name)
    }
    thresholds = find_thresholds(partial(open_task_vectors, models), sizes, density, "model", models) if sizes else {}
    return Layers(thresholds, inputs_first(models))


@dataclass(frozen=True)
class TaskMatrix:
    """A task vector's matrix, outputs along the rows, computed when it is read.

    Attributes:
        base, expert: (m, n), in their stored dtypes.
    """

    base: Tensor
    expert: Tensor

    def rows(self, part: slice) -> Tensor:
        """Return some rows, float32 or float64."""
        return working(self.expert[part]) - working(self.base[part])

    def columns(self, part: slice) -> Tensor:
        """Return some columns, float32 or float64."""
        return working(self.expert[:, part]) - working(self.base[:, part])

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        return self.base.shape[0], self.base.shape[1]

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return math.hypot(*(norm(self.rows(part)) for part in blocks(self.shape[0], ROWS)))

    def leading(self, rank: int) -> Triplets:
        """Return the ``rank`` largest singular triplets, of the transpose where the matrix is wide."""
        if is_wide(self.shape):
            tall = TallMatrix(lambda part: self.columns(part).T.double(), *self.shape[::-1])
        else:
            tall = TallMatrix(lambda part: self.rows(part).double(), *self.shape)
        return decompose_leading(tall, rank)


@merge_method(
    needs_base=True,
    prepare=prepare_layers,
    identical_at=None,
    family="spectral",
    use="several tasks without data, when a few minutes of optimisation are worth a better merge",
    work="multiplies every matrix hundreds of times",
    paper="Wei et al. 2025, arXiv:2501.01230",
)
def doge_ta(
    base: Tensor,
    experts: Sequence[Tensor],
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
    get the mean task vector.

    Departures: FusionBench leaves tensors that are no such matrices at the base. Entries equal to the threshold of m_t
    all stay, and k is at least 1, as in `ties`; FusionBench keeps one entry more. A task vector of norm 0 has λ_t = 0.
    GPT-2's Conv1D matrices are transposed for rows to be outputs.

    Cost: a step takes 4·m·n·(T + min(m, n)/``subspace``) operations. For BERT-base with five experts that is 45 GFLOP a
    step, 18 TFLOP in all.

    Args:
        base: θ0, whole.
        experts: T tensors of the base's shape. Δ is optimised in float32, or float64 where a model is.
        site: names the tensor.
        prepared: thresholds of the layers' matrices, and the names of those that are stored transposed.
        eta: η, the norm of each weighted task vector of a matrix.
        density: fraction of entries kept, over all layers' matrices of an expert.
        subspace: the share of the directions that Δ leaves alone is one in so many.
        steps: number of Adam's steps; 0 for Δ = 0.
        lr: Adam's learning rate, about the change of an entry in a step.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs).
    """
    thresholds = prepared.thresholds.get(site.name)
    if thresholds is None:
        return mean(task_vectors(base, experts)).add_(working(base))
    turned = site.name in prepared.transposed
    start = base.T if turned else base
    matrices = [TaskMatrix(start, expert.T if turned else expert) for expert in experts]
    norms = [matrix.norm() for matrix in matrices]
    shares = [eta / length if length else 0.0 for length in norms]
    changes = _common_change(matrices, shares, _shared_directions(matrices, subspace), steps, lr)
    merged = torch.empty(start.shape, dtype=changes[0][1].dtype, device=base.device)
    for part, change in changes:
        total = torch.zeros_like(change)
        for matrix, share, threshold in zip(matrices, shares, thresholds, strict=True):
            own = matrix.columns(part)
            dropped = own.abs() <= just_below(threshold, own.dtype)
            total += (own + change).masked_fill_(dropped, 0).mul_(share)
        merged[:, part] = total + working(start[:, part])
    return merged.T if turned else merged


def _shared_directions(matrices: Sequence[TaskMatrix], subspace: int) -> Tensor:
    """Return an orthonormal basis (m, r) of the leading directions that the experts' left singular vectors span."""
    like, least = matrices[0].rows(slice(0, 1)), min(matrices[0].shape)
    wanted, rank = least // subspace, least // len(matrices)
    spanning = like.new_zeros(matrices[0].shape[0], rank * len(matrices), dtype=torch.float64)
    for at, matrix in enumerate(matrices if rank else ()):
        found = matrix.leading(rank)
        columns = slice(at * rank, at * rank + len(found.values))  # fewer than rank of a matrix of low rank
        if is_wide(matrix.shape):
            spanning[:, columns] = found.right
            continue
        for part in found.matrix.parts():
            spanning[part, columns] = found.left(part)
    squares, directions = torch.linalg.eigh(self_product(spanning))
    leading = [i for i in range(len(squares))[::-1] if squares[i] > RESOLVED][:wanted]
    basis: Tensor = spanning @ (directions[:, leading] / squares[leading].sqrt())
    return basis.to(like.dtype)


def _common_change(
    matrices: Sequence[TaskMatrix], shares: Sequence[float], fixed: Tensor, steps: int, lr: float
) -> list[tuple[slice, Tensor]]:
    """Return Δ (m, n) after Adam's steps, in parts of its columns, which depend on each other by sums over a row."""
    rows, columns = matrices[0].shape
    parts = blocks(columns, max(1, ENTRIES // rows))
    changes = [(part, fixed.new_zeros(rows, part.stop - part.start)) for part in parts]
    whole = math.fsum(shares)
    if not steps or not whole:
        return changes
    missing = _missing(matrices, shares)
    adams = [torch.optim.Adam([change], lr=lr) for _, change in changes]
    for _ in range(steps):
        residuals = [each.clone() for each in missing]
        for part, change in changes:
            for residual, matrix in zip(residuals, matrices, strict=True):
                residual -= whole * torch.linalg.vecdot(matrix.columns(part), change)
        for (part, change), adam in zip(changes, adams, strict=True):
            gradient = torch.zeros_like(change)
            for residual, matrix in zip(residuals, matrices, strict=True):
                gradient.addcmul_(residual[:, None], matrix.columns(part), value=-2 * whole)
            change.grad = gradient - fixed @ (fixed.T @ gradient)
            adam.step()
            change.grad = None
    return changes


def _missing(matrices: Sequence[TaskMatrix], shares: Sequence[float]) -> list[Tensor]:
    """Return ⟨τ_t,i, τ_t,i − Σ_s λ_s τ_s,i⟩ for each expert and row, (m,) each."""
    rows = matrices[0].shape[0]
    found: list[list[Tensor]] = [[] for _ in matrices]
    for part in blocks(rows, ROWS):
        vectors = [matrix.rows(part) for matrix in matrices]
        added = weighted_sum([vector.double() for vector in vectors], shares)
        for missing, vector in zip(found, vectors, strict=True):
            missing.append(torch.linalg.vecdot(vector.double(), vector - added).to(vector.dtype))
    return [torch.cat(missing) for missing in found]
