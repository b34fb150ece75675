"""Compute second moments of what each layer multiplies: inputs of linear layers, and normalised inputs of norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import Batch, ExampleSource, ExpertExamples
from mergelab.estimation.forward import frozen, split_labels
from mergelab.estimation.hooks import LayerKind, Recorder, layer_kind, normalised_input
from mergelab.estimation.input_gram import InputGram, input_gram, real_tokens
from mergelab.ops.threads import in_order, on_one_thread, thread_count
from mergelab.weights.align import AlignedModels


@dataclass(frozen=True)
class LayerFeatures:
    """Second moments of the features that an expert's weights multiply, averaged over real tokens.

    Attributes:
        linear: XᵀX/n of the inputs of linear layers.
        norms: mean squares (d,) of the normalised inputs of norms, float64, by the name of the norm's weight.
    """

    linear: InputGram
    norms: Mapping[str, Tensor]


def layer_features(
    models: AlignedModels, examples: ExampleSource, samples: int, seed: int
) -> tuple[LayerFeatures, ...]:
    """Compute every expert's features on its own examples, or read them from the cache."""

    def of(expert: str) -> LayerFeatures:
        linear = input_gram(examples, expert, samples, seed)
        drawn = examples.of(expert, samples=samples, seed=seed)
        key = {
            "statistic": "normalised inputs",
            "names": sorted(drawn.parameter_names.items()),
            "examples": drawn.key,
        }
        norms, _ = disk_cached(examples.folder, key if drawn.key else None, lambda: (norm_squares(drawn), {}))
        return LayerFeatures(linear, norms)

    return tuple(of(expert.name) for expert in models.experts)


def norm_squares(examples: ExpertExamples) -> dict[str, Tensor]:
    """Run the expert once over its examples; return the mean squares of its norms' normalised inputs."""
    module, names = examples.module(), examples.parameter_names
    weights: dict[nn.Module, str] = {}
    kinds: dict[nn.Module, LayerKind] = {}
    for path, layer in module.named_modules():
        name, kind = names.get(f"{path}.weight"), layer_kind(layer)
        if name is not None and kind in ("layer_norm", "rms_norm"):
            weights[layer], kinds[layer] = name, kind
    if not weights:
        return {}
    device = next(module.parameters()).device
    recorder = Recorder(module, kinds)
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    threads = thread_count() if device.type == "cpu" else 1
    with frozen(module), on_one_thread(device), recorder.watching():
        for found in in_order(partial(_squares, recorder, weights, device), examples.batches(), threads=threads):
            for name, (square, count) in found.items():
                sums[name] = sums[name] + square if name in sums else square
                tokens[name] = tokens.get(name, 0) + count
    return {name: (total / tokens[name]).cpu() for name, total in sums.items()}


@torch.no_grad()
def _squares(
    recorder: Recorder, weights: Mapping[nn.Module, str], device: torch.device, batch: Batch
) -> dict[str, tuple[Tensor, int]]:
    """Return for each norm the sum of squares over a batch's real tokens, (d,) float64, and their number."""
    inputs, _ = split_labels(batch, device)
    _, calls = recorder.run(inputs)
    found: dict[str, tuple[Tensor, int]] = {}
    for call in calls:
        rows = real_tokens(replace(call, input=normalised_input(call)), inputs).double()
        square, count = found.get(weights[call.layer], (0.0, 0))
        found[weights[call.layer]] = square + rows.square().sum(0), count + len(rows)
    return found
