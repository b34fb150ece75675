"""What goes into an expert's linear layers on given inputs: the same tokens for every expert, a few of each example."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import Batch
from mergelab.estimation.forward import frozen, on_one_thread, split_labels
from mergelab.estimation.hooks import Recorder
from mergelab.estimation.input_gram import linear_kinds, real_tokens
from mergelab.ops.threads import in_order, thread_count


def layer_inputs(
    module: nn.Module, names: Mapping[str, str], wanted: Collection[str], batches: Sequence[Batch], tokens: int
) -> dict[str, Tensor]:
    """Run a module and note what goes into its linear layers.

    Args:
        module: what runs.
        names: the common names of its weights, by their names in the module.
        wanted: common names of the weights of the layers that are looked at.
        batches: its inputs.
        tokens: how many of an example's real tokens are noted, evenly spread; all where there are not more.

    Returns:
        (n, d) float32 on the CPU for each weight, the tokens in the order of the batches; layers with the same input
        stand under the first one's name alone.
    """
    own, kinds = linear_kinds(module, {name: common for name, common in names.items() if common in wanted})
    if not own:
        return {}
    device = next(module.parameters()).device
    recorder = Recorder(module, kinds)

    @torch.no_grad()
    def inputs_of(batch: Batch) -> dict[str, Tensor]:
        inputs, _ = split_labels(batch, device)
        _, uses = recorder.run(inputs)
        spread = {name: spread_tokens(mask, tokens) for name, mask in masks(inputs).items()}
        found: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for use in uses:
            place = use.input.data_ptr(), use.input.shape
            if place not in seen and own[use.layer] not in found:
                seen.add(place)
                found[own[use.layer]] = real_tokens(use, spread).float().cpu()
        return found

    threads = thread_count() if device.type == "cpu" else 1
    with frozen(module), on_one_thread(device), recorder.watching():
        parts = list(in_order(inputs_of, batches, threads=threads))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def masks(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which tokens are real, as the module is told; all where it is not."""
    told = {name: mask for name, mask in inputs.items() if name.endswith("attention_mask")}
    return told or {"attention_mask": torch.ones_like(next(iter(inputs.values())))}


def spread_tokens(mask: Tensor, count: int) -> Tensor:
    """Choose ``count`` of the real tokens in each row of a mask (b, l), evenly spread; all of fewer."""
    real = mask.long()
    before = real.cumsum(1) - real
    length = real.sum(1, keepdim=True).clamp_min(1)
    steps = (before + 1) * count // length - before * count // length
    return real * (steps > 0)
