"""ZipIt!: put together the experts' features that correlate, within and across experts, before averaging them."""

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
from mergelab.methods.rebasin import attention_head_groups, config_of, place
from mergelab.methods.soup import soup
from mergelab.ops.blocks import working
from mergelab.ops.feature_matching import Likeness, Places, zipped
from mergelab.ops.layout import inputs_first
from mergelab.ops.permutations import Permutation, Slot, find_permutations
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource, WrappedSource

TOKENS = 2048  # of all examples together whose features are compared, where there are so few examples
CONSTANT = 1e-6  # a feature that varies less, beside its size, does not vary
LAYER = re.compile(r"\.\d+\.")


def check_units(models: AlignedModels) -> None:
    """Raise `ConfigError` for models with layers of which no hidden units are known."""
    if any(map(LAYER.search, models.names)) and not units_of(models, heads=1):
        raise ConfigError(
            "method=zipit: knows the hidden units of BERT-, GPT-2- and Llama-like models, and these are none of them "
            f"(tensors are called {models.names[0]}, …); other methods merge them as they are"
        )


def units_of(models: AlignedModels, *, heads: int) -> tuple[Permutation, ...]:
    """Find the hidden units, and where they are written and read."""
    shapes = {name: tuple(models.experts[0].shape(name)) for name in models.names}
    return find_permutations(shapes, (*models.ignored, *models.experts_only), heads=heads)


@merge_method(
    needs=("data",),
    check=check_units,
    family="alignment",
    paper="Stoica et al. 2024, arXiv:2305.03053",
)
def zipit(
    models: AlignedModels,
    examples: ExampleSource,
    *,
    seed: int = 0,
    ratio: Fraction = 0.5,
    alpha: Fraction = 0.3,
    beta: Fraction = 0.125,
    samples: Samples = 200,
    heads: Annotated[int, Field(ge=1)] | None = None,
    kv_heads: Annotated[int, Field(ge=1)] | None = None,
) -> Substitute:
    """Put together the features that correlate most, within and across experts, then average what is put together.

    In each layer the T·d features of T experts become d groups: greedily, the two groups that correlate most are put
    together, again and again. With M_t and U_t the expert's parts of the merge matrix (each row a group's mean) and of
    its unmerge matrix (each column a group's sum), layers W_t that write the features become M_t W_t and are added up,
    layers that read them W_t U_t and are averaged (Stoica et al. 2024, arXiv:2305.03053). Correlations are over the
    same tokens for all experts: training examples of every expert's task, at most about 2048 tokens or one of each
    example. Groups correlate as their least correlated features do, times ``alpha`` for each feature that they would
    have together beyond T. In BERT-, GPT-2- and Llama-like models the features are each layer's FFN hidden units, its
    attention heads (whole, those that share keys and values together), the residual stream, and a pooler's outputs; all
    other tensors are averaged.

    Departures: attention heads and the residual stream are zipped across experts alone, one feature of each in a group,
    as neither attention nor LayerNorm (nor an embedding that is also the output layer) stays what it is when two
    features of one expert become one; each expert then computes what it did. The output is one model of the experts'
    size: where ``ratio`` asks for less than d groups out of T·d features, the places whose features correlate best as
    they are keep them, and only the others are zipped, so that at ratio 0 the result is the experts' mean. The paper's
    partial zip, a model with several ends, is not made. The authors' code multiplies by α in each step and counts a
    group as its first feature's expert's; for two experts' single features that is the same. A step counts against the
    budget of the experts of which both groups have features; where budgets leave nothing to put together they are void.
    Equal correlations go to features of the same place; features that do not vary are alike, and like no others. Units
    that a tensor that is not merged reads or writes are averaged as they are.

    Args:
        models: the experts (a base takes no part).
        examples: of the experts' tasks.
        seed: of the draw of examples.
        ratio: the share of the T·d features that zipping takes away (the paper's r): 1 − 1/T or more is all that can be
            taken, which the default is for two experts.
        alpha: factor that keeps groups of more than T features from growing.
        beta: budget for features of one expert put together in a layer: a share of the steps that fall to an expert.
        samples: how many training examples of each expert.
        heads: number of attention heads; default: from the models' configs.
        kv_heads: number of key and value heads; default: from the configs, else ``heads``.

    Returns:
        What to merge instead: the experts' features in common places, by `soup`.

    Raises:
        ConfigError: the models are of no known family, or the number of heads is not known.
    """
    method: MergeMethod = soup.merge_method  # type: ignore[attr-defined]
    plain = check_parameters(method, {})
    experts = models.experts
    if not units_of(models, heads=1):
        message = "zipit: these models have no hidden units, so the experts are averaged as they are"
        warnings.warn(message, MergeWarning, stacklevel=2)
        return Substitute(method, plain, models)
    if len(experts) == 1:
        return Substitute(method, plain, models)
    drawn = [examples.of(expert.name, samples=samples, seed=seed) for expert in experts]
    told = experts if heads or any(map(config_of, experts)) else (_config_of(drawn[0]),)
    units = units_of(models, heads=attention_head_groups(told, heads, kv_heads, "zipit"))
    turned = inputs_first(models)
    features = expert_features(examples, drawn, {slot.tensor for unit in units for slot in readers(unit, turned)})

    def zip_unit(unit: Permutation) -> Places:
        likeness = unit_likeness(unit, features, readers(unit, turned))
        if likeness is None:
            return np.tile(np.arange(unit.size), (len(experts), 1))
        taken = min(unit.size, round(ratio * unit.size * len(experts) / (len(experts) - 1)))
        return zipped(likeness, len(experts), taken, one_of_each=is_whole(unit), alpha=alpha, beta=beta)

    places = dict(zip((unit.name for unit in units), in_order(zip_unit, units, ahead=1), strict=True))
    moved = [ZippedSource(expert, axes_of(units, places, at, models, turned)) for at, expert in enumerate(experts)]
    return Substitute(method, plain, replace(models, experts=tuple(moved)))


def _config_of(drawn: ExpertExamples) -> SimpleNamespace:
    config: Any = getattr(drawn.module(), "config", None)
    return SimpleNamespace(config=config.to_dict() if hasattr(config, "to_dict") else None)


def is_whole(unit: Permutation) -> bool:
    """Return whether two features of one expert cannot become one."""
    return unit.name.split(".")[0] in ("heads", "residual")


def readers(unit: Permutation, turned: frozenset[str]) -> list[Slot]:
    """List the matrices that take the unit's features in; those in ``turned`` have their inputs along the rows."""
    return [slot for slot in unit.slots if slot.axis == (0 if slot.tensor in turned else 1)]


def expert_features(
    examples: ExampleSource, drawn: Sequence[ExpertExamples], wanted: Collection[str]
) -> list[Mapping[str, Tensor]]:
    """Run every expert on the examples of all, or find again what goes into its layers; see `layer_inputs`."""
    tokens = max(1, TOKENS // sum(each.count for each in drawn))
    batches: list[Batch] = []

    def run(expert: ExpertExamples) -> tuple[Mapping[str, Tensor], dict[str, str]]:
        if not batches:
            batches.extend(batch for each in drawn for batch in each.batches())
        return layer_inputs(expert.module(), expert.parameter_names, wanted, batches, tokens), {}

    def of(expert: ExpertExamples) -> Mapping[str, Tensor]:
        parts = {
            "statistic": "layer inputs",
            "expert": expert.key,
            "names": sorted(expert.parameter_names.items()),
            "layers": sorted(wanted),
            "examples": [each.key for each in drawn],
            "tokens": tokens,
        }
        return disk_cached(examples.folder, parts if all(each.key for each in drawn) else None, lambda: run(expert))[0]

    return [of(expert) for expert in drawn]


def unit_likeness(
    unit: Permutation, features: Sequence[Mapping[str, Tensor]], slots: Sequence[Slot]
) -> Likeness | None:
    """Return how the T experts' features correlate, (T·n, T·n); the mean over the layers that read them.

    Of heads, which are several features each, it is the mean over the features that have the same place in their heads.

    Returns:
        None where no layer that reads them has run.
    """
    read = [slot for slot in slots if slot.tensor in features[0]]
    total: Tensor | None = None
    for slot in read:
        rows = torch.cat([standardised(each[slot.tensor], unit.size) for each in features])
        product = (rows @ rows.T).div_(slot.block * len(read))
        total = product if total is None else total.add_(product)
    if total is None:
        return None
    likeness: Likeness = total.numpy()
    return np.maximum(likeness, likeness.T)


def standardised(tokens: Tensor, size: int) -> Tensor:
    """Bring features (n, size·k) to mean 0 and length 1, and answer them as (size, (n + 1)·k) float32.

    The entry in addition is 0, but 1 for features that do not vary: these are alike, and like no others.
    """
    values = tokens.double()
    centred = values - values.mean(0)
    length = centred.norm(dim=0)
    varies = length > CONSTANT * values.norm(dim=0)
    units = torch.cat([centred / torch.where(varies, length, 1) * varies, ~varies[None]])
    return units.float().view(len(units), size, -1).transpose(0, 1).reshape(size, -1)


@dataclass(frozen=True)
class Axis:
    """What becomes of an axis of an expert's tensor: entry i is added to entry ``index[i]`` of the new one, scaled."""

    index: Tensor
    scale: Tensor


def axes_of(
    units: Sequence[Permutation], places: Mapping[str, Places], at: int, models: AlignedModels, turned: frozenset[str]
) -> dict[str, dict[int, Axis]]:
    """Return what becomes of the tensors of the expert at ``at``, so that the experts' mean is the merged model.

    A tensor that writes a group's features is the mean of them all: T times over the group's size in the experts' mean.
    One that reads them adds up what it did with each.
    """
    result: dict[str, dict[int, Axis]] = {}
    for unit in units:
        found = places[unit.name]
        share = torch.from_numpy(len(found) / np.bincount(found.ravel(), minlength=unit.size))
        reading = readers(unit, turned)
        for slot in unit.slots:
            length = models.experts[at].shape(slot.tensor)[slot.axis]
            new = Axis(torch.arange(length), torch.ones(length, dtype=torch.float64))
            axis = result.setdefault(slot.tensor, {}).setdefault(slot.axis, new)
            place(axis.index, slot, found[at])
            if slot not in reading:
                axis.scale[slot.offset : slot.offset + unit.size * slot.block] = share.repeat_interleave(slot.block)
    return result


@dataclass(frozen=True)
class ZippedSource(WrappedSource):
    """An expert whose features are in common places, those of one group added up.

    Attributes:
        source: the expert.
        axes: what becomes of its tensors' axes.
    """

    source: TensorSource
    axes: Mapping[str, Mapping[int, Axis]]
    _last: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _lock: Lock = field(default_factory=Lock, compare=False, repr=False)

    def get(self, key: str) -> Tensor:
        """Read ``key`` and add up what goes together, in float32 or float64; made once for all parts of a tensor."""
        if key not in self.axes:
            return self.source.get(key)
        with self._lock:
            if key not in self._last:
                self._last.clear()
                self._last[key] = gathered(self.source.get(key), self.axes[key])
            return self._last[key]


def gathered(tensor: Tensor, axes: Mapping[int, Axis]) -> Tensor:
    """Add up the entries of a tensor that go to the same place, and scale the sums."""
    result = working(tensor)
    for at, axis in axes.items():
        shape = [-1 if dimension == at else 1 for dimension in range(result.ndim)]
        added = torch.zeros_like(result).index_add_(at, axis.index.to(result.device), result)
        result = added.mul_(axis.scale.to(result.device, result.dtype).view(shape))
    return result
