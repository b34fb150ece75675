"""Slices: a merge of stacks of layers. What `models.slices` says becomes models that are stacks, and rules by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.config import (
    ExperimentConfig,
    ExpertConfig,
    LayersOfModel,
    ModelsConfig,
    SliceConfig,
    StackConfig,
    VocabConfig,
)
from mergelab.errors import ConfigError, did_you_mean, listed
from mergelab.ops.expert_values import is_number

_BASE, _UNION = "base", "union"
_RULES, _RULES_AS, _MERGEKIT = "rules", "rules_as", "mergekit"


def without_slices(config: ExperimentConfig) -> ExperimentConfig:
    """Return the same merge without slices: each expert is a stack of layers, and so is the base.

    Where every slice has the same experts, these keep their names. Else the first experts of all slices are one stack,
    the second ones another, and so on; a slice that has fewer has the base, or one of its own, with weight 0 there.

    Raises:
        ConfigError: a source is no model, or an expert is in no slice; some slices have the base and others not; an
            expert has a weight or other settings of its own where the slices have different experts.
    """
    if not config.models.slices:
        return config
    slices = config.models.slices
    references = _references(config.models)
    names = [[name for name in each.sources if name != _BASE] for each in slices.values()]
    _check(config.models, slices, references, names)
    alike = all(set(each) == set(names[0]) for each in names)
    if not alike:
        _check_stacked(config.models)
    slots = names[0] if alike else _numbered(max(map(len, names)))
    taken = [{name: name if alike else slots[at] for at, name in enumerate(each)} for each in names]
    experts = {slot: _expert(config.models, slices, references, taken, slot, alike=alike) for slot in slots}
    base = None
    if all(_BASE in each.sources for each in slices.values()):
        base = _stack(references, [(_BASE, each.sources[_BASE]) for each in slices.values()])
    renamed = {name: slot for each in reversed(taken) for name, slot in each.items()}
    models = config.models.model_copy(
        update={
            "base": base,
            "experts": experts,
            "slices": None,
            "config": _renamed(config.models.config, renamed, base, slots),
            "head": _renamed_head(config.models.head, renamed),
            "vocab": _renamed_vocab(config.models.vocab, renamed, base, slots),
        }
    )
    save = config.save.model_copy(update={"tokenizer": _renamed(config.save.tokenizer, renamed, base, slots)})
    method = _with_rules(config.method, slices, taken, slots)
    return config.model_copy(update={"models": models, "save": save, "method": method})


def _references(models: ModelsConfig) -> dict[str, str]:
    """Return the references of the models, by name; a slice cannot have layers of a pair or of a stack."""
    given = {name: expert.reference for name, expert in models.experts.items()}
    if models.base is not None:
        given[_BASE] = models.base
    if odd := [name for name, reference in given.items() if not isinstance(reference, str)]:
        raise ConfigError(f"models.slices: {odd[0]} must be a folder or a hub id, of which layers are taken")
    return {name: str(reference) for name, reference in given.items()}


def _check(
    models: ModelsConfig,
    slices: Mapping[str, SliceConfig],
    references: Mapping[str, str],
    names: Sequence[Sequence[str]],
) -> None:
    for name, each in slices.items():
        if unknown := [source for source in each.sources if source not in references]:
            hint = did_you_mean(unknown[0], references) or f"; there are {listed(references)}"
            raise ConfigError(f"models.slices.{name}.sources.{unknown[0]}: no model is called so{hint}")
        if each.sources.keys() == {_BASE}:
            raise ConfigError(f"models.slices.{name}.sources: needs an expert")
    if unused := [name for name in models.experts if not any(name in each for each in names)]:
        raise ConfigError(f"models.experts.{unused[0]}: is in none of models.slices; leave it out")
    with_base = [name for name, each in slices.items() if _BASE in each.sources]
    if with_base and len(with_base) < len(slices):
        lacking = next(name for name in slices if name not in with_base)
        raise ConfigError(f"models.slices.{lacking}.sources: needs base, as {listed(with_base)} have it")


def _check_stacked(models: ModelsConfig) -> None:
    """Check that experts whose layers are stacked with those of others have no settings of their own."""
    plain = ExpertConfig(reference="")
    for name, expert in models.experts.items():
        if own := [key for key in ("part", "weight", "task", "labels") if getattr(expert, key) != getattr(plain, key)]:
            where = "; weights belong to models.slices.NAME.method.weights" if own == ["weight"] else ""
            raise ConfigError(
                f"models.experts.{name}.{own[0]}: cannot be kept, as the slices have different experts, whose layers "
                f"become one model{where}"
            )


def _numbered(count: int) -> list[str]:
    return ["stack"] if count == 1 else [f"stack{at}" for at in range(1, count + 1)]


def _stack(references: Mapping[str, str], parts: Sequence[tuple[str, Sequence[int]]]) -> StackConfig:
    return StackConfig(stack=[LayersOfModel(model=references[name], layers=list(layers)) for name, layers in parts])


def _expert(
    models: ModelsConfig,
    slices: Mapping[str, SliceConfig],
    references: Mapping[str, str],
    taken: Sequence[Mapping[str, str]],
    slot: str,
    *,
    alike: bool,
) -> ExpertConfig:
    """Return the expert that has a slot's layers."""
    parts = []
    for each, names in zip(slices.values(), taken, strict=True):
        spare = _BASE if _BASE in each.sources else next(iter(names))
        name = next((name for name, at in names.items() if at == slot), spare)
        parts.append((name, each.sources[name]))
    own = models.experts[slot] if alike else ExpertConfig(reference="")
    return own.model_copy(update={"reference": _stack(references, parts)})


def _renamed(
    name: str | None, renamed: Mapping[str, str], base: StackConfig | None, slots: Sequence[str]
) -> str | None:
    """Return what stands for a model whose config or tokenizer the merged one has."""
    if name is None or (name == _BASE and base is not None):
        return name
    return renamed.get(name, slots[0])


def _renamed_vocab(
    vocab: VocabConfig | None, renamed: Mapping[str, str], base: StackConfig | None, slots: Sequence[str]
) -> VocabConfig | None:
    """Return the settings of the tokens, with what stands for each model."""
    if vocab is None:
        return None
    source = vocab.source if vocab.source == _UNION else _renamed(vocab.source, renamed, base, slots)
    tokens = [each.model_copy(update={"model": _renamed(each.model, renamed, base, slots)}) for each in vocab.tokens]
    first = _renamed(vocab.first, renamed, base, slots)
    return vocab.model_copy(update={"source": source, "first": first, "tokens": tokens})


def _renamed_head(head: str, renamed: Mapping[str, str]) -> str:
    prefix, _, name = head.partition(":")
    return f"{prefix}:{renamed.get(name, name)}" if name else head


def _with_rules(
    method: Mapping[str, Any],
    slices: Mapping[str, SliceConfig],
    taken: Sequence[Mapping[str, str]],
    slots: Sequence[str],
) -> dict[str, Any]:
    """Return the method's settings with those of the slices as rules by layer."""
    first_counts = method.get(_RULES_AS) == _MERGEKIT
    rules: list[dict[str, Any]] = []
    at = 0
    for number, ((name, each), names) in enumerate(zip(slices.items(), taken, strict=True)):
        start, stop = next(iter(each.sources.values()))
        layers = [None if number == 0 else at, None if number == len(slices) - 1 else at + stop - start]
        at += stop - start
        where = {"layers": layers} if layers != [None, None] else {"match": "*"}
        own = {key: _by_slot(value, names) for key, value in each.method.items() if key != _RULES}
        if missing := [slot for slot in slots if slot not in names.values()]:
            present = own.get("weights") or dict.fromkeys(names.values(), 1.0)
            own["weights"] = {**present, **dict.fromkeys(missing, 0.0)}
        ruled = _of_slice(name, each.method.get(_RULES) or [], where, names)
        plain = [{**where, **own}] if own else []
        rules += [*ruled, *plain] if first_counts else [*plain, *ruled]
    given = list(method.get(_RULES) or [])
    joined = [*rules, *given] if first_counts else [*given, *rules]
    return {**method, _RULES: joined} if joined else dict(method)


def _of_slice(name: str, rules: Any, where: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a slice's rules by tensor name as rules for its layers."""
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not all(isinstance(r, Mapping) for r in rules):
        raise ConfigError(f"models.slices.{name}.method.rules: must be a list of {{match: PATTERN, PARAMETER: VALUE}}")
    if any("layers" in rule for rule in rules):
        raise ConfigError(f"models.slices.{name}.method.rules: hold for the layers of the slice; leave layers out")
    return [{**where, **{key: _by_slot(value, names) for key, value in rule.items()}} for rule in rules]


def _by_slot(value: Any, names: Mapping[str, str]) -> Any:
    """Return numbers by expert as numbers by the stack that the expert is in."""
    if not isinstance(value, Mapping):
        return value
    if any(not is_number(each) and not isinstance(each, Sequence) for each in value.values()):
        return value
    return {names.get(str(name), str(name)): each for name, each in value.items()}
