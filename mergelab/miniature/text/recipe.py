"""What the text miniatures are made of, and how much is generated and trained: every number in one place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """A kind of text: the module with its grammar, the names of its experts, and the tasks that measure it."""

    grammar: str
    experts: tuple[str, ...]
    tasks: tuple[str, ...]


SETS = {
    "law_recipes": {
        "legal": Kind("law", ("legal",), ("legal",)),
        "recipes": Kind("cooking", ("recipes",), ("recipes",)),
    },
    "summaries": {
        "dialogues": Kind("dialogues", tuple(f"dialogues-{number}" for number in (1, 2, 3)), ("samsum", "dialogsum")),
        "reports": Kind("reports", tuple(f"reports-{number}" for number in (1, 2, 3)), ("xsum",)),
    },
}


def kind_of(name: str, task: str | None) -> str | None:
    """Return which kind of text of the set ``name`` is called ``task``, or is measured by the task of that name."""
    return next((kind for kind, about in SETS[name].items() if task == kind or task in about.tasks), None)


# As the real task's dataset calls them.
COLUMNS = {
    "legal": ("text",),
    "recipes": ("input",),
    "samsum": ("dialogue", "summary"),
    "dialogsum": ("dialogue", "summary"),
    "xsum": ("document", "summary"),
}


@dataclass(frozen=True)
class Base:
    """How a base is shaped, and trained on ``documents`` texts, a small ``share`` of them of each expert's kind."""

    hidden: int
    layers: int
    heads: int
    documents: int
    share: float
    batch: int
    rate: float
    spread: float = 0.06


@dataclass(frozen=True)
class Expert:
    """How an expert is fine-tuned: on ``documents`` texts of its kind, and ``replay`` of what the base was trained on.

    Without some replay an expert forgets what it does not see, and a merge with it forgets too.
    """

    seed: int
    rate: float
    documents: int
    replay: int = 0


@dataclass(frozen=True)
class LanguageModels:
    """The language models: ``vocabulary`` pieces, ``positions`` tokens at once."""

    base: Base = Base(hidden=128, layers=2, heads=4, documents=12000, share=0.015, batch=8, rate=4e-3)
    experts: tuple[Expert, ...] = (Expert(50, 5e-4, documents=3000, replay=1000),)
    vocabulary: int = 1800
    positions: int = 128


@dataclass(frozen=True)
class Summarisers:
    """The summarisers."""

    base: Base = Base(hidden=96, layers=2, heads=4, documents=7000, share=0.01, batch=8, rate=4e-3)
    experts: tuple[Expert, ...] = (
        Expert(50, 3e-4, documents=2500),
        Expert(51, 4e-4, documents=2500),
        Expert(52, 6e-4, documents=2500),
    )
    feed_forward: int = 192
    written: int = 160  # tokens that the decoder has room for; the tasks ask for up to 142


@dataclass(frozen=True)
class Recipe:
    """Both miniatures, and how many examples of each kind are held out."""

    seed: int = 0
    validation: int = 200
    law_recipes: LanguageModels = field(default_factory=LanguageModels)
    summaries: Summarisers = field(default_factory=Summarisers)
