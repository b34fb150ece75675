"""Estimate the diagonal Fisher information of an expert on its own examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, ModelError
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import ExampleSource, ExpertExamples
from mergelab.estimation.gradient_powers import gradient_powers
from mergelab.ops.philox import stream_key, words
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels

Estimator = Literal["auto", "expected", "sampled", "empirical"]

_NO_EXPECTED = (
    "method.estimator=expected: takes a pass for every token of a vocabulary; for models that write text take sampled "
    "(a token drawn at each position) or empirical (the text's own)"
)


def unsupported_estimator(estimator: Estimator) -> str | None:
    """Return why models that generate text have no such estimate; None when they have one."""
    return _NO_EXPECTED if estimator == "expected" else None


@dataclass(frozen=True)
class FisherDiagonal:
    """The diagonal of an expert's Fisher information.

    Attributes:
        tensors: the diagonal by common name, in the shapes of the parameters.
        scale: factor of all entries.
        first: whether it is that of the expert that was given first.
    """

    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    first: bool = False

    def part(self, site: Site, like: Tensor) -> Tensor:
        """Return the entries for a flat part of a tensor, in float64; 0 for tensors without an estimate."""
        if site.name not in self.tensors:
            return torch.zeros_like(like, dtype=torch.float64)
        entries = self.tensors[site.name].reshape(-1)[site.offset : site.offset + like.numel()]
        return entries.to(like.device, torch.float64).mul_(self.scale)


def fisher_diagonals(
    models: AlignedModels, examples: ExampleSource, samples: int, seed: int, estimator: Estimator
) -> tuple[FisherDiagonal, ...]:
    """Compute the diagonal Fisher information of every expert on its own examples, or read it from the cache."""

    def of(expert: str) -> FisherDiagonal:
        drawn = examples.of(expert, samples=samples, seed=seed, labelled=estimator == "empirical")
        return FisherDiagonal(_diagonal(drawn, examples, seed, estimator))

    return tuple(of(expert.name) for expert in models.experts)


def _diagonal(drawn: ExpertExamples, examples: ExampleSource, seed: int, estimator: Estimator) -> Mapping[str, Tensor]:
    key = {
        "statistic": "diagonal fisher",
        "estimator": estimator,
        "seed": seed if estimator in ("auto", "sampled") else None,
        "names": sorted(drawn.parameter_names.items()),
        "examples": drawn.key,
    }
    tensors, _ = disk_cached(
        examples.folder,
        key if drawn.key else None,
        lambda: (diagonal_fisher(drawn, estimator=estimator, seed=seed), {}),
    )
    return tensors


def diagonal_fisher(examples: ExpertExamples, *, estimator: Estimator = "expected", seed: int = 0) -> dict[str, Tensor]:
    """Compute the diagonal Fisher information of a module's parameters, averaged over the examples.

    The Fisher information is E_x Σ_c p(c|x) (∂ log p(c|x)/∂θ)². Squares are of one example's gradient, never of a sum
    over examples or classes. A module with one output is a regression, with p(y|x) a Gaussian of variance 1 around it.

    A module that generates tokens returns logits (b, l, C) for given texts. Its log p is the sum over the positions
    that have a label. As tokens are drawn independently given the text, the expected square of that sum's gradient is
    the sum of the positions' expected squares.

    Args:
        examples: the expert and its examples.
        estimator: "expected" sums over all classes exactly, in C−1 backward passes. "sampled" draws one class from
            p(·|x) for each example, or one token for each position that has a label. "empirical" uses the labels.
            "auto" is "expected" for classes and "sampled" for tokens.
        seed: of the draws of "sampled".

    Returns:
        By common name, a tensor of the parameter's shape and dtype, on the CPU.

    Raises:
        ModelError: the module's output has no logits (b, C) or (b, l, C).
        ConfigError: "expected" for a module that generates tokens, which would take a pass per token of its vocabulary.
    """
    key = stream_key(seed, "fisher", examples.key)

    def directions(logits: Tensor, labels: Tensor | None, position: int) -> Tensor:
        if estimator == "empirical":
            return observed_scores(logits, labels)
        if logits.dim() == 3:
            return _token_scores(logits, labels, "sampled" if estimator == "auto" else estimator, key, position)
        return sampled_scores(logits, key, position) if estimator == "sampled" else covariance_root(logits)

    totals = gradient_powers(examples.module(), examples.batches(), directions, examples.parameter_names)
    return {name: total.div_(examples.count).cpu() for name, total in totals.items()}


# -------------------------------------------------------------------- directions in which outputs are differentiated


def covariance_root(logits: Tensor) -> Tensor:
    """Return R (b, C, C−1) with R·Rᵀ = diag(p) − p·pᵀ, where p is the softmax of ``logits`` (b, C).

    As ∂ log p_c = ∂z_c − Σ_k p_k ∂z_k, the sum of squares over R's columns is the expected square over classes. R is
    the Cholesky factor. Its entries are products of conditional probabilities, without differences of close numbers. A
    single output, the mean of a Gaussian with variance 1, has the direction 1.
    """
    if logits.shape[1] == 1:
        return torch.ones_like(logits)[..., None]
    p = logits.double().softmax(1)
    tail = p.flip(1).cumsum(1).flip(1)  # p_j + … + p_C
    rest = tail[:, 1:]
    stay = torch.where(tail[:, :-1] > 0, rest / tail[:, :-1], 0)  # share of the tail from j that lies after j
    diagonal = (p[:, :-1] * stay).sqrt()
    share = torch.where(rest[:, None, :] > 0, p[:, :, None] / rest[:, None, :], 0)
    below = torch.ones(p.shape[1], p.shape[1] - 1, device=p.device).tril(-1)
    root = -share * diagonal[:, None, :] * below
    root[:, :-1] += torch.diag_embed(diagonal)
    return root.to(logits.dtype)


def sampled_scores(logits: Tensor, key: int, position: int) -> Tensor:
    """Return δ_y − p (b, C, 1) with y drawn from p; for one output, a draw from the unit Gaussian."""
    count = len(logits)
    uniform = (words(key, 2 * position, 2 * count).astype(np.float64).reshape(count, 2) + 0.5) / 2.0**32
    if logits.shape[1] == 1:
        normal = np.sqrt(-2 * np.log(uniform[:, 0])) * np.cos(2 * np.pi * uniform[:, 1])
        return torch.from_numpy(normal).to(logits)[:, None, None]
    below = logits.double().softmax(1).cumsum(1)[:, :-1]
    drawn = (torch.from_numpy(uniform[:, :1]).to(below) >= below).sum(1)
    return label_scores(logits, drawn)


def label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return δ_y − p (b, C, 1) for the labels y; for one output, y − z."""
    if logits.shape[1] == 1:
        return (labels.to(logits)[:, None] - logits)[..., None]
    p = logits.double().softmax(1)
    return (nn.functional.one_hot(labels.long(), logits.shape[1]) - p).to(logits.dtype)[..., None]


def observed_scores(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the direction of the gradient of log p of the labels: (b, C, 1), or (b, l, C, 1) for tokens."""
    if logits.dim() == 3:
        return _token_scores(logits, labels, "empirical", 0, 0)
    assert labels is not None
    return label_scores(logits, labels)


def _token_scores(logits: Tensor, labels: Tensor | None, estimator: Estimator, key: int, position: int) -> Tensor:
    """Return δ_y − p (b, l, C, 1) at positions that have a label, with y the label or drawn from p; 0 elsewhere."""
    if estimator == "expected":
        raise ConfigError(_NO_EXPECTED)
    if labels is None or labels.shape != logits.shape[:2]:
        raise ModelError("the Fisher information of a model that writes tokens needs the token to follow each position")
    labelled = labels >= 0
    if estimator == "sampled":
        uniform = np.stack([words(key, (position + row) << 24, logits.shape[1]) for row in range(len(logits))])
        below = logits.softmax(2).cumsum(2)
        labels = (torch.from_numpy((uniform + 0.5) / 2.0**32).to(below)[..., None] >= below[..., :-1]).sum(2)
    scores = -logits.softmax(2)
    scores.scatter_add_(2, labels.clamp(min=0)[..., None], torch.ones_like(scores[..., :1]))
    return (scores * labelled[..., None])[..., None]
