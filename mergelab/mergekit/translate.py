"""Translate a document of a mergekit config to a config of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.errors import ConfigError, listed
from mergelab.mergekit.document import MergeDocument, Slice, parse
from mergelab.mergekit.methods import BY_WEIGHTS, METHODS, Method, known_parameters
from mergelab.mergekit.module_rules import joined
from mergelab.mergekit.modules import modules_of
from mergelab.mergekit.settings import Settings, settings_of
from mergelab.mergekit.tokens import set_tokens

DTYPES = ("float32", "bfloat16", "float16")
DTYPE = "dtype:"  # how the note begins that is no fault of the config
_BASE = "base"
WORDS = {_BASE, "null", "true", "false", "nan", "inf"}


@dataclass(frozen=True)
class Translation:
    """A merge as this package's config has it.

    Attributes:
        models, method, save: the config's groups; ``method`` has the method's name under ``name``.
        notes: what mergekit passes over, and where its result differs, one line each.
    """

    models: dict[str, Any]
    method: dict[str, Any]
    save: dict[str, Any]
    notes: tuple[str, ...]


def translate(content: Mapping[str, Any], where: str, name: str) -> Translation:
    """Translate one document.

    Args:
        content: as YAML has it.
        where: what messages call it.
        name: what the models of this merge are called in tables.

    Raises:
        ConfigError: what mergekit refuses too, or what cannot be merged here to the same numbers.
    """
    document = parse(content, where, known_parameters())
    method = METHODS[document.method]
    modules = modules_of(document)
    slices = [part for part, _ in modules] or document.slices
    parts = [_Part.of(document, part, method) for part in slices]
    names = _names(dict.fromkeys(model for part in parts for model in part.experts))
    if modules:
        method = _for_modules(document, method, parts, names)
    found = [settings_of(document, each.part, method, {m: names[m] for m in each.experts}) for each in parts]
    models: dict[str, Any] = {"name": name, "base": parts[0].base, "experts": {names[m]: m for m in names}}
    if modules:
        settings = joined(found, [region for _, region in modules], method, list(names.values()), where)
    elif document.stacked:
        models["slices"], settings = _slices(parts, names, found)
    else:
        settings = found[0]
    parameters = {**method.constants, **settings.as_config()}
    owner = _owner(document, parts[0], names)
    models["config"] = owner
    save: dict[str, Any] = {"tokenizer": owner}
    notes = [*document.notes, *_ends(document), *_dtype(document, save)]
    notes += set_tokens(document, models, save, {model: names[model] for part in parts for model in part.experts})
    return Translation(models, {"name": method.ours, **parameters}, save, tuple(notes))


@dataclass(frozen=True)
class _Part:
    """A slice with the parts that its models have here.

    Attributes:
        part: the slice.
        base: the base model; None where the method has none, or has it as one of the experts.
        experts: the references of the other models, in the order that the method takes them.
    """

    part: Slice
    base: str | None
    experts: tuple[str, ...]

    @classmethod
    def of(cls, document: MergeDocument, part: Slice, method: Method) -> _Part:
        """Tell the base from the experts, and check how many there are."""
        where = part.named(document.where)
        models = [source.model for source in part.sources]
        base = part.base
        if base is None and method.base in ("needed", "first"):
            raise ConfigError(f"{where}: merge_method={document.method}: needs base_model")
        if base is not None and method.base != "expert" and base not in models:
            raise ConfigError(f"{where}: its sources must include the base model ({base})")
        if part.path and method.base in ("needed", "optional") and base != document.base:
            raise ConfigError(f"{where}.base_model: must be that of the whole config")
        if method.base == "first":
            assert base is not None
            models = [base, *(model for model in models if model != base)]
            base = None
        elif method.base == "expert":
            base = None
        experts = tuple(model for model in models if model != base)
        if len(experts) < method.fewest or (method.most is not None and len(experts) > method.most):
            bound = f"at most {method.most}" if len(experts) > method.fewest else f"at least {method.fewest}"
            bound = f"exactly {method.fewest}" if method.fewest == method.most else bound
            besides = "" if base is None else " besides the base"
            count = f"{bound} model{'' if bound.endswith(' 1') else 's'}{besides}"
            hint = f" ({len(document.slices)} slices can take one each)" if document.stacked else ""
            raise ConfigError(
                f"{where}: merge_method={document.method}: takes {count}, and has {len(experts)}: "
                f"{listed(experts)}{hint}"
            )
        return cls(part, base, experts)


def _for_modules(document: MergeDocument, method: Method, parts: Sequence[_Part], names: Mapping[str, str]) -> Method:
    """Return the method here where modules may be of different models: one with weights, of which some are 0.

    Raises:
        ConfigError: the models differ, and it has none.
    """
    first = parts[0]
    odd = next((each for each in parts if {*each.experts} != {*first.experts}), None)
    if method.base == "first":
        odd = next((each for each in parts if each.experts != first.experts), None)
    if odd is not None and document.base is None and document.settings.keys() & {"tokenizer", "tokenizer_source"}:
        raise ConfigError(
            f"{document.where}: {odd.part.path}: has other models, whose tokens count only with base_model"
        )
    if method.ours == "passthrough":
        return BY_WEIGHTS
    if odd is None or (method.most is None and any(setting.ours == "weights" for setting in method.settings)):
        return method
    here, there = (listed(names[model] for model in each.experts) for each in (odd, first))
    raise ConfigError(
        f"{odd.part.named(document.where)}: {document.method} has no weights, and needs the same models in the same "
        f"order in all modules; here {here}, and in {first.part.path} {there}"
    )


def _names(models: Mapping[str, None]) -> dict[str, str]:
    """Name the experts after the last parts of their references."""
    names: dict[str, str] = {}
    for model in models:
        stems = [re.sub(r"@.*$", "", part).rstrip("/").rsplit("/", 1)[-1] for part in model.split("+")]
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(stems)) or "model"
        stem = stem if stem[0].isalpha() and stem.lower() not in WORDS else f"m_{stem}"
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[model] = name
    return names


def _slices(
    parts: Sequence[_Part], names: Mapping[str, str], found: Sequence[Settings]
) -> tuple[dict[str, Any], Settings]:
    """Return the slices with the parameters of each, and the parameters that all have."""
    same_models = len({part.experts for part in parts}) == 1
    first = found[0]
    shared = {
        key: value
        for key, value in first.values.items()
        if not isinstance(value, list)
        and all(each.values.get(key) == value for each in found)
        and (same_models or not isinstance(value, Mapping))
        and not Settings({key: value}).varies
    }
    required = sorted({key for each in found for key in each.required}) if same_models else []
    if not same_models and any(each.required for each in found):
        raise ConfigError("slices: a filter leaves a needed value open, and the slices are of different models")
    slices = {}
    for at, (part, each) in enumerate(zip(parts, found, strict=True), 1):
        own: dict[str, Any] = {key: value for key, value in each.values.items() if key not in shared}
        if each.rules:
            own["rules"] = each.rules
        by_name = {_BASE if source.model == part.base else names[source.model]: source for source in part.part.sources}
        ordered = [*([_BASE] if part.base is not None else []), *(names[model] for model in part.experts)]
        sources = {name: list(by_name[name].layers or ()) for name in ordered}
        slices[f"s{at}"] = {"sources": sources} | ({"method": own} if own else {})
    whole = Settings(shared, [], required)
    if any(each.varies for each in found) or any("method" in each for each in slices.values()):
        whole.values["rules_as"] = "mergekit"
    return slices, whole


def _owner(document: MergeDocument, part: _Part, names: Mapping[str, str]) -> str:
    """Return the name of the model whose config and tokenizer the merged one has: the base's, or the first one's."""
    if part.base is not None:
        return _BASE
    return names.get(document.base or "", next(iter(names.values())))


def _ends(document: MergeDocument) -> list[str]:
    """Say where what follows the layers is merged of other models than in mergekit."""
    notes = []
    for slices in document.modules.values() or [document.slices]:
        first, last = (len(slices[at].sources) for at in (0, -1))
        if last > first:
            notes.append(
                f"{slices[-1].path}: has {last} sources, and the first slice {first}: mergekit merges what follows the "
                f"layers (last norm, head) from the first {first} of them alone, here from all"
            )
    return notes


def _dtype(document: MergeDocument, save: dict[str, Any]) -> list[str]:
    """Set what the merged model is stored in; say where mergekit rounds on the way."""
    computed, stored = (document.settings.get(key) for key in ("dtype", "out_dtype"))
    for key, value in (("dtype", computed), ("out_dtype", stored)):
        if value is not None and value not in DTYPES:
            raise ConfigError(f"{document.where}: {key}={value}: must be one of {listed(DTYPES)}")
    if (chosen := stored or computed) is not None:
        save["dtype"] = chosen
    if computed in DTYPES[1:]:
        return [
            f"{DTYPE} {computed}: mergekit rounds to it on the way; here all is computed in float32 and rounded once, "
            f"as mergekit does with dtype: float32 and out_dtype: {chosen}"
        ]
    return []
