"""WUDI v2 (OptMerge): WUDI on task vectors of low rank, by gradient descent that is summed in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Positive
from mergelab.ops.blocks import blocks
from mergelab.ops.layout import inputs_first, is_embedding, is_matrix
from mergelab.ops.site import Site
from mergelab.ops.svd import ROWS, decompose_leading, is_wide, tall_matrix
from mergelab.ops.task_vectors import mean
from mergelab.weights.numerics import norm


@merge_method(
    lambda_=1.0,
    identical_at=None,
    prepare=inputs_first,
    family="spectral",
    use="as wudi, for large models: few directions of each expert, and no step taken one by one",
    work="decomposes every matrix of every expert",
    paper="Wei et al. 2025, arXiv:2505.19892",
)
def wudi_v2(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: frozenset[str] = frozenset(),
    steps: Annotated[int, Field(ge=0)] = 300,
    lr: Positive = 1e-4,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
) -> Tensor:
    """Optimise the mean task vector to change least the outputs on each task's leading input directions.

    Per matrix of rank bound k = min(m, n): τ̂_t = U_t S_t V_tᵀ with the ⌊k/T⌋ largest singular triplets of τ_t.
    ``steps`` steps of gradient descent with momentum, from τ_m = mean τ_t, on Σ_t ‖(τ_m − τ̂_t) V_t S_t‖² / ‖τ_t‖²;
    θ0 + λ·τ_m (Wei et al. 2025, arXiv:2505.19892, for models that are fully fine-tuned). Matrices are those of linear
    layers, with outputs along the rows (GPT-2's Conv1D is transposed). Embeddings and tensors that are no matrices get
    the mean task vector, as in the authors' code.

    The loss is quadratic, so that every step multiplies along fixed directions: those of A = Σ V_t S_t² V_tᵀ / ‖τ_t‖².
    The steps are carried out for the eigenvalues alone, and the result is that of all steps to rounding.

    Departures: a step that diverges in a direction (lr·λ_max(A) too large for the momentum) diverges here too, and the
    engine reports the infinity. A task vector of norm 0 adds nothing to the loss. The paper's other variant, for
    merging LoRA models, is not here.

    Args:
        vectors: T task vectors, float32 or float64, whole tensors. Decompositions are in float64.
        site: names the tensor.
        prepared: names of the matrices that are stored transposed.
        steps: number of steps; 0 gives the mean.
        lr: learning rate.
        momentum: from 0 to below 1.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    average = mean(vectors)
    rank = min(site.shape) // len(vectors) if is_matrix(average) and not is_embedding(site.name) else 0
    if not rank:
        return average
    matrices = [vector.T for vector in vectors] if site.name in prepared else vectors
    merged = average.T if site.name in prepared else average
    found = [_inputs(matrix, rank) for matrix in matrices]
    inputs = torch.cat(found)  # Z (Σ r, n), of float64, with ZᵀZ = A
    if not len(inputs):
        return average
    squares, directions = torch.linalg.eigh(inputs @ inputs.T)
    travelled = ((directions * _descended(squares, steps, lr, momentum)) @ directions.T) @ inputs
    for part in blocks(len(merged), ROWS):
        each = [(merged[part].double() - matrix[part]) @ rows.T for matrix, rows in zip(matrices, found, strict=True)]
        merged[part] += (torch.cat(each, dim=1) @ travelled).to(merged.dtype)
    return average


def _inputs(matrix: Tensor, rank: int) -> Tensor:
    """Return S Vᵀ / ‖τ‖ of the leading triplets, (r, n) float64; r = 0 where the matrix is 0."""
    size = norm(matrix)
    found = decompose_leading(tall_matrix(matrix), rank)
    if not size or not len(found.values):
        return found.right.new_zeros(0, matrix.shape[1])
    if not is_wide(matrix.shape):
        return (found.right * (found.values / size)).T
    rows = found.right.new_empty(len(found.values), matrix.shape[1])
    for part in found.matrix.parts():
        rows[:, part] = found.right.T @ found.matrix.read(part).T / size
    return rows


def _descended(squares: Tensor, steps: int, lr: float, momentum: float) -> Tensor:
    """Return, for each eigenvalue a of A, how far the steps go along a gradient of 1 there that grows by 2·a·way."""
    way, speed = torch.zeros_like(squares), torch.zeros_like(squares)
    for _ in range(steps):
        speed = momentum * speed + 2 + 2 * squares * way
        way = way - lr * speed
    return way
