"""Merging linear layers by regression: the layer whose outputs are nearest to the experts' on their own inputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction, Positive, Samples
from mergelab.errors import MergeWarning
from mergelab.estimation.examples import ExampleSource
from mergelab.estimation.input_gram import InputGram, input_gram
from mergelab.methods.soup import soup
from mergelab.ops.blocks import blocks
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels

ENTRIES = 1 << 20  # of a layer's weight that are solved for at once


def prepare_products(
    models: AlignedModels, examples: ExampleSource, *, seed: int, samples: int
) -> tuple[InputGram, ...]:
    """Compute the input products of every expert's linear layers."""
    return tuple(input_gram(examples, expert.name, samples, seed) for expert in models.experts)


@merge_method(
    needs=("data",),
    prepare=prepare_products,
    family="data",
    work="solves a system for every linear layer",
    paper="Jin et al. 2023, arXiv:2212.09849",
)
def regmean(
    experts: Sequence[Tensor],
    *,
    prepared: Sequence[InputGram],
    site: Site,
    alpha: Fraction = 0.9,
    samples: Samples = 1000,
    ridge: Positive = 1e-6,
) -> Tensor:
    """Solve for the linear layer that is nearest to the experts' outputs on each one's own inputs; average the rest.

    W = (Σ Ĝ_t)⁻¹ Σ Ĝ_t W_t with G_t = X_tᵀX_t/n over the n real (unpadded) tokens that reach the layer in expert t, and
    Ĝ_t = α·G_t + (1−α)·diag(G_t) (Jin et al. 2023, arXiv:2212.09849, equation 2 and section 4.2). All other tensors
    (embeddings, biases, norms) are the experts' mean. Departures: the system is solved for the distance to the experts'
    mean, which is the same and rounds less; where Σ Ĝ_t is singular, as judged by a Cholesky pivot under ``ridge``
    times its diagonal entry, ``ridge`` times the mean of the diagonal is added to it, which draws the undetermined part
    to the mean, and a warning names the layer. Solved in float64.

    Args:
        experts: T whole tensors of one shape, any float dtype.
        prepared: the experts' input products.
        site: which tensor.
        alpha: factor of the off-diagonal entries of G_t.
        samples: how many training examples of each expert.
        ridge: for singular systems, relative to the diagonal.

    Returns:
        Tensor of the experts' shape, float32 (float64 for float64 inputs).
    """
    products = [found for each in prepared if (found := each.of(site.name)) is not None]
    mean = soup(experts)
    if len(products) < len(experts) or mean.dim() != 2:
        return mean
    input_first = site.name in prepared[0].input_first
    return solve_layer(experts, mean, products, site.name, alpha=alpha, ridge=ridge, input_first=input_first)


def solve_layer(
    experts: Sequence[Tensor],
    mean: Tensor,
    products: Sequence[Tensor],
    name: str,
    *,
    alpha: float,
    ridge: float,
    input_first: bool,
    method: str = "regmean",
) -> Tensor:
    """Return the weight that minimises Σ_t tr((W − W_t)·Ĝ_t·(W − W_t)ᵀ).

    Args:
        experts: T weights, (out, in), or (in, out) where ``input_first``.
        mean: their mean.
        products: the experts' G_t, (in, in).
        name: of the weight, for a warning.
        alpha, ridge: as for ``regmean``.
        input_first: the weights are (in, out).
        method: for a warning.

    Returns:
        The weight in the dtype of ``mean``.
    """

    def own(product: Tensor) -> Tensor:
        return scaled_off_diagonal(product.to(mean.device, torch.float64), alpha)

    first, *others = products
    system = own(first)
    for product in others:
        system += own(product)
    factor = factorise(system, ridge, f"method={method}: the inputs of {name}")
    upright = [weight if input_first else weight.T for weight in experts]
    solved = torch.empty_like(mean)
    into, middle = (solved, mean) if input_first else (solved.T, mean.T)
    for part in blocks(into.shape[1], max(1, ENTRIES // len(system))):  # one output does not depend on another
        centre = middle[:, part].double()
        if factor is not None:
            right = torch.zeros_like(centre)
            for weight, product in zip(upright, products, strict=True):
                right += own(product) @ (weight[:, part].double() - centre)
            centre += torch.cholesky_solve(right, factor)
        into[:, part] = centre
    return solved


def scaled_off_diagonal(product: Tensor, alpha: float) -> Tensor:
    """Return α·G + (1−α)·diag(G)."""
    scaled = product * alpha
    scaled.diagonal().copy_(product.diagonal())
    return scaled


def factorise(system: Tensor, ridge: float, inputs: str) -> Tensor | None:
    """Return the Cholesky factor of a symmetric matrix of non-negative eigenvalues; None for a matrix of zeros.

    Where the matrix is singular, a warning says so, and a ridge is added.
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
    while level > 0:  # inputs in float32 may leave eigenvalues a little under 0
        added = system + ridge * level * torch.eye(len(system), dtype=system.dtype, device=system.device)
        factor, failed = torch.linalg.cholesky_ex(added)
        if not failed:
            return factor
        level *= 10
    return None
