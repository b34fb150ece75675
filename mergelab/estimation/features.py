"""Collect the input features of an expert's linear layers: the same tokens for every expert, a few per example."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import Batch
from mergelab.estimation.forward import frozen, split_labels
from mergelab.estimation.hooks import Recorder
from mergelab.estimation.input_gram import linear_layers_of, real_tokens
from mergelab.ops.threads import in_order, on_one_thread, thread_count


def layer_inputs(
    module: nn.Module, names: Mapping[str, str], wanted: Collection[str], batches: Sequence[Batch], tokens: int
) -> dict[str, Tensor]:
    """Run a module and collect the inputs of its linear layers.

    Args:
        module: the module to run.
        names: the common names of its weights, by their names in the module.
        wanted: common names of the weights of the layers to collect inputs of.
        batches: inputs of the module.
        tokens: number of real (unpadded) tokens to collect per example, evenly spread; all when there are fewer.

    Returns:
        By common name of the weight, (n, d) float32 on the CPU, the tokens in the order of the batches. Layers with the
        same input have one entry, under the name of the first.
    """
    weights, kinds = linear_layers_of(module, {name: common for name, common in names.items() if common in wanted})
    if not weights:
        return {}
    device = next(module.parameters()).device
    recorder = Recorder(module, kinds)

    @torch.no_grad()
    def inputs_of(batch: Batch) -> dict[str, Tensor]:
        inputs, _ = split_labels(batch, device)
        _, calls = recorder.run(inputs)
        spread = {name: spread_tokens(mask, tokens) for name, mask in attention_masks(inputs).items()}
        features: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for call in calls:
            memory = call.input.data_ptr(), call.input.shape
            if memory not in seen and weights[call.layer] not in features:
                seen.add(memory)
                features[weights[call.layer]] = real_tokens(call, spread).float().cpu()
        return features

    threads = thread_count() if device.type == "cpu" else 1
    with frozen(module), on_one_thread(device), recorder.watching():
        parts = list(in_order(inputs_of, batches, threads=threads))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def attention_masks(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the attention masks among the inputs; a mask of ones when there are none."""
    given = {name: mask for name, mask in inputs.items() if name.endswith("attention_mask")}
    return given or {"attention_mask": torch.ones_like(next(iter(inputs.values())))}


def spread_tokens(mask: Tensor, count: int) -> Tensor:
    """Select ``count`` of the real tokens in each row of a mask, evenly spread; all when there are fewer.

    Args:
        mask: (b, l), 0 at padding.
        count: number of tokens per row.

    Returns:
        (b, l) int64, 1 for selected tokens.
    """
    real = mask.long()
    before = real.cumsum(1) - real
    length = real.sum(1, keepdim=True).clamp_min(1)
    steps = (before + 1) * count // length - before * count // length
    return real * (steps > 0)
