"""SVC: after another merge, scale its singular values down where the experts share a direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.chaining import ChainedWeights, check_then
from mergelab.engine.merged_vector import MergedVector, prepare_merged
from mergelab.engine.method import merge_method
from mergelab.engine.sweep_range import SweepRange
from mergelab.ops.blocks import working
from mergelab.ops.layout import inputs_first, is_embedding, is_matrix
from mergelab.ops.rounding import rounding_norm
from mergelab.ops.site import Site
from mergelab.ops.svd import Triplets, assembled, decompose, is_wide, tall_matrix
from mergelab.weights.align import AlignedModels


def prepare_calibration(
    models: AlignedModels, *, seed: int, then: str | Mapping[str, Any], weights: Sequence[float] | None
) -> tuple[MergedVector, frozenset[str]]:
    """Prepare the merge that is calibrated, and find the matrices that are stored transposed."""
    return prepare_merged(models, seed=seed, then=then, weights=weights), inputs_first(models)


@merge_method(
    needs_base=True,
    prepare=prepare_calibration,
    check=check_then,
    order_matters=True,
    identical_at=None,
    family="spectral",
    use="after a method on task vectors, where directions that the experts share count too much in the sum",
    work="decomposes every merged matrix",
    paper="Li et al. 2026, arXiv:2602.05536",
)
def svc(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    prepared: tuple[MergedVector, frozenset[str]],
    then: str | Mapping[str, Any] = "task_arithmetic",
    alpha: Annotated[float, Field(gt=0), SweepRange(0.1, 2.0)] = 1.0,
    weights: ChainedWeights = None,
) -> Tensor:
    """Merge by another method, and scale down singular values to which several experts contribute.

    Per matrix, with τ_m = U diag(σ) Vᵀ the other method's merged task vector, λ included: the experts' responses to the
    left (output) direction u_r are a_r^t = u_rᵀ τ_t, the merged one's is a_r = u_rᵀ τ_m, and s_r^t = ⟨a_r, a_r^t⟩ /
    ‖a_r^t‖² says how many times over the merge has what expert t has along u_r. σ_r becomes γ_r σ_r with
    γ_r = T / Σ_t max(α, s_r^t) (Li et al. 2026, arXiv:2602.05536, Singular Value Calibration). θ0 + U diag(γσ) Vᵀ. With
    α ≥ 1 no singular value grows. As in the authors' code, embeddings are no such matrices; tensors other than matrices
    are what the other method makes of them.

    Departures: directions whose σ is no larger than rounding to the dtype that the experts are stored in alone makes it
    (`mergelab.engine.merged_vector.MergedVector.noise`) are dropped. Where ‖a_r^t‖ is no larger than such rounding,
    s_r^t counts as 0; the authors' code limits ‖a_r^t‖² to 1e-12 from below, which small task vectors reach. With
    matrices stored transposed (GPT-2's Conv1D), u_r is along the outputs all the same. Where singular values of the
    merge are equal (`iso_c` makes them so), the paper does not say along which directions to compare; they are those
    that the decomposition happens to give.

    Args:
        base: θ0, whole.
        experts: T tensors of the base's shape.
        site: names the tensor.
        prepared: the other method's merged task vector; the names of the matrices that are stored transposed.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters, λ among them.
        alpha: α, the smallest s that counts: above 0; the larger, the smaller the result.
        weights: per expert, passed on to ``then``; default 1.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs). Decompositions are in float64.

    Raises:
        ConfigError: ``then`` cannot merge these models.
    """
    merged, transposed = prepared
    change = merged.of(site.name).to(base.device)
    start = working(base)
    if not is_matrix(change) or is_embedding(site.name):
        return start + change
    outputs_are_rows = site.name not in transposed
    found = decompose(tall_matrix(change), noise=merged.noise(site.name))
    if not len(found.values):
        return start.clone()
    left_is_tall = outputs_are_rows != is_wide(change.shape)  # U has the long side's length
    each = torch.stack([_overcounting(found, base, expert, left_is_tall) for expert in experts])
    summed = each.clamp_min(alpha).sort(dim=0).values.sum(dim=0)  # sorted: the experts' order changes no bit
    scale = len(experts) / summed
    return start + assembled(found.matrix, (found.right * scale) @ found.right.T, change)


def _overcounting(merged: Triplets, base: Tensor, expert: Tensor, left_is_tall: bool) -> Tensor:
    """Return s_r = ⟨a_r, a_r^t⟩ / ‖a_r^t‖² for each singular triplet, (r,) float64; 0 where a_r^t is 0.

    Args:
        merged: the triplets of the merged task vector as a tall matrix X.
        base: the tensor of the base, not transposed.
        expert: the expert's.
        left_is_tall: whether the output directions are X's left singular vectors; otherwise its right ones.
    """
    vector = tall_matrix(working(expert) - working(base))
    products, squares = torch.zeros_like(merged.values), torch.zeros_like(merged.values)
    responses = merged.right.new_zeros(vector.columns, len(merged.values))
    size = 0.0
    for part in vector.parts():
        rows = vector.read(part)
        left = merged.left(part)
        size += float(rows.square().sum())
        if left_is_tall:
            responses += rows.T @ left
        else:
            response = rows @ merged.right
            products += (response * left).sum(dim=0)
            squares += response.square().sum(dim=0)
    if left_is_tall:
        products, squares = (responses * merged.right).sum(dim=0), responses.square().sum(dim=0)
    least = max(rounding_norm([expert]) ** 2, (vector.rows * torch.finfo(squares.dtype).eps) ** 2 * size)
    return torch.where(squares > least, merged.values * products / squares.clamp_min(1e-300), 0.0)
