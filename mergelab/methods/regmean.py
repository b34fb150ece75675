"""RegMean: merge linear layers by regression on the experts' outputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction, Positive, Samples
from mergelab.engine.sweep_range import NotSwept
from mergelab.errors import MergeWarning
from mergelab.estimation.examples import ExampleSource
from mergelab.estimation.input_gram import InputGram, input_gram
from mergelab.methods.soup import soup
from mergelab.ops.blocks import blocks
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels

ENTRIES = 1 << 20  # entries of a weight solved for at once


def prepare_input_grams(
    models: AlignedModels, examples: ExampleSource, *, seed: int, samples: int
) -> tuple[InputGram, ...]:
    """Compute the input Gram matrices of every expert's linear layers."""
    return tuple(input_gram(examples, expert.name, samples, seed) for expert in models.experts)


@merge_method(
    needs=("data",),
    prepare=prepare_input_grams,
    family="data",
    work="solves a system for every linear layer",
    paper="Jin et al. 2023, arXiv:2212.09849",
    authors={"alpha": 0.1, "samples": 16000},
    use="few experts with examples of their tasks: a closed form, without gradients",
)
def regmean(
    experts: Sequence[Tensor],
    *,
    prepared: Sequence[InputGram],
    site: Site,
    alpha: Fraction = 0.9,
    samples: Samples = 1000,
    ridge: Annotated[Positive, NotSwept()] = 1e-6,
) -> Tensor:
    """Solve for the linear layers whose outputs are closest to each expert's on its own inputs; average the rest.

    W = (Σ Ĝ_t)⁻¹ Σ Ĝ_t W_t with G_t = X_tᵀX_t/n over the layer's inputs in expert t at n real (unpadded) tokens, and
    Ĝ_t = α·G_t + (1−α)·diag(G_t) (Jin et al. 2023, arXiv:2212.09849, equation 2 and section 4.2). All other tensors
    (embeddings, biases, norms) are the experts' mean. Solved in float64.

    Departures: the system is solved for the difference from the experts' mean, which is equivalent and rounds less.
    When Σ Ĝ_t is singular (a Cholesky pivot is below ``ridge`` times its diagonal entry), ``ridge`` times the mean of
    the diagonal is added to it. That draws the undetermined part towards the mean, and a warning names the layer. The
    defaults are the values that the paper recommends for encoders, on 1000 examples; the authors' configurations count
    1000 batches of 16 examples, and most have α = 0.1.

    Args:
        experts: T whole tensors of one shape, any float dtype.
        prepared: the experts' input Gram matrices.
        site: names the tensor.
        alpha: factor of the off-diagonal entries of G_t.
        samples: number of training examples of each expert.
        ridge: regularisation of singular systems, relative to the diagonal.

    Returns:
        Tensor of the experts' shape, float32 (float64 for float64 inputs).
    """
    grams = [gram for each in prepared if (gram := each.of(site.name)) is not None]
    mean = soup(experts)
    if len(grams) < len(experts) or mean.dim() != 2:
        return mean
    input_first = site.name in prepared[0].input_first
    return solve_layer(experts, mean, grams, site.name, alpha=alpha, ridge=ridge, input_first=input_first)


def solve_layer(
    experts: Sequence[Tensor],
    mean: Tensor,
    grams: Sequence[Tensor],
    name: str,
    *,
    alpha: float,
    ridge: float,
    input_first: bool,
    method: str = "regmean",
) -> Tensor:
    """Return the weight that minimises Σ_t tr((W − W_t)·Ĝ_t·(W − W_t)ᵀ).

    Args:
        experts: T weights, (out, in), or (in, out) with ``input_first``.
        mean: the experts' mean.
        grams: the experts' G_t, (in, in).
        name: the weight's name, for a warning.
        alpha, ridge: as for ``regmean``.
        input_first: whether the weights are (in, out).
        method: the method's name, for a warning.

    Returns:
        The weight, in the shape and dtype of ``mean``.
    """

    def scaled(gram: Tensor) -> Tensor:
        return scaled_off_diagonal(gram.to(mean.device, torch.float64), alpha)

    first, *others = grams
    system = scaled(first)
    for gram in others:
        system += scaled(gram)
    factor = cholesky_factor(system, ridge, f"method={method}: the inputs of {name}")
    weights = [weight if input_first else weight.T for weight in experts]
    solved = torch.empty_like(mean)
    into, middle = (solved, mean) if input_first else (solved.T, mean.T)
    for part in blocks(into.shape[1], max(1, ENTRIES // len(system))):  # outputs are independent
        centre = middle[:, part].double()
        if factor is not None:
            right = torch.zeros_like(centre)
            for weight, gram in zip(weights, grams, strict=True):
                right += scaled(gram) @ (weight[:, part].double() - centre)
            centre += torch.cholesky_solve(right, factor)
        into[:, part] = centre
    return solved


def scaled_off_diagonal(gram: Tensor, alpha: float) -> Tensor:
    """Return α·G + (1−α)·diag(G)."""
    scaled = gram * alpha
    scaled.diagonal().copy_(gram.diagonal())
    return scaled


def cholesky_factor(system: Tensor, ridge: float, inputs: str) -> Tensor | None:
    """Compute the Cholesky factor of a positive semi-definite matrix; None for a matrix of zeros.

    For a singular matrix a ridge is added, and a warning that names ``inputs`` is issued.
    """
    diagonal = system.diagonal().clone()
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    if not failed and bool((factor.diagonal().square() >= ridge * diagonal).all()):
        return factor
    warnings.warn(
        f"{inputs} do not determine the layer (its Gram matrix is singular); a ridge draws it to the experts' mean",
        MergeWarning,
        stacklevel=2,
    )
    level = float(diagonal.mean())
    while level > 0:  # float32 inputs can make eigenvalues slightly negative
        added = system + ridge * level * torch.eye(len(system), dtype=system.dtype, device=system.device)
        factor, failed = torch.linalg.cholesky_ex(added)
        if not failed:
            return factor
        level *= 10
    return None
