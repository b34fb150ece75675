"""TATR: task arithmetic within a trust region, where no task's loss is sensitive to the other tasks' vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergelab.engine.finite_check import digest_of
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Samples, Weights
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import ExampleSource, ExpertExamples
from mergelab.estimation.fisher import observed_scores
from mergelab.estimation.forward import write_merged
from mergelab.estimation.gradient_powers import gradient_powers
from mergelab.ops.kth_largest import Array, kth_largest, rank_of
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import factors, open_task_vectors, weighted_sum
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource


@dataclass(frozen=True)
class TrustRegion:
    """The entries in which no task's loss is sensitive to the other tasks' vectors.

    Attributes:
        gradients: by expert and tensor, the mean magnitudes of the gradient of its task's loss at the base.
        bound: the largest sensitivity inside.
    """

    gradients: Sequence[Mapping[str, Tensor]]
    bound: float = 0.0

    def sensitivity(self, name: str, part: slice, vectors: Sequence[Tensor]) -> Tensor:
        """Return Σ_t |τ_t| Σ_{s≠t} |∂L_s/∂θ| for a part of a flattened tensor, in float64."""
        total = torch.zeros_like(vectors[0], dtype=torch.float64)
        for t, vector in enumerate(vectors):
            for s, gradients in enumerate(self.gradients):
                if s != t and name in gradients:
                    entries = gradients[name].reshape(-1)[part].to(vector.device, torch.float64)
                    total.addcmul_(entries, vector.abs().double())
        return total


def prepare_trust_region(
    models: AlignedModels, examples: ExampleSource, *, seed: int, samples: int, density: float
) -> TrustRegion:
    """Compute the gradients' magnitudes, and the bound below which ``density`` of all entries are."""
    assert models.base is not None
    base = digest_of(models.base, models.names)
    drawn = [examples.of(expert.name, samples=samples, seed=seed, labelled=True) for expert in models.experts]
    found = []
    for each in drawn:
        key = {
            "statistic": "gradient magnitudes at the base",
            "names": sorted(each.parameter_names.items()),
            "examples": each.key,
            "base": base,
        }
        compute = partial(gradient_magnitudes, models.base, each)
        found.append(disk_cached(examples.folder, key if each.key else None, compute)[0])
    return TrustRegion(found, _bound(TrustRegion(found), models, density))


def gradient_magnitudes(base: TensorSource, examples: ExpertExamples) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return E|∂L/∂θ| at the base with the expert's head, over single examples, by common name."""
    module, names = examples.module(), examples.parameter_names
    write_merged(module, names, base)
    totals = gradient_powers(module, examples.batches(), lambda z, y, _: observed_scores(z, y), names, power=1)
    return {name: total.div_(examples.count).cpu() for name, total in totals.items()}, {}


def _bound(region: TrustRegion, models: AlignedModels, density: float) -> float:
    """Return the k-th smallest sensitivity of all entries, k = max(1, int(density · n))."""
    sizes = {name: torch.Size(models.experts[0].shape(name)).numel() for name in models.names}
    count = sum(sizes.values())
    if density >= 1 or not count:
        return float("inf")
    from_largest = count - rank_of(density, count) + 1

    def open_(name: str) -> Callable[[slice], list[Array]]:
        read = open_task_vectors(models, name)
        return lambda part: [region.sensitivity(name, part, read(part)).numpy()]

    (bound,) = kth_largest(open_, sizes, (from_largest + 0.5) / count, 1)
    return bound


@merge_method(
    needs=("data", "gradients"),
    lambda_=0.3,
    elementwise=True,
    prepare=prepare_trust_region,
    identical_at=None,
    family="data",
    paper="Sun et al. 2025, arXiv:2501.15065",
    tuned=("lambda_",),
    use="as task_arithmetic, for tasks that conflict, with labelled examples of each",
)
def tatr(
    vectors: Sequence[Tensor],
    *,
    prepared: TrustRegion,
    site: Site,
    weights: Weights = None,
    density: Density = 0.99,
    samples: Samples = 128,
) -> Tensor:
    """Add up the task vectors in the entries in which no task's loss is sensitive to those of other tasks.

    θ0 + λ·m⊙Σ_t w_t τ_t with m = [Ω ≤ ε] and Ω = Σ_{s≠t} E|∂L_s/∂θ (θ0)|⊙|τ_t| (Sun et al. 2025, arXiv:2501.15065,
    Task Arithmetic in Trust Region). L_s is the loss of one labelled training example of expert s's task, −log p of the
    label (of all tokens' labels; half the squared error of a score), with the base's weights and the expert's head. ε
    is the sensitivity that the fraction ``density`` of all entries of the model do not exceed.

    Departures: of entries of equal Ω at the bound all are kept; the authors' code keeps those below the bound, one
    entry fewer. Tensors without a gradient, which no example uses, are within the trust region.

    Args:
        vectors: T task vectors (parts of them, flattened) of one shape.
        prepared: the gradients and the bound.
        site: names the tensor and its part.
        weights: w_t per expert; default 1.
        density: fraction of entries inside the trust region; 1 is task arithmetic.
        samples: number of labelled training examples of each expert.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        The merged task vector, of the vectors' shape and dtype.

    Raises:
        DataError: while preparing: the training examples have no labels.
    """
    flat = [vector.reshape(-1) for vector in vectors]
    part = slice(site.offset, site.offset + flat[0].numel())
    outside = prepared.sensitivity(site.name, part, flat) > prepared.bound
    return weighted_sum(vectors, factors(weights, len(vectors))).masked_fill_(outside.view(vectors[0].shape), 0)
