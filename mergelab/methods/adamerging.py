"""AdaMerging: task arithmetic with coefficients learnt by minimising prediction entropy on unlabelled examples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from mergelab.engine.finite_check import digest_of
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Fraction, Positive, Samples
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.entropy import EntropyDescent, entropy_task, written_text
from mergelab.estimation.examples import ExampleSource
from mergelab.ops.blocks import blockwise, working
from mergelab.ops.multi_task import MultiTask, agreeing, multi_task_vector, prepare_multi_task
from mergelab.ops.sign_consensus import TensorConsensus
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import task_vectors
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot

Granularity = Literal["task", "layer"]


class LearningExamples(ExampleSource, Protocol):
    """Draws examples for a method that learns in steps, and receives its progress and its coefficients."""

    def progress(self, message: str, done: float, /) -> None:
        """Receive the fraction of steps done, from 0 to 1."""
        ...

    def settle(self, coefficients: Mapping[str, Mapping[str, float]], /) -> None:
        """Receive the learnt coefficients: by expert, one for each tensor."""
        ...


@dataclass(frozen=True)
class Learnt:
    """What merging a tensor needs to know.

    Attributes:
        coefficients: of each tensor, one per expert.
        consensus: TIES' thresholds and tie sign of each tensor; None where plain task vectors are added up.
    """

    coefficients: Mapping[str, tuple[float, ...]]
    consensus: Mapping[str, TensorConsensus] | None


def prepare_coefficients(
    models: AlignedModels,
    examples: LearningExamples,
    *,
    seed: int,
    granularity: Granularity,
    lr: float,
    steps: int,
    batch: int,
    init: float,
    samples: int,
    merge: MultiTask,
    density: float,
) -> Learnt:
    """Learn the coefficients of each tensor, one per expert, or read them from the cache."""
    experts = [expert.name for expert in models.experts]
    drawn = [examples.of(expert, samples=samples, seed=seed) for expert in experts]
    layer_of = {name: name if granularity == "layer" else "" for name in models.names}
    layers = sorted(set(layer_of.values()))
    consensus = prepare_multi_task(models, merge=merge, density=density)

    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        contents = [digest_of(expert, models.names) for expert in models.experts]
        tasks = [entropy_task(*each) for each in zip(experts, contents, drawn, strict=True)]
        descent = EntropyDescent("adamerging", tasks, batch, seed)
        raw = torch.full((len(layers), len(tasks)), init, dtype=torch.float64)
        learning = _Coefficients(raw, models, descent.targets(), layer_of, layers, consensus)
        descent.run([raw], learning.write, learning.gradients_of, lr=lr, steps=steps, progress=examples.progress)
        return {"coefficients": raw.clamp(0, 1)}, {}

    key = {
        "statistic": "adamerging",
        "settings": [granularity, lr, steps, batch, init, seed, *([density] if merge == "ties" else [])],
        "experts": experts,
        "examples": [each.key for each in drawn],
        "names": [sorted(each.parameter_names.items()) for each in drawn],
        "layers": sorted(layer_of.items()),
    }
    cacheable = examples.folder is not None and all(each.key for each in drawn)
    found, _ = disk_cached(examples.folder, key | {"base": _digest(models)} if cacheable else None, compute)
    values = dict(zip(layers, found["coefficients"].tolist(), strict=True))
    learnt = {name: tuple(values[layer]) for name, layer in layer_of.items()}
    examples.settle({expert: {name: row[t] for name, row in learnt.items()} for t, expert in enumerate(experts)})
    return Learnt(learnt, consensus)


def _digest(models: AlignedModels) -> str:
    """Return a SHA-256 of the base's merged tensors."""
    assert models.base is not None
    digest = hashlib.sha256()
    for name in sorted(models.names):
        tensor = models.base.get(name).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Coefficients:
    """The merged model as a function of its coefficients, with their gradient.

    Attributes:
        raw: (layers, experts) float64, overwritten by each step; coefficients are between 0 and 1.
    """

    raw: Tensor
    models: AlignedModels
    targets: Mapping[str, Sequence[nn.Parameter]]
    layer_of: Mapping[str, str]
    layers: Sequence[str]
    consensus: Mapping[str, TensorConsensus] | None

    def gradients_of(self, gradients: Mapping[str, Tensor], threads: int) -> list[Tensor]:
        """Return the gradient of ``raw``, from ⟨∂L/∂θ, τ_t⟩ of each tensor."""
        names = [name for name in self.models.names if name in gradients]
        products = in_order(lambda name: self._products(name, gradients[name]), names, threads=threads)
        found = dict(zip(names, products, strict=True))
        gradient = torch.zeros_like(self.raw)
        for row, layer in enumerate(self.layers):
            terms = [found[name] for name in names if self.layer_of[name] == layer]
            for t in range(self.raw.shape[1]):
                gradient[row, t] = math.fsum(term[t] for term in terms)
        return [gradient * ((self.raw >= 0) & (self.raw <= 1))]

    def write(self, threads: int) -> None:
        """Write θ0 + Σ λ_t τ_t into the modules."""
        rows = dict(zip(self.layers, self.raw.clamp(0, 1).tolist(), strict=True))

        @torch.no_grad()
        def write(name: str) -> None:
            base, experts = read_on(self.models, name, self.targets[name][0].device)
            factors = rows[self.layer_of[name]]
            known = None if self.consensus is None else self.consensus[name]

            def move(start: Tensor, *ends: Tensor) -> Tensor:
                return start + multi_task_vector(task_vectors(start, ends), factors, known)

            value = blockwise(move, base, *experts)
            for parameter in self.targets[name]:
                parameter.copy_(value)

        for _ in in_order(write, [name for name in self.models.names if name in self.targets], threads=threads):
            pass

    def _products(self, name: str, gradient: Tensor) -> list[float]:
        base, experts = read_on(self.models, name, gradient.device)
        if self.consensus is not None:
            return [dot(gradient, each) for each in agreeing(task_vectors(base, experts), self.consensus[name])]
        start = working(base)
        return [dot(gradient, working(expert) - start) for expert in experts]


def read_on(models: AlignedModels, name: str, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Read a tensor of the base and of the experts, on a device."""
    assert models.base is not None
    return models.base.get(name).to(device), [each.get(name).to(device) for each in models.experts]


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_coefficients,
    unsupported_for_generation=lambda: written_text("adamerging"),
    identical_at=None,
    family="data",
    paper="Yang et al. 2024, arXiv:2310.02575",
    authors={"batch": 32},
    use="experts of several classification tasks, with unlabelled examples and time to learn the coefficients",
)
def adamerging(
    vectors: Sequence[Tensor],
    *,
    prepared: Learnt,
    site: Site,
    granularity: Granularity = "layer",
    lr: Positive = 1e-3,
    steps: Annotated[int, Field(ge=0)] = 500,
    batch: Annotated[int, Field(ge=1)] = 16,
    init: Fraction = 0.3,
    samples: Samples = 4096,
    merge: MultiTask = "sum",
    density: Density = 0.2,
) -> Tensor:
    """Add up the task vectors with coefficients learnt by minimising the entropy of the merged model's predictions.

    θ0 + Σ_t λ_t τ_t, with one λ_t per expert, or one per expert and tensor. ``steps`` steps of Adam, starting at
    ``init``, minimise Σ_t E_x H(p(·|x; λ)): the entropy of the merged model's predictions, with the head of expert t,
    on unlabelled examples x of its task (Yang et al. 2024, arXiv:2310.02575). Each step draws ``batch`` examples of
    each expert's task. ∂L/∂λ_t is Σ ⟨∂L/∂θ, τ_t⟩ over the tensors that share λ_t, in float64. λ is clamped to [0, 1],
    as in the authors' code, and has no gradient outside. A layer is one parameter tensor, as in the authors' code; tied
    ones count once. ``merge=ties`` is the paper's AdaMerging++: in place of τ_t, what TIES' trimming leaves of it and
    has the elected sign.

    Departures: the examples are of the training split (without its labels), so that no reported example is learnt from;
    the paper learns from the unlabelled test examples. There is one batch per task and step; the authors' loop sums
    the entropies of two batches of 16, which is a batch of 32 to Adam. Tensors that are not merged (heads, a pooler
    that the base lacks) have expert t's values for its examples.

    Args:
        vectors: T task vectors (parts of them, flattened) of one shape.
        prepared: by tensor, the experts' λ_t, and what TIES needs to know.
        site: names the tensor.
        granularity: "task": one λ per expert; "layer": one λ per expert and tensor.
        lr: Adam's learning rate, about the change of a λ in a step.
        steps: number of Adam's steps; 0 gives task arithmetic with λ = ``init``.
        batch: number of examples of each expert's task in a step.
        init: initial value of every λ.
        samples: number of training examples of each expert to draw batches from.
        merge: "sum": λ for the task vectors; "ties": for what of them agrees after TIES' trimming and election.
        density: fraction of entries that TIES keeps of each task vector; without effect on the sum.

    Returns:
        Σ λ_t τ_t, of the vectors' shape and dtype.

    Raises:
        ConfigError: while learning: an expert's model predicts a score, not classes.
    """
    known = None if prepared.consensus is None else prepared.consensus[site.name]
    return multi_task_vector(vectors, prepared.coefficients[site.name], known)
