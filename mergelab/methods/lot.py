"""LOT Merging: in each layer the task vector that changes the experts' features least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Samples
from mergelab.estimation.examples import ExampleSource
from mergelab.estimation.layer_features import LayerFeatures, layer_features
from mergelab.ops.blocks import blocks
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import mean
from mergelab.weights.align import AlignedModels

ENTRIES = 1 << 20  # entries of a weight that are merged at once


def prepare_features(
    models: AlignedModels, examples: ExampleSource, *, seed: int, samples: int
) -> tuple[LayerFeatures, ...]:
    """Compute the second moments of every expert's features."""
    return layer_features(models, examples, samples, seed)


@merge_method(
    needs=("data",),
    lambda_=1.0,
    prepare=prepare_features,
    identical_at=None,
    family="data",
    work="decomposes a Gram matrix for every linear layer",
    paper="Sun et al. 2025, arXiv:2505.23859",
    tuned=("lambda_",),
    use="as regmean, on task vectors and for norms as well, with few examples",
)
def lot(vectors: Sequence[Tensor], *, prepared: Sequence[LayerFeatures], site: Site, samples: Samples = 64) -> Tensor:
    """Solve in each layer for the task vector whose outputs are closest to the experts' on their own features.

    τ* = argmin_τ Σ_t ‖f(θ0 + τ; X_t) − f(θ0 + τ_t; X_t)‖² for X_t, the layer's inputs in expert t (Sun et al. 2025,
    arXiv:2505.23859, equations 9, 12 and 14). Linear layers (in, out): τ* = (Σ G_t)† Σ G_t τ_t with G_t = X_tᵀX_t; the
    scales of norms: τ* = Σ s_t τ_t / Σ s_t with s_t the sums of the squared normalised inputs; biases, and all other
    tensors: the mean of the τ_t. θ0 + λ·τ*. Solved in float64.

    Departures: G_t and s_t are means over an expert's real (unpadded) tokens, so that each expert counts the same,
    however long its texts are; the paper adds up the tokens of as many images. Directions in which no expert has
    inputs get 0, by the pseudo-inverse, not the mean: eigenvalues of Σ G_t up to d·ε of the largest count as 0, with ε
    of float32, in which the experts run. Embeddings, which the paper does not treat, have the mean.

    Args:
        vectors: T whole task vectors, float32 or float64.
        prepared: the second moments of the experts' features.
        site: names the tensor.
        samples: number of training examples of each expert.
        lambda_: scale of the merged task vector; the engine applies it. The paper sets 1.2 or 1.5 where it tunes it.

    Returns:
        τ*, of the vectors' shape and dtype.
    """
    grams = [gram for each in prepared if (gram := each.linear.of(site.name)) is not None]
    if vectors[0].dim() == 2 and len(grams) == len(vectors):
        return closest_outputs(vectors, grams, input_first=site.name in prepared[0].linear.input_first)
    squares = [each.norms[site.name].to(vectors[0].device) for each in prepared if site.name in each.norms]
    total = sum(squares, torch.zeros((), dtype=torch.float64)) if len(squares) == len(vectors) else None
    if total is None:
        return mean(vectors)
    weighed = sum(square * vector.double() for square, vector in zip(squares, vectors, strict=True))
    return torch.where(total > 0, weighed / total.clamp_min(1e-300), mean(vectors).double()).to(vectors[0].dtype)


def closest_outputs(vectors: Sequence[Tensor], grams: Sequence[Tensor], *, input_first: bool) -> Tensor:
    """Return (Σ G_t)† Σ G_t τ_t.

    Args:
        vectors: T weights, (out, in), or (in, out) with ``input_first``.
        grams: the experts' G_t, (in, in) float32.
        input_first: whether the weights are (in, out).

    Returns:
        The weight, in the shape and dtype of the vectors.
    """
    first, *others = (gram.to(vectors[0].device, torch.float64) for gram in grams)
    system = first.clone()
    for gram in others:
        system += gram
    values, directions = torch.linalg.eigh(system)
    known = values > len(values) * torch.finfo(torch.float32).eps * values[-1].clamp_min(0)
    inverse = (directions[:, known] / values[known]) @ directions[:, known].T
    merged = torch.empty_like(vectors[0], memory_format=torch.contiguous_format)
    into = merged if input_first else merged.T
    turned = [vector if input_first else vector.T for vector in vectors]
    for part in blocks(into.shape[1], max(1, ENTRIES // len(values))):  # outputs are independent
        right = torch.zeros(len(values), part.stop - part.start, dtype=torch.float64, device=merged.device)
        for vector, gram in zip(turned, grams, strict=True):
            right += gram.to(merged.device, torch.float64) @ vector[:, part].double()
        into[:, part] = inverse @ right
    return merged
