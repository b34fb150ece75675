"""Write a merge of this package as a mergekit config, or say which of its settings has no equal there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.config import ExperimentConfig, SliceConfig
from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import Parameters, key_of
from mergelab.engine.per_tensor import KEY as RULES
from mergelab.engine.per_tensor import LAYERS, MATCH, MERGEKIT, REQUIRED, RULES_AS, is_curve
from mergelab.errors import listed, shortened
from mergelab.mergekit.methods import METHODS, Method, Setting
from mergelab.mergekit.settings import filter_of
from mergelab.mergekit.tokens import NoEqual, tokenizer
from mergelab.mergekit.translate import DTYPES

_BASE, _WEIGHTS, _ABSENT = "base", "weights", object()
_SKIPPING = ("passthrough", "leave_out", "merge_new", "untie")  # keys of `models` that mergekit has nothing for


@dataclass(frozen=True)
class Facts:
    """What is known of a merge's models once they are open.

    Attributes:
        references: by name, ``base`` and the experts, what mergekit calls each model.
        stored: the dtype of the merged model; None where its tensors have several.
        apart: tensors that skip the merge.
        heads: tensors of classifiers' heads, which are merged apart.
        seed: of random masks.
        rows: which settings of ``models.vocab`` change a row: padding, unknown, lacking.
    """

    references: Mapping[str, str | Mapping[str, Any]]
    stored: str | None
    apart: Sequence[str] = ()
    heads: Sequence[str] = ()
    seed: int = 0
    rows: Collection[str] = ()


def exported(config: ExperimentConfig, method: MergeMethod, parameters: Parameters, facts: Facts) -> str:
    """Return the text of a mergekit config that makes the same merged model.

    Random masks are other ones in mergekit. Read here again, it is the same merge bit by bit.

    Args:
        config: the experiment, with ``models.slices`` where it has them.
        method: the merge method.
        parameters: its checked parameters; with slices, those that are not the slices' own.
        facts: what the models are.

    Raises:
        NoEqual: a setting cannot be said in mergekit's language; names it.
    """
    import yaml  # type: ignore[import-untyped]

    theirs = _method_of(method)
    _check_models(config, facts)
    merge = _Merge(config, METHODS[theirs], theirs, method, parameters, facts)
    content = merge.document()
    random = any(setting.theirs == "rescale" for setting in METHODS[theirs].settings)
    seed = f" seed={facts.seed}" if random and facts.seed else ""
    head = f"# mergekit-yaml makes this merge from it, and here: python -m mergelab.mergekit FILE OUT{seed}\n"
    return head + str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def _method_of(method: MergeMethod) -> str:
    found = [theirs for theirs, each in METHODS.items() if each.ours == method.name and not method.custom]
    if not found:
        raise NoEqual(f"method={method.name}: mergekit has no such method")
    return found[0]


def _check_models(config: ExperimentConfig, facts: Facts) -> None:
    models, save = config.models, config.save
    if save.form not in (None, "dense"):
        raise NoEqual(f"save.form={save.form}: mergekit writes whole models")
    if named := [key for key in _SKIPPING if getattr(models, key)]:
        raise NoEqual(f"models.{named[0]}={shortened(getattr(models, named[0]))}: mergekit merges every tensor")
    if facts.heads:
        raise NoEqual(f"models.head={models.head}: mergekit merges classifiers' heads as every tensor, not apart")
    if facts.apart:
        raise NoEqual(f"mergekit merges every tensor, and here {listed(facts.apart)} is not in all models")
    if odd := [name for name in _names(config) if name not in facts.references]:
        raise NoEqual(f"models: {odd[0]} is neither a folder nor a hub id, with a LoRA adapter or without")
    if facts.stored not in DTYPES:
        of_what = facts.stored or "several dtypes"
        raise NoEqual(f"the merged tensors are of {of_what}, mergekit writes one of {listed(DTYPES)}: save.dtype=...")


def _names(config: ExperimentConfig) -> list[str]:
    return [*([_BASE] if config.models.base is not None else []), *config.models.experts]


@dataclass(frozen=True)
class _Level:
    """Values and rules of one level, a slice's or the whole method's; the first rule counts.

    Attributes:
        where: the configuration's key of it.
        rules, values: by config key.
        required: as `Varied.required`.
        curves: whether lists over the layers mean here what they mean in mergekit.
        whole: whether its lists run over all layers, where there are slices.
    """

    where: str
    rules: Sequence[Mapping[str, Any]]
    values: Mapping[str, Any]
    required: Sequence[str] = ()
    curves: bool = False
    whole: bool = False

    @classmethod
    def of(cls, where: str, given: Mapping[str, Any], *, curves: bool, whole: bool = False) -> _Level:
        """Take apart a group of the configuration."""
        rules = list(given.get(RULES) or [])
        values = {key: value for key, value in given.items() if key not in (RULES, RULES_AS, REQUIRED)}
        ordered = rules if curves else rules[::-1]
        return cls(where, ordered, values, tuple(given.get(REQUIRED) or ()), curves, whole)


@dataclass(frozen=True)
class _Merge:
    """One merge, and mergekit's method for it."""

    config: ExperimentConfig
    method: Method
    theirs: str
    ours: MergeMethod
    parameters: Parameters
    facts: Facts

    def document(self) -> dict[str, Any]:
        """Return the config as YAML has it."""
        given = self.parameters.by_key()
        base, experts = self._base_and_experts()
        self._check_constants(given)
        curves = given.get(RULES_AS) == MERGEKIT
        slices = self.config.models.slices
        level = _Level.of("method", given, curves=curves, whole=bool(slices))
        found: dict[str, Any] = {"merge_method": self.theirs}
        if slices:
            body: dict[str, Any] = {"slices": self._slices(slices, level, base)}
            experts = self._sources(next(iter(slices.values())), base)
        else:
            models, shared = self._models((level,), base, experts)
            body = {"models": [_node(self.facts.references[name], own, None) for name, own in models]}
            body |= {"parameters": shared} if shared else {}
        if (owner := self._owner(base, experts)) is not None:
            found["base_model"] = self.facts.references[owner]
        stored = {} if self.facts.stored == DTYPES[0] else {"out_dtype": self.facts.stored}
        template = self.config.save.chat_template
        chat = {} if template is None else {"chat_template": template}
        tokens = tokenizer(self.config.models.vocab, owner, self.facts.references, self.facts.rows)
        return found | body | {"dtype": DTYPES[0]} | stored | tokens | chat

    def _slices(self, slices: Mapping[str, SliceConfig], level: _Level, base: str | None) -> list[dict[str, Any]]:
        """Return the slices, each with all parameters that hold in it."""
        first = next(iter(slices.values()))
        found = []
        for name, each in slices.items():
            own = _Level.of(f"models.slices.{name}.method", each.method, curves=level.curves)
            self._check_settings(own)
            experts = self._sources(each, base)
            models, shared = self._models((own, level), base, experts)
            node: dict[str, Any] = {
                "sources": [_node(self.facts.references[one], given, each.sources[one]) for one, given in models]
            }
            if self.method.base == "first" and experts[0] != self._sources(first, base)[0]:
                node["base_model"] = self.facts.references[experts[0]]
            found.append(node | ({"parameters": shared} if shared else {}))
        if len(found[-1]["sources"]) > len(found[0]["sources"]):
            raise NoEqual(
                f"models.slices.{name}: has more sources than the first slice, and mergekit merges what follows the "
                "layers from as many as that one has"
            )
        return found

    # ------------------------------------------------------------------------------------------------------- models

    def _sources(self, part: SliceConfig, base: str | None) -> list[str]:
        """Return a slice's experts in the order that the method takes them."""
        slices = self.config.models.slices
        first = list(next(iter(slices.values())).sources) if slices and self._alike else list(part.sources)
        return [name for name in first if name not in (_BASE, base)]

    @property
    def _alike(self) -> bool:
        """Whether there are no slices, or all have the same experts."""
        slices = self.config.models.slices or {}
        return len({frozenset(each.sources) - {_BASE} for each in slices.values()}) <= 1

    def _base_and_experts(self) -> tuple[str | None, list[str]]:
        """Return the base, where the method takes one apart, and the experts in the order that it takes them."""
        experts = list(self.config.models.experts)
        base = _BASE if self.config.models.base is not None else None
        if self.method.base in ("expert", "first"):
            return None, experts
        if self.method.base == "optional":
            return (None if self.parameters.by_key().get("task_vectors") is False else base), experts
        if base is None:  # of a pair of models, the first
            return experts[0], experts[1:]
        return base, experts

    def _owner(self, base: str | None, experts: Sequence[str]) -> str | None:
        """Return the model that is mergekit's base_model, whose config and tokenizer the merged model has there.

        Raises:
            NoEqual: here it has those of another one.
        """
        models, save = self.config.models, self.config.save
        chosen = {"models.config": models.config, "save.tokenizer": save.tokenizer if models.vocab is None else None}
        wanted = {key: name for key, name in chosen.items() if name is not None}
        owner = base or (experts[0] if self.method.base == "first" else None)
        if owner is None and self.method.base == "expert" and not models.slices:
            owner = next((name for name in wanted.values() if name in experts[1:]), None)
        there = owner or experts[0]
        for key, name in wanted.items():
            if name != there:
                raise NoEqual(f"{key}={name}: in mergekit the merged model has that of {there}")
        if models.vocab is not None and models.base is not None and base is None:
            raise NoEqual(f"models.vocab={models.vocab}: mergekit's {self.theirs} has no base whose tokens would count")
        return owner

    def _models(
        self, levels: Sequence[_Level], base: str | None, experts: Sequence[str]
    ) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
        """Return the models, each with its own parameters, and the parameters that all share."""
        own: dict[str, dict[str, Any]] = {name: {} for name in experts}
        shared: dict[str, Any] = {}
        for setting in self.method.settings:
            each = {name: self._written(setting, levels, name) for name in experts}
            first = next(iter(each.values()))
            if not setting.by_expert or all(one == first for one in each.values()):
                shared[setting.theirs] = first
                continue
            for name, value in each.items():
                own[name][setting.theirs] = value
        return [*([(base, {})] if base is not None else []), *own.items()], shared

    # --------------------------------------------------------------------------------------------------- parameters

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        """Check that what mergekit has no parameter for is as it has it."""
        defaults = {key_of(name): field.default for name, field in self.ours.parameters.model_fields.items()}
        known = {setting.ours for setting in self.method.settings}
        if "task_vectors" in defaults and given.get("task_vectors") is not None:
            known.add("task_vectors")  # `_base_and_experts` has read it
        fixed = {key: self.method.constants.get(key, value) for key, value in defaults.items() if key not in known}
        if odd := {key: given[key] for key, value in fixed.items() if given[key] != value}:
            here = listed(f"method.{key}={_spelled(value)}" for key, value in odd.items())
            there = listed(f"{key}={_spelled(fixed[key])}" for key in odd)
            raise NoEqual(f"{here}: mergekit's {self.theirs} has {there} alone")
        self._check_settings(_Level.of("method", given, curves=True))

    def _check_settings(self, level: _Level) -> None:
        """Check that rules, and the values of a slice, set what mergekit has a parameter for."""
        known = {setting.ours for setting in self.method.settings}
        own = [level.values] if level.where != "method" else []
        for each in [*own, *level.rules]:
            if odd := [key for key in each if key not in (*known, MATCH, LAYERS)]:
                raise NoEqual(f"{level.where}: mergekit's {self.theirs} has no {odd[0]}")
            if each.get(LAYERS) is not None:
                raise NoEqual(f"{level.where}.rules: mergekit has no ranges of layers but slices ({each[LAYERS]})")

    def _written(self, setting: Setting, levels: Sequence[_Level], expert: str) -> Any:
        """Return a parameter as mergekit has it: one value, or filters with values of which the first counts."""
        entries: list[tuple[str | None, Any]] = []
        for text, value in self._chain(setting, levels, expert):
            entries.append((text, value))
            if text is None:
                break
        if len(entries) == 1 and entries[0][0] is None:
            return entries[0][1]
        return [({} if text is None else {"filter": text}) | {"value": value} for text, value in entries]

    def _chain(self, setting: Setting, levels: Sequence[_Level], expert: str) -> Iterator[tuple[str | None, Any]]:
        key = setting.ours
        for level in levels:
            for rule in level.rules:
                if key in rule and (value := self._of_expert(key, rule[key], expert)) is not _ABSENT:
                    yield self._filter(level, rule), _theirs(setting, value, level)
            if key in level.required or f"{key}.{expert}" in level.required:
                return
            if key in level.values and (value := self._of_expert(key, level.values[key], expert)) is not _ABSENT:
                yield None, _theirs(setting, value, level)
                return
        yield None, self._weight(expert)  # all other parameters have defaults

    def _filter(self, level: _Level, rule: Mapping[str, Any]) -> str | None:
        pattern = str(rule.get(MATCH, "*"))
        text = None if pattern == "*" else filter_of(pattern)
        if text is None and pattern != "*":
            raise NoEqual(f"{level.where}.rules: {pattern!r} is no filter of mergekit's, which are *PART OF A NAME*")
        return text

    def _of_expert(self, key: str, value: Any, expert: str) -> Any:
        """Return what a value is for an expert."""
        if value is None:
            return _ABSENT
        if isinstance(value, Mapping):
            return value.get(expert, _ABSENT)
        if key == _WEIGHTS and isinstance(value, Sequence):
            if self.config.models.slices:
                raise NoEqual(f"method.{key}={list(value)}: with models.slices, by the experts' names alone")
            return value[list(self.config.models.experts).index(expert)]
        return value

    def _weight(self, expert: str) -> float:
        return self.config.models.experts[expert].weight if self._alike else 1.0


def _theirs(setting: Setting, value: Any, level: _Level) -> Any:
    """Return a value as mergekit has it."""
    if setting.values is not None:
        for flag, one in zip((False, True), setting.values, strict=True):
            if type(one) is type(value) and one == value:
                return flag
        allowed = listed(map(_spelled, setting.values))
        raise NoEqual(f"{level.where}.{setting.ours}={_spelled(value)}: mergekit has {allowed} alone")
    if not is_curve(value) and not isinstance(value, tuple):
        return value
    numbers = list(value)
    if level.whole:
        raise NoEqual(f"{level.where}.{setting.ours}={numbers}: runs over all layers, in mergekit over each slice's")
    if not level.curves and numbers[0] != numbers[-1]:
        raise NoEqual(
            f"{level.where}.{setting.ours}={numbers}: what follows the layers has a list's last number, in mergekit "
            "its first (method.rules_as=mergekit)"
        )
    return numbers


def _node(reference: str | Mapping[str, Any], own: Mapping[str, Any], layers: Sequence[int] | None) -> dict[str, Any]:
    chosen = {} if layers is None else {"layer_range": list(layers)}
    return {"model": reference, **chosen, **({"parameters": dict(own)} if own else {})}


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
