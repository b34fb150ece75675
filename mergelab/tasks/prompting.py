r"""From an example to a prompt, and from what a model went on with to an answer.

A template names columns in braces: ``"Q: {question}\nA:"``. Worked examples may stand before it, from a text file with
an empty line between two of them. An answer is what the metrics compare: the whole text, the number that it ends with,
the word for a label, or a score; an answer that cannot be found is empty.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal

from mergelab.config import local_path
from mergelab.errors import ConfigError, did_you_mean, listed

AnswerKind = Literal["text", "number", "label", "score"]

_EXAMPLES = Path(__file__).resolve().parent / "prompts"

# A minus behind a digit, a letter or a bracket is a subtraction.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:[$€£]-?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
# Where a model that has answered starts to make up the next question.
_NEXT_QUESTION = re.compile(r"\n\s*(?:Q|Question)\s*:", re.IGNORECASE)
# A sentence ends with a point that is not inside a number, or with the line.
_STATED = re.compile(r"(?:####|\bthe answer is\b:?)(.*?\d.*?)(?:\.(?!\d)|\n|$)", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------- prompts


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, each once, in the order of their first use.

    Raises:
        ConfigError: a brace is not closed, braces hold something else than a column's name, or there are none.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"task.prompt={template!r}: {error} (a brace that is text is written twice: {{{{)") from None
    columns = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not re.fullmatch(r"[^\W\d]\w*", name) or spec or conversion:
            said = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ConfigError(f"task.prompt={template!r}: {{{said}}} must be a column's name, such as {{sentence}}")
        columns.append(name)
    if not columns:
        raise ConfigError(f"task.prompt={template!r}: must name a column in braces, such as {{sentence}}")
    return tuple(dict.fromkeys(columns))


def fill(template: str, row: Mapping[str, str], examples: Sequence[str] = ()) -> str:
    """Make the prompt of one example, behind worked ``examples`` where there are any."""
    return "\n\n".join([*examples, template.format_map(row)])


def fewshot_examples(name: str, count: int | None = None) -> tuple[str, ...]:
    """Read the first ``count`` worked examples (by default all) of a file.

    Args:
        name: a file that comes with the package (``gsm8k_cot``), or the path of another.
        count: how many.

    Raises:
        ConfigError: there is no such file, or it has fewer examples.
    """
    file = _EXAMPLES / f"{name}.txt" if re.fullmatch(r"\w+", name) else local_path(name, "task.fewshot_examples")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        ready = sorted(path.stem for path in _EXAMPLES.glob("*.txt"))
        raise ConfigError(
            f"task.fewshot_examples={name}: no readable text file, and no ready one{did_you_mean(name, ready)} "
            f"(there are {listed(ready)})"
        ) from None
    found = tuple(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())
    if not found:
        raise ConfigError(f"task.fewshot_examples={name}: has no worked examples")
    if count is not None and not 0 < count <= len(found):
        raise ConfigError(f"task.num_fewshot={count}: {name} has {len(found)} worked examples")
    return found[:count]


# ------------------------------------------------------------------------------------------------------------- answers


def answer(kind: AnswerKind, text: str, words: Sequence[str] = ()) -> str:
    """Find the answer in what a model wrote; empty where there is none.

    Args:
        kind: ``text`` takes all; ``number`` as `number` does; ``score`` a number that is all there is (Raffel et al.
            2020, arXiv:1910.10683); ``label`` one of ``words``, which must be all there is but for `plain_word`.
        text: the completion.
        words: those that stand for the labels.
    """
    if kind == "number":
        return number(text)
    plain = text.strip()
    if kind == "score":
        return plain if re.fullmatch(r"-?\d+(?:\.\d+)?", plain) else ""
    if kind == "label":
        said = plain_word(text)
        return next((word for word in words if plain_word(word) == said), "")
    return plain


def plain_word(text: str) -> str:
    """Leave out what does not tell one label's word from another: case, and what punctuation is around it."""
    return text.strip(" \t\r\n.,;:!?'\"`*").casefold()


def number(text: str) -> str:
    """Find the number that a worked solution ends with: of the first answer, without what may follow it.

    That is the last number of the first sentence with ``####`` or ``the answer is`` (GSM8K, Cobbe et al. 2021,
    arXiv:2110.14168; Wei et al. 2022, arXiv:2201.11903), else the last number before the next question. Commas and
    currency signs are left out, and so are zeros at a decimal fraction's end: ``$1,200.50`` is ``1200.5``.
    """
    first = _NEXT_QUESTION.split(text, maxsplit=1)[0]
    stated = _STATED.search(first)
    found = _NUMBER.findall(stated[1] if stated else first)
    if not found:
        return ""
    plain = f"{Decimal(re.sub(r'[,$€£]', '', found[-1])):f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


def score_text(score: float) -> str:
    """Write a score as text-to-text models are taught to: one digit after the point."""
    return f"{score:.1f}"
