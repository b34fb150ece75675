"""Adapters merged here, and the same adapters in PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergelab.adapters.changes import LowRank
from mergelab.engine.registry import get_method
from mergelab.engine.request import checked_job, merged_adapter, prepared_job
from mergelab.engine.run import merge
from mergelab.experiment.opening import MergeScope, OpenedModels, open_models
from mergelab.experiment.sources import from_list
from tests.adapters import made as small


def several(folder: Path, build: Any, configs: Sequence[Any]) -> list[small.Made]:
    """Save one base, and an adapter for each configuration."""
    return [small.made(folder, build(), config, seed=seed) for seed, config in enumerate(configs)]


def opened(adapters: Sequence[small.Made], *, passthrough: Sequence[str] = ()) -> OpenedModels:
    base, *experts = from_list([adapters[0].base, *(each.adapter for each in adapters)], 0)
    return open_models(base, experts, MergeScope(passthrough, separate_heads=False, key=""))


def factors(models: OpenedModels, method: str, **parameters: Any) -> dict[str, LowRank]:
    """The factors that a method combines, by tensor."""
    job = prepared_job(checked_job(get_method(method), parameters, models.aligned))
    found = {name: merged_adapter(job, job.site(name)) for name in job.models.names}
    return {name: change for name, change in found.items() if change is not None}


def changes(models: OpenedModels, method: str, **parameters: Any) -> dict[str, Tensor]:
    """The difference from the base, of the tensors that have one."""
    base = models.aligned.base
    assert base is not None
    merged = dict(merge(get_method(method), parameters, models.aligned))
    found = {name: merged[name] - base.get(name) for name in models.aligned.names}
    return {name: change for name, change in found.items() if change.any()}


def in_peft(adapters: Sequence[small.Made], model: nn.Module) -> Any:
    """Load adapters, called a, b, c, … as a user would."""
    import peft

    wrapped: Any = None
    for name, each in zip("abcdef", adapters, strict=False):
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(
                model.double(), each.adapter, adapter_name=name, autocast_adapter_dtype=False
            )
        else:
            wrapped.load_adapter(each.adapter, adapter_name=name, autocast_adapter_dtype=False)
    return wrapped


def combined(wrapped: Any, weights: Sequence[float], kind: str, **settings: Any) -> Mapping[str, LowRank]:
    """PEFT's combination, by the name of the tensor that it changes, with the scale that PEFT runs it with."""
    from peft.tuners.lora import LoraLayer

    wrapped.add_weighted_adapter(list("abcdef"[: len(weights)]), list(weights), "merged", kind, **settings)
    found: dict[str, LowRank] = {}
    for layer, module in wrapped.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or "merged" not in module.scaling:
            continue
        scale = module.scaling["merged"]
        embedding = "merged" in module.lora_embedding_A
        a, b = (
            (module.lora_embedding_A["merged"], module.lora_embedding_B["merged"])
            if embedding
            else (module.lora_A["merged"].weight, module.lora_B["merged"].weight)
        )
        transposed = embedding or getattr(module, "fan_in_fan_out", False)
        a, b = a.detach().flatten(1), b.detach().flatten(1)
        found[f"{layer}.weight"] = LowRank.of(a, b, scale, transposed=transposed)
    return found
