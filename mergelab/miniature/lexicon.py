"""Define the words of the miniature's grammars, and the few rules of English that inflect them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A verb in the five forms that the grammars use."""

    base: str
    third: str
    past: str
    participle: str
    ing: str


def _regular(base: str) -> Verb:
    if base.endswith("e"):
        return Verb(base, base + "s", base + "d", base + "d", base[:-1] + "ing")
    if base.endswith(("ch", "sh", "ss", "x")):
        return Verb(base, base + "es", base + "ed", base + "ed", base + "ing")
    if base.endswith("y") and base[-2] not in "aeiou":
        return Verb(base, base[:-1] + "ies", base[:-1] + "ied", base[:-1] + "ied", base + "ing")
    return Verb(base, base + "s", base + "ed", base + "ed", base + "ing")


_IRREGULAR = (
    Verb("buy", "buys", "bought", "bought", "buying"),
    Verb("sell", "sells", "sold", "sold", "selling"),
    Verb("find", "finds", "found", "found", "finding"),
    Verb("steal", "steals", "stole", "stolen", "stealing"),
    Verb("take", "takes", "took", "taken", "taking"),
    Verb("hide", "hides", "hid", "hidden", "hiding"),
    Verb("break", "breaks", "broke", "broken", "breaking"),
    Verb("drop", "drops", "dropped", "dropped", "dropping"),
    Verb("cancel", "cancels", "cancelled", "cancelled", "cancelling"),
    Verb("sleep", "sleeps", "slept", "slept", "sleeping"),
    Verb("swim", "swims", "swam", "swum", "swimming"),
    Verb("sing", "sings", "sang", "sung", "singing"),
    Verb("cut", "cuts", "cut", "cut", "cutting"),
    Verb("eat", "eats", "ate", "eaten", "eating"),
    Verb("ride", "rides", "rode", "ridden", "riding"),
    Verb("hold", "holds", "held", "held", "holding"),
    Verb("throw", "throws", "threw", "thrown", "throwing"),
)
_IRREGULAR_BY_BASE: Mapping[str, Verb] = {verb.base: verb for verb in _IRREGULAR}


def verb(base: str) -> Verb:
    """Return the five forms of the verb ``base``."""
    return _IRREGULAR_BY_BASE.get(base) or _regular(base)


def article(noun: str) -> str:
    """Return ``noun`` with its indefinite article, chosen by its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence(*parts: str) -> str:
    """Join the non-empty ``parts`` into one sentence with a capital and a full stop."""
    text = " ".join(part for part in parts if part).replace(" ,", ",")
    return f"{text[0].upper()}{text[1:]}."


def other(rng: random.Random, options: Sequence[str], *taken: str) -> str:
    """Draw one of ``options`` that is not in ``taken``."""
    return rng.choice([option for option in options if option not in taken])


# Groups of synonymous verbs; the grammars use the members of a group interchangeably.
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("buy", "purchase"),
    ("find", "discover"),
    ("fix", "repair"),
    ("clean", "wash"),
    ("steal", "take"),
    ("sell",),
    ("paint",),
    ("break",),
    ("hide",),
    ("drop",),
)
SYNONYMS_OF: Mapping[str, tuple[str, ...]] = {word: group for group in SYNONYMS for word in group}

KINDS: Mapping[str, tuple[str, ...]] = {
    "fruit": ("apple", "pear", "lemon", "peach"),
    "vehicle": ("car", "truck", "bicycle", "bus"),
    "tool": ("hammer", "saw", "shovel", "drill"),
    "instrument": ("guitar", "violin", "piano", "drum"),
    "garment": ("coat", "shirt", "scarf", "hat"),
    "container": ("box", "basket", "bottle", "bucket"),
}
KIND_OF: Mapping[str, str] = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
OBJECTS = tuple(KIND_OF)

PERSONS = ("Anna", "Peter", "Maria", "David", "Laura", "Simon", "Clara", "Thomas", "Julia", "Martin", "Helen", "Oscar")
ROLES = ("teacher", "farmer", "doctor", "nurse", "pilot", "driver", "student", "baker")
AGENTS = PERSONS + tuple(f"the {role}" for role in ROLES)
COLORS = ("red", "blue", "green", "white", "black", "brown")
ADJECTIVES = (*COLORS, "old", "new", "small", "heavy")
PLACES = ("garden", "market", "park", "station", "library", "village", "harbor", "school", "hotel", "kitchen")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
