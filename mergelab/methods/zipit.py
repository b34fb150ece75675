"""ZipIt!: merge correlated features, within and across experts, before averaging the experts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import MergeMethod, Substitute, merge_method
from mergelab.engine.parameters import Fraction, Samples
from mergelab.engine.registry import check_parameters
from mergelab.errors import ConfigError, MergeWarning
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import Batch, ExampleSource, ExpertExamples
from mergelab.estimation.features import layer_inputs
from mergelab.methods.rebasin import attention_head_groups, config_of
from mergelab.methods.soup import soup
from mergelab.ops.blocks import working
from mergelab.ops.feature_matching import Budget, Positions, Similarity, assign_positions
from mergelab.ops.layout import inputs_first
from mergelab.ops.permutations import Permutation, Slot, find_permutations, write_indices
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource, WrappedSource

TOKENS = 2048  # tokens of all examples whose features are compared; more when there are more examples
CONSTANT = 1e-6  # relative deviation up to which a feature counts as constant
LAYER = re.compile(r"\.\d+\.")


def check_units(models: AlignedModels) -> None:
    """Raise `ConfigError` for models with layers whose hidden units are not known."""
    if any(map(LAYER.search, models.names)) and not units_of(models, heads=1):
        raise ConfigError(
            "method=zipit: knows the hidden units of BERT-, GPT-2- and Llama-like models, and these are none of them "
            f"(tensors are called {models.names[0]}, …); other methods merge them as they are"
        )


def units_of(models: AlignedModels, *, heads: int) -> tuple[Permutation, ...]:
    """Find the hidden units, and the tensors that write and read them."""
    shapes = {name: tuple(models.experts[0].shape(name)) for name in models.names}
    return find_permutations(shapes, (*models.ignored, *models.experts_only), heads=heads)


@merge_method(
    needs=("data",),
    check=check_units,
    identical_at={"alpha": 1.0},
    family="alignment",
    paper="Stoica et al. 2024, arXiv:2305.03053",
    work="compares all features of a layer with one another",
    authors={"budget": "first"},
    use="models trained from different starts on different tasks, with examples",
)
def zipit(
    models: AlignedModels,
    examples: ExampleSource,
    *,
    seed: int = 0,
    ratio: Fraction = 0.5,
    alpha: Fraction = 0.3,
    beta: Fraction = 0.125,
    budget: Budget = "members",
    samples: Samples = 200,
    heads: Annotated[int, Field(ge=1)] | None = None,
    kv_heads: Annotated[int, Field(ge=1)] | None = None,
) -> Substitute:
    """Merge the features that correlate most, within and across experts, and average the experts.

    In each layer the T·d features of T experts become d groups: the two groups that correlate most are merged, until d
    are left. With M_t and U_t the expert's parts of the merge matrix (each row a group's mean) and of its unmerge
    matrix (each column a group's sum), layers W_t that write the features become M_t W_t and are added up. Layers that
    read them become W_t U_t and are averaged (Stoica et al. 2024, arXiv:2305.03053). Correlations are over the same
    tokens for all experts: training examples of every expert's task, at most about 2048 tokens or one of each example.
    The correlation of a group with another is the smaller one of the two groups that it was made of, times ``alpha``.
    In BERT-, GPT-2- and Llama-like models the features are each layer's FFN hidden units, its attention heads (whole
    heads, or whole groups that share keys and values), the residual stream, and a pooler's outputs. All other tensors
    are averaged.

    Departures: attention heads and the residual stream are zipped only across experts, with one feature of each expert
    in a group. Attention, LayerNorm and an embedding that is also the output layer do not keep their function when two
    features of one expert are merged; this way each expert computes the same as before. The output is one model of the
    experts' size: when ``ratio`` asks for fewer merged features, positions whose features already correlate best keep
    them, and only the others are zipped, so that ratio 0 gives the experts' mean. The paper's partial zip, a model with
    several ends, is not supported. A step counts against the budgets of the experts of which both groups have features,
    so that with β = 0 no two features of one expert are merged. The authors' code counts a group as its first feature's
    expert's, so that mixed groups escape the budget, and merges once at β = 0: ``budget="first"``. When budgets leave
    nothing to merge, they are void. Negative correlations are not multiplied by α, which would raise them. Of equal
    correlations, features with equal positions are merged first. Constant features correlate fully with each other and
    not with others. Units that a tensor outside the merge reads or writes are averaged without zipping.

    Args:
        models: the experts; a base is not used. The units lie as in the expert whose name sorts first, where they can.
        examples: draws examples of the experts' tasks.
        seed: of the draw of examples.
        ratio: fraction of the T·d features that zipping removes (the paper's r); 1 − 1/T, the default for two experts,
            or more removes as many as possible.
        alpha: factor that keeps groups of more than two features from growing.
        beta: budget for merging features of one expert in a layer, as a fraction of the steps per expert.
        budget: which experts' budgets a step counts against, by all "members" of the groups or by their "first" one.
        samples: number of training examples of each expert.
        heads: number of attention heads; default: from the models' configs.
        kv_heads: number of key and value heads; default: from the configs, else ``heads``.

    Returns:
        The merge to run instead: the experts with their features in common positions, by `soup`.

    Raises:
        ConfigError: the models are of no known family, or the number of heads is not known.
    """
    method: MergeMethod = soup.merge_method  # type: ignore[attr-defined]
    plain = check_parameters(method, {})
    models = replace(models, experts=tuple(sorted(models.experts, key=lambda expert: expert.name)))
    experts = models.experts
    if not units_of(models, heads=1):
        message = "zipit: these models have no hidden units, so the experts are averaged as they are"
        warnings.warn(message, MergeWarning, stacklevel=2)
        return Substitute(method, plain, models)
    if len(experts) == 1:
        return Substitute(method, plain, models)
    drawn = [examples.of(expert.name, samples=samples, seed=seed) for expert in experts]
    configured = experts if heads or any(map(config_of, experts)) else (_config_of(drawn[0]),)
    units = units_of(models, heads=attention_head_groups(configured, heads, kv_heads, "zipit"))
    transposed = inputs_first(models)
    features = expert_features(examples, drawn, {slot.tensor for unit in units for slot in readers(unit, transposed)})

    def zip_unit(unit: Permutation) -> Positions:
        correlations = unit_correlations(unit, features, readers(unit, transposed))
        if correlations is None:
            return np.tile(np.arange(unit.size), (len(experts), 1))
        count = min(unit.size, round(ratio * unit.size * len(experts) / (len(experts) - 1)))
        return assign_positions(
            correlations,
            len(experts),
            count,
            one_per_model=one_per_expert(unit),
            alpha=alpha,
            beta=beta,
            budget=budget,
        )

    positions = dict(zip((unit.name for unit in units), in_order(zip_unit, units, ahead=1), strict=True))
    zipped = [
        ZippedSource(expert, axes_of(units, positions, i, models, transposed)) for i, expert in enumerate(experts)
    ]
    return Substitute(method, plain, replace(models, experts=tuple(zipped)))


def _config_of(drawn: ExpertExamples) -> SimpleNamespace:
    config: Any = getattr(drawn.module(), "config", None)
    return SimpleNamespace(config=config.to_dict() if hasattr(config, "to_dict") else None)


def one_per_expert(unit: Permutation) -> bool:
    """Return whether features of one expert must not be merged with each other."""
    return unit.name.split(".")[0] in ("heads", "residual")


def readers(unit: Permutation, transposed: frozenset[str]) -> list[Slot]:
    """List the slots of matrices that read the features; those in ``transposed`` have their inputs along the rows."""
    return [slot for slot in unit.slots if slot.axis == (0 if slot.tensor in transposed else 1)]


def expert_features(
    examples: ExampleSource, drawn: Sequence[ExpertExamples], wanted: Collection[str]
) -> list[Mapping[str, Tensor]]:
    """Collect the `layer_inputs` of every expert on all experts' examples, or read them from the cache."""
    tokens = max(1, TOKENS // sum(each.count for each in drawn))
    batches: list[Batch] = []

    def run(expert: ExpertExamples) -> tuple[Mapping[str, Tensor], dict[str, str]]:
        if not batches:
            batches.extend(batch for each in drawn for batch in each.batches())
        return layer_inputs(expert.module(), expert.parameter_names, wanted, batches, tokens), {}

    def of(expert: ExpertExamples) -> Mapping[str, Tensor]:
        key = {
            "statistic": "layer inputs",
            "expert": expert.key,
            "names": sorted(expert.parameter_names.items()),
            "layers": sorted(wanted),
            "examples": [each.key for each in drawn],
            "tokens": tokens,
        }
        return disk_cached(examples.folder, key if all(each.key for each in drawn) else None, lambda: run(expert))[0]

    return [of(expert) for expert in drawn]


def unit_correlations(
    unit: Permutation, features: Sequence[Mapping[str, Tensor]], slots: Sequence[Slot]
) -> Similarity | None:
    """Compute the correlations of the T experts' units, averaged over the layers that read them.

    Heads are units of several features. Their correlation is the mean over features with equal positions in the heads.

    Returns:
        (T·n, T·n) float32; None when no layer that reads the units has run.
    """
    observed = [slot for slot in slots if slot.tensor in features[0]]
    total: Tensor | None = None
    for slot in observed:
        rows = torch.cat([standardised(each[slot.tensor], unit.size) for each in features])
        product = (rows @ rows.T).div_(slot.block * len(observed))
        total = product if total is None else total.add_(product)
    if total is None:
        return None
    correlations: Similarity = total.numpy()
    return np.maximum(correlations, correlations.T)


def standardised(tokens: Tensor, size: int) -> Tensor:
    """Scale features (n, size·k) to mean 0 and norm 1 over the tokens; return them as (size, (n + 1)·k) float32.

    The additional entry is 1 for constant features, else 0: constant features correlate only with each other.
    """
    values = tokens.double()
    centred = values - values.mean(0)
    length = centred.norm(dim=0)
    varies = length > CONSTANT * values.norm(dim=0)
    units = torch.cat([centred / torch.where(varies, length, 1) * varies, ~varies[None]])
    return units.float().view(len(units), size, -1).transpose(0, 1).reshape(size, -1)


@dataclass(frozen=True)
class Axis:
    """The new positions along an axis of an expert's tensor.

    Attributes:
        index: (n,) int64; entry i is added to entry ``index[i]`` of the new axis.
        scale: (n,) float64, factors of the new entries.
    """

    index: Tensor
    scale: Tensor


def axes_of(
    units: Sequence[Permutation],
    positions: Mapping[str, Positions],
    expert: int,
    models: AlignedModels,
    transposed: frozenset[str],
) -> dict[str, dict[int, Axis]]:
    """Return the new axes of one expert's tensors, such that the experts' mean is the merged model.

    Tensors that write a group's features are averaged over the group: scaled by T over the group's size, as the experts
    are averaged later. Tensors that read them are summed.
    """
    result: dict[str, dict[int, Axis]] = {}
    for unit in units:
        found = positions[unit.name]
        share = torch.from_numpy(len(found) / np.bincount(found.ravel(), minlength=unit.size))
        reading = readers(unit, transposed)
        for slot in unit.slots:
            length = models.experts[expert].shape(slot.tensor)[slot.axis]
            new = Axis(torch.arange(length), torch.ones(length, dtype=torch.float64))
            axis = result.setdefault(slot.tensor, {}).setdefault(slot.axis, new)
            write_indices(axis.index, slot, found[expert])
            if slot not in reading:
                axis.scale[slot.offset : slot.offset + unit.size * slot.block] = share.repeat_interleave(slot.block)
    return result


@dataclass(frozen=True)
class ZippedSource(WrappedSource):
    """An expert with its features in common positions, and the features of a group added up.

    Attributes:
        source: the expert.
        axes: by tensor and axis, the new positions.
    """

    source: TensorSource
    axes: Mapping[str, Mapping[int, Axis]]
    _last: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _lock: Lock = field(default_factory=Lock, compare=False, repr=False)

    def get(self, key: str) -> Tensor:
        """Return ``key`` with its groups added up, in float32 or float64; computed once for all parts of a tensor."""
        if key not in self.axes:
            return self.source.get(key)
        with self._lock:
            if key not in self._last:
                self._last.clear()
                self._last[key] = add_groups(self.source.get(key), self.axes[key])
            return self._last[key]


def add_groups(tensor: Tensor, axes: Mapping[int, Axis]) -> Tensor:
    """Add up the entries of a tensor that have the same new position, and scale the sums."""
    result = working(tensor)
    for at, axis in axes.items():
        shape = [-1 if dimension == at else 1 for dimension in range(result.ndim)]
        added = torch.zeros_like(result).index_add_(at, axis.index.to(result.device), result)
        result = added.mul_(axis.scale.to(result.device, result.dtype).view(shape))
    return result
