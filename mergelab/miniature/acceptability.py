"""Generate acceptable and unacceptable sentences: the CoLA-shaped task.

An unacceptable sentence breaks one rule: agreement, the verb form after an auxiliary, the order of words, the
reflexive, or whether the verb takes an object.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mergelab.miniature.lexicon import ADJECTIVES, KIND_OF, PLACES, ROLES, Verb, sentence, verb
from mergelab.miniature.record import Document, Example

LABEL_NAMES = ("unacceptable", "acceptable")
COLUMNS = ("sentence",)
UNACCEPTABLE, ACCEPTABLE = 0, 1

WITH_OBJECT = ("buy", "find", "fix", "take", "carry", "repair", "purchase", "discover")
WITHOUT_OBJECT = ("sleep", "swim", "laugh", "smile", "arrive", "wait")
HIMSELF = {"boy": "himself", "man": "himself", "girl": "herself", "woman": "herself"}
SUBJECTS = (*HIMSELF, *ROLES)
ADVERBS = ("often", "never", "always", "quietly", "quickly")


@dataclass(frozen=True)
class _Parts:
    """The parts of a sentence: the subject, its number, and the predicate."""

    subject: str
    plural: bool
    action: Verb
    thing: str
    place: str
    adverb: str
    owner: str


def _plural(noun: str) -> str:
    return {"man": "men", "woman": "women"}.get(noun, noun + "s")


def _parts(rng: random.Random) -> _Parts:
    transitive = rng.random() < 0.6
    adjective = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.4 else ""
    return _Parts(
        subject=rng.choice(SUBJECTS),
        plural=rng.random() < 0.45,
        action=verb(rng.choice(WITH_OBJECT if transitive else WITHOUT_OBJECT)),
        thing=f"the {adjective}{rng.choice(tuple(KIND_OF))}" if transitive else "",
        place=f"in the {rng.choice(PLACES)}" if rng.random() < 0.4 else "",
        adverb=rng.choice(ADVERBS) if rng.random() < 0.25 else "",
        owner=rng.choice(ROLES) if rng.random() < 0.3 else "",
    )


def _subject(rng: random.Random, parts: _Parts) -> str:
    noun = _plural(parts.subject) if parts.plural else parts.subject
    # A noun of the other number between subject and verb, so that agreement does not follow from adjacent words.
    if not parts.owner:
        return f"the {noun}"
    owner = parts.owner if parts.plural else _plural(parts.owner)
    return f"the {noun} {rng.choice(('near', 'behind', 'with'))} the {owner}"


def _finite(rng: random.Random, parts: _Parts, wrong: bool) -> str:
    """Put the verb into the present, progressive or perfect, in agreement with the subject unless ``wrong``."""
    third = not parts.plural
    tense = rng.choice(("present", "progressive", "perfect"))
    agree = third != wrong
    if tense == "present":
        return " ".join(part for part in (parts.adverb, parts.action.third if agree else parts.action.base) if part)
    if tense == "progressive":
        return f"{'is' if agree else 'are'} {parts.adverb} {parts.action.ing}".replace("  ", " ")
    return f"{'has' if agree else 'have'} {parts.adverb} {parts.action.participle}".replace("  ", " ")


def _auxiliary(rng: random.Random, parts: _Parts, wrong: bool) -> str:
    """Put an auxiliary before the verb, and the verb in the form that it requires, unless ``wrong``."""
    action = parts.action
    forms = {
        rng.choice(("will", "can", "must", "did not")): (action.base, (action.third, action.ing, action.past)),
        "is" if not parts.plural else "are": (action.ing, (action.base, action.third)),
        "has" if not parts.plural else "have": (action.participle, (action.base, action.ing)),
    }
    word = rng.choice(tuple(forms))
    right, others = forms[word]
    return f"{word} {rng.choice([form for form in others if form != right]) if wrong else right}"


def _sentence(rng: random.Random, kind: str, wrong: bool) -> str:
    parts = _parts(rng)
    subject = _subject(rng, parts)
    if kind == "agreement":
        return sentence(subject, _finite(rng, parts, wrong), parts.thing, parts.place)
    if kind == "form":
        return sentence(subject, _auxiliary(rng, parts, wrong), parts.thing, parts.place)
    if kind == "reflexive":
        who = rng.choice(tuple(HIMSELF))
        right = HIMSELF[who]
        word = ("herself" if right == "himself" else "himself") if wrong else right
        where = parts.place or f"near the {rng.choice(tuple(HIMSELF))}"
        return sentence(
            f"the {who}", rng.choice(("has", "will have")), rng.choice(("hidden", "painted", "found")), word, where
        )
    if kind == "object":
        transitive = rng.random() < 0.5
        action = verb(rng.choice(WITH_OBJECT if transitive else WITHOUT_OBJECT))
        thing = f"the {rng.choice(tuple(KIND_OF))}" if transitive != wrong else ""
        return sentence(f"the {parts.subject}", action.past, thing, parts.place)
    text = sentence(subject, _auxiliary(rng, parts, False), parts.thing, parts.place)
    return _swap_words(rng, text) if wrong else text


def _swap_words(rng: random.Random, text: str) -> str:
    """Swap two adjacent words of ``text`` that differ."""
    words = text[:-1].lower().split()
    at = rng.choice([at for at in range(len(words) - 1) if words[at] != words[at + 1]])
    words[at], words[at + 1] = words[at + 1], words[at]
    return sentence(*words)


PHENOMENA = ("agreement", "form", "reflexive", "object", "order")
_WEIGHTS = (30, 25, 12, 18, 15)


def example(rng: random.Random) -> Example:
    """Draw a sentence and whether it is acceptable."""
    kind = rng.choices(PHENOMENA, _WEIGHTS)[0]
    wrong = rng.random() < 0.36
    return Example((_sentence(rng, kind, wrong),), UNACCEPTABLE if wrong else ACCEPTABLE, kind)


def document(rng: random.Random) -> Document:
    """Draw one acceptable sentence."""
    return Document(_sentence(rng, rng.choices(PHENOMENA, _WEIGHTS)[0], False))
