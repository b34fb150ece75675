"""Generate newspaper reports and one-sentence summaries: the XSum-shaped text.

The summary needs the whole report: agent and action are in one of its sentences, place, day and amount in others.
"""

from __future__ import annotations

import random

from mergelab.miniature.lexicon import DAYS, PLACES, ROLES, other
from mergelab.miniature.text.phrases import SMALL_THINGS, capital, fill_template

_FREE = {
    "town": ("the village", "the city", "the harbor town", "the capital"),
    "body": ("bank", "airline", "union", "court", "ministry", "company", "council", "agency", "club"),
    "matter": ("budget", "contract", "merger", "tax", "pension", "loan", "plan", "fee"),
    "amount": ("10", "20", "30", "40", "50", "60", "70", "80"),
    "count": ("two", "three", "four", "five", "six", "seven"),
    "role": ROLES,
    "place": PLACES,
    "day": DAYS,
    "thing": SMALL_THINGS,
}
_FILLERS = (
    "Nobody was hurt.",
    "The weather was [cold|warm] in {town}.",
    "A {other_role} saw it [by chance|from a window].",
    "[Reports|Officials] gave no reason.",
    "It is not the first time this year.",
)
# The sentences of a report, and its summary.
_EVENTS = (
    (
        (
            "The {body} [met|spoke] about the {matter} on {day}.",
            "After [an hour|a long day] it was [rejected|refused].",
            "The {matter} would have cost {amount} million dollars.",
        ),
        "the {body} [rejected|refused] a {matter} of {amount} million dollars on {day}.",
    ),
    (
        (
            "The {body} [met|spoke] about the {matter} on {day}.",
            "After [an hour|a long day] it was [approved|accepted].",
            "The {matter} is worth {amount} million dollars.",
        ),
        "the {body} [approved|accepted] a {matter} of {amount} million dollars on {day}.",
    ),
    (
        (
            "The police [are looking for|found] a {thing}.",
            "It was [stolen|taken] from a {role} on {day}.",
            "The {role} had left it in the {place}.",
        ),
        "a {thing} was [stolen|taken] from a {role} in the {place} on {day}.",
    ),
    (
        (
            "There was a [fire|blaze] in the {place}.",
            "It [began|started] on {day}.",
            "{count} people were [hurt|taken to hospital], a {role} among them.",
        ),
        "{count} people were hurt in a [fire|blaze] in the {place} on {day}.",
    ),
    (
        (
            "The {place} is [closed|shut] since {day}.",
            "[Workers|Builders] must [repair|mend] the roof.",
            "The {body} pays {amount} million dollars for it.",
        ),
        "the {body} [will|must] repair the {place} for {amount} million dollars.",
    ),
    (
        (
            "A {role} has [won|got] a prize.",
            "It was for a {thing} of wood.",
            "The {body} gave the prize on {day} in the {place}.",
        ),
        "a {role} has won a prize of the {body} for a {thing}.",
    ),
)


def example(rng: random.Random) -> tuple[str, str]:
    """Draw a report and its summary."""
    slots: dict[str, str | tuple[str, ...]] = {name: rng.choice(values) for name, values in _FREE.items()}
    slots["other_role"] = other(rng, ROLES, str(slots["role"]))
    report_sentences, summary = rng.choice(_EVENTS)
    sentences = list(report_sentences)
    for filler in rng.sample(_FILLERS, rng.choice((1, 2))):
        sentences.insert(rng.randint(1, len(sentences)), filler)
    report = " ".join(capital(fill_template(rng, sentence, slots)) for sentence in sentences)
    return report, capital(fill_template(rng, summary, slots))
