"""AdaMerging: task arithmetic with coefficients learnt by minimising prediction entropy on unlabelled examples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mergelab.engine.finite_check import digest_of
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Fraction, Positive, Samples
from mergelab.errors import ConfigError
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import LABELS, Batch, ExampleSource, ExpertExamples, Padding
from mergelab.estimation.forward import frozen, merged_parameters, requiring_gradients, size_of
from mergelab.ops.blocks import blockwise, working
from mergelab.ops.multi_task import MultiTask, agreeing, multi_task_vector, prepare_multi_task
from mergelab.ops.philox import stream_key, words
from mergelab.ops.sign_consensus import TensorConsensus
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import task_vectors
from mergelab.ops.threads import in_order, on_one_thread, thread_count
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot

Granularity = Literal["task", "layer"]
ExampleInputs = dict[str, Tensor]  # inputs of one example, without padding and without a batch dimension

MICRO_BATCH = 4  # examples that run at once on a CPU; results depend on it
GRADIENTS = 4  # micro-batches whose gradients are in memory at once
_OF_CLASSES = "method=adamerging: minimises the entropy of predicted classes"


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
        tasks = [_task(*each) for each in zip(experts, contents, drawn, strict=True)]
        learning = _Learning(models, tasks, layer_of, layers, batch, seed, consensus)
        return {"coefficients": learning.run(init, lr, steps, examples)}, {}

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


# ------------------------------------------------------------------------------------------------------------ examples


@dataclass(frozen=True)
class _Task:
    """An expert's module, whose merged parameters are overwritten in each step, and its examples.

    Attributes:
        expert: its name.
        content: a digest of its merged tensors' values.
        module: the module to run; experts may share it.
        merged: the module's merged parameters, by common name.
        unmerged: the module's other parameters (the head), each with the expert's value.
        rows: the examples' inputs.
        pad_id: padding token of ``input_ids``.
        padding: how examples share a batch.
    """

    expert: str
    content: str
    module: nn.Module
    merged: Mapping[str, nn.Parameter]
    unmerged: Sequence[tuple[nn.Parameter, Tensor]]
    rows: Sequence[ExampleInputs]
    pad_id: int
    padding: Padding

    def micro_batches(self, batch: int, seed: int, step: int) -> Iterator[dict[str, Tensor]]:
        """Yield a step's examples as padded inputs, grouped by length."""
        drawn = [self.rows[at] for at in positions(len(self.rows), batch, seed, self.content, step)]
        device = next(self.module.parameters()).device
        drawn.sort(key=lambda row: max((len(value) for value in row.values() if value.dim()), default=0))
        size = MICRO_BATCH if device.type == "cpu" else batch
        for rows in _grouped(drawn, size, self.padding):
            yield {name: self._stacked(name, [row[name] for row in rows]).to(device) for name in rows[0]}

    def _stacked(self, name: str, values: list[Tensor]) -> Tensor:
        if not values[0].dim():
            return torch.stack(values)
        fill = float(self.pad_id) if name == "input_ids" else 0.0
        side = "left" if self.padding == "left" else "right"
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill, padding_side=side)


def _grouped(rows: Sequence[ExampleInputs], size: int, padding: Padding) -> Iterator[Sequence[ExampleInputs]]:
    """Divide sorted examples into batches of up to ``size`` that can be padded so."""
    size = 1 if padding == "alone" else size

    def shape(row: ExampleInputs) -> list[torch.Size]:
        return [value.shape for value in row.values()] if padding == "equal" else []

    for _, group in groupby(rows, shape):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def positions(count: int, batch: int, seed: int, content: str, step: int) -> list[int]:
    """Draw ``batch`` of an expert's ``count`` examples for a step without replacement; all when there are fewer."""
    permutation = np.argsort(words(stream_key(seed, "adamerging", content, str(step)), 0, count), kind="stable")
    return [int(at) for at in permutation[:batch]]


def _task(expert: str, content: str, drawn: ExpertExamples) -> _Task:
    """Collect an expert's examples and unmerged parameters, before another expert is loaded into the same module."""
    module = drawn.module()
    names = drawn.parameter_names
    merged = merged_parameters(module, names)
    ids = {id(parameter) for parameter in merged.values()}
    unmerged = [
        (parameter, parameter.detach().clone()) for parameter in module.parameters() if id(parameter) not in ids
    ]
    rows = [row for batch in drawn.batches() for row in _rows(batch)]
    pad_id = getattr(getattr(module, "config", None), "pad_token_id", None)
    pad_id = pad_id if isinstance(pad_id, int) else 0
    return _Task(expert, content, module, merged, unmerged, rows, pad_id, drawn.padding_side)


def _rows(batch: Batch) -> Iterator[ExampleInputs]:
    """Split a batch into examples, without padding and labels."""
    inputs = {name: value.cpu() for name, value in batch.items() if name != LABELS}
    mask = inputs.get("attention_mask")
    for row in range(size_of(inputs)):
        if mask is None:
            yield {name: value[row] for name, value in inputs.items()}
            continue
        filled = mask[row].nonzero().flatten().tolist() or [0]
        tokens = slice(filled[0], filled[-1] + 1)
        padded = [name for name, value in inputs.items() if value.dim() > 1 and value.shape[1] == mask.shape[1]]
        yield {name: value[row, tokens] if name in padded else value[row] for name, value in inputs.items()}


# ------------------------------------------------------------------------------------------------------------ learning


@dataclass(frozen=True)
class _Learning:
    """The merged model as a function of its coefficients, with the gradient of its prediction entropy.

    Memory: the models, one gradient of all merged parameters, and up to `GRADIENTS` that are being added to it.
    """

    models: AlignedModels
    tasks: Sequence[_Task]
    layer_of: Mapping[str, str]
    layers: Sequence[str]
    batch: int
    seed: int
    consensus: Mapping[str, TensorConsensus] | None

    def run(self, init: float, lr: float, steps: int, examples: LearningExamples) -> Tensor:
        """Take steps of Adam, and return the coefficients (layers, experts) in float64."""
        raw = torch.full((len(self.layers), len(self.tasks)), init, dtype=torch.float64)
        adam = torch.optim.Adam([raw], lr=lr)
        device = next(self.tasks[0].module.parameters()).device
        threads = thread_count() if device.type == "cpu" else 1
        with ExitStack() as stack:
            for module in {id(task.module): task.module for task in self.tasks}.values():
                stack.enter_context(frozen(module))
            merged = [parameter for task in self.tasks for parameter in task.merged.values()]
            stack.enter_context(requiring_gradients(merged))
            stack.enter_context(on_one_thread(device))
            for step in range(steps):
                entropy, gradient = self._gradient(raw.clamp(0, 1), step, threads)
                raw.grad = gradient * ((raw >= 0) & (raw <= 1))
                adam.step()
                examples.progress(f"learning coefficients: entropy {entropy:.4f}", (step + 1) / steps)
        return raw.clamp(0, 1)

    def _gradient(self, coefficients: Tensor, step: int, threads: int) -> tuple[float, Tensor]:
        """Return the sum over tasks of the mean entropy, and its gradient from ⟨∂L/∂θ, τ_t⟩ of each tensor."""
        self._write_merged(coefficients, threads)
        entropy, gradients = 0.0, dict[str, Tensor]()
        for task in self.tasks:
            for parameter, value in task.unmerged:
                parameter.detach().copy_(value)
            entropy += _add_entropy(task, list(task.micro_batches(self.batch, self.seed, step)), gradients, threads)
        names = [name for name in self.models.names if name in gradients]
        products = in_order(lambda name: self._products(name, gradients[name]), names, threads=threads)
        found = dict(zip(names, products, strict=True))
        gradient = torch.zeros_like(coefficients)
        for row, layer in enumerate(self.layers):
            terms = [found[name] for name in names if self.layer_of[name] == layer]
            for t in range(len(self.tasks)):
                gradient[row, t] = math.fsum(term[t] for term in terms)
        return entropy, gradient

    def _write_merged(self, coefficients: Tensor, threads: int) -> None:
        """Write θ0 + Σ λ_t τ_t into the modules."""
        rows = dict(zip(self.layers, coefficients.tolist(), strict=True))
        targets: dict[str, dict[int, nn.Parameter]] = {}
        for task in self.tasks:
            for name, parameter in task.merged.items():
                targets.setdefault(name, {})[id(parameter)] = parameter

        @torch.no_grad()
        def write(name: str) -> None:
            base, experts = self._read(name, next(iter(targets[name].values())).device)
            factors = rows[self.layer_of[name]]
            known = None if self.consensus is None else self.consensus[name]

            def move(start: Tensor, *ends: Tensor) -> Tensor:
                return start + multi_task_vector(task_vectors(start, ends), factors, known)

            value = blockwise(move, base, *experts)
            for parameter in targets[name].values():
                parameter.copy_(value)

        for _ in in_order(write, [name for name in self.models.names if name in targets], threads=threads):
            pass

    def _products(self, name: str, gradient: Tensor) -> list[float]:
        base, experts = self._read(name, gradient.device)
        if self.consensus is not None:
            return [dot(gradient, each) for each in agreeing(task_vectors(base, experts), self.consensus[name])]
        start = working(base)
        return [dot(gradient, working(expert) - start) for expert in experts]

    def _read(self, name: str, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        assert self.models.base is not None
        return self.models.base.get(name).to(device), [each.get(name).to(device) for each in self.models.experts]


def _add_entropy(task: _Task, batches: Sequence[Batch], gradients: dict[str, Tensor], threads: int) -> float:
    """Add the gradient of the examples' mean entropy to ``gradients``, batch by batch; return the entropy."""
    count = sum(size_of(batch) for batch in batches)
    parameters = list(task.merged.values())

    def run(batch: Batch) -> tuple[float, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            entropy = mean_entropy(task.module(**batch), task.expert) * (size_of(batch) / count)
        if not entropy.requires_grad:
            return entropy.item(), (None,) * len(parameters)
        return entropy.item(), torch.autograd.grad(entropy, parameters, allow_unused=True)

    total = 0.0
    for entropy, found in in_order(run, batches, threads=min(threads, GRADIENTS), ahead=1):
        total += entropy
        for name, gradient in zip(task.merged, found, strict=True):
            if gradient is not None:
                gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient.clone()
    return total


def mean_entropy(output: Any, expert: str) -> Tensor:
    """Return the mean Shannon entropy of the predicted distributions softmax(``output.logits``), (b, C), as a scalar.

    Raises:
        ConfigError: the model does not predict two or more classes.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        what = "one score" if isinstance(logits, Tensor) and logits.shape[-1] == 1 else "no classes"
        raise ConfigError(f"{_OF_CLASSES}, and {expert}'s model has {what} as its output")
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_coefficients,
    unsupported_for_generation=lambda: f"{_OF_CLASSES}, and models that write text have none as their output",
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
