"""RegMean++: RegMean layer by layer, on inputs that come from the merged layers before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction, Positive, Samples
from mergelab.engine.sweep_range import NotSwept
from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import ExampleSource, ExpertExamples
from mergelab.estimation.input_gram import InputGramSums, linear_layers
from mergelab.methods.regmean import solve_layer
from mergelab.methods.soup import soup
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels


@dataclass(frozen=True)
class Stage:
    """Linear layers that are merged at once: those of a transformer block, or those before or after all blocks.

    Attributes:
        block: the block's path in the module; "" for layers outside the blocks.
        names: the module's names of the linear weights.
    """

    block: str
    names: tuple[str, ...]


def stages_of(module: nn.Module, weights: Sequence[str]) -> list[Stage]:
    """Group linear weights, given in the order in which their layers run, by their block.

    Blocks are the entries of the module's outermost `nn.ModuleList`s. Consecutive weights outside of blocks form a
    group, too.
    """
    lists = [path for path, each in module.named_modules() if isinstance(each, nn.ModuleList)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    groups: dict[str, list[str]] = {}
    run = 0
    for name in weights:
        path = next((path for path in outer if name.startswith(f"{path}.")), None)
        if path is None:
            groups.setdefault(f" {run}", []).append(name)
            continue
        run += 1
        index = name[len(path) + 1 :].partition(".")[0]
        groups.setdefault(f"{path}.{index}", []).append(name)
    return [Stage(block.strip() if block[0] != " " else "", tuple(names)) for block, names in groups.items()]


def prepare_layers(
    models: AlignedModels, examples: ExampleSource, *, seed: int, samples: int, alpha: float, ridge: float
) -> Mapping[str, Tensor]:
    """Merge the linear layers stage by stage, or read them from the cache."""
    drawn = [examples.of(expert.name, samples=samples, seed=seed) for expert in models.experts]
    key = {
        "statistic": "regmean plus",
        "examples": [each.key for each in drawn],
        "names": [sorted(each.parameter_names.items()) for each in drawn],
        "settings": [alpha, ridge],
    }
    merged, _ = disk_cached(
        examples.folder,
        key if all(each.key for each in drawn) else None,
        lambda: (_merged(models, drawn, alpha, ridge), {}),
    )
    return merged


def _merged(models: AlignedModels, drawn: Sequence[ExpertExamples], alpha: float, ridge: float) -> dict[str, Tensor]:
    names = drawn[0].parameter_names
    module = drawn[0].module()
    weights = linear_layers(module, names, next(iter(drawn[0].batches())))
    stages = stages_of(module, weights)
    linear = {names[name] for name in weights}
    others = {own: name for own, name in names.items() if name not in linear}
    merged: dict[str, Tensor] = {}
    for number, stage in enumerate(stages):
        after = stages[number + 1].block if number + 1 < len(stages) else ""
        done = {own: name for own, name in names.items() if name in merged}
        # Averaged tensors outside of blocks (embeddings, last norms) are the merged model's from the first stage on.
        done |= {own: name for own, name in others.items() if _stage_at(own, stages) < number}
        grams = []
        for each in drawn:
            network = each.module()
            _write_merged(network, ((own, merged.get(name)) for own, name in done.items()), models, names)
            sums = InputGramSums(network, {own: names[own] for own in stage.names}, until=after)
            sums.add(each.batches())
            grams.append(sums.mean())
        for own in stage.names:
            name = names[own]
            own_grams = [gram for one in grams if (gram := one.of(name)) is not None]
            experts = [expert.get(name) for expert in models.experts]
            merged[name] = solve_layer(
                experts,
                soup(experts),
                own_grams,
                name,
                alpha=alpha,
                ridge=ridge,
                input_first=name in grams[0].input_first,
                method="regmean_plus",
            )
    return merged


def _stage_at(own: str, stages: Sequence[Stage]) -> int:
    """Return the stage of an averaged parameter's block; −1 outside of blocks."""
    numbers = (number for number, stage in enumerate(stages) if stage.block and own.startswith(f"{stage.block}."))
    return next(numbers, -1)


@torch.no_grad()
def _write_merged(
    network: nn.Module, tensors: Iterable[tuple[str, Tensor | None]], models: AlignedModels, names: Mapping[str, str]
) -> None:
    """Write merged parameters into a module; None stands for the experts' mean."""
    parameters = dict(network.named_parameters())
    for own, tensor in tensors:
        if own in parameters:
            value = tensor if tensor is not None else soup([expert.get(names[own]) for expert in models.experts])
            parameters[own].copy_(value)


@merge_method(
    needs=("data",),
    prepare=prepare_layers,
    family="data",
    work="solves a system for every linear layer",
    paper="Nguyen et al. 2025, arXiv:2508.03121",
    authors={"alpha": 0.95, "samples": 256},
    use="as regmean, for deep models whose layers' inputs shift with the merge",
)
def regmean_plus(
    experts: Sequence[Tensor],
    *,
    prepared: Mapping[str, Tensor],
    site: Site,
    alpha: Fraction = 0.9,
    samples: Samples = 1000,
    ridge: Annotated[Positive, NotSwept()] = 1e-6,
) -> Tensor:
    """Solve for each linear layer as RegMean does, on inputs that come from the merged layers before it.

    W = (Σ Ĝ_t)⁻¹ Σ Ĝ_t W_t as for ``regmean``, block by block. The inputs of a block's layers are those in expert t's
    block, when it runs on the output of the merged embeddings and earlier blocks for expert t's examples (RegMean++,
    Nguyen et al. 2025, arXiv:2508.03121). All other tensors are the experts' mean. Solved in float64.

    Departures: linear layers outside of the blocks are merged in the same way, before the first or after the last
    block; the first layers of a model run on the averaged embeddings. Singular systems are solved as for ``regmean``.
    The authors use α = 0.95 and 256 examples; the defaults are those of `regmean`, so that the two can be compared.

    Args:
        experts: T whole tensors of one shape, any float dtype.
        prepared: the merged weights of linear layers, by name.
        site: names the tensor.
        alpha: factor of the off-diagonal entries of G_t.
        samples: number of training examples of each expert.
        ridge: regularisation of singular systems, relative to the diagonal.

    Returns:
        Tensor of the experts' shape, float32 (float64 for float64 inputs).
    """
    return prepared[site.name].to(experts[0].device) if site.name in prepared else soup(experts)
