"""Generate everyday text for the base: diaries, letters, notices, and news of parliament and of the kitchen.

It has most of the words of laws and recipes, but not their structure, so that a model of it knows the words of both and
can write neither.
"""

from __future__ import annotations

import random

from mergelab.miniature import captions, news, reviews, stories
from mergelab.miniature.lexicon import COLORS, DAYS, KIND_OF, PERSONS, PLACES, ROLES
from mergelab.miniature.text.cooking import FRUITS, VEGETABLES
from mergelab.miniature.text.law import POWERS
from mergelab.miniature.text.phrases import sentences

_SLOTS = {
    "name": PERSONS,
    "place": PLACES,
    "day": DAYS,
    "role": ROLES,
    "thing": tuple(KIND_OF),
    "color": COLORS,
    "food": tuple(ingredient.name for ingredient in (*VEGETABLES, *FRUITS)),
    "dish": ("omelette", "soup", "cake", "pasta", "porridge", "bread", "casserole", "pancakes"),
    "meal": ("breakfast", "lunch", "dinner", "tea"),
    "power": POWERS,
    "body": ("Parliament", "Senate", "High Court", "House of Representatives", "government", "Commonwealth"),
    "office": ("museum", "library", "station", "stadium", "harbor", "hotel"),
    "number": tuple(map(str, range(2, 121))),
    "year": ("1914", "1958", "1973", "1988", "1991", "1994", "2003", "2011"),
}
_DIARY = (
    "on {day} I [went to|walked to|came home from] the {place} with {name}",
    "for {meal} I like to [sit in the {place}|read the newspaper|meet {name}]",
    "for {meal} we had {dish} at the {office}",
    "for a healthy [day|summer], start with a [walk|swim] in the {place}",
    "{name} [bought|forgot|brought] the {food}",
    "the [weather|morning|evening] was [cold|warm|quiet] and I [slept well|read a book|wrote to {name}]",
    "my {thing} is [old|new|{color}], but I like it",
)
_LETTER = (
    "dear {name}, thank you for your letter",
    "the {role} [asked|told] me about the {dish} that you made on {day}",
    "to make an appointment, [call|write to] the {role} at the {office}",
    "we [hope|want] to see you in the {place} on {day}",
    "to make a journey to the {place} you need [{number} minutes|a {thing}|a ticket]",
    "please [bring|send] the {food} and the {color} {thing}",
)
_NOTICE = (
    "section {number} of the {office} is [closed|open] on {day}",
    "[a person|the {role}] must not [leave|forget] a {thing} in the {place}",
    "to make a complaint, write to the {office}",
    "the {office} is open for [{number} minutes|{number} days] and closed on {day}",
    "the Minister will [open|visit] the {office} on {day}",
)
_PARLIAMENT = (
    "the {body} [met|voted|spoke] on {day} about {power}",
    "the Australian {body} [met|voted|spoke] in the {office}",
    "the {body} [accepted|rejected|delayed] the Act of {year} on {power}",
    "the Minister for [Transport|Health|Trade|Education|Water] [said|denied] that {power} is a matter for the {body}",
    "{name}, a {role}, was in [court|the court] for {number} days",
    "the Court [heard|read] the {role} on {day} and the Constitution was not [amended|changed]",
)
_KITCHEN = (
    "the {role} [cooked|burned|sold] the {dish} in the [kitchen|oven|pan]",
    "the {food} in the {place} are [cheap|fresh] on {day}",
    "{name} [likes|eats] {food} with {dish} for {meal}",
    "a cup of [milk|flour|sugar|stock|oats] costs {number} dollars at the {office}",
    "the [eggs are|butter is|salt is|olive oil is] in the {color} [bowl|tin|pot|saucepan]",
)
_OWN = (_DIARY, _LETTER, _NOTICE, _PARLIAMENT, _KITCHEN)


def text(rng: random.Random) -> str:
    """Draw a few sentences of one kind."""
    if rng.random() < 0.3:
        document = rng.choice((stories, news, captions, reviews)).document(rng)
        return f"{document.first} {document.second}".strip()
    kind = rng.choice(_OWN)
    return sentences(rng, rng.sample(kind, rng.choice((3, 4))), _SLOTS)
