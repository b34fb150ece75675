"""AdaRank: task arithmetic without the singular directions that raise the entropy of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mergelab.engine.finite_check import digest_of
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction, Positive, Samples
from mergelab.engine.sweep_range import NotSwept, SweepRange
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.entropy import EntropyDescent, entropy_task, written_text
from mergelab.methods.adamerging import LearningExamples, read_on
from mergelab.ops.blocks import working
from mergelab.ops.layout import is_embedding, is_matrix
from mergelab.ops.rounding import rounding_norm
from mergelab.ops.site import Site
from mergelab.ops.svd import decompose, is_wide, tall_matrix
from mergelab.ops.task_vectors import weighted_sum
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot

START = 0.1  # magnitude of the masks' scores at the start


@dataclass(frozen=True)
class Ranks:
    """What is learnt.

    Attributes:
        coefficients: λ_t of each tensor, one per expert.
        kept: for each matrix, the kept ones of each expert's singular directions, (r,) bool, the largest σ first.
    """

    coefficients: Mapping[str, Sequence[float]]
    kept: Mapping[str, Sequence[Tensor]]


def prepare_ranks(
    models: AlignedModels,
    examples: LearningExamples,
    *,
    seed: int,
    rank: float,
    init: float,
    temperature: float,
    lr: float,
    steps: int,
    batch: int,
    samples: int,
) -> Ranks:
    """Learn the coefficients and the directions to keep, or read them from the cache."""
    experts = [expert.name for expert in models.experts]
    drawn = [examples.of(expert, samples=samples, seed=seed) for expert in experts]
    contents = [digest_of(expert, models.names) for expert in models.experts]

    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        tasks = [entropy_task(*each) for each in zip(experts, contents, drawn, strict=True)]
        descent = EntropyDescent("adarank", tasks, batch, seed)
        learning = _Learning(models, descent.targets(), init, rank, temperature)
        progress = examples.progress
        descent.run(learning.raw, learning.write, learning.gradients_of, lr=lr, steps=steps, progress=progress)
        masks = {f"{t}:{name}": scores > 0 for name, each in learning.scores.items() for t, scores in enumerate(each)}
        return {"coefficients": learning.coefficients, **masks}, {}

    assert models.base is not None
    key = {
        "statistic": "adarank",
        "settings": [rank, init, temperature, lr, steps, batch, seed],
        "experts": contents,
        "examples": [each.key for each in drawn],
        "names": [sorted(each.parameter_names.items()) for each in drawn],
        "base": digest_of(models.base, models.names),
    }
    cacheable = examples.folder is not None and all(each.key for each in drawn)
    found, _ = disk_cached(examples.folder, key if cacheable else None, compute)
    coefficients = dict(zip(sorted(models.names), found["coefficients"].tolist(), strict=True))
    kept = {name: [found[f"{t}:{name}"] for t in range(len(experts))] for name in coefficients if f"0:{name}" in found}
    examples.settle({expert: {name: row[t] for name, row in coefficients.items()} for t, expert in enumerate(experts)})
    return Ranks(coefficients, kept)


class _Learning:
    """The merged model as a function of its coefficients and of the scores of singular directions.

    Memory: the right singular vectors of every matrix of every expert, as many entries as the square of its short side.

    Attributes:
        coefficients: (tensors, experts) float64, in the order of the tensors' names.
        scores: for each matrix, of each expert's singular directions, (r,) float64; those above 0 are kept.
        directions: for each matrix, of each expert, its right singular vectors as a tall matrix.
    """

    def __init__(
        self,
        models: AlignedModels,
        targets: Mapping[str, Sequence[nn.Parameter]],
        init: float,
        rank: float,
        temperature: float,
    ) -> None:
        self._models, self._targets, self._temperature = models, targets, temperature
        self._names = sorted(models.names)
        self.coefficients = torch.full((len(self._names), len(models.experts)), init, dtype=torch.float64)
        self.scores: dict[str, list[Tensor]] = {}
        self.directions: dict[str, list[Tensor]] = {}
        for name, found in zip(self._names, in_order(self._decomposed, self._names), strict=True):
            if not found:
                continue
            kept = int(min(models.experts[0].shape(name)) * rank)
            self.directions[name] = found
            self.scores[name] = [
                torch.where(torch.arange(each.shape[1]) < kept, START, -START).double() for each in found
            ]

    def _decomposed(self, name: str) -> list[Tensor]:
        base, experts = read_on(self._models, name, torch.device("cpu"))
        return [
            right_vectors(working(expert) - working(base), expert) for expert in experts if decomposed(expert, name)
        ]

    @property
    def raw(self) -> list[Tensor]:
        """All that is learnt."""
        return [self.coefficients, *(scores for each in self.scores.values() for scores in each)]

    def write(self, threads: int) -> None:
        """Write θ0 + Σ λ_t τ̂_t into the modules."""
        rows = dict(zip(self._names, self.coefficients.tolist(), strict=True))

        @torch.no_grad()
        def write(name: str) -> None:
            device = self._targets[name][0].device
            base, experts = read_on(self._models, name, device)
            vectors = [working(expert) - working(base) for expert in experts]
            if name in self.scores:
                chosen = [v[:, s > 0] for v, s in zip(self.directions[name], self.scores[name], strict=True)]
                vectors = [along(*each) for each in zip(vectors, chosen, strict=True)]
            value = working(base) + weighted_sum(vectors, rows[name])
            for parameter in self._targets[name]:
                parameter.copy_(value)

        for _ in in_order(write, [name for name in self._names if name in self._targets], threads=threads):
            pass

    def gradients_of(self, gradients: Mapping[str, Tensor], threads: int) -> list[Tensor]:
        """Return the gradients of ``raw``, in its order."""
        shared = [name for name in self._names if name in gradients]
        products = in_order(lambda name: self._products(name, gradients[name]), shared, threads=threads)
        found = dict(zip(shared, products, strict=True))
        of_coefficients = torch.zeros_like(self.coefficients)
        of_scores: list[Tensor] = []
        for row, name in enumerate(self._names):
            for t in range(len(self._models.experts)):
                product = found[name][t] if name in found else None
                if name not in self.scores:
                    of_coefficients[row, t] = 0.0 if product is None else product
                    continue
                scores = self.scores[name][t]
                product = torch.zeros_like(scores) if product is None else product
                of_coefficients[row, t] = product[scores > 0].sum()
                soft = (scores / self._temperature).sigmoid()
                of_scores.append(self.coefficients[row, t] * product * soft * (1 - soft) / self._temperature)
        return [of_coefficients, *of_scores]

    def _products(self, name: str, gradient: Tensor) -> list[Tensor]:
        """Return σ_i·u_iᵀ (∂L/∂θ) v_i of each direction of each expert; ⟨∂L/∂θ, τ_t⟩ for tensors without directions."""
        base, experts = read_on(self._models, name, gradient.device)
        vectors = [working(expert) - working(base) for expert in experts]
        if name not in self.directions:
            return [torch.tensor(dot(gradient, vector), dtype=torch.float64) for vector in vectors]
        found = []
        slope = tall_matrix(gradient)
        for vector, right in zip(vectors, self.directions[name], strict=True):
            tall, total = tall_matrix(vector), torch.zeros(right.shape[1], dtype=torch.float64)
            turned = right.to(gradient.device)
            for part in tall.parts():
                total += ((tall.read(part) @ turned) * (slope.read(part) @ turned)).sum(0).cpu()
            found.append(total)
        return found


def decomposed(tensor: Tensor, name: str) -> bool:
    """Return whether a tensor is a matrix whose singular directions are selected."""
    return is_matrix(tensor) and not is_embedding(name)


def right_vectors(vector: Tensor, expert: Tensor) -> Tensor:
    """Return the right singular vectors of a task vector as a tall matrix, (n, r) float64, the largest σ first."""
    return decompose(tall_matrix(vector), noise=rounding_norm([expert])).right


def along(vector: Tensor, right: Tensor) -> Tensor:
    """Return what a matrix has along some of its right singular vectors (as a tall matrix), in its dtype."""
    tall = tall_matrix(vector)
    result = torch.empty_like(vector, memory_format=torch.contiguous_format)
    into, turned = result.T if is_wide(vector.shape) else result, right.to(vector.device)
    for part in tall.parts():
        into[part] = (tall.read(part) @ turned) @ turned.T
    return result


@merge_method(
    needs=("data", "gradients"),
    prepare=prepare_ranks,
    unsupported_for_generation=lambda: written_text("adarank"),
    identical_at=None,
    family="data",
    work="decomposes every matrix of every expert, and multiplies by its directions in each step",
    paper="Lee et al. 2025, arXiv:2503.22178",
    authors={"lr": 5e-5, "steps": 5000, "batch": 8},
    use="experts of several classification tasks, with unlabelled examples and much time to learn",
)
def adarank(
    vectors: Sequence[Tensor],
    experts: Sequence[Tensor],
    *,
    prepared: Ranks,
    site: Site,
    rank: Fraction = 1.0,
    init: Annotated[float, Field()] = 0.3,
    temperature: Annotated[Positive, NotSwept()] = 10.0,
    lr: Annotated[Positive, SweepRange(1e-5, 1e-2, log=True)] = 1e-3,
    steps: Annotated[int, Field(ge=0)] = 500,
    batch: Annotated[int, Field(ge=1)] = 16,
    samples: Samples = 4096,
) -> Tensor:
    """Add up the singular directions of task vectors that lower the entropy of the merged model's predictions.

    θ0 + Σ_t λ_t U_t diag(b_t⊙σ_t) V_tᵀ per matrix with τ_t = U_t diag(σ_t) V_tᵀ; θ0 + Σ_t λ_t τ_t for other tensors.
    ``steps`` steps of Adam on the λ_t, one per expert and tensor, and on the scores B_t minimise Σ_t E_x H(p(·|x)), as
    in `adamerging`. b_t = [B_t > 0]; its gradient is that of σ(B_t/T), T = ``temperature`` (straight through). At the
    start B is 0.1 for the leading fraction ``rank`` of a matrix's min(m, n) directions and −0.1 for the others (Lee et
    al. 2025, arXiv:2503.22178).

    Departures: matrices are all tensors of two dimensions but embeddings, which have a λ alone; in the authors' code
    for RoBERTa embeddings stay the base's. Directions whose σ is no larger than rounding to the dtype that the experts
    are stored in alone makes it (`mergelab.ops.rounding.rounding_norm`) are none. The examples are of the training
    split, without its labels; the paper learns from the unlabelled test examples. The paper's other variant, which
    starts from the experts' mean, is not here.

    Args:
        vectors: T whole task vectors, float32 or float64. Decompositions are in float64.
        experts: T tensors in their stored dtypes.
        prepared: the coefficients, and which directions are kept.
        site: names the tensor.
        rank: fraction of the directions that is kept at the start.
        init: every λ at the start.
        temperature: T; the larger, the less the gradient of a score depends on it.
        lr: Adam's learning rate, about the change of a λ or of a score in a step.
        steps: number of Adam's steps; 0: the leading directions, with λ = ``init``.
        batch: number of examples of each expert's task in a step.
        samples: number of training examples of each expert to draw batches from.

    Returns:
        The merged task vector, of the vectors' shape and dtype.

    Raises:
        ConfigError: while learning: an expert's model predicts a score, not classes.
    """
    if site.name not in prepared.kept:
        return weighted_sum(vectors, prepared.coefficients[site.name])
    pairs = zip(vectors, experts, prepared.kept[site.name], strict=True)
    chosen = [along(vector, right_vectors(vector, expert)[:, kept]) for vector, expert, kept in pairs]
    return weighted_sum(chosen, prepared.coefficients[site.name])
