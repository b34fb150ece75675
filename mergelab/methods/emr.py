"""EMR-Merging: one elected task vector for all tasks, and for each task a mask and a rescaler."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.blocks import blocks
from mergelab.ops.task_vectors import disjoint_reduce, elect, open_task_vectors
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import total


def unify(vectors: Sequence[Tensor]) -> Tensor:
    """Return the unified task vector: at each entry the elected sign and the largest magnitude that has it."""
    return disjoint_reduce(vectors, elect(vectors), reduce="max")


def masked(unified: Tensor, vector: Tensor) -> Tensor:
    """Keep of the unified task vector the entries that have the sign of the task's own."""
    return unified.masked_fill(unified * vector.sign() <= 0, 0)


def rescalers(models: AlignedModels) -> tuple[float, ...]:
    """Return Σ|τ_t| / Σ|M_t⊙τ_uni| for each expert, sums over its whole task vector, in float64.

    1 where nothing is left to be rescaled.
    """

    def magnitudes(name: str) -> list[tuple[list[float], list[float]]]:
        assert models.base is not None
        read = open_task_vectors(models, name)
        summands: list[tuple[list[float], list[float]]] = [([], []) for _ in models.experts]
        for part in blocks(math.prod(models.base.shape(name))):
            vectors = read(part)
            unified = unify(vectors)
            for (of_whole, of_masked), vector in zip(summands, vectors, strict=True):
                of_whole.append(total(vector.abs()))
                of_masked.append(total(masked(unified, vector).abs_()))
        return summands

    whole: list[list[float]] = [[] for _ in models.experts]
    remaining: list[list[float]] = [[] for _ in models.experts]
    for summands in in_order(magnitudes, models.names):
        for i, (of_whole, of_masked) in enumerate(summands):
            whole[i].extend(of_whole)
            remaining[i].extend(of_masked)
    pairs = [(math.fsum(a), math.fsum(b)) for a, b in zip(whole, remaining, strict=True)]
    return tuple(a / b if b else 1.0 for a, b in pairs)


@merge_method(
    elementwise=True,
    prepare=rescalers,
    family="task vectors",
    paper="Huang et al. 2024, arXiv:2405.17461",
    use="a model for each task that stores one merged vector and a mask per task",
)
def emr(vectors: Sequence[Tensor], *, output: int, prepared: Sequence[float]) -> Tensor:
    """Give each task its own masked and rescaled part of one unified task vector.

    θ0 + λ_t·M_t⊙τ_uni for task t: τ_uni = γ⊙ε with the elected sign γ = sgn(Σ τ_t) and ε the largest |τ_t| of that
    sign; M_t = [τ_t⊙τ_uni > 0]; λ_t = Σ|τ_t| / Σ|M_t⊙τ_uni| over the whole vector (Huang et al. 2024,
    arXiv:2405.17461). A merged model for each expert: τ_uni is common, masks and rescalers are small.

    Departures: none from the paper. The authors' code divides sums of the tensors' mean magnitudes instead, and where
    the votes cancel exactly it elects the negative sign; here, as in the paper's formula, that entry is 0.

    Args:
        vectors: T task vectors, float32 or float64.
        output: index of the expert whose model is wanted.
        prepared: the rescalers, one per expert.

    Returns:
        λ_t·M_t⊙τ_uni, of the vectors' shape and dtype.
    """
    return masked(unify(vectors), vectors[output]) * prepared[output]
