"""What a mergekit config says of the tokenizer, as ``models.vocab`` and ``save.chat_template`` here, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mergelab.config import TokenConfig, VocabConfig
from mergelab.errors import ConfigError, MergelabError, did_you_mean, listed, shortened
from mergelab.mergekit.document import MergeDocument, model_text
from mergelab.models.chat_templates import check_template

_BASE, _UNION, _ZERO, _ROW = "base", "union", "zero", "model_token"
# How models' rows are brought together in mergekit.
_ROWS: Mapping[str, Any] = {"unknown": "zero", "padding": "drop"}


class NoEqual(MergelabError):
    """A setting of a merge has no equal in mergekit."""


def set_tokens(
    document: MergeDocument, models: dict[str, Any], save: dict[str, Any], names: Mapping[str, str]
) -> list[str]:
    """Set whose tokens the merged model has, and its chat template; return notes.

    Args:
        document: the config.
        models, save: the groups of the config here.
        names: what the experts are called here, by their references.

    Raises:
        ConfigError: a setting that mergekit refuses too, or that names a model that is not merged.
    """
    settings, where = document.settings, document.where
    _set_template(settings.get("chat_template"), save, f"{where}: chat_template")
    node = settings.get("tokenizer")
    source = settings.get("tokenizer_source") if node is None else node.get("source") or _UNION
    if source is None:
        return []
    key = f"{where}: {'tokenizer_source' if node is None else 'tokenizer.source'}"
    known = {**names, **({models["base"]: _BASE} if models["base"] is not None else {})}
    if len({part.base for part in document.slices}) > 1:
        raise ConfigError(f"{key}={source}: the slices have different base models, whose tokens would count")
    first = None if document.base is None else known.get(document.base)
    notes = []
    if document.base is None and source == _BASE:
        notes.append("tokenizer_source=base: without base_model mergekit takes any model's tokenizer, here the first's")
    named = first or next(iter(names.values())) if source == _BASE else source
    if source not in (_BASE, _UNION):
        named = _model(source, known, key, _BASE, _UNION)
    vocab = {"source": named, "lacking": "mean" if first is None else "first", **_ROWS}
    if first not in (None, _BASE):
        vocab["first"] = first
    if node is not None and node.get("pad_to_multiple_of") is not None:
        vocab["pad_to_multiple_of"] = node["pad_to_multiple_of"]
    if tokens := (node or {}).get("tokens"):
        vocab["tokens"] = _tokens(tokens, known, f"{where}: tokenizer.tokens")
        if source == _BASE and not all(each["everywhere"] for each in vocab["tokens"]):
            notes.append(
                "tokenizer.tokens: of tokens that the base lacks mergekit gives it its own padding rows, with source: "
                "base and without force: true, and fails where it has none; here it has the rows that are named"
            )
    models["vocab"] = vocab
    save.pop("tokenizer", None)
    return notes


def _set_template(given: Any, save: dict[str, Any], key: str) -> None:
    if given is None or given == "":
        return
    if not isinstance(given, str):
        raise ConfigError(f"{key}={shortened(repr(given))}: must be text")
    check_template(given, key)
    save["chat_template"] = given


def _model(given: Any, known: Mapping[str, str], key: str, *words: str) -> str:
    """Return what a model is called here; ``words`` are what else may be given."""
    text = model_text(given, key)
    if text not in known:
        hint = did_you_mean(text, [*words, *known]) or f" (there are {listed(known)})"
        besides = "".join(f"{word}, " for word in words) + ("or " if words else "")
        raise ConfigError(f"{key}={shortened(text)}: must be {besides}one of the models that are merged{hint}")
    return known[text]


def _tokens(given: Any, known: Mapping[str, str], key: str) -> list[dict[str, Any]]:
    """Return the rows of single tokens."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}={shortened(repr(given))}: must be a mapping from tokens to {{source: ...}}")
    found = []
    for token, node in given.items():
        at = f"{key}.{token}"
        if not isinstance(node, Mapping) or node.get("source") is None:
            raise ConfigError(f"{at}={shortened(repr(node))}: needs source, a model or {{kind: zero}}")
        force = node.get("force", False)
        if not isinstance(force, bool):
            raise ConfigError(f"{at}.force={shortened(repr(force))}: must be true or false")
        found.append({"token": str(token), **_row(node["source"], known, f"{at}.source"), "everywhere": force})
    return found


def _row(source: Any, known: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return where a row is taken."""
    if not isinstance(source, Mapping) or "kind" not in source:
        return {"model": _model(source, known, key)}
    if source["kind"] == _ZERO:
        return {}
    if source["kind"] != _ROW or source.get("model") is None:
        raise ConfigError(
            f"{key}={shortened(repr(source))}: must be a model, {{kind: zero}} or {{kind: model_token, …}}"
        )
    token, row = source.get("token"), source.get("token_id")
    if (token is None) == (row is None):
        raise ConfigError(f"{key}: needs one of token and token_id")
    if row is not None and (type(row) is not int or row < 0):
        raise ConfigError(f"{key}.token_id={shortened(repr(row))}: must be a whole number from 0 on")
    place = {"row": row} if token is None else {"like": str(token)}
    return {"model": _model(source["model"], known, f"{key}.model"), **place}


def tokenizer(
    vocab: VocabConfig | None, owner: str | None, references: Mapping[str, Any], rows: Collection[str]
) -> dict[str, Any]:
    """Return the settings of the tokenizer that mergekit has for ``models.vocab``.

    Args:
        vocab: the settings.
        owner: the name of the model that is mergekit's base_model.
        references: what mergekit calls the models, by name.
        rows: which settings change a row.

    Raises:
        NoEqual: mergekit makes other rows.
    """
    if vocab is None:
        return {}
    for key, value in _ROWS.items():
        if key in rows and getattr(vocab, key) != value:
            raise NoEqual(f"models.vocab.{key}={getattr(vocab, key)}: mergekit has {value} alone")
    first = None
    if vocab.lacking == "first":
        first = vocab.first or (_BASE if _BASE in references else next(iter(references)))
    if "lacking" in rows and first != owner:
        there = "the mean, as it has no base_model" if owner is None else f"that of {owner}"
        raise NoEqual(f"models.vocab.lacking={vocab.lacking}: a model that lacks a token has in mergekit {there}")
    source = vocab.source if vocab.source == _UNION else _BASE if vocab.source == owner else references[vocab.source]
    if not vocab.tokens and vocab.pad_to_multiple_of is None:
        return {"tokenizer_source": source}
    found: dict[str, Any] = {"source": source}
    if vocab.tokens:
        found["tokens"] = {each.token: _node(each, references) for each in vocab.tokens}
    if vocab.pad_to_multiple_of is not None:
        found["pad_to_multiple_of"] = vocab.pad_to_multiple_of
    return {"tokenizer": found}


def _node(each: TokenConfig, references: Mapping[str, Any]) -> dict[str, Any]:
    source: Any = {"kind": _ZERO}
    if each.model is not None:
        place: dict[str, Any] = {} if each.row is None else {"token_id": each.row}
        place |= {} if each.like is None else {"token": each.like}
        model = references[each.model]
        source = {"kind": _ROW, "model": model, **place} if place else model
    return {"source": source, "force": each.everywhere}
