"""Generate small stories about an agent, an action, an object, a place and a day: the RTE-shaped task.

The hypothesis is entailed when it states nothing beyond the premise: it may omit details, use a synonym of the action,
name the kind instead of the thing, or be in the passive voice. It is not entailed when one detail is changed, added or
negated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from mergelab.miniature.lexicon import (
    ADJECTIVES,
    AGENTS,
    DAYS,
    KIND_OF,
    OBJECTS,
    PLACES,
    SYNONYMS,
    SYNONYMS_OF,
    article,
    other,
    sentence,
    verb,
)
from mergelab.miniature.record import Document, Example

LABEL_NAMES = ("entailment", "not_entailment")
COLUMNS = ("sentence1", "sentence2")
ENTAILED, NOT_ENTAILED = 0, 1


@dataclass(frozen=True)
class Story:
    """One event; an empty detail is omitted from the text."""

    agent: str
    action: str
    thing: str
    adjective: str = ""
    place: str = ""
    day: str = ""


def _story(rng: random.Random) -> Story:
    return Story(
        agent=rng.choice(AGENTS),
        action=rng.choice(rng.choice(SYNONYMS)),
        thing=rng.choice(OBJECTS),
        adjective=rng.choice(ADJECTIVES) if rng.random() < 0.5 else "",
        place=rng.choice(PLACES) if rng.random() < 0.5 else "",
        day=rng.choice(DAYS) if rng.random() < 0.5 else "",
    )


def _unlike(rng: random.Random, story: Story) -> Story:
    """Draw a story that shares neither agent nor thing with ``story``."""
    drawn = _story(rng)
    return replace(
        drawn, agent=other(rng, AGENTS, story.agent), thing=other(rng, OBJECTS, story.thing, KIND_OF[story.thing])
    )


def _clause(rng: random.Random, story: Story, *, passive: bool = False, negated: bool = False) -> str:
    action = verb(rng.choice(SYNONYMS_OF[story.action]))
    thing = f"{story.adjective} {story.thing}".strip()
    thing = article(thing) if rng.random() < 0.4 and not negated else f"the {thing}"
    where = f"in the {story.place}" if story.place else ""
    when = f"on {story.day}" if story.day else ""
    if passive:
        parts = [thing, "was", "not" if negated else "", action.participle, "by", story.agent, where, when]
    elif negated:
        parts = [story.agent, "did not", action.base, thing, where, when]
    else:
        parts = [story.agent, action.past, thing, where, when]
    return " ".join(part for part in parts if part)


def _write(rng: random.Random, story: Story) -> str:
    """Write ``story`` as a clause, in one of the word orders of equal meaning."""
    if story.day and rng.random() < 0.3:
        return f"on {story.day} , {_clause(rng, replace(story, day=''))}"
    return _clause(rng, story, passive=rng.random() < 0.15)


def _shorten(rng: random.Random, story: Story) -> Story:
    """Omit some of the details of ``story``, or name its thing by its kind."""
    return replace(
        story,
        thing=KIND_OF[story.thing] if rng.random() < 0.2 else story.thing,
        adjective=story.adjective if rng.random() < 0.4 else "",
        place=story.place if rng.random() < 0.5 else "",
        day=story.day if rng.random() < 0.5 else "",
    )


def _falsify(rng: random.Random, story: Story, second: Story | None) -> tuple[Story, str]:
    """Change one detail of ``story`` so that its premise, which also states ``second``, does not entail it."""
    kinds = ["agent", "thing", "action", "day", "place"] + (["mixed"] * 3 if second else [])
    kind = rng.choice(kinds)
    if kind == "mixed" and second:
        return replace(_shorten(rng, story), agent=second.agent), kind
    short = _shorten(rng, story)
    if kind == "agent":
        return replace(short, agent=other(rng, AGENTS, story.agent, second.agent if second else "")), kind
    if kind == "thing":
        return replace(short, thing=other(rng, OBJECTS, story.thing, second.thing if second else "")), kind
    if kind == "action":
        groups = [group for group in SYNONYMS if story.action not in group]
        return replace(short, action=rng.choice(rng.choice(groups))), kind
    if kind == "day":
        return replace(short, day=other(rng, DAYS, story.day)), kind
    return replace(short, place=other(rng, PLACES, story.place)), kind


def example(rng: random.Random) -> Example:
    """Draw a premise, a hypothesis, and whether the premise entails the hypothesis."""
    story = _story(rng)
    second = _unlike(rng, story) if rng.random() < 0.35 else None
    if second:
        story = replace(story, adjective="") if rng.random() < 0.5 else replace(story, place="")
        second = replace(second, adjective="", place="")
    clauses = [_write(rng, story)] + ([_clause(rng, second)] if second else [])
    target, rest = (story, second)
    if second and rng.random() < 0.5:
        target, rest = second, story
    premise = sentence(f" {rng.choice(('and', 'while'))} ".join(rng.sample(clauses, len(clauses))))
    if rng.random() < 0.5:
        short = _shorten(rng, target)
        kind = "kind" if short.thing != target.thing else "two" if second else "plain"
        return Example((premise, sentence(_clause(rng, short, passive=rng.random() < 0.2))), ENTAILED, kind)
    if rng.random() < 0.15:
        return Example((premise, sentence(_clause(rng, _shorten(rng, target), negated=True))), NOT_ENTAILED, "denied")
    wrong, kind = _falsify(rng, target, rest)
    return Example((premise, sentence(_clause(rng, wrong, passive=rng.random() < 0.2))), NOT_ENTAILED, kind)


def document(rng: random.Random) -> Document:
    """Draw two sentences about one event, and an unrelated sentence about a similar event."""
    story = _story(rng)
    first = sentence(_write(rng, story))
    second = sentence(_write(rng, _shorten(rng, story)))
    unrelated = sentence(_write(rng, _falsify(rng, story, None)[0]))
    return Document(first, second, unrelated)
