"""The LoRA factors of experts that are adapters, for methods that combine these instead of weights."""

from __future__ import annotations

from collections.abc import Sequence

from mergelab.adapters.changes import Change, Factor, LowRank, Magnitude, Product, Replacement, Rows, Shift, Stacked
from mergelab.adapters.deltas import delta_of
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels

_WHAT: dict[type, str] = {
    Magnitude: "DoRA",
    Shift: "a bias of B (lora_bias)",
    Rows: "token rows",
    Replacement: "a whole tensor (a trained bias, or modules_to_save)",
    Factor: "IA³",
    Product: "LoHa or LoKr",
    Stacked: "LoRA of parameters (target_parameters)",
}


def factors_at(models: AlignedModels, name: str, method: str) -> list[LowRank | None]:
    """Return what each expert changes in a tensor; None where it leaves the base's.

    Args:
        models: base and experts.
        name: the tensor.
        method: what errors call the method.

    Raises:
        ConfigError: an expert is no adapter, changes the tensor by more than LoRA, or in another rank than others.
    """
    assert models.base is not None
    found: list[LowRank | None] = []
    start = delta_of(models.base, name)
    for expert in models.experts:
        delta = delta_of(expert, name)
        if start.changes or not delta.is_on(start):
            raise ConfigError(
                f"method={method}: {expert.name} is no LoRA adapter, or is read with its rows in another order; "
                f"{method} combines the factors of adapters (task_arithmetic merges any models)"
            )
        own = delta.low_rank
        if own is None or len(own) > 1 or any(change.kind != "LORA" for change in own):
            forms = "dense or ia3" if isinstance(delta.changes[-1], Factor) else "dense or lora_svd"
            raise ConfigError(
                f"method={method}: {expert.name} changes {name} by {_what(delta.changes)}, and {method} combines LoRA "
                f"factors alone; task_arithmetic holds it with save.form={forms}, and models.passthrough leaves it out "
                "of the merge"
            )
        found.append(own[0] if own else None)
    _check_ranks(found, models, name, method)
    return found


def _check_ranks(found: Sequence[LowRank | None], models: AlignedModels, name: str, method: str) -> None:
    ranks = {
        change.rank: expert.name for change, expert in zip(found, models.experts, strict=True) if change is not None
    }
    if len(ranks) > 1:
        (one, first), (other, second) = list(ranks.items())[:2]
        raise ConfigError(
            f"method={method}: the ranks of {name} differ: {one} in {first} and {other} in {second}; task_arithmetic "
            "takes any ranks, with save.form=lora_cat or lora_svd"
        )


def _what(changes: Sequence[Change]) -> str:
    others = [change for change in changes if not isinstance(change, LowRank)]
    if others:
        return _WHAT.get(type(others[-1]), "another change than LoRA's")
    odd = next((change.kind for change in changes if isinstance(change, LowRank) and change.kind != "LORA"), None)
    return odd or "two products of factors"


def check_one_configuration(models: AlignedModels) -> None:
    """Check that all experts adapt the same layers, each with one scale, as Adapters asks for.

    Raises:
        ConfigError: one does not adapt a layer, or scales differ.
    """
    for name in models.names:
        found = factors_at(models, name, "adapters_linear")
        scales = {change.scale: expert.name for change, expert in zip(found, models.experts, strict=True) if change}
        if not scales:
            continue
        if None in found:
            expert = models.experts[found.index(None)].name
            raise ConfigError(
                f"method: {expert} does not adapt {name}, and others do; Adapters' modes take adapters of one "
                "configuration, task_arithmetic and peft_linear take any layers"
            )
        if len(scales) > 1:
            (one, first), (other, second) = list(scales.items())[:2]
            raise ConfigError(
                f"method: the scales (α/r) of {name} differ: {one:g} in {first} and {other:g} in {second}; Adapters' "
                "modes take adapters of one configuration, task_arithmetic and peft_linear take any scales"
            )
