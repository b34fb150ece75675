"""Sum the squares, or the magnitudes, of each example's own gradients, many examples at once.

A backward pass over a batch gives the gradient of each layer's output. Together with the layer's input it gives every
example's gradient of the layer's parameters, which is raised to a power and summed without being stored for all
examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergelab.errors import ModelError
from mergelab.estimation.examples import Batch
from mergelab.estimation.forward import frozen, groups, requiring_gradients, size_of, split_labels
from mergelab.estimation.hooks import (
    EmbeddingGradients,
    ExampleGradients,
    LayerCall,
    MatrixGradients,
    Recorder,
    VectorGradients,
    example_gradients,
    layer_kind,
)
from mergelab.ops.blocks import blocks
from mergelab.ops.threads import in_order, on_one_thread, thread_count

# Entries of a matrix that are squared at once, so that they and the factors of their product stay in a core's cache.
_BLOCK = 131_072
_ACCELERATOR_BLOCK = 1 << 27

# Receives the outputs (b, C) of examples from a position on, their labels and that position; returns the directions
# (b, C, R) in which to differentiate the outputs. For outputs of tokens (b, l, C), with the next tokens (b, l) as
# labels, directions are (b, l, C, R).
Directions = Callable[[Tensor, Tensor | None, int], Tensor]
Power = Literal[1, 2]


def gradient_powers(
    module: nn.Module, batches: Iterable[Batch], directions: Directions, names: Mapping[str, str], power: Power = 2
) -> dict[str, Tensor]:
    """Sum Σ_r |∂(d_r·z)/∂θ|^p over examples with outputs z and directions d_r.

    `mergelab.estimation.hooks` gives the gradients of parameters of the layers that it covers. Other parameters, and
    those whose gradients differ from autograd's on a few examples, are differentiated one example at a time.

    Args:
        module: returns an object with ``logits`` (b, C) or (b, l, C).
        batches: inputs, of at least one example each.
        directions: returns the d_r for the outputs of a batch; see `Directions`.
        names: the common names of the parameters to differentiate, by their names in the module.
        power: p; 2 gives squares, 1 magnitudes.

    Returns:
        Sums by common name, of the parameters' shapes and dtypes.

    Raises:
        ModelError: the module's output has no such logits.
    """
    parameters = _parameters(module, names)
    totals = {name: torch.zeros_like(parameter.value) for name, parameter in parameters.items()}
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None or not parameters:
        return {parameter.common: totals[name] for name, parameter in parameters.items()}
    kinds = {layer: kind for p in parameters.values() for layer in p.layers if (kind := layer_kind(layer)) is not None}
    recorder = Recorder(module, kinds)
    device = next(module.parameters()).device
    threads = thread_count() if device.type == "cpu" else 1
    position = 0
    with frozen(module), on_one_thread(device):
        with recorder.watching():
            covered = _covered(recorder, parameters, first, device)
        others = {name: parameter for name, parameter in parameters.items() if name not in covered}
        for group in groups(chain([first], remaining)):
            starts = [position, *(position := position + size_of(batch) for batch in group)]
            placed = list(zip(starts, group, strict=False))
            with recorder.watching():
                traces = list(in_order(lambda at: _forward(recorder, directions, device, *at), placed, threads=threads))
            for direction in range(traces[0].directions.shape[-1]):
                back = partial(_Trace.gradients, parameters=covered, direction=direction)
                gradients = list(in_order(back, traces, threads=threads))
                _add_powers(totals, gradients, power, threads)
            if others:
                _add_one_by_one(totals, module, others, directions, power, device, placed, threads)
    return {parameter.common: totals[name] for name, parameter in parameters.items()}


@dataclass
class _Trace:
    """A batch's forward pass, with its autograd graph."""

    logits: Tensor
    calls: list[LayerCall]
    directions: Tensor

    def gradients(self, parameters: Mapping[str, _Parameter], direction: int) -> dict[str, ExampleGradients]:
        """Run one backward pass, and return each example's gradients of the parameters."""
        last = direction == self.directions.shape[-1] - 1
        outputs = _backward(self.logits, self.directions[..., direction], self.calls, retain_graph=not last)
        found = {}
        for name, parameter in parameters.items():
            own = [(call, g) for call, g in outputs if call.layer in parameter.layers]
            if own and (part := example_gradients(parameter.local, own)) is not None:
                found[name] = part
        if last:
            self.calls.clear()
        return found


@dataclass(frozen=True)
class _Parameter:
    """A parameter to differentiate.

    Attributes:
        value: the parameter.
        common: its common name in the merge.
        local: its name in its layers; "" when they call it differently.
        layers: the layers that own it; empty when one has gradients without a closed form.
    """

    value: nn.Parameter
    common: str
    local: str
    layers: frozenset[nn.Module]


def _parameters(module: nn.Module, names: Mapping[str, str]) -> dict[str, _Parameter]:
    """Collect the parameters to differentiate, each once, by their first name in the module."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for layer in module.modules():
        for local, value in layer.named_parameters(recurse=False):
            owners.setdefault(id(value), []).append((layer, local))
    found: dict[int, _Parameter] = {}
    keys: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        if name in names and id(value) not in found and value.is_floating_point():
            own = owners[id(value)]
            local = own[0][1] if len({local for _, local in own}) == 1 else ""
            known = local in ("weight", "bias") and all(layer_kind(layer) is not None for layer, _ in own)
            layers = frozenset(layer for layer, _ in own) if known else frozenset()
            found[id(value)] = _Parameter(value, names[name], local, layers)
            keys[id(value)] = name
    return {keys[at]: parameter for at, parameter in found.items()}


def _forward(recorder: Recorder, directions: Directions, device: torch.device, start: int, batch: Batch) -> _Trace:
    inputs, labels = split_labels(batch, device)
    with torch.enable_grad():
        output, calls = recorder.run(inputs)
    logits = _logits(output)
    return _Trace(logits, calls, directions(logits.detach(), labels, start))


def _backward(
    logits: Tensor, cotangent: Tensor, calls: Sequence[LayerCall], *, retain_graph: bool
) -> list[tuple[LayerCall, Tensor]]:
    """Return the gradient of each call's output, without calls that the logits do not depend on."""
    if not calls or not logits.requires_grad:
        return []
    outputs = [call.output for call in calls]
    found = torch.autograd.grad(logits, outputs, cotangent, retain_graph=retain_graph, allow_unused=True)
    return [(call, g.detach()) for call, g in zip(calls, found, strict=True) if g is not None]


def _covered(
    recorder: Recorder, parameters: Mapping[str, _Parameter], batch: Batch, device: torch.device
) -> dict[str, _Parameter]:
    """Select the parameters whose gradients from the layers equal autograd's on a few examples."""
    inputs, _ = split_labels(batch, device)
    lengths = {value.shape[1] for value in inputs.values() if value.dim() > 1}
    count = next(n for n in range(2, 9) if n not in lengths)  # so that no other dimension has the batch's length
    rows = torch.arange(count, device=device) % size_of(batch)
    tensors = [parameter.value for parameter in parameters.values()]
    with torch.enable_grad(), requiring_gradients(tensors):
        output, calls = recorder.run({name: value[rows] for name, value in inputs.items()})
        logits = _logits(output)
        cotangent = torch.linspace(0.5, 1.5, logits.numel(), device=device).to(logits.dtype).view_as(logits)
        found = torch.autograd.grad(
            logits, [*(call.output for call in calls), *tensors], cotangent, allow_unused=True, materialize_grads=False
        )
    gradients = [(call, g) for call, g in zip(calls, found, strict=False) if g is not None]
    covered = {}
    for (name, parameter), true in zip(parameters.items(), found[len(calls) :], strict=True):
        own = [(call, g) for call, g in gradients if call.layer in parameter.layers]
        if all(len(call.input) == len(call.output) == count for call, _ in own) and _agrees(parameter, own, true):
            covered[name] = parameter
    return covered


def _agrees(parameter: _Parameter, gradients: Sequence[tuple[LayerCall, Tensor]], true: Tensor | None) -> bool:
    """Return whether the examples' gradients add up to autograd's, within the rounding of their sum."""
    if true is None or not gradients:
        return true is None and not gradients
    part = example_gradients(parameter.local, gradients)
    if part is None or part.total().shape != true.shape:
        return False
    return bool((part.total() - true).abs().max() <= 1e-4 * part.magnitude().total().max())


def _add_powers(
    totals: Mapping[str, Tensor], gradients: Sequence[Mapping[str, ExampleGradients]], power: Power, threads: int
) -> None:
    """Add the powers of all examples' gradients, in the order of the batches; no two threads share an entry."""

    def add(target: tuple[str, slice]) -> None:
        name, rows = target
        parts = [of_batch[name] for of_batch in gradients if name in of_batch]
        total = totals[name]
        if isinstance(parts[0], MatrixGradients):
            total[rows] += _powers_of_matrices([p for p in parts if isinstance(p, MatrixGradients)], rows, power)
        elif isinstance(parts[0], VectorGradients):
            total += torch.stack(
                [_raised_(p.terms.sum(1), power).sum(0) for p in parts if isinstance(p, VectorGradients)]
            ).sum(0)
        else:
            for part in parts:
                assert isinstance(part, EmbeddingGradients)
                indices, sums = part.of_each_example()
                total.index_add_(0, indices, _raised_(sums, power))

    kinds = {name: part for of_batch in gradients for name, part in of_batch.items()}
    targets = ((name, rows) for name, part in kinds.items() for rows in _row_blocks(totals[name], part))
    for _ in in_order(add, targets, threads=threads, ahead=64):
        pass


def _row_blocks(total: Tensor, part: ExampleGradients) -> Iterator[slice]:
    """Divide a matrix into blocks of rows that fit into a core's cache, or are large enough for an accelerator."""
    if not isinstance(part, MatrixGradients):
        return iter([slice(0, len(total))])
    entries = _BLOCK if total.device.type == "cpu" else _ACCELERATOR_BLOCK
    return blocks(len(total), max(1, entries // total.shape[1]))


def _raised_(gradients: Tensor, power: Power) -> Tensor:
    """Write the powers of the magnitudes into ``gradients``."""
    return gradients.square_() if power == 2 else gradients.abs_()


def _powers_of_matrices(parts: Sequence[MatrixGradients], rows: slice, power: Power) -> Tensor:
    """Return some rows of Σ_b |left_bᵀ·right_b|^p, summed over all parts."""
    first = parts[0]
    total = first.left.new_zeros(rows.stop - rows.start, first.right.shape[2])
    product = torch.empty_like(total)
    for part in parts:
        left, right = part.left[:, :, rows], part.right
        if left.shape[1] == 1:  # the power of an outer product is the outer product of the powers
            total.addmm_(_raised_(left[:, 0].clone(), power).T, _raised_(right[:, 0].clone(), power))
        elif total.device.type == "cpu":
            for each, other in zip(left, right, strict=True):
                torch.mm(each.T, other, out=product)
                if power == 2:
                    total.addcmul_(product, product)
                else:
                    total += product.abs_()
        else:
            step = max(1, _ACCELERATOR_BLOCK // total.numel())
            for chunk in blocks(len(left), step):
                total += _raised_(torch.bmm(left[chunk].mT, right[chunk]), power).sum(0)
    return total


def _add_one_by_one(
    totals: Mapping[str, Tensor],
    module: nn.Module,
    parameters: Mapping[str, _Parameter],
    directions: Directions,
    power: Power,
    device: torch.device,
    placed: Iterable[tuple[int, Batch]],
    threads: int,
) -> None:
    """Add the powers of gradients that autograd computes one example at a time."""
    tensors = [parameter.value for parameter in parameters.values()]

    def powers(at: tuple[int, Batch]) -> list[Tensor]:
        inputs, labels = split_labels(at[1], device)
        with torch.enable_grad():
            logits = _logits(module(**inputs))
        columns = directions(logits.detach(), labels, at[0])
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        for r in range(columns.shape[-1]) if logits.requires_grad else ():
            retain = r < columns.shape[-1] - 1
            found = torch.autograd.grad(logits, tensors, columns[..., r], retain_graph=retain, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += _raised_(gradient, power)
        return sums

    singles = (
        (start + i, {name: value[i : i + 1] for name, value in batch.items()})
        for start, batch in placed
        for i in range(size_of(batch))
    )
    with requiring_gradients(tensors):
        for found in in_order(powers, singles, threads=threads):
            for name, more in zip(parameters, found, strict=True):
                totals[name].add_(more)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise ModelError("the Fisher information is of a model with outputs (logits) of classes, one score, or tokens")
    return logits
