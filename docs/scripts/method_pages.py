"""The pages of *Methods*: one for each family, written from the methods' functions and declarations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from mergelab.engine.catalogue import Entry, entries

_ARGUMENT = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n     .*)*)", re.MULTILINE)
_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.MULTILINE)
_CODE = re.compile(r"``(.+?)``|`(.+?)`", re.DOTALL)
_NEEDS = {
    "B": "a base model",
    "D": "training examples of each expert",
    "G": "gradients",
    "S": "examples that select",
    "L": "experts that are LoRA adapters",
    "2": "exactly two experts",
}

_INDEX = """\
# Methods

<!-- Written by `make reference`; do not edit. -->

mergelab has {count} merge methods. `method=NAME` chooses one, and `method.<parameter>=` sets its parameters. Each page
below describes one family: the formula, what a method needs and costs, its defaults beside the values of the authors'
code, and the paper. `python -m mergelab.methods` prints the same in a terminal.

- **Which one?** Begin with `soup` for experts of one task and with `task_arithmetic` or `ties` for experts of several
  tasks. They need no data and take seconds. [Results](../results/methods.md) compares all methods on the miniature.
- **Base.** A method that adds up task vectors needs the model that the experts were fine-tuned from.
- **Data.** A method that needs examples reads them from the training split of each expert's own task. From Python they
  may also be [given](../python/index.md).
- **Notation.** θ0 is the base, θ_t the expert t of T, τ_t = θ_t − θ0 its task vector, w_t its weight, and λ the scale
  of the merged task vector.
- **Tested.** [Parity](../../experiments/PARITY.md) lists how far each method is from other implementations of it.

Every parameter that is a number may also be given by layer or by tensor name:
[Parameters by layer, tensor and expert](../guides/method-parameters.md).
"""


def pages() -> dict[str, str]:
    """Return the pages' texts by their paths below docs/."""
    found = entries()
    written = {"methods/index.md": _index(found)}
    for family, members in groupby(found, key=lambda each: each.family):
        written[f"methods/{slug(family)}.md"] = _family(family, list(members))
    return written


def slug(family: str) -> str:
    """Return the name of a family's page."""
    return family.replace(" ", "-")


def cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, with nothing in it read as markup except code."""
    return plain(text).replace("|", "\\|").replace("\n", " ")


def plain(text: str) -> str:
    """Return a docstring's text as Markdown: names in backticks are code, all other signs are themselves."""
    kept, at = "", 0
    for found in _CODE.finditer(text):
        name = found[1] or found[2]
        code = name.rsplit(".", 1)[-1] if name.startswith("mergelab.") and found[2] else name
        kept += _escaped(text[at : found.start()]) + f"`{' '.join(code.split())}`"
        at = found.end()
    return kept + _escaped(text[at:])


def _escaped(text: str) -> str:
    return re.sub(r"([*_<\[\]#])", r"\\\1", text)


def _index(found: list[Entry]) -> str:
    lines = [_INDEX.format(count=len(found))]
    for family, members in groupby(found, key=lambda each: each.family):
        lines += [f"\n## [{family[:1].upper()}{family[1:]}]({slug(family)}.md)\n"]
        lines += ["| method | needs | use it for | paper |", "| --- | --- | --- | --- |"]
        lines += [
            f"| [`{each.name}`]({slug(family)}.md#{each.name}) | {_needs(each)} | {cell(each.method.use)} | "
            f"{cell(each.paper)} |"
            for each in members
        ]
    return "\n".join(lines) + "\n"


def _needs(each: Entry) -> str:
    return ", ".join(_NEEDS[letter] for letter in each.needs.split()) or "experts only"


def _family(family: str, members: list[Entry]) -> str:
    lines = [f"# {family[:1].upper()}{family[1:]}\n", "<!-- Written by `make reference`; do not edit. -->"]
    for each in members:
        lines += ["", *_method(each)]
    return "\n".join(lines) + "\n"


def _method(each: Entry) -> Iterator[str]:
    prose = _SECTIONS.split(each.method.documentation, maxsplit=1)[0].strip()
    summary, *paragraphs = prose.split("\n\n")
    yield f"## `{each.name}` {{ #{each.name} }}\n"
    yield f"{plain(' '.join(summary.split()))}\n"
    for number, paragraph in enumerate(paragraphs):
        heading = re.match(r"(?P<name>Departures?|Cost): ", paragraph)
        label = "Formula" if number == 0 and heading is None else heading["name"] if heading else ""
        body = paragraph[heading.end() :] if heading else paragraph
        body = body[:1].upper() + body[1:] if heading else body
        yield f"{f'**{label}.** ' if label else ''}{plain(body)}\n"
    yield from _facts(each)
    yield from _parameters(each)


def _facts(each: Entry) -> Iterator[str]:
    facts = {
        "Use it for": each.method.use,
        "Needs": _needs(each),
        "Data": each.data,
        "Cost": each.cost,
        "Memory": each.memory,
        "From disk to disk": each.streaming,
        "Paper": each.paper,
    }
    yield "\n".join(f"- **{name}:** {plain(text)}" for name, text in facts.items() if text) + "\n"


def _parameters(each: Entry) -> Iterator[str]:
    described = {found["name"].removesuffix("_"): found["text"] for found in _ARGUMENT.finditer(_documented(each))}
    if not each.settable:
        yield "No parameters."
        return
    yield "| parameter | default | authors' | values | meaning |\n| --- | --- | --- | --- | --- |"
    for one in each.settable:
        meaning = " ".join(described[one.name].split())
        authors = one.of_authors if one.departs else ""
        yield f"| `{one.name}` | {cell(one.shown)} | {cell(authors)} | {cell(one.allowed)} | {cell(meaning)} |"


def _documented(each: Entry) -> str:
    """Return the sections of arguments and attributes alone."""
    parts = _SECTIONS.split(each.method.documentation)
    return "\n".join(
        text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name in ("Args", "Attributes")
    )
