"""Read one document of a mergekit config: its keys, its models and slices, and what in it has no effect.

mergekit passes over keys that it does not know. Each is a note here, with what was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.errors import ConfigError, did_you_mean, listed, nearest, shortened

TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "name"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_OF_MODEL, _OF_SOURCE = ("model", "parameters"), ("model", "layer_range", "parameters")
_OF_SLICE = ("sources", "base_model", "residual_weight", "parameters")
_OF_MODULE = ("slices", "models", "parameters")
_OF_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_OF_TOKEN, _OF_ROW = ("source", "force"), ("kind", "model", "token", "token_id")
_MIXTURE = ("gate_mode", "experts_per_token", "shared_experts")  # keys of mergekit-moe's configs
_EXPRESSION = re.compile(r"[*^$|\\(\[?+]")
Levels = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Source:
    """A model, or some of its layers: with its own parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Slice:
    """What some layers of the result are made of: models, and parameters for all of them.

    Attributes:
        sources: the models, each once.
        levels: parameters that hold for all sources, the nearest first.
        base: the base model.
        path: where it is in the config; "" for what ``models`` is.
    """

    sources: tuple[Source, ...]
    levels: Levels
    base: str | None
    path: str = ""

    def named(self, where: str) -> str:
        """Return what messages call it in the document ``where``."""
        return f"{where}: {self.path}" if self.path else where


@dataclass(frozen=True)
class MergeDocument:
    """A mergekit config.

    Attributes:
        where: what messages call it.
        method: mergekit's name of the method.
        slices: one for ``models``, or as many as are stacked; of several modules all.
        stacked: whether layers were chosen.
        base: the base model.
        modules: the slices of each, where the config is written by modules.
        settings: dtype, out_dtype, tokenizer_source, tokenizer, chat_template, name, where given.
        notes: what has no effect, one line each.
    """

    where: str
    method: str
    slices: tuple[Slice, ...]
    stacked: bool
    base: str | None
    modules: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(path: str | Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Read a file's YAML documents, each with what messages call it.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or has no document that is a mapping.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"{path}{at}: is no YAML: {getattr(error, 'problem', None) or error}") from None
    if not documents or not all(isinstance(each, Mapping) for each in documents):
        raise ConfigError(f"{path}: must be a mergekit config, with merge_method and models or slices")
    many = len(documents) > 1
    return [(f"{path}, document {at}" if many else str(path), each) for at, each in enumerate(documents, 1)]


def parse(content: Mapping[str, Any], where: str, known: Mapping[str, Sequence[str]]) -> MergeDocument:
    """Read one document.

    Args:
        content: as YAML has it.
        where: what messages call it.
        known: the parameters of each method.

    Raises:
        ConfigError: what mergekit refuses too, or a config of another of its commands.
    """
    _refuse_others(content, where)
    method = content.get("merge_method")
    if not isinstance(method, str) or method not in known:
        hint = "" if method is None else did_you_mean(str(method), known)
        there_are = hint or f"; there are {listed(known, 20)}"
        raise ConfigError(f"{where}: merge_method={method}: mergekit has no such method{there_are}")
    reader = _Reader(where, known[method], method)
    reader.keys(content, TOP, "")
    given = [key for key in ("models", "slices", "modules") if content.get(key)]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: needs exactly one of models, slices and modules, and has {listed(given) or 'none'}"
        )
    base = None if content.get("base_model") is None else model_text(content["base_model"], f"{where}: base_model")
    top = reader.parameters(content, "parameters")
    modules = reader.modules(content["modules"], top, base) if given == ["modules"] else {}
    slices = tuple(each for own in modules.values() for each in own) or reader.slices(content, (top,), base)
    stacked = len(modules) < 2 and slices[0].sources[0].layers is not None
    settings = {key: content[key] for key in TOP[6:] if content.get(key) is not None}
    if "tokenizer" in settings:
        reader.tokenizer(settings)
    return MergeDocument(where, method, slices, stacked, base, modules, settings, reader.notes)


def model_text(value: Any, where: str) -> str:
    """Return a model reference as text: ``path@revision+adapter@revision``."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, Mapping) and "model" in value:
        parts = [value["model"], *([value["lora"]] if value.get("lora") else [])]
        return "+".join(model_text(part, where) for part in parts)
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")
    raise ConfigError(f"{where}={shortened(repr(value))}: must be a model: a folder, or org/name@revision")


def _refuse_others(content: Mapping[str, Any], where: str) -> None:
    if "genome" in content:
        raise ConfigError(
            f"{where}: a genome of mergekit-evolve, which searches for a merge; here -m sweep=METHOD does that"
        )
    if "experts" in content and "merge_method" not in content and (content.keys() & {*_MIXTURE, "base_model", "dtype"}):
        raise ConfigError(f"{where}: a config of mergekit-moe, which makes mixtures of experts; they are not made here")


@dataclass
class _Reader:
    """Reads the parts of a document, and notes what has no effect."""

    where: str
    known: Sequence[str]
    method: str
    notes: list[str] = field(default_factory=list)

    def keys(self, node: Any, known: Sequence[str], path: str) -> None:
        """Note the keys of a mapping that mergekit passes over."""
        if not isinstance(node, Mapping):
            raise ConfigError(f"{self.where}: {path or 'it'}={shortened(repr(node))}: must be a mapping")
        for key in node:
            if key in known:
                continue
            place = f"{path}.{key}" if path else str(key)
            if key in self.known and "parameters" in known:
                hint = f"; did you mean {f'{path}.parameters' if path else 'parameters'}.{key}?"
            else:
                hint = did_you_mean(str(key), [*known, *(self.known if "parameters" in known else ())])
            self.notes.append(f"{place}: mergekit has no such key there and passes over it{hint}")

    def parameters(self, node: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """Return a level of parameters; note those that the method does not have, and filters that look wrong."""
        found = node.get("parameters") or {}
        if not isinstance(found, Mapping):
            raise ConfigError(f"{self.where}: {path}={shortened(repr(found))}: must be a mapping")
        for key, value in found.items():
            if key == "int8_mask":
                continue
            if key not in self.known:
                hint = did_you_mean(str(key), self.known) if nearest(str(key), self.known) else ""
                self.notes.append(f"{path}.{key}: {self.method} has no such parameter, mergekit passes over it{hint}")
                continue
            for one in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
                if isinstance(one, Mapping):
                    self._filter(one, f"{path}.{key}")
        return {key: value for key, value in found.items() if key in self.known}

    def _filter(self, entry: Mapping[str, Any], path: str) -> None:
        for key in entry.keys() - {"filter", "value"}:
            hint = did_you_mean(str(key), ["filter", "value"])
            self.notes.append(f"{path}.{key}: mergekit has no such key there and passes over it{hint}")
        text = entry.get("filter")
        if isinstance(text, str) and text != "*" and _EXPRESSION.search(text):
            self.notes.append(
                f"{path}: filter {text!r} is looked for as it stands in the tensors' names; mergekit's filters are no "
                "patterns (a part of a name, or * for all)"
            )

    def modules(self, modules: Any, top: Mapping[str, Any], base: str | None) -> dict[str, tuple[Slice, ...]]:
        """Return what each module is made of."""
        if not isinstance(modules, Mapping):
            raise ConfigError(f"{self.where}: modules={shortened(repr(modules))}: must be a mapping of modules by name")
        found = {}
        for name, module in modules.items():
            path = f"modules.{name}"
            self.keys(module, _OF_MODULE, path)
            if bool(module.get("slices")) == bool(module.get("models")):
                raise ConfigError(f"{self.where}: {path}: needs one of models and slices")
            levels = (self.parameters(module, f"{path}.parameters"), top)
            found[str(name)] = self.slices(module, levels, base, f"{path}.")
        return found

    def slices(self, body: Mapping[str, Any], levels: Levels, base: str | None, at: str = "") -> tuple[Slice, ...]:
        """Return what the result, or a module of it, is made of; ``at`` is where that is in the config."""
        if body.get("models"):
            entries = self._list(body["models"], f"{at}models")
            found = [self._source(each, f"{at}models[{i}]", chosen=False) for i, each in enumerate(entries)]
            if base is not None and base not in [each.model for each in found]:
                found.append(Source(base, None, {}))
            return (Slice(self._distinct(found, f"{at}models"), levels, base, at.rstrip(".")),)
        entries = self._list(body["slices"], f"{at}slices")
        return tuple(self._slice(each, f"{at}slices[{i}]", levels, base) for i, each in enumerate(entries))

    def _slice(self, node: Any, path: str, levels: Levels, base: str | None) -> Slice:
        self.keys(node, _OF_SLICE, path)
        entries = self._list(node.get("sources"), f"{path}.sources")
        found = [self._source(each, f"{path}.sources[{i}]", chosen=True) for i, each in enumerate(entries)]
        lengths = [each.layers[1] - each.layers[0] for each in found if each.layers]
        if len(set(lengths)) > 1:
            raise ConfigError(f"{self.where}: {path}: its sources must have equally many layers, and have {lengths}")
        own = node.get("base_model")
        base = base if own is None else model_text(own, f"{self.where}: {path}.base_model")
        levels = (self.parameters(node, f"{path}.parameters"), *levels)
        return Slice(self._distinct(found, path), levels, base, path)

    def _source(self, node: Any, path: str, *, chosen: bool) -> Source:
        self.keys(node, _OF_SOURCE if chosen else _OF_MODEL, path)
        if "model" not in node:
            raise ConfigError(f"{self.where}: {path}: needs model")
        layers = node.get("layer_range") if chosen else None
        if chosen and not (isinstance(layers, Sequence) and len(layers) == 2 and all(type(n) is int for n in layers)):
            raise ConfigError(f"{self.where}: {path}.layer_range={layers}: must be [FIRST, AFTER_LAST]")
        if layers is not None and not 0 <= layers[0] < layers[1]:
            raise ConfigError(f"{self.where}: {path}.layer_range={list(layers)}: holds no layer")
        model = model_text(node["model"], f"{self.where}: {path}.model")
        return Source(
            model, None if layers is None else (layers[0], layers[1]), self.parameters(node, f"{path}.parameters")
        )

    def _distinct(self, found: Sequence[Source], path: str) -> tuple[Source, ...]:
        names = [each.model for each in found]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"{self.where}: {path}: {listed(repeated)} is there more than once, and counts once in mergekit"
            )
        return tuple(found)

    def _list(self, node: Any, path: str) -> Sequence[Any]:
        if not isinstance(node, Sequence) or isinstance(node, str) or not node:
            raise ConfigError(f"{self.where}: {path}={shortened(repr(node))}: must be a list")
        return node

    def tokenizer(self, settings: Mapping[str, Any]) -> None:
        """Check the settings of the tokenizer."""
        node = settings["tokenizer"]
        self.keys(node, _OF_TOKENIZER, "tokenizer")
        for token, each in (node.get("tokens") or {}).items() if isinstance(node.get("tokens"), Mapping) else ():
            if isinstance(each, Mapping):
                self.keys(each, _OF_TOKEN, f"tokenizer.tokens.{token}")
                if isinstance(source := each.get("source"), Mapping) and "kind" in source:
                    self.keys(source, _OF_ROW, f"tokenizer.tokens.{token}.source")
        if "tokenizer_source" in settings:
            raise ConfigError(f"{self.where}: needs one of tokenizer_source and tokenizer, and has both")
        multiple = node.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise ConfigError(f"{self.where}: tokenizer.pad_to_multiple_of={multiple}: must be a whole number above 0")
