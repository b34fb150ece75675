"""Fill templates with alternatives and slots, for the grammars of this package."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from mergelab.miniature.lexicon import KINDS

SMALL_THINGS = tuple(
    thing for kind in ("tool", "garment", "container", "fruit") for thing in KINDS[kind]
)  # things that can be carried, lost and given
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def fill_template(rng: random.Random, template: str, slots: Mapping[str, str | Sequence[str]] | None = None) -> str:
    """Draw a text from ``template``: one alternative of each ``[a|b]``, and the value of the slot for each ``{name}``.

    A slot with several values gives a random one at each occurrence. Alternatives may contain slots, but no
    alternatives.
    """
    text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    if slots:
        text = re.sub(r"\{(\w+)\}", lambda match: _value(rng, slots[match[1]]), text)
    return text


def _value(rng: random.Random, value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else rng.choice(value)


def capital(text: str) -> str:
    """Return ``text`` with a capital first letter."""
    return f"{text[0].upper()}{text[1:]}"


def sentences(rng: random.Random, templates: Sequence[str], slots: Mapping[str, str | Sequence[str]]) -> str:
    """Fill each template, and join the results as sentences."""
    return " ".join(f"{capital(fill_template(rng, template, slots))}." for template in templates)
