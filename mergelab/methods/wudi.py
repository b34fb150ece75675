"""WUDI: the task vector that interferes least with every task's own inputs, found by gradient descent on weights."""

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
)
def wudi(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: frozenset[str] = frozenset(),
    steps: Annotated[int, Field(ge=0)] = 300,
    lr: Annotated[float, Field(gt=0)] = 1e-5,
) -> Tensor:
    """Descend from the sum of the task vectors to one that changes least what each task's inputs give.

    Per matrix: ``steps`` steps of Adam, from τ_m = Σ τ_t, on Σ_t ‖(τ_m − τ_t)τ_tᵀ‖² / ‖τ_t‖²; θ0 + λ·τ_m (Cheng et al.
    2025, arXiv:2503.08099): the rows of τ_t stand for the layer's inputs. Matrices are those of linear layers, outputs
    along the rows (GPT-2's Conv1D, which stores them transposed, is turned). Embeddings and tensors that are no
    matrices get the mean task vector.

    Departures: the authors' code optimises attention and MLP matrices and leaves all other tensors at the base. The
    gradient is computed as 2(D A + B) with D what τ_m has moved, A = Σ τ_tᵀτ_t/‖τ_t‖² and
    B = Σ_t (Σ_s τ_s − τ_t)τ_tᵀτ_t/‖τ_t‖², which do not change between steps; a task vector of norm 0 adds nothing.

    Cost: D A takes 2·m·n² operations a step for (m, n) with n inputs: for BERT-base 0.26 TFLOP a step, 78 in all, which
    takes ten minutes on two cores that multiply at 65 GFLOP/s each. A has rank min(n, T·m), so that its factors save
    something only where 2·T·m < n; and Adam's step is another one in every entry, so that D has no low rank.

    Args:
        vectors: T task vectors, float32 or float64, in which all is computed; whole tensors.
        site: whose ``name`` tells embeddings, and is looked up in ``prepared``.
        prepared: the matrices that are stored transposed.
        steps: of Adam; 0 gives the sum.
        lr: Adam's learning rate, about the distance that an entry moves in a step.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]) or is_embedding(site.name):
        return mean(vectors)
    turned = site.name in prepared
    matrices = [vector.T for vector in vectors] if turned else list(vectors)
    merged = weighted_sum(matrices, (1.0,) * len(matrices))
    linear = torch.zeros_like(merged)
    quadratic = merged.new_zeros(merged.shape[1], merged.shape[1])
    for matrix in matrices:
        if length := norm(matrix):
            own = _shares(matrix, length)
            quadratic += own
            for part in blocks(merged.shape[0], ROWS):
                linear[part].addmm_(merged[part] - matrix[part], own)
    for part in blocks(merged.shape[0], ROWS) if quadratic.any() else ():
        merged[part] += _descent(linear[part], quadratic, steps, lr)
    return merged.T if turned else merged


def _shares(matrix: Tensor, length: float) -> Tensor:
    """Return τᵀτ/‖τ‖², from some rows at a time."""
    product = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    for part in blocks(matrix.shape[0], ROWS):
        unit = matrix[part] / length  # before it is squared: float32 has no squares of very small numbers
        product.addmm_(unit.T, unit)
    return product


def _descent(linear: Tensor, quadratic: Tensor, steps: int, lr: float) -> Tensor:
    """Return how far Adam goes from 0 on tr(D A Dᵀ) + 2·tr(D Bᵀ)."""
    distance = torch.zeros_like(linear)
    adam = torch.optim.Adam([distance], lr=lr)
    for _ in range(steps):
        distance.grad = (distance @ quadratic).add_(linear).mul_(2)
        adam.step()
    return distance.detach()
