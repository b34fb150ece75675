"""Translate the documents of a mergekit-multi config: the last merge, and the named ones whose results it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergelab.errors import ConfigError, listed, shortened
from mergelab.mergekit.translate import WORDS, Translation, translate

_DOCUMENTS = Sequence[tuple[str, Mapping[str, Any]]]


def translate_stages(documents: _DOCUMENTS, file: str, name: str) -> Translation:
    """Translate a file: one merge, with the documents that have a name as ``models.stages``.

    The last merge is the document without a name or, where all have one, the only one that no other names.

    Args:
        documents: each with what messages call it, as YAML has it.
        file: what messages call the whole.
        name: what the models of the last merge are called in tables.

    Raises:
        ConfigError: as `translate`; two documents have one name, or it is not clear which is the last.
    """
    where, content = documents[0]
    if len(documents) == 1:
        found = translate(content, where, name)
        return replace(found, notes=tuple(f"{where}: {note}" for note in found.notes))
    named = _by_name(documents, file)
    ours = _our_names([each for each in named if each is not None])
    translated = {
        each: translate(content, where, ours.get(each or "", name)) for each, (where, content) in named.items()
    }
    last = None if None in named else _unused(translated, file)
    notes = [f"{named[each][0]}: {note}" for each, found in translated.items() for note in found.notes]
    stages = {ours[each]: _as_stage(found, ours) for each, found in translated.items() if each != last and each}
    final = translated[last]
    return replace(final, models={**_renamed(final.models, ours), "name": name, "stages": stages}, notes=tuple(notes))


def _by_name(documents: _DOCUMENTS, file: str) -> dict[str | None, tuple[str, Mapping[str, Any]]]:
    found: dict[str | None, tuple[str, Mapping[str, Any]]] = {}
    for where, content in documents:
        name = content.get("name")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ConfigError(f"{where}: name={shortened(repr(name))}: must be a name")
        if name in found:
            what = "have no name" if name is None else f"are called {name}"
            raise ConfigError(f"{file}: two documents {what}: every merge but the last has a name of its own")
        found[name] = (where, content)
    return found


def _our_names(names: Sequence[str]) -> dict[str, str]:
    """Return the stages' names in letters, digits, _ and -."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        plain = plain if plain[0].isalpha() and plain.lower() not in WORDS else f"m_{plain}"
        number, stem = 2, plain
        while plain in found.values():
            plain, number = f"{stem}-{number}", number + 1
        found[name] = plain
    return found


def _unused(translated: Mapping[str | None, Translation], file: str) -> str:
    """Return the only merge that no other one takes."""
    taken = {
        reference.partition("+")[0]
        for found in translated.values()
        for reference in _references(found.models)
        if reference
    }
    last = [name for name in translated if name is not None and name not in taken]
    if len(last) != 1:
        which = f"{listed(last)} are taken by no other" if last else "each is taken by another one"
        raise ConfigError(f"{file}: which merge is the last? {which}; that one is written without name")
    return last[0]


def _references(models: Mapping[str, Any]) -> list[str]:
    return [each for each in (models["base"], *models["experts"].values()) if each is not None]


def _renamed(models: Mapping[str, Any], ours: Mapping[str, str]) -> dict[str, Any]:
    """Return models with the stages among them called as they are here."""

    def renamed(reference: str | None) -> str | None:
        stage, plus, adapter = (reference or "").partition("+")
        return f"{ours[stage]}{plus}{adapter}" if stage in ours else reference

    experts = {name: renamed(reference) for name, reference in models["experts"].items()}
    return {**models, "base": renamed(models["base"]), "experts": experts}


def _as_stage(found: Translation, ours: Mapping[str, str]) -> dict[str, Any]:
    models = {key: value for key, value in _renamed(found.models, ours).items() if value is not None and key != "name"}
    return {**models, "method": found.method, **found.save}
