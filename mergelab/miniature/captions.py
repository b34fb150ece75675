"""Generate captions of everyday scenes: the STS-B-shaped task.

The score of two captions, from 0 to 5, is the weighted share of agent, action, object and place that they have in
common, with partial credit for words of one family (a boy and a child), and with noise for the disagreement of human
raters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergelab.miniature.lexicon import COLORS, article, other, sentence, verb
from mergelab.miniature.record import Document, Example

COLUMNS = ("sentence1", "sentence2")

WHO = (
    ("man", "gentleman"),
    ("woman", "lady"),
    ("boy", "child"),
    ("girl", "kid"),
    ("dancer", "singer"),
    ("soldier", "guard"),
)
# Actions: their synonyms, and their objects in tuples of similar things.
SCENES: tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = (
    (("play",), (("guitar", "violin"), ("piano", "drum"))),
    (("ride",), (("horse", "pony"), ("bicycle", "motorcycle"))),
    (("cut", "slice"), (("apple", "pear"), ("onion", "carrot"))),
    (("carry", "hold"), (("box", "basket"), ("ball", "toy"))),
    (("eat",), (("cake", "pie"), ("banana", "peach"))),
    (("push", "pull"), (("cart", "wagon"), ("chair", "table"))),
    (("watch",), (("bird", "duck"), ("train", "boat"))),
    (("throw", "toss"), (("stone", "stick"), ("hat", "shoe"))),
)
WHERE = (
    ("in the park", "in the garden"),
    ("on the street", "on the road"),
    ("in the kitchen", "in the room"),
    ("by the river", "by the lake"),
    ("on the beach", "in the field"),
)
HOW = ("young", "old", "tall", "happy")
WEIGHTS = {"who": 1.4, "scene": 1.5, "thing": 1.3, "where": 0.8}


@dataclass(frozen=True)
class Scene:
    """Agent, action, object and place; ``scene`` is an index into `SCENES`, ``where`` may be empty."""

    who: str
    scene: int
    thing: str
    where: str = ""


def _family(groups: Sequence[Sequence[str]], word: str) -> Sequence[str]:
    return next((group for group in groups if word in group), (word,))


def _things(scene: int) -> list[str]:
    return [thing for group in SCENES[scene][1] for thing in group]


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [word for group in groups for word in group]


def _scene(rng: random.Random) -> Scene:
    scene = rng.randrange(len(SCENES))
    where = rng.choice(_flat(WHERE)) if rng.random() < 0.6 else ""
    return Scene(rng.choice(_flat(WHO)), scene, rng.choice(_things(scene)), where)


def _caption(rng: random.Random, scene: Scene) -> str:
    action = verb(rng.choice(SCENES[scene.scene][0]))
    who = article(f"{rng.choice(HOW)} {scene.who}" if rng.random() < 0.3 else scene.who)
    thing = article(f"{rng.choice(COLORS)} {scene.thing}" if rng.random() < 0.3 else scene.thing)
    if rng.random() < 0.15:
        return sentence(thing, "is being", action.participle, "by", who, scene.where)
    return sentence(who, "is", action.ing, thing, scene.where)


def _alter(rng: random.Random, scene: Scene, part: str) -> Scene:
    """Change one part of ``scene``, in half of the cases to a word of the same family."""
    near = rng.random() < 0.5
    if part == "who":
        family = _family(WHO, scene.who)
        return replace(scene, who=other(rng, family if near else _flat(WHO), scene.who))
    if part == "where":
        family = _family(WHERE, scene.where) if near and scene.where else _flat(WHERE)
        return replace(scene, where="" if scene.where and rng.random() < 0.4 else other(rng, family, scene.where))
    if part == "thing":
        family = _family(SCENES[scene.scene][1], scene.thing)
        return replace(scene, thing=other(rng, family if near else _things(scene.scene), scene.thing))
    number = rng.choice([number for number in range(len(SCENES)) if number != scene.scene])
    return replace(scene, scene=number, thing=rng.choice(_things(number)))


def similarity(first: Scene, second: Scene) -> float:
    """Return the similarity of two scenes, from 0 to 5."""
    shared = WEIGHTS["who"] * _alike(WHO, first.who, second.who)
    shared += WEIGHTS["where"] * _alike(WHERE, first.where, second.where)
    if first.scene == second.scene:
        shared += WEIGHTS["scene"] + WEIGHTS["thing"] * _alike(SCENES[first.scene][1], first.thing, second.thing)
    return shared


def _alike(groups: Sequence[Sequence[str]], first: str, second: str) -> float:
    if first == second:
        return 1.0
    if not first or not second:
        return 0.5
    return 0.6 if second in _family(groups, first) else 0.0


def example(rng: random.Random) -> Example:
    """Draw two captions and their similarity score, as the mean of a few raters would give it."""
    first = _scene(rng)
    changes = rng.choices(range(5), weights=(18, 25, 25, 20, 12))[0]
    second = first
    for part in rng.sample(("who", "scene", "thing", "where"), min(changes, 4)):
        second = _alter(rng, second, part)
    score = similarity(first, second) + rng.gauss(0.0, 0.35)
    rated = round(min(5.0, max(0.0, score)) * 5) / 5
    return Example((_caption(rng, first), _caption(rng, second)), rated, f"changed {changes}")


def document(rng: random.Random) -> Document:
    """Draw two captions of one scene, and an unrelated caption of another scene."""
    scene = _scene(rng)
    unrelated = scene
    for part in rng.sample(("who", "scene", "thing", "where"), 2):
        unrelated = _alter(rng, unrelated, part)
    return Document(_caption(rng, scene), _caption(rng, scene), _caption(rng, unrelated))
