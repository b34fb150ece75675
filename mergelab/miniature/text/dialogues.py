"""Generate chats of two people and their summaries: the SAMSum-shaped text."""

from __future__ import annotations

import random

from mergelab.miniature.lexicon import DAYS, PERSONS, PLACES
from mergelab.miniature.text.phrases import SMALL_THINGS, fill_template

_FREE = {
    "excuse": ("the car is broken", "the bus is late", "the shop is closed", "there is too much work"),
    "hello": ("Hi", "Hello", "Good morning", "Hey"),
    "thanks": ("Thanks", "Thank you", "Great", "Perfect"),
    "bye": ("See you soon", "Bye", "See you then", "Take care"),
    "chat": (
        "How was the film",
        "How are the children",
        "Did you sleep well",
        "Is it warm in the garden",
    ),
    "answer": ("Very good", "Not bad", "I am a bit tired", "I had no time"),
}
_OPENING = "{first}: {hello} {second}! {chat}?\n{second}: {answer}.\n"
# Dialogues and their summaries. Names and things appear only in the dialogue; the summary omits small talk.
_TALKS = (
    (
        "{first}: Can you [bring|take] the {thing} to the {place} on {day}?\n{second}: Yes, [I will|of course].\n"
        "{first}: {thanks}!\n{second}: {bye}.",
        "{second} [will bring|is bringing] the {thing} to the {place} on {day}.",
    ),
    (
        "{first}: Can you [bring|take] the {thing} to the {place} on {day}?\n"
        "{second}: [Sorry, I cannot|No], {excuse}.\n{first}: [What a pity|Never mind].",
        "{second} cannot bring the {thing} to the {place} [because|as] {excuse}.",
    ),
    (
        "{first}: [Shall we|Do you want to] meet in the {place} on {other_day}?\n"
        "{second}: [Better|Can we meet] on {day}, {excuse}.\n{first}: [Fine|All right].\n{second}: {bye}.",
        "{first} and {second} [will meet|are meeting] in the {place} on {day}.",
    ),
    (
        "{first}: I [lost|forgot] the {thing} [yesterday|on {day}].\n{second}: Did you look in the {place}?\n"
        "{first}: [Not yet|No].\n{second}: I will [go and look|look for it] there.\n{first}: {thanks}!",
        "{first} [lost|has lost] the {thing}. {second} will look for it in the {place}.",
    ),
    (
        "{first}: What shall we [buy|get] for {third}?\n{second}: [Maybe|Perhaps] a {other_thing}?\n"
        "{first}: No, a {thing} is better.\n{second}: [Fine|All right], I will buy it on {day}.",
        "{second} [will buy|is buying] a {thing} for {third} on {day}.",
    ),
    (
        "{first}: Are you coming to the {place} on {day}?\n{second}: Yes, {third} is coming too.\n"
        "{first}: Please [bring|take] the {thing}.\n{second}: {bye}.",
        "{second} and {third} [will come|are coming] to the {place} on {day} with the {thing}.",
    ),
)


def example(rng: random.Random) -> tuple[str, str]:
    """Draw a dialogue and its summary."""
    first, second, third = rng.sample(PERSONS, 3)
    thing, other_thing = rng.sample(SMALL_THINGS, 2)
    day, other_day = rng.sample(DAYS, 2)
    fixed = {
        "first": first, "second": second, "third": third, "thing": thing, "other_thing": other_thing,
        "day": day, "other_day": other_day, "place": rng.choice(PLACES), "excuse": rng.choice(_FREE["excuse"]),
    }  # fmt: skip
    talk, summary = rng.choice(_TALKS)
    opening = _OPENING if rng.random() < 0.5 else ""
    slots = {**_FREE, **fixed}
    return fill_template(rng, opening + talk, slots), fill_template(rng, summary, slots)
