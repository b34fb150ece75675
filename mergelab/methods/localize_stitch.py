"""Localize-and-Stitch: few entries of each task vector, found by learning masks, averaged where they overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mergelab.engine.finite_check import digest_of
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Positive, Samples
from mergelab.engine.sweep_range import NotSwept, SweepRange
from mergelab.errors import ModelError
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import Batch, ExampleSource, ExpertExamples
from mergelab.estimation.forward import frozen, merged_parameters, requiring_gradients, size_of, split_labels
from mergelab.ops.blocks import blockwise, working
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import just_below, open_task_vectors
from mergelab.ops.threads import in_order, on_one_thread, thread_count
from mergelab.ops.thresholds import find_thresholds
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource

Penalty = Literal["mask", "certainty"]
Masks = Mapping[str, Tensor]  # bool, by tensor, in its shape

GRADIENTS = 4  # batches whose gradients are in memory at once


@dataclass(frozen=True)
class Learning:
    """How a mask is learnt; see `localize_stitch`."""

    steps: int
    lr: float
    l1: float
    bias: float
    penalty: Penalty


def prepare_masks(
    models: AlignedModels,
    examples: ExampleSource,
    *,
    seed: int,
    density: float,
    steps: int,
    lr: float,
    l1: float,
    bias: float,
    penalty: Penalty,
    samples: int,
) -> tuple[Masks, ...]:
    """Learn every expert's mask, or read it from the cache."""
    assert models.base is not None
    sizes = {name: torch.Size(models.base.shape(name)).numel() for name in models.names}
    start = find_thresholds(partial(open_task_vectors, models), sizes, density, "model", models)
    learning = Learning(steps, lr, l1, bias, penalty)
    base = digest_of(models.base, models.names)
    drawn = [examples.of(expert.name, samples=samples, seed=seed, labelled=True) for expert in models.experts]
    found = []
    for t, (expert, each) in enumerate(zip(models.experts, drawn, strict=True)):
        key = {
            "statistic": "localize_stitch",
            "settings": [density, steps, lr, l1, bias, penalty],
            "names": sorted(each.parameter_names.items()),
            "examples": each.key,
            "base": base,
        }
        bounds = {name: start[name][t] for name in models.names}
        compute = partial(learn_mask, models.base, expert, each, bounds, learning)
        found.append(disk_cached(examples.folder, key if each.key else None, compute)[0])
    return tuple(found)


def learn_mask(
    base: TensorSource, expert: TensorSource, examples: ExpertExamples, bounds: Mapping[str, float], how: Learning
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an expert's mask after all steps.

    Args:
        base, expert: the models.
        examples: the expert's labelled examples.
        bounds: by tensor, the magnitude of τ that an entry has at least when it is in the mask at the start.
        how: the settings.
    """
    scores = {}
    for name, bound in bounds.items():
        vector = _vector(base, expert, name)
        scores[name] = torch.where(vector.abs() > just_below(bound, vector.dtype), how.bias, -how.bias)
    if how.steps:
        module = examples.module()
        parameters = merged_parameters(module, examples.parameter_names)
        device = next(module.parameters()).device
        with frozen(module), requiring_gradients(parameters.values()), on_one_thread(device):
            for _ in range(how.steps if parameters else 0):
                _step(module, parameters, base, expert, examples, scores, how)
    return {name: score > 0 for name, score in scores.items()}, {}


def _vector(base: TensorSource, expert: TensorSource, name: str) -> Tensor:
    return working(expert.get(name).cpu()) - working(base.get(name).cpu())


def _step(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    base: TensorSource,
    expert: TensorSource,
    examples: ExpertExamples,
    scores: dict[str, Tensor],
    how: Learning,
) -> None:
    """Take a step of gradient descent on all examples at once."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            moved = working(base.get(name).cpu()) + scores[name].sigmoid() * _vector(base, expert, name)
            parameter.copy_(moved)
    gradients = _mean_gradient(module, list(parameters.values()), examples)
    for (name, _), gradient in zip(parameters.items(), gradients, strict=True):
        vector, score = _vector(base, expert, name), scores[name]

        def descended(g: Tensor, tau: Tensor, s: Tensor) -> Tensor:
            slope = s.sigmoid() * (1 - s.sigmoid())
            push = slope if how.penalty == "mask" else -slope * torch.where(s > 0, 1.0, -1.0)
            return s - (how.lr * g * tau * slope + how.l1 * push)

        scores[name] = blockwise(descended, gradient.cpu(), vector, score)


def _mean_gradient(module: nn.Module, parameters: Sequence[nn.Parameter], examples: ExpertExamples) -> list[Tensor]:
    """Return the gradient of the examples' mean loss."""
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    device = totals[0].device if totals else torch.device("cpu")
    threads = thread_count() if device.type == "cpu" else 1

    def run(batch: Batch) -> tuple[Tensor | None, ...]:
        inputs, labels = split_labels(batch, device)
        with torch.enable_grad():
            loss = mean_loss(module(**inputs), labels) * (size_of(batch) / examples.count)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    for found in in_order(run, examples.batches(), threads=min(threads, GRADIENTS), ahead=1):
        for total, gradient in zip(totals, found, strict=True):
            if gradient is not None:
                total += gradient
    return totals


def mean_loss(output: Any, labels: Tensor | None) -> Tensor:
    """Return the mean of −log p of the labels, or of the squared errors of scores, as a scalar.

    Raises:
        ModelError: the output has no logits, or there are no labels that fit them.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or labels is None or logits.shape[: labels.dim()] != labels.shape:
        raise ModelError("a loss needs outputs (logits) of classes, one score, or tokens, and their labels")
    if logits.shape[-1] == 1:
        return (logits.squeeze(-1) - labels).square().mean()
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=-100)


@merge_method(
    needs=("data", "gradients"),
    lambda_=1.0,
    elementwise=True,
    prepare=prepare_masks,
    identical_at=None,
    family="data",
    work="runs every expert on its examples in each step",
    paper="He et al. 2024, arXiv:2408.13656",
    authors={"penalty": "certainty"},
    use="experts whose skills are few entries, with labelled examples; steps=0 chooses by magnitude",
)
def localize_stitch(
    vectors: Sequence[Tensor],
    *,
    prepared: Sequence[Masks],
    site: Site,
    density: Density = 1e-5,
    steps: Annotated[int, Field(ge=0)] = 10,
    lr: Annotated[Positive, SweepRange(1e5, 1e8, log=True)] = 1e7,
    l1: Annotated[float, Field(ge=0), SweepRange(0.0, 20.0)] = 10.0,
    bias: Annotated[Positive, NotSwept()] = 5.0,
    penalty: Penalty = "mask",
    samples: Samples = 64,
) -> Tensor:
    """Add to the base the few entries of each task vector that a mask selects; average those that several select.

    θ0 + λ·Σ_t m_t⊙τ_t / max(1, Σ_t m_t) with m_t = [σ(S_t) > ½] (He et al. 2024, arXiv:2408.13656). S_t minimises
    L_t(θ0 + σ(S)⊙τ_t) + γ·‖σ(S)‖₁, L_t the mean loss on expert t's labelled training examples, with its head: ``steps``
    steps of gradient descent on all examples, S −= (η·∂L/∂θ⊙τ_t + γ)⊙σ'(S). At the start S is ``bias`` at the
    ``density`` largest |τ_t| of the model, −``bias`` elsewhere. With ``steps=0`` that is the paper's variant without
    data, for which it takes a density of 0.05.

    Departures: the authors' code has −γ·sgn(S)⊙σ'(S) in the place of γ·σ'(S), which rewards masks that are certain,
    not small (``penalty=certainty``). The loss is the mean over examples, theirs is that over batches. λ is an
    addition, the paper's is 1. Of equal magnitudes at the start's bound all are in the mask; the authors' code leaves
    them out.

    Args:
        vectors: T task vectors (parts of them, flattened) of one shape.
        prepared: the experts' masks.
        site: names the tensor and its part.
        density: fraction of each task vector's entries that are in the mask at the start.
        steps: number of steps; 0: the entries of largest magnitude.
        lr: η. Gradients and task vectors are small, and so is σ' at ±``bias``.
        l1: γ; as in the authors' code not multiplied by η.
        bias: magnitude of S at the start.
        penalty: "mask": γ‖σ(S)‖₁, the paper's; "certainty": the authors' code.
        samples: number of labelled training examples of each expert.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        The merged task vector, of the vectors' shape and dtype.

    Raises:
        DataError: while preparing: the training examples have no labels.
    """
    part = slice(site.offset, site.offset + vectors[0].numel())
    total, count = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, masks in zip(vectors, prepared, strict=True):
        selected = masks[site.name].reshape(-1)[part].to(vector.device).view(vector.shape)
        total += torch.where(selected, vector, 0.0)
        count += selected
    return total.div_(count.clamp_min_(1))
