"""Generate reviews of films: the SST-2-shaped task.

Each review praises or criticises one or two aspects of a film. Words have different sentiment weights, "not" reverses
them, "very" strengthens them, and a clause after "but" counts more. The label is the sign of the sum after a little
noise, as people disagree about lukewarm reviews.
"""

from __future__ import annotations

import random

from mergelab.miniature.lexicon import other, sentence
from mergelab.miniature.record import Document, Example

LABEL_NAMES = ("negative", "positive")
COLUMNS = ("sentence",)

ASPECTS = ("film", "story", "acting", "plot", "music", "cast", "ending", "script", "humor", "dialogue")
GOOD = {
    "brilliant": 3, "wonderful": 3, "superb": 3, "moving": 2, "charming": 2,
    "clever": 2, "funny": 2, "elegant": 2, "fresh": 2,
    "warm": 2, "pleasant": 1, "decent": 1, "likable": 1, "solid": 1, "sweet": 1, "gentle": 1,
}  # fmt: skip
BAD = {
    "awful": 3, "terrible": 3, "dreadful": 3, "boring": 2, "dull": 2,
    "clumsy": 2, "stale": 2, "lifeless": 2, "silly": 2,
    "messy": 2, "slow": 1, "thin": 1, "uneven": 1, "bland": 1, "loud": 1, "tired": 1,
}  # fmt: skip
FEELING = {word: float(weight) for word, weight in GOOD.items()} | {
    word: -float(weight) for word, weight in BAD.items()
}
OPENERS = ("", "", "", "in the end", "to be honest", "all in all", "for once")
PRAISE = (("I loved", 3.0), ("I enjoyed", 2.0), ("I liked", 1.5))
BLAME = (("I hated", -3.0), ("I disliked", -2.0), ("I resented", -1.5))


def _word(rng: random.Random, sign: int) -> str:
    return rng.choice(tuple(GOOD if sign > 0 else BAD))


def _opinion(rng: random.Random, aspect: str, sign: int) -> tuple[str, float]:
    """Draw a clause about ``aspect`` with the sentiment ``sign``; return the clause and its weight."""
    shape = rng.random()
    if shape < 0.18:
        word = _word(rng, -sign)
        degree = rng.choice(("not", "never", "hardly"))
        return f"the {aspect} is {degree} {word}", -0.6 * FEELING[word]
    if shape < 0.36:
        phrase, feeling = rng.choice(PRAISE if sign > 0 else BLAME)
        return f"{phrase} the {aspect}", feeling
    if shape < 0.5:
        first, second = _word(rng, sign), _word(rng, sign)
        return f"the {aspect} is {first} and {second}", FEELING[first] + FEELING[second]
    word = _word(rng, sign)
    degree, strength = rng.choice((("", 1.0), ("very", 1.4), ("truly", 1.4), ("rather", 0.7), ("a bit", 0.5)))
    return f"the {aspect} is {degree} {word}".replace("  ", " "), strength * FEELING[word]


def _review(rng: random.Random, sign: int) -> tuple[str, float, str]:
    aspect = rng.choice(ASPECTS)
    opener = rng.choice(OPENERS)
    first, feeling = _opinion(rng, aspect, sign)
    shape = rng.random()
    if shape < 0.3:
        return sentence(opener, first), feeling, "one"
    second_aspect = other(rng, ASPECTS, aspect)
    if shape < 0.55:
        second, more = _opinion(rng, second_aspect, sign)
        return sentence(opener, first, "and", second), feeling + more, "and"
    second, more = _opinion(rng, second_aspect, -sign)
    if shape < 0.85:
        return sentence(opener, first, ", but", second), 0.5 * feeling + more, "but"
    return sentence("although", second, ",", first), 0.5 * more + feeling, "although"


def example(rng: random.Random) -> Example:
    """Draw a review and whether it is positive."""
    text, feeling, kind = _review(rng, rng.choice((-1, 1)))
    return Example((text,), int(feeling + rng.gauss(0.0, 0.5) > 0), kind)


def document(rng: random.Random) -> Document:
    """Draw two sentences about a film with the same sentiment, and an unrelated one with the opposite sentiment."""
    sign = rng.choice((-1, 1))
    first, second, unrelated = (_plain(rng, one) for one in (sign, sign, -sign))
    return Document(first, second, unrelated)


def _plain(rng: random.Random, sign: int) -> str:
    aspect = rng.choice(ASPECTS)
    first, _ = _opinion(rng, aspect, sign)
    if rng.random() < 0.5:
        return sentence(rng.choice(OPENERS), first)
    second, _ = _opinion(rng, other(rng, ASPECTS, aspect), sign)
    return sentence(first, "and", second)
