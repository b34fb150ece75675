"""AdaMerging: task arithmetic whose coefficients make the merged model sure of its answers, on unlabelled examples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction, Positive, Samples
from mergelab.errors import ConfigError
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import LABELS, Batch, Examples, ExpertExamples
from mergelab.estimation.forward import frozen, on_one_thread, size_of
from mergelab.ops.blocks import working
from mergelab.ops.gram import combined
from mergelab.ops.philox import stream_key, words
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import weighted_sum
from mergelab.ops.threads import in_order, thread_count
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import dot

Granularity = Literal["task", "layer"]
Inputs = dict[str, Tensor]  # of one example: without padding, without the dimension of examples

# Examples that run at once on a CPU (a part of the result), and how many such parts' gradients are held at once.
PART = 4
GRADIENTS = 4
_OF_CLASSES = "method=adamerging: minimises the entropy of predicted classes"


class Unlabelled(Examples, Protocol):
    """Examples for learning in steps, which takes long and gives coefficients that whoever merges may want to see."""

    def progress(self, message: str, done: float, /) -> None:
        """Hear how far the learning is, from 0 to 1."""
        ...

    def settle(self, coefficients: Mapping[str, Mapping[str, float]], /) -> None:
        """Hear what was learnt: each expert's coefficient for each tensor."""
        ...


def prepare_coefficients(
    models: AlignedModels,
    examples: Unlabelled,
    *,
    seed: int,
    granularity: Granularity,
    lr: float,
    steps: int,
    batch: int,
    init: float,
    samples: int,
) -> Mapping[str, tuple[float, ...]]:
    """Learn the coefficients of each tensor, one for each expert, or find them again."""
    experts = [expert.name for expert in models.experts]
    drawn = [examples.of(expert, samples=samples, seed=seed) for expert in experts]
    layer_of = {name: name if granularity == "layer" else "" for name in models.names}
    layers = sorted(set(layer_of.values()))

    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        tasks = [_task(expert, each) for expert, each in zip(experts, drawn, strict=True)]
        learning = _Learning(models, tasks, layer_of, layers, batch, seed)
        return {"coefficients": learning.run(init, lr, steps, examples)}, {}

    parts = {
        "statistic": "adamerging",
        "settings": [granularity, lr, steps, batch, init, seed],
        "experts": experts,
        "examples": [each.key for each in drawn],
        "names": [sorted(each.parameter_names.items()) for each in drawn],
        "layers": sorted(layer_of.items()),
    }
    can_keep = examples.folder is not None and all(each.key for each in drawn)
    found, _ = disk_cached(examples.folder, parts | {"base": _digest(models)} if can_keep else None, compute)
    values = dict(zip(layers, found["coefficients"].tolist(), strict=True))
    learnt = {name: tuple(values[layer]) for name, layer in layer_of.items()}
    examples.settle({expert: {name: row[t] for name, row in learnt.items()} for t, expert in enumerate(experts)})
    return learnt


def _digest(models: AlignedModels) -> str:
    """Hash the base's merged tensors."""
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
    """An expert's module, of which the merged parameters are written anew in each step, and its examples.

    Attributes:
        expert: its name.
        module: what runs; experts may share it.
        merged: the module's parameters that take part in the merge, by common name.
        own: the others (the head) with the expert's values.
        rows: the examples' inputs.
        pad_id: what fills up ``input_ids``.
    """

    expert: str
    module: nn.Module
    merged: Mapping[str, nn.Parameter]
    own: Sequence[tuple[nn.Parameter, Tensor]]
    rows: Sequence[Inputs]
    pad_id: int

    def parts(self, batch: int, seed: int, step: int) -> Iterator[Inputs]:
        """Return a step's examples as padded inputs, those of like length together."""
        drawn = [self.rows[at] for at in positions(len(self.rows), batch, seed, self.expert, step)]
        device = next(self.module.parameters()).device
        drawn.sort(key=lambda row: max((len(value) for value in row.values() if value.dim()), default=0))
        size = PART if device.type == "cpu" else batch
        for start in range(0, len(drawn), size):
            rows = drawn[start : start + size]
            yield {name: self._stacked(name, [row[name] for row in rows]).to(device) for name in rows[0]}

    def _stacked(self, name: str, values: list[Tensor]) -> Tensor:
        if not values[0].dim():
            return torch.stack(values)
        fill = float(self.pad_id) if name == "input_ids" else 0.0
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def positions(count: int, batch: int, seed: int, expert: str, step: int) -> list[int]:
    """Draw ``batch`` of ``count`` examples for a step, none twice; all where there are not so many."""
    order = np.argsort(words(stream_key(seed, "adamerging", expert, str(step)), 0, count), kind="stable")
    return [int(at) for at in order[:batch]]


def _task(expert: str, drawn: ExpertExamples) -> _Task:
    """Read an expert's examples and its own parameters, before another expert's come into the same module."""
    module = drawn.module()
    names = drawn.parameter_names
    merged = {names[own]: parameter for own, parameter in module.named_parameters() if own in names}
    taken = {id(parameter) for parameter in merged.values()}
    own = [(parameter, parameter.detach().clone()) for parameter in module.parameters() if id(parameter) not in taken]
    rows = [row for batch in drawn.batches() for row in _rows(batch)]
    pad_id = getattr(getattr(module, "config", None), "pad_token_id", None)
    return _Task(expert, module, merged, own, rows, pad_id if isinstance(pad_id, int) else 0)


def _rows(batch: Batch) -> Iterator[Inputs]:
    """Take a batch apart, without padding and labels."""
    inputs = {name: value.cpu() for name, value in batch.items() if name != LABELS}
    mask = inputs.get("attention_mask")
    for row in range(size_of(inputs)):
        if mask is None:
            yield {name: value[row] for name, value in inputs.items()}
            continue
        length = 1 + max(mask[row].nonzero().flatten().tolist(), default=0)
        padded = [name for name, value in inputs.items() if value.dim() > 1 and value.shape[1] == mask.shape[1]]
        yield {name: value[row, :length] if name in padded else value[row] for name, value in inputs.items()}


# ------------------------------------------------------------------------------------------------------------ learning


@dataclass(frozen=True)
class _Learning:
    """The merged model as a function of its coefficients, and how the entropy of its answers depends on them.

    Beside the models, one gradient of all merged parameters is held, and up to `GRADIENTS` that are added to it.
    """

    models: AlignedModels
    tasks: Sequence[_Task]
    layer_of: Mapping[str, str]
    layers: Sequence[str]
    batch: int
    seed: int

    def run(self, init: float, lr: float, steps: int, examples: Unlabelled) -> Tensor:
        """Take steps of Adam; answer the coefficients (layers, experts) in float64."""
        raw = torch.full((len(self.layers), len(self.tasks)), init, dtype=torch.float64)
        adam = torch.optim.Adam([raw], lr=lr)
        device = next(self.tasks[0].module.parameters()).device
        threads = thread_count() if device.type == "cpu" else 1
        with ExitStack() as stack:
            for module in {id(task.module): task.module for task in self.tasks}.values():
                stack.enter_context(frozen(module))
            stack.enter_context(_asking([parameter for task in self.tasks for parameter in task.merged.values()]))
            stack.enter_context(on_one_thread(device))
            for step in range(steps):
                entropy, gradient = self._gradient(raw.clamp(0, 1), step, threads)
                raw.grad = gradient * ((raw >= 0) & (raw <= 1))
                adam.step()
                examples.progress(f"learning coefficients: entropy {entropy:.4f}", (step + 1) / steps)
        return raw.clamp(0, 1)

    def _gradient(self, coefficients: Tensor, step: int, threads: int) -> tuple[float, Tensor]:
        """Return Σ_t of the mean entropies at the coefficients, and its gradient, by ⟨∂L/∂θ, τ_t⟩ of each tensor."""
        self._pour(coefficients, threads)
        entropy, gradients = 0.0, dict[str, Tensor]()
        for task in self.tasks:
            for parameter, value in task.own:
                parameter.detach().copy_(value)
            entropy += _add_entropy(task, list(task.parts(self.batch, self.seed, step)), gradients, threads)
        names = [name for name in self.models.names if name in gradients]
        products = in_order(lambda name: self._products(name, gradients[name]), names, threads=threads)
        found = dict(zip(names, products, strict=True))
        gradient = torch.zeros_like(coefficients)
        for row, layer in enumerate(self.layers):
            terms = [found[name] for name in names if self.layer_of[name] == layer]
            for t in range(len(self.tasks)):
                gradient[row, t] = math.fsum(term[t] for term in terms)
        return entropy, gradient

    def _pour(self, coefficients: Tensor, threads: int) -> None:
        """Write θ0 + Σ λ_t τ_t into the modules."""
        rows = dict(zip(self.layers, coefficients.tolist(), strict=True))
        targets: dict[str, dict[int, nn.Parameter]] = {}
        for task in self.tasks:
            for name, parameter in task.merged.items():
                targets.setdefault(name, {})[id(parameter)] = parameter

        @torch.no_grad()
        def write(name: str) -> None:
            base, experts = self._read(name, next(iter(targets[name].values())).device)
            value = combined(experts, rows[self.layer_of[name]], base)
            for parameter in targets[name].values():
                parameter.copy_(value)

        for _ in in_order(write, [name for name in self.models.names if name in targets], threads=threads):
            pass

    def _products(self, name: str, gradient: Tensor) -> list[float]:
        base, experts = self._read(name, gradient.device)
        start = working(base)
        return [dot(gradient, working(expert) - start) for expert in experts]

    def _read(self, name: str, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        assert self.models.base is not None
        return self.models.base.get(name).to(device), [each.get(name).to(device) for each in self.models.experts]


def _add_entropy(task: _Task, parts: Sequence[Inputs], gradients: dict[str, Tensor], threads: int) -> float:
    """Add the gradient of the examples' mean entropy to ``gradients``, part by part; answer the entropy."""
    count = sum(size_of(part) for part in parts)
    parameters = list(task.merged.values())

    def run(part: Inputs) -> tuple[float, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            entropy = mean_entropy(task.module(**part), task.expert) * (size_of(part) / count)
        if not entropy.requires_grad:
            return entropy.item(), (None,) * len(parameters)
        return entropy.item(), torch.autograd.grad(entropy, parameters, allow_unused=True)

    total = 0.0
    for entropy, found in in_order(run, parts, threads=min(threads, GRADIENTS), ahead=1):
        total += entropy
        for name, gradient in zip(task.merged, found, strict=True):
            if gradient is not None:
                gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient.clone()
    return total


def mean_entropy(output: Any, expert: str) -> Tensor:
    """Return the Shannon entropy of the predicted distributions, softmax of ``output.logits`` (b, C), on average.

    Raises:
        ConfigError: the outputs are not of two or more classes.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        what = "one score" if isinstance(logits, Tensor) and logits.shape[-1] == 1 else "no classes"
        raise ConfigError(f"{_OF_CLASSES}, and {expert}'s model has {what} as its output")
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


@contextmanager
def _asking(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters ask for gradients; whoever froze them puts that back."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_coefficients,
    unsupported_for_generation=lambda: f"{_OF_CLASSES}, and models that write text have none as their output",
    identical_at=None,
    family="data",
    paper="Yang et al. 2024, arXiv:2310.02575",
)
def adamerging(
    vectors: Sequence[Tensor],
    *,
    prepared: Mapping[str, Sequence[float]],
    site: Site,
    granularity: Granularity = "layer",
    lr: Positive = 1e-3,
    steps: Annotated[int, Field(ge=0)] = 500,
    batch: Annotated[int, Field(ge=1)] = 16,
    init: Fraction = 0.3,
    samples: Samples = 4096,
) -> Tensor:
    """Add up the task vectors, each with a coefficient that was learnt by making the merged model sure of its answers.

    θ0 + Σ_t λ_t τ_t with the λ_t, one for each expert or one for each expert and tensor, that ``steps`` steps of Adam
    find from ``init`` on for Σ_t E_x H(p(·|x; λ)): the entropy of the merged model's predictions, with the head of
    expert t, on unlabelled examples x of its task (Yang et al. 2024, arXiv:2310.02575). Each step draws ``batch``
    examples of each expert's task anew. ∂L/∂λ_t is Σ ⟨∂L/∂θ, τ_t⟩ over the tensors that share λ_t, in float64. λ is
    used within [0, 1], as in the authors' code, where one that has left it is not pushed further. A layer is what it
    is in the authors' code: one parameter tensor (tied ones count once).

    Departures: the examples are of the training split (without its labels), so that no example that reports is learnt
    from; the paper learns from the unlabelled test examples. One batch for each task and step; the authors' loop adds
    up two. What is not merged (heads, a pooler that the base lacks) is expert t's own while its examples run.

    Args:
        vectors: T task vectors (parts of them, flattened) of one shape.
        prepared: by tensor, the experts' λ_t.
        site: which tensor.
        granularity: "task": one λ for each expert; "layer": one for each expert and tensor.
        lr: Adam's learning rate, about the distance that a λ moves in a step.
        steps: of Adam; 0 gives task arithmetic with λ = ``init``.
        batch: how many examples of each expert's task in a step.
        init: every λ at the start.
        samples: how many training examples of each expert batches are drawn from.

    Returns:
        Σ λ_t τ_t, of the vectors' shape and dtype.

    Raises:
        ConfigError: while learning: an expert's model has a score as its output, not classes.
    """
    return weighted_sum(vectors, prepared[site.name])
