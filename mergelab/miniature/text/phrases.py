"""What the grammars of this package share: templates with alternatives and slots."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from mergelab.miniature.lexicon import KINDS

SMALL_THINGS = tuple(
    thing for kind in ("tool", "garment", "container", "fruit") for thing in KINDS[kind]
)  # what can be carried, lost and given
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def fill(rng: random.Random, template: str, slots: Mapping[str, str | Sequence[str]] | None = None) -> str:
    """Draw one text of ``template``: of ``[a|b]`` one alternative, and for ``{name}`` what ``slots`` has.

    A slot that holds several texts gives one of them, drawn anew each time. Alternatives may hold slots, not others.
    """
    text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    if slots:
        text = re.sub(r"\{(\w+)\}", lambda match: _value(rng, slots[match[1]]), text)
    return text


def _value(rng: random.Random, value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else rng.choice(value)


def capital(text: str) -> str:
    """Return ``text`` with a capital at its start."""
    return f"{text[0].upper()}{text[1:]}"


def sentences(rng: random.Random, templates: Sequence[str], slots: Mapping[str, str | Sequence[str]]) -> str:
    """Fill each template and make it a sentence."""
    return " ".join(f"{capital(fill(rng, template, slots))}." for template in templates)
