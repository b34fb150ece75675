"""Bring a model's outputs into the order of a task's labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergelab.errors import DataError, listed

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

# How models on the hub call GLUE's labels, besides the dataset's own names.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "negative": ("neg",),
    "positive": ("pos",),
    "acceptable": ("grammatical",),
    "unacceptable": ("ungrammatical", "notacceptable"),
    "equivalent": ("paraphrase", "isparaphrase"),
    "notequivalent": ("notparaphrase", "nonparaphrase"),
    "duplicate": ("duplicated", "paraphrase", "isduplicate"),
    "notduplicate": ("notparaphrase", "nonduplicate"),
    "entailment": ("entail", "entails", "entailed"),
    "notentailment": ("nonentailment", "noentailment", "notentail"),
    "contradiction": ("contradict", "contradicts", "contradictory"),
}
_NUMBERED = re.compile(r"(?:label)?(\d+)")


def same_label(first: str, second: str) -> bool:
    """Return whether two spellings name one label: case and separators aside, or by a known synonym."""
    a, b = _plain(first), _plain(second)
    return a == b or a in _SYNONYMS.get(b, ()) or b in _SYNONYMS.get(a, ())


def label_order(
    spec: TaskSpec, id2label: Mapping[int, str], *, model: str, override: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Find, for each of the task's labels in the dataset's order, the model's output that stands for it.

    Args:
        spec: the task.
        id2label: the model's name for each output. ``LABEL_0`` or ``"0"`` means the dataset's label 0.
        model: what an error calls the model.
        override: the task's label names in the order of the model's outputs; ``id2label`` then does not count.

    Raises:
        DataError: the number of labels differs, or the names cannot be matched one to one.
    """
    names = [str(id2label[key]) for key in sorted(id2label, key=int)]
    if spec.labels is None:
        if len(names) != 1:
            raise DataError(f"{model} has {len(names)} outputs ({listed(names)}), {spec.name} needs one, a score")
        return (0,)
    wanted = f"{spec.name}'s labels ({listed(spec.labels)})"
    if len(names) != len(spec.labels):
        raise DataError(f"{model} has {len(names)} labels ({listed(names)}), which do not fit {wanted}")
    if override is not None:
        order = matched_order(spec.labels, override)
        if order is None:
            raise DataError(f"{model}: the given labels ({listed(override)}) are not {wanted} in some order")
        return order
    order = matched_order(spec.labels, names) or numbered_order(names)
    if order is None:
        raise DataError(
            f"{model}'s labels ({listed(names)}) cannot be matched with {wanted}; "
            "give the task's names in the order of the model's outputs"
        )
    return order


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def matched_order(labels: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Find the position in ``names`` of each label; ``None`` unless all of both are matched one to one."""
    found = [[row for row, name in enumerate(names) if same_label(name, label)] for label in labels]
    order = tuple(rows[0] for rows in found if len(rows) == 1)
    return order if len(order) == len(set(order)) == len(labels) == len(names) else None


def numbered_order(names: Sequence[str]) -> tuple[int, ...] | None:
    """Find the position of each number in names that only number the labels; ``None`` for other names."""
    numbers = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(_plain(name)))]
    if sorted(numbers) != list(range(len(names))):
        return None
    return tuple(numbers.index(label) for label in range(len(names)))
