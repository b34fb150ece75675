"""KnOTS: the experts' updates of a matrix in one basis, where TIES merges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities, MeanWeights
from mergelab.engine.sweep_range import NotSwept
from mergelab.ops.blocks import blocks
from mergelab.ops.kth_largest import rank_of
from mergelab.ops.layout import inputs_first, is_matrix
from mergelab.ops.sign_consensus import SignConsensus, TensorConsensus, prepare_consensus
from mergelab.ops.site import Site
from mergelab.ops.sparsify import ranked_magnitudes
from mergelab.ops.svd import TallMatrix, assembled, decompose_leading
from mergelab.ops.task_vectors import Vectors, of_each, open_task_vectors, task_vectors, trim_
from mergelab.ops.threads import in_order
from mergelab.ops.thresholds import find_thresholds
from mergelab.weights.align import AlignedModels

KnotsScope = Literal["model", "tensor"]
ROWS = 64  # rows of Σ Vᵀ that are computed at once
Tolerance = Annotated[float, Field(ge=0), NotSwept()]


@dataclass(frozen=True)
class Basis:
    """The singular triplets of T matrices (m, n) side by side, [X_1 … X_T] = U Σ [V_1 … V_T]ᵀ; one side is held.

    Attributes:
        values: (r,) σ.
        vectors: U (m, r), or V (T·n, r) where the matrices side by side are no wider than high.
        is_left: whether it is U.
    """

    values: Tensor
    vectors: Tensor
    is_left: bool

    def parts(self, matrices: Sequence[Tensor], rows: slice | None = None) -> list[Tensor]:
        """Return rows of Σ V_tᵀ, which is Uᵀ X_t, for each t: (r, n), in the matrices' dtype.

        Products are made for the same rows at a time whichever are asked for: an entry has the same bits each time.
        """
        wanted = rows or slice(0, len(self.values))
        start, stop = wanted.start // ROWS * ROWS, min(-(-wanted.stop // ROWS) * ROWS, len(self.values))
        made = [self._rows(matrices, part) for part in blocks(stop, ROWS, start)]
        whole = [torch.cat(of_one) for of_one in zip(*made, strict=True)] or [m[:0] for m in matrices]
        return [part[wanted.start - start : wanted.stop - start] for part in whole]

    def _rows(self, matrices: Sequence[Tensor], rows: slice) -> list[Tensor]:
        held = self.vectors[:, rows].to(matrices[0].device)
        if self.is_left:
            return [(held.T @ matrix.double()).to(matrix.dtype) for matrix in matrices]
        scaled = (held * self.values[rows].to(held.device)).T
        width = matrices[0].shape[1]
        return [scaled[:, part].to(matrices[0].dtype) for part in blocks(width * len(matrices), width)]

    def mapped_back(self, merged: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Return U·M for M (r, n), in the matrices' dtype."""
        held = self.vectors.to(merged.device)
        if self.is_left:
            return (held @ merged.double()).to(matrices[0].dtype)
        inner = (held / self.values.to(held.device)) @ merged.double()  # U = [X_1 … X_T] V/σ
        return assembled(side_by_side(matrices), inner, matrices[0])


def side_by_side(matrices: Sequence[Tensor]) -> TallMatrix:
    """View T matrices (m, n) as one (m, T·n)."""
    rows, columns = matrices[0].shape
    return TallMatrix(
        lambda part: torch.cat([m[part].double() for m in matrices], dim=1), rows, columns * len(matrices)
    )


def stacked(matrices: Sequence[Tensor]) -> TallMatrix:
    """View T matrices (m, n) as one (T·n, m), each transposed."""
    rows, columns = matrices[0].shape

    def read(part: slice) -> Tensor:
        found = []
        for index, matrix in enumerate(matrices):
            start, stop = max(part.start - index * columns, 0), min(part.stop - index * columns, columns)
            if start < stop:
                found.append(matrix[:, start:stop].T.double())
        return torch.cat(found)

    return TallMatrix(read, columns * len(matrices), rows)


def common_basis(matrices: Sequence[Tensor], tolerance: float) -> Basis:
    """Decompose matrices side by side; directions whose σ is at most ``tolerance`` are left out."""
    rows, columns = matrices[0].shape
    is_left = rows < columns * len(matrices)
    matrix = stacked(matrices) if is_left else side_by_side(matrices)
    found = decompose_leading(matrix, matrix.columns)
    leading = found.leading(int((found.values > tolerance).sum()))
    return Basis(leading.values, leading.right.contiguous(), is_left)


@dataclass(frozen=True)
class Knots:
    """What merging one tensor needs to know of the whole.

    Attributes:
        turned: names of the matrices that are stored transposed.
        others: thresholds and tie signs of the tensors that are no matrices.
        bases: of the matrices, where the models' whole vectors are trimmed.
        thresholds: of the matrices, where there are bases.
    """

    turned: frozenset[str] = frozenset()
    others: Mapping[str, TensorConsensus] = field(default_factory=dict)
    bases: Mapping[str, Basis] = field(default_factory=dict)
    thresholds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def prepare_knots(
    models: AlignedModels, *, density: float | Sequence[float], scope: KnotsScope, tolerance: float
) -> Knots:
    """Find the thresholds of the tensors that are no matrices, and, over the whole models, those of the matrices."""
    assert models.base is not None
    turned = inputs_first(models)
    shapes = {name: tuple(models.base.shape(name)) for name in models.names}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and all(shape)]
    others = replace(models, names=tuple(name for name in shapes if name not in set(matrices)))
    open_others = partial(open_task_vectors, others)
    consensus = prepare_consensus(others, open_others, SignConsensus(), density=density, scope=scope)
    if scope == "tensor":
        return Knots(turned, consensus)
    known: dict[Any, Basis] = {} if models.memo is None else models.memo.setdefault("bases", {})
    missing = [name for name in matrices if (name, tolerance) not in known]

    def decomposed(name: str) -> Basis:
        return common_basis(_matrices(models, name, turned), tolerance)

    known.update(zip(((name, tolerance) for name in missing), in_order(decomposed, missing, ahead=1), strict=True))
    bases = {name: known[name, tolerance] for name in matrices}

    def open_parts(name: str, /, *, only: slice = slice(None)) -> Vectors:
        vectors = _matrices(models, name, turned)
        width = vectors[0].shape[1]

        def read(part: slice) -> list[Tensor]:
            first = part.start // width
            rows = slice(first, -(-part.stop // width))
            within = slice(part.start - first * width, part.stop - first * width, part.step)
            return [found.reshape(-1)[within].contiguous() for found in bases[name].parts(vectors, rows)[only]]

        return read

    widths = {name: shapes[name][0] if name in turned else shapes[name][1] for name in matrices}
    sizes = {name: len(bases[name].values) * widths[name] for name in matrices}
    return Knots(turned, consensus, bases, find_thresholds(open_parts, sizes, density, "model", models))


def _matrices(models: AlignedModels, name: str, turned: frozenset[str]) -> list[Tensor]:
    """Return the experts' task vectors of a matrix, outputs along the rows, on the CPU."""
    assert models.base is not None
    vectors = task_vectors(models.base.get(name).cpu(), [expert.get(name).cpu() for expert in models.experts])
    return [vector.T for vector in vectors] if name in turned else vectors


@merge_method(
    lambda_=0.6,
    prepare=prepare_knots,
    identical_at=None,
    family="spectral",
    work="decomposes every matrix of all experts side by side",
    paper="Stoica et al. 2024, arXiv:2410.19735",
    use="LoRA experts, whose updates agree too little for merging entry by entry",
)
def knots(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Knots,
    density: Densities = 0.2,
    weights: MeanWeights = None,
    scope: KnotsScope = "model",
    tolerance: Tolerance = 1e-5,
) -> Tensor:
    """Bring the task vectors of a matrix into one basis and merge them there as TIES does.

    Per matrix of outputs × inputs: [τ_1 … τ_T] = U Σ [V_1 … V_T]ᵀ, side by side; M = TIES of the Σ V_tᵀ: of each expert
    keep the ``density`` largest entries, elect signs, average what agrees; θ0 + λ·U M (Stoica et al. 2024,
    arXiv:2410.19735, KnOTS-TIES, with the singular values on V as in the authors' configurations). It is defined for
    LoRA updates, of low rank; on full fine-tunes it is the same formula for dense task vectors, whose bases are of full
    rank. Every two-dimensional tensor is a matrix, embeddings too. All other tensors are merged by `ties` among
    themselves (the authors' code appends a bias to its matrix as a column).

    Departures: entries of M whose votes cancel are 0, as the signs of singular vectors are arbitrary, and with them
    the majority that the authors' code takes; the weights are an addition. Where singular values are equal the basis is
    arbitrary, and so is the result.

    Cost: the eigenvectors of a symmetric matrix of min(m, T·n) columns for each (m, n), with n inputs: 12 s of a core
    for 3072 columns, of which BERT-base has 12 such matrices, beside its embeddings.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        site: whose ``name`` is looked up in ``prepared``.
        prepared: what was found in the whole models.
        density: fraction of entries kept; may be given for each expert.
        lambda_: scale of the merged task vector; the engine applies it.
        weights: per expert, at least 0; default 1.
        scope: what the fraction is of: the Σ V_tᵀ of all an expert's matrices (as in the authors' code; the bases of
            all matrices, about as many entries as a model has, are held in float64), or of each matrix.
        tolerance: directions whose singular value is not above it are left out, and do not count as entries.

    Returns:
        U M, of the vectors' shape and dtype.

    Raises:
        ConfigError: a weight is negative, or none is above 0.
    """
    if not is_matrix(vectors[0]):
        return _ties(vectors, prepared.others[site.name], weights)
    turned = site.name in prepared.turned
    matrices = [vector.T for vector in vectors] if turned else list(vectors)
    basis = prepared.bases[site.name] if scope == "model" else common_basis(matrices, tolerance)
    parts = basis.parts(matrices)
    if scope == "model":
        thresholds = prepared.thresholds[site.name]
    else:
        thresholds = tuple(map(_smallest_kept, parts, of_each(density, len(parts))))
    merged = _ties(parts, TensorConsensus(thresholds), weights)
    result = basis.mapped_back(merged, matrices)
    return result.T if turned else result


def _ties(vectors: Sequence[Tensor], found: TensorConsensus, weights: MeanWeights) -> Tensor:
    """Merge whole tensors as `ties` does; they are trimmed in place."""
    trimmed = [trim_(vector, threshold) for vector, threshold in zip(vectors, found.thresholds, strict=True)]
    return SignConsensus(weights).merge(trimmed, found.tie_sign)


def _smallest_kept(part: Tensor, density: float) -> float:
    """Return the magnitude below which the entries are that ``density`` drops."""
    if density >= 1 or not part.numel():
        return 0.0
    return ranked_magnitudes(part.reshape(1, -1), [rank_of(density, part.numel())])[0].item()
