"""WUDI: optimise the merged task vector to interfere least with every task's inputs, from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.blocks import blocks
from mergelab.ops.layout import inputs_first, is_embedding, is_matrix
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import mean, weighted_sum
from mergelab.weights.numerics import norm

ROWS = 768  # rows that are optimised at a time; the loss is a sum over rows


@merge_method(
    lambda_=1.0,
    identical_at=None,
    prepare=inputs_first,
    family="spectral",
    work="multiplies every matrix hundreds of times",
    paper="Cheng et al. 2025, arXiv:2503.08099",
    use="several tasks without data, when minutes of optimisation are worth a better merge",
)
def wudi(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: frozenset[str] = frozenset(),
    steps: Annotated[int, Field(ge=0)] = 300,
    lr: Annotated[float, Field(gt=0)] = 1e-5,
) -> Tensor:
    """Optimise the sum of the task vectors to change least the outputs on each task's inputs.

    Per matrix: ``steps`` steps of Adam, from τ_m = Σ τ_t, on Σ_t ‖(τ_m − τ_t)τ_tᵀ‖² / ‖τ_t‖²; θ0 + λ·τ_m (Cheng et al.
    2025, arXiv:2503.08099), where the rows of τ_t stand for the layer's inputs. Matrices are those of linear layers,
    with outputs along the rows (GPT-2's Conv1D, which stores them transposed, is transposed back). Embeddings and
    tensors that are no matrices get the mean task vector.

    Departures: the authors' code optimises attention and MLP matrices and leaves all other tensors at the base. The
    gradient is computed as 2(D A + B) with D the change of τ_m so far, A = Σ τ_tᵀτ_t/‖τ_t‖² and
    B = Σ_t (Σ_s τ_s − τ_t)τ_tᵀτ_t/‖τ_t‖², which do not change between steps. A task vector of norm 0 adds nothing.

    Cost: D A takes 2·m·n² operations per step for a matrix (m, n) with n inputs. For BERT-base that is 0.26 TFLOP per
    step and 78 TFLOP in all: ten minutes on two cores at 65 GFLOP/s each. A has rank min(n, T·m), so that its factors
    are cheaper only where 2·T·m < n. Adam's steps differ between entries, so that D has no low rank.

    Args:
        vectors: T task vectors, float32 or float64, whole tensors; computed in their dtype.
        site: names the tensor.
        prepared: names of the matrices that are stored transposed.
        steps: number of Adam's steps; 0 gives the sum.
        lr: Adam's learning rate, about the change of an entry in a step.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]) or is_embedding(site.name):
        return mean(vectors)
    transposed = site.name in prepared
    matrices = [vector.T for vector in vectors] if transposed else list(vectors)
    merged = weighted_sum(matrices, (1.0,) * len(matrices))
    linear = torch.zeros_like(merged)
    quadratic = merged.new_zeros(merged.shape[1], merged.shape[1])
    for matrix in matrices:
        if length := norm(matrix):
            gram = _normalised_gram(matrix, length)
            quadratic += gram
            for part in blocks(merged.shape[0], ROWS):
                linear[part].addmm_(merged[part] - matrix[part], gram)
    for part in blocks(merged.shape[0], ROWS) if quadratic.any() else ():
        merged[part] += _minimise(linear[part], quadratic, steps, lr)
    return merged.T if transposed else merged


def _normalised_gram(matrix: Tensor, length: float) -> Tensor:
    """Return τᵀτ/‖τ‖², summed over blocks of rows."""
    product = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    for part in blocks(matrix.shape[0], ROWS):
        unit = matrix[part] / length  # before squaring, which underflows in float32 for very small numbers
        product.addmm_(unit.T, unit)
    return product


def _minimise(linear: Tensor, quadratic: Tensor, steps: int, lr: float) -> Tensor:
    """Return D after Adam's steps from D = 0 on tr(D A Dᵀ) + 2·tr(D Bᵀ)."""
    change = torch.zeros_like(linear)
    adam = torch.optim.Adam([change], lr=lr)
    for _ in range(steps):
        change.grad = (change @ quadratic).add_(linear).mul_(2)
        adam.step()
    return change.detach()
