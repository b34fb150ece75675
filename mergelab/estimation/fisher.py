"""The diagonal of an expert's Fisher information: squares of each example's own gradients, many examples at once.

A backward pass over a batch gives the gradient of each layer's output; with the layer's input that makes every
example's gradient of the layer's parameters, which is squared and added up without ever being stored for all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, ModelError
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import Batch, Examples, ExpertExamples
from mergelab.estimation.forward import frozen, groups, on_one_thread, size_of, split_labels
from mergelab.estimation.hooks import Matrices, PerExample, Recorder, TableRows, Use, Vectors, kind_of, per_example
from mergelab.ops.blocks import blocks
from mergelab.ops.philox import stream_key, words
from mergelab.ops.site import Site
from mergelab.ops.threads import in_order, thread_count
from mergelab.weights.align import AlignedModels

Estimator = Literal["auto", "expected", "sampled", "empirical"]
# Entries of a matrix that are squared at once: with the product they come from they stay in a core's cache.
_BLOCK = 131_072
_ACCELERATOR_BLOCK = 1 << 27

# Answers, for the outputs (b, C) of examples from a position on, the directions (b, C, R) to differentiate them in; for
# outputs of tokens (b, l, C), with the tokens (b, l) that should follow, directions (b, l, C, R).
Directions = Callable[[Tensor, Tensor | None, int], Tensor]


_NO_EXPECTED = (
    "method.estimator=expected: takes a pass for every token of a vocabulary; for models that write text take sampled "
    "(a token drawn at each position) or empirical (the text's own)"
)


def of_writers(estimator: Estimator) -> str | None:
    """Say why there is no such estimate for models that write text; None where there is."""
    return _NO_EXPECTED if estimator == "expected" else None


def diagonal_fisher(examples: ExpertExamples, *, estimator: Estimator = "expected", seed: int = 0) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information of the module's parameters, averaged over the examples.

    "expected": E_x Σ_c p(c|x) (∂ log p(c|x)/∂θ)², exactly, in C−1 backward passes; "sampled": one class drawn from
    p(·|x) for each example; "empirical": its label; "auto": "expected", or "sampled" where tokens are written. A module
    with one output is a regression, p(y|x) a Gaussian around it with variance 1. Squares are of one example's gradient,
    never of a sum over examples or classes.

    A module that writes tokens answers logits (b, l, C) on texts that are given: log p is the sum over the positions
    that have a label, "sampled" draws a token for each of them. As draws are independent given the text, the expected
    square of the sum's gradient is the sum of the positions' own expected squares.

    Returns:
        By common name, a tensor of the parameter's shape, on the CPU.

    Raises:
        ModelError: the module's output has no logits (b, C) or (b, l, C).
        ConfigError: "expected" for a module that writes tokens, which would take a pass for each token it knows.
    """
    key = stream_key(seed, "fisher", examples.key)

    def directions(logits: Tensor, labels: Tensor | None, position: int) -> Tensor:
        if logits.dim() == 3:
            return _token_scores(logits, labels, "sampled" if estimator == "auto" else estimator, key, position)
        if estimator in ("auto", "expected"):
            return covariance_root(logits)
        if estimator == "sampled":
            return sampled_scores(logits, key, position)
        assert labels is not None
        return label_scores(logits, labels)

    totals = squared_gradients(examples.module(), examples.batches(), directions, examples.parameter_names)
    return {name: total.div_(examples.count).cpu() for name, total in totals.items()}


# ------------------------------------------------------------------------- directions to differentiate the outputs in


def covariance_root(logits: Tensor) -> Tensor:
    """Return R with R·Rᵀ = diag(p) − p·pᵀ, p the softmax of ``logits`` (b, C): (b, C, C−1).

    As ∂ log p_c = ∂z_c − Σ_k p_k ∂z_k, the expected squares of score directions are those of R's columns; with two
    classes there is one. It is the Cholesky factor, whose entries are products of conditional probabilities (no
    difference of near numbers). A single output, the mean of a Gaussian with variance 1, has the direction 1.
    """
    if logits.shape[1] == 1:
        return torch.ones_like(logits)[..., None]
    p = logits.double().softmax(1)
    tail = p.flip(1).cumsum(1).flip(1)  # p_j + … + p_C
    rest = tail[:, 1:]
    stay = torch.where(tail[:, :-1] > 0, rest / tail[:, :-1], 0)  # of what was left, the share after class j
    diagonal = (p[:, :-1] * stay).sqrt()
    share = torch.where(rest[:, None, :] > 0, p[:, :, None] / rest[:, None, :], 0)
    below = torch.ones(p.shape[1], p.shape[1] - 1, device=p.device).tril(-1)
    root = -share * diagonal[:, None, :] * below
    root[:, :-1] += torch.diag_embed(diagonal)
    return root.to(logits.dtype)


def sampled_scores(logits: Tensor, key: int, position: int) -> Tensor:
    """Return δ_y − p with y drawn from p, or (for one output) a draw from the unit Gaussian: (b, C, 1)."""
    count = len(logits)
    uniform = (words(key, 2 * position, 2 * count).astype(np.float64).reshape(count, 2) + 0.5) / 2.0**32
    if logits.shape[1] == 1:
        normal = np.sqrt(-2 * np.log(uniform[:, 0])) * np.cos(2 * np.pi * uniform[:, 1])
        return torch.from_numpy(normal).to(logits)[:, None, None]
    below = logits.double().softmax(1).cumsum(1)[:, :-1]
    drawn = (torch.from_numpy(uniform[:, :1]).to(below) >= below).sum(1)
    return label_scores(logits, drawn)


def label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return δ_y − p for the labels y, or (for one output) y − z: (b, C, 1)."""
    if logits.shape[1] == 1:
        return (labels.to(logits)[:, None] - logits)[..., None]
    p = logits.double().softmax(1)
    return (nn.functional.one_hot(labels.long(), logits.shape[1]) - p).to(logits.dtype)[..., None]


def _token_scores(logits: Tensor, labels: Tensor | None, estimator: Estimator, key: int, position: int) -> Tensor:
    """Return δ_y − p of each position that has a label, y the label or drawn from p; 0 elsewhere: (b, l, C, 1)."""
    if estimator == "expected":
        raise ConfigError(_NO_EXPECTED)
    if labels is None or labels.shape != logits.shape[:2]:
        raise ModelError("the Fisher information of a model that writes tokens needs the token to follow each position")
    counts = labels >= 0
    if estimator == "sampled":
        uniform = np.stack([words(key, (position + row) << 24, logits.shape[1]) for row in range(len(logits))])
        below = logits.softmax(2).cumsum(2)
        drawn = (torch.from_numpy((uniform + 0.5) / 2.0**32).to(below)[..., None] >= below[..., :-1]).sum(2)
        labels = drawn
    scores = -logits.softmax(2)
    scores.scatter_add_(2, labels.clamp(min=0)[..., None], torch.ones_like(scores[..., :1]))
    return (scores * counts[..., None])[..., None]


# ------------------------------------------------------------------------------------------------- squares of gradients


@dataclass
class _Trace:
    """A batch's forward pass, with the graph to go back through."""

    logits: Tensor
    uses: list[Use]
    directions: Tensor

    def gradients(self, parameters: Mapping[str, _Parameter], direction: int) -> dict[str, PerExample]:
        """Go back once, and describe each example's gradients of the parameters."""
        last = direction == self.directions.shape[-1] - 1
        found = _backward(self.logits, self.directions[..., direction], self.uses, keep=not last)
        described = {}
        for name, parameter in parameters.items():
            own = [(use, g) for use, g in found if use.layer in parameter.layers]
            if own and (part := per_example(parameter.local, own)) is not None:
                described[name] = part
        if last:
            self.uses.clear()
        return described


@dataclass(frozen=True)
class _Parameter:
    """A parameter that takes part: what it is called in the merge, in its layers, and which these are."""

    value: nn.Parameter
    common: str
    local: str
    layers: frozenset[nn.Module]


def squared_gradients(
    module: nn.Module, batches: Iterable[Batch], directions: Directions, names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Add up Σ_r (∂(d_r·z)/∂θ)² over examples, z their outputs and d_r their directions.

    Parameters that are used in other ways than those of `mergelab.estimation.hooks`, and those for which its gradients
    do not agree with autograd's in a trial, are differentiated for one example after the other.

    Args:
        module: answers an object with ``logits`` (b, C) or (b, l, C).
        batches: inputs, of at least one example each.
        directions: see there.
        names: common name of each parameter that is wanted.

    Returns:
        Sums by common name, of the parameters' shapes and dtypes.
    """
    parameters = _parameters(module, names)
    totals = {name: torch.zeros_like(parameter.value) for name, parameter in parameters.items()}
    waiting = iter(batches)
    first = next(waiting, None)
    if first is None or not parameters:
        return {parameter.common: totals[name] for name, parameter in parameters.items()}
    kinds = {layer: kind for p in parameters.values() for layer in p.layers if (kind := kind_of(layer)) is not None}
    recorder = Recorder(module, kinds)
    device = next(module.parameters()).device
    threads = thread_count() if device.type == "cpu" else 1
    position = 0
    with frozen(module), on_one_thread(device):
        with recorder.watching():
            covered = _covered(recorder, parameters, first, device)
        others = {name: parameter for name, parameter in parameters.items() if name not in covered}
        for group in groups(chain([first], waiting)):
            starts = [position, *(position := position + size_of(batch) for batch in group)]
            placed = list(zip(starts, group, strict=False))
            with recorder.watching():
                traces = list(in_order(lambda at: _forward(recorder, directions, device, *at), placed, threads=threads))
            for direction in range(traces[0].directions.shape[-1]):
                back = partial(_Trace.gradients, parameters=covered, direction=direction)
                seen = list(in_order(back, traces, threads=threads))
                _add_squares(totals, seen, threads)
            if others:
                _add_one_by_one(totals, module, others, directions, device, placed, threads)
    return {parameter.common: totals[name] for name, parameter in parameters.items()}


def _parameters(module: nn.Module, names: Mapping[str, str]) -> dict[str, _Parameter]:
    """Find the parameters that take part, each once, with the layers that own them."""
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
            known = local in ("weight", "bias") and all(kind_of(layer) is not None for layer, _ in own)
            layers = frozenset(layer for layer, _ in own) if known else frozenset()
            found[id(value)] = _Parameter(value, names[name], local, layers)
            keys[id(value)] = name
    return {keys[at]: parameter for at, parameter in found.items()}


def _forward(recorder: Recorder, directions: Directions, device: torch.device, start: int, batch: Batch) -> _Trace:
    inputs, labels = split_labels(batch, device)
    with torch.enable_grad():
        output, uses = recorder.run(inputs)
    logits = _logits(output)
    return _Trace(logits, uses, directions(logits.detach(), labels, start))


def _backward(logits: Tensor, cotangent: Tensor, uses: Sequence[Use], *, keep: bool) -> list[tuple[Use, Tensor]]:
    """Return the gradient of each use's output; uses that the outputs do not depend on are left out."""
    if not uses or not logits.requires_grad:
        return []
    outputs = [use.output for use in uses]
    found = torch.autograd.grad(logits, outputs, cotangent, retain_graph=keep, allow_unused=True)
    return [(use, g.detach()) for use, g in zip(uses, found, strict=True) if g is not None]


def _covered(
    recorder: Recorder, parameters: Mapping[str, _Parameter], batch: Batch, device: torch.device
) -> dict[str, _Parameter]:
    """Try on a few examples for which parameters the layers' gradients are what autograd says."""
    inputs, _ = split_labels(batch, device)
    lengths = {value.shape[1] for value in inputs.values() if value.dim() > 1}
    count = next(n for n in range(2, 9) if n not in lengths)  # so that no other dimension looks like the batch
    rows = torch.arange(count, device=device) % size_of(batch)
    tensors = [parameter.value for parameter in parameters.values()]
    with torch.enable_grad(), _asking(tensors):
        output, uses = recorder.run({name: value[rows] for name, value in inputs.items()})
        logits = _logits(output)
        cotangent = torch.linspace(0.5, 1.5, logits.numel(), device=device).to(logits.dtype).view_as(logits)
        found = torch.autograd.grad(
            logits, [*(use.output for use in uses), *tensors], cotangent, allow_unused=True, materialize_grads=False
        )
    gradients = [(use, g) for use, g in zip(uses, found, strict=False) if g is not None]
    covered = {}
    for (name, parameter), true in zip(parameters.items(), found[len(uses) :], strict=True):
        own = [(use, g) for use, g in gradients if use.layer in parameter.layers]
        if all(len(use.input) == len(use.output) == count for use, _ in own) and _agrees(parameter, own, true):
            covered[name] = parameter
    return covered


def _agrees(parameter: _Parameter, gradients: Sequence[tuple[Use, Tensor]], true: Tensor | None) -> bool:
    """Return whether the examples' gradients add up to autograd's, up to rounding of the terms that are added."""
    if true is None or not gradients:
        return true is None and not gradients
    part = per_example(parameter.local, gradients)
    if part is None or part.total().shape != true.shape:
        return False
    return bool((part.total() - true).abs().max() <= 1e-4 * part.magnitude().total().max())


def _add_squares(totals: Mapping[str, Tensor], seen: Sequence[Mapping[str, PerExample]], threads: int) -> None:
    """Add the squares of all examples' gradients, in the order of the batches; no two threads share an entry."""

    def add(place: tuple[str, slice]) -> None:
        name, rows = place
        parts = [found[name] for found in seen if name in found]
        total = totals[name]
        if isinstance(parts[0], Matrices):
            total[rows] += _squared_matrices([part for part in parts if isinstance(part, Matrices)], rows)
        elif isinstance(parts[0], Vectors):
            total += torch.stack([p.terms.sum(1).square_().sum(0) for p in parts if isinstance(p, Vectors)]).sum(0)
        else:
            for part in parts:
                assert isinstance(part, TableRows)
                indices, sums = part.of_each_example()
                total.index_add_(0, indices, sums.square_())

    kinds = {name: part for found in seen for name, part in found.items()}
    places = ((name, rows) for name, part in kinds.items() for rows in _row_blocks(totals[name], part))
    for _ in in_order(add, places, threads=threads, ahead=64):
        pass


def _row_blocks(total: Tensor, part: PerExample) -> Iterator[slice]:
    """Cut a matrix by rows, so that a block is what a core's cache (or an accelerator) holds well."""
    if not isinstance(part, Matrices):
        return iter([slice(0, len(total))])
    wanted = _BLOCK if total.device.type == "cpu" else _ACCELERATOR_BLOCK
    return blocks(len(total), max(1, wanted // total.shape[1]))


def _squared_matrices(parts: Sequence[Matrices], rows: slice) -> Tensor:
    """Return Σ_b (left_bᵀ·right_b)² over all parts, for some rows."""
    first = parts[0]
    total = first.left.new_zeros(rows.stop - rows.start, first.right.shape[2])
    product = torch.empty_like(total)
    for part in parts:
        left, right = part.left[:, :, rows], part.right
        if left.shape[1] == 1:  # the square of an outer product is that of the squares
            total.addmm_(left[:, 0].square().T, right[:, 0].square())
        elif total.device.type == "cpu":
            for each, other in zip(left, right, strict=True):
                total.addcmul_(torch.mm(each.T, other, out=product), product)
        else:
            step = max(1, _ACCELERATOR_BLOCK // total.numel())
            for chunk in blocks(len(left), step):
                total += torch.bmm(left[chunk].mT, right[chunk]).square_().sum(0)
    return total


def _add_one_by_one(
    totals: Mapping[str, Tensor],
    module: nn.Module,
    parameters: Mapping[str, _Parameter],
    directions: Directions,
    device: torch.device,
    placed: Iterable[tuple[int, Batch]],
    threads: int,
) -> None:
    """Add the squares of gradients that autograd computes for each example alone."""
    tensors = [parameter.value for parameter in parameters.values()]

    def squares(at: tuple[int, Batch]) -> list[Tensor]:
        inputs, labels = split_labels(at[1], device)
        with torch.enable_grad():
            logits = _logits(module(**inputs))
        columns = directions(logits.detach(), labels, at[0])
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        for r in range(columns.shape[-1]) if logits.requires_grad else ():
            keep = r < columns.shape[-1] - 1
            found = torch.autograd.grad(logits, tensors, columns[..., r], retain_graph=keep, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
        return sums

    singles = (
        (start + i, {name: value[i : i + 1] for name, value in batch.items()})
        for start, batch in placed
        for i in range(size_of(batch))
    )
    with _asking(tensors):
        for found in in_order(squares, singles, threads=threads):
            for name, more in zip(parameters, found, strict=True):
                totals[name].add_(more)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise ModelError("the Fisher information is of a model with outputs (logits) of classes, one score, or tokens")
    return logits


@contextmanager
def _asking(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let frozen parameters ask for gradients."""
    tensors = list(tensors)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of an expert's Fisher information, by tensor, and what to multiply it by."""

    tensors: Mapping[str, Tensor]
    scale: float = 1.0

    def part(self, site: Site, like: Tensor) -> Tensor:
        """Return the entries that belong to a flat part of a tensor, in float64; 0 for what the data do not reach."""
        if site.name not in self.tensors:
            return torch.zeros_like(like, dtype=torch.float64)
        entries = self.tensors[site.name].reshape(-1)[site.offset : site.offset + like.numel()]
        return entries.to(like.device, torch.float64).mul_(self.scale)


def diagonals(
    models: AlignedModels, examples: Examples, samples: int, seed: int, estimator: Estimator
) -> tuple[Diagonal, ...]:
    """Compute, or find again, the diagonal Fisher information of every expert on its own examples."""

    def of(expert: str) -> Diagonal:
        drawn = examples.of(expert, samples=samples, seed=seed, labelled=estimator == "empirical")
        return Diagonal(_diagonal(drawn, examples, seed, estimator))

    return tuple(of(expert.name) for expert in models.experts)


def _diagonal(drawn: ExpertExamples, examples: Examples, seed: int, estimator: Estimator) -> Mapping[str, Tensor]:
    parts = {
        "statistic": "diagonal fisher",
        "estimator": estimator,
        "seed": seed if estimator in ("auto", "sampled") else None,
        "names": sorted(drawn.parameter_names.items()),
        "examples": drawn.key,
    }
    tensors, _ = disk_cached(
        examples.folder,
        parts if drawn.key else None,
        lambda: (diagonal_fisher(drawn, estimator=estimator, seed=seed), {}),
    )
    return tensors
