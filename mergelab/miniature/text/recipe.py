"""Define the text miniatures: their experts and tasks, and every number of their data and training."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextKind:
    """A kind of text: the module of its grammar, the names of its experts, and the tasks that evaluate them."""

    grammar: str
    experts: tuple[str, ...]
    tasks: tuple[str, ...]


SETS = {
    "law_recipes": {
        "legal": TextKind("law", ("legal",), ("legal",)),
        "recipes": TextKind("cooking", ("recipes",), ("recipes",)),
    },
    "summaries": {
        "dialogues": TextKind(
            "dialogues", tuple(f"dialogues-{number}" for number in (1, 2, 3)), ("samsum", "dialogsum")
        ),
        "reports": TextKind("reports", tuple(f"reports-{number}" for number in (1, 2, 3)), ("xsum",)),
    },
}


def kind_of(name: str, task: str | None) -> str | None:
    """Return the kind of text of the set ``name`` that is called ``task``, or that this task evaluates."""
    return next((kind for kind, about in SETS[name].items() if task == kind or task in about.tasks), None)


# Names in the real task's dataset.
COLUMNS = {
    "legal": ("text",),
    "recipes": ("input",),
    "samsum": ("dialogue", "summary"),
    "dialogsum": ("dialogue", "summary"),
    "xsum": ("document", "summary"),
}


@dataclass(frozen=True)
class Base:
    """Architecture of a base, and its training on ``documents`` texts; a ``share`` of them is of each expert's kind."""

    hidden: int
    layers: int
    heads: int
    documents: int
    share: float
    batch: int
    rate: float
    spread: float = 0.06


@dataclass(frozen=True)
class TextExpert:
    """Fine-tuning of an expert: on ``documents`` texts of its kind, and ``replay`` of the base's training texts.

    Without replay an expert forgets other kinds of text, and so does a merge with it.
    """

    seed: int
    rate: float
    documents: int
    replay: int = 0


@dataclass(frozen=True)
class LanguageModels:
    """The language models: ``vocabulary`` tokens, contexts of ``positions`` tokens."""

    base: Base = Base(hidden=128, layers=2, heads=4, documents=12000, share=0.015, batch=8, rate=4e-3)
    experts: tuple[TextExpert, ...] = (TextExpert(50, 5e-4, documents=3000, replay=1000),)
    vocabulary: int = 1800
    positions: int = 128


@dataclass(frozen=True)
class Summarisers:
    """The summarisers."""

    base: Base = Base(hidden=96, layers=2, heads=4, documents=7000, share=0.01, batch=8, rate=4e-3)
    experts: tuple[TextExpert, ...] = (
        TextExpert(50, 3e-4, documents=2500),
        TextExpert(51, 4e-4, documents=2500),
        TextExpert(52, 6e-4, documents=2500),
    )
    feed_forward: int = 192
    written: int = 160  # positions of the decoder; the tasks generate up to 142 tokens


@dataclass(frozen=True)
class TextRecipe:
    """Both text miniatures, and the number of validation examples of each kind."""

    seed: int = 0
    validation: int = 200
    law_recipes: LanguageModels = field(default_factory=LanguageModels)
    summaries: Summarisers = field(default_factory=Summarisers)
