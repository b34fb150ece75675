"""A split's table as examples: what a model gets, and what it is to answer, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import DataError, listed
from mergelab.tasks.labels import same_label
from mergelab.tasks.prompting import answer, fill, score_text
from mergelab.tasks.splits import stratified_sample

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TaskRows:
    """One split's examples, as `mergelab.tasks.data.TaskData` has them."""

    texts: list[tuple[str, ...]]
    labels: Array
    idx: Array
    references: Array | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, members: Array) -> TaskRows:
        """Return the examples at the positions ``members`` (m,)."""
        references = None if self.references is None else self.references[members]
        return TaskRows([self.texts[i] for i in members], self.labels[members], self.idx[members], references)

    def first(self, limit: int) -> TaskRows:
        """Return the first ``limit`` examples."""
        return self.take(np.arange(min(limit, len(self))))

    def sample(self, limit: int, seed: int) -> TaskRows:
        """Draw ``limit`` examples, every label in its share, where there are more."""
        return self if limit >= len(self) else self.take(stratified_sample(self.labels, limit, seed))


def read_rows(spec: TaskSpec, table: Any, names: Sequence[str] | None, where: str) -> TaskRows:
    """Check a split's table and make the task's examples of it.

    Args:
        table: an Arrow table.
        names: of the label's classes, where the data have them.
        where: what errors call the table.

    Raises:
        DataError: columns are missing, or what they hold is not usable.
    """
    answers = [] if spec.kind == "language_modelling" else spec.references or [spec.label_column]
    needed = list(dict.fromkeys([*spec.columns, *answers, *filter(None, [spec.group_by])]))
    if missing := [column for column in needed if column not in table.column_names]:
        raise DataError(
            f"{spec.name}: {where} lacks the columns {listed(missing)}: needs {listed(needed)}, "
            f"has {listed(table.column_names)}"
        )
    if table.num_rows == 0:
        raise DataError(f"{spec.name}: {where} has no examples")
    has_idx = "idx" in table.column_names and table["idx"].null_count == 0
    idx = table["idx"].to_numpy() if has_idx else np.arange(table.num_rows)
    texts = [_texts(spec, table[column], column, where) for column in spec.columns]
    if spec.kind == "language_modelling":
        return _running_text(spec, texts[0], idx, where)
    if spec.kind == "generation":
        return _prompted(spec, table, names, list(zip(*texts, strict=True)), idx, where)
    labels = _scores(spec, table, where) if spec.labels is None else _classes(spec, table, names, where)
    return TaskRows(list(zip(*texts, strict=True)), labels, idx)


# ------------------------------------------------------------------------------------------------------ language models


def _running_text(spec: TaskSpec, texts: Sequence[str], idx: Array, where: str) -> TaskRows:
    """Make an example of each row with words; blank ones stand, with what joins rows, before the next."""
    found: list[tuple[str, str]] = []
    before, kept = "", []
    for row, text in enumerate(texts):
        if text.strip():
            found.append((before, text))
            kept.append(row)
            before = ""
        elif spec.join is not None:
            before += text
        if spec.join is not None and row + 1 < len(texts):
            before += spec.join
    if not found:
        raise DataError(f"{spec.name}: {where}: no row has any words")
    if before:
        found[-1] = (found[-1][0], found[-1][1] + before)
    return TaskRows(list(found), np.zeros(len(found), dtype=np.int64), idx[kept])


# ----------------------------------------------------------------------------------------------------------- generation


def _prompted(
    spec: TaskSpec,
    table: Any,
    names: Sequence[str] | None,
    texts: Sequence[tuple[str, ...]],
    idx: Array,
    where: str,
) -> TaskRows:
    """Make an example of each row, or of each group of rows, with its prompt and its references."""
    labels: Array = np.zeros(len(texts), dtype=np.int64)
    said: list[tuple[str, ...]]
    if spec.labels is not None:
        labels, words = _classes(spec, table, names, where), spec.verbalizer or spec.labels
        said = [(words[label],) if label >= 0 else () for label in labels.tolist()]
    else:
        said = _references(spec, table, where)
        if spec.answer == "score":
            labels = np.array([float(answers[0]) for answers in said], dtype=np.float32)
    members = [[row] for row in range(len(texts))]
    if spec.group_by is not None:
        groups: dict[Any, list[int]] = {}
        for row, value in enumerate(table[spec.group_by].to_pylist()):
            groups.setdefault(value, []).append(row)
        members = list(groups.values())
    firsts = [rows[0] for rows in members]
    prompts: list[tuple[str, ...]] = [
        (fill(spec.prompt, dict(zip(spec.columns, texts[row], strict=True)), spec.fewshot_examples),) for row in firsts
    ]
    references = np.empty(len(members), dtype=object)
    references[:] = [tuple(text for row in rows for text in said[row]) for rows in members]
    if (labels < 0).all() and spec.labels is not None:  # hidden, as in GLUE's test splits
        return TaskRows(prompts, labels, idx)
    return TaskRows(prompts, labels[firsts], idx[firsts], references)


def _references(spec: TaskSpec, table: Any, where: str) -> list[tuple[str, ...]]:
    """Read each row's reference texts, and find the answers in them."""
    found: list[list[str]] = [[] for _ in range(table.num_rows)]
    for name in spec.references:
        for texts, value in zip(found, table[name].to_pylist(), strict=True):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, int | float) and spec.answer == "score":
                    each = score_text(each)
                if each is not None and not isinstance(each, str):
                    raise DataError(
                        f"{spec.name}: {where}: the column {name} must hold texts or lists of texts, it holds "
                        f"{table[name].type}"
                    )
                if each and (said := answer(spec.answer, each)):
                    texts.append(said)
    if lacking := [row for row, texts in enumerate(found) if not texts]:
        raise DataError(
            f"{spec.name}: {where}: {len(lacking)} of {len(found)} rows have no reference in {listed(spec.references)} "
            f"(answer: {spec.answer}), the first is row {lacking[0]}"
        )
    return [tuple(texts) for texts in found]


# ---------------------------------------------------------------------------------------------------------- classifiers


def _texts(spec: TaskSpec, column: Any, name: str, where: str) -> list[str]:
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{spec.name}: {where}: the column {name} must hold text, it holds {column.type}")
    if column.null_count:
        raise DataError(f"{spec.name}: {where}: the column {name} has {column.null_count} empty (null) texts")
    found: list[str] = column.to_pylist()
    return found


def _scores(spec: TaskSpec, table: Any, where: str) -> Array:
    """Read a regression's labels (n,) as float32; a split without any stays unlabelled."""
    import pyarrow as pa

    column = table[spec.label_column]
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise DataError(
            f"{spec.name}: {where}: the column {spec.label_column} must hold numbers, it holds {column.type}"
        )
    scores: Array = column.cast(pa.float32(), safe=False).to_numpy()
    if not np.isfinite(scores).all() and not np.isnan(scores).all():
        raise DataError(f"{spec.name}: {where}: the column {spec.label_column} has scores that are not finite numbers")
    return scores


def _classes(spec: TaskSpec, table: Any, names: Sequence[str] | None, where: str) -> Array:
    """Read class labels (n,) as int64 positions in ``spec.labels``; -1 throughout where they are hidden."""
    import pyarrow as pa

    column, labels = table[spec.label_column], spec.labels or ()
    if column.null_count:
        raise DataError(f"{spec.name}: {where}: the column {spec.label_column} has {column.null_count} null labels")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.combine_chunks().dictionary_encode()
        names, values = column.dictionary.to_pylist(), column.indices.to_numpy()
        # A sample of the data need not show every label.
        to_task = [_position(spec, name, where) for name in names]
    elif pa.types.is_integer(column.type):
        values = column.to_numpy()
        to_task = _class_order(spec, names, where)
    else:
        raise DataError(
            f"{spec.name}: {where}: the column {spec.label_column} must hold class numbers or names, "
            f"it holds {column.type}"
        )
    if (values == -1).all():
        return np.full(len(values), -1, dtype=np.int64)
    if (wrong := np.flatnonzero((values < 0) | (values >= len(to_task)))).size:
        raise DataError(
            f"{spec.name}: {where}: label {values[wrong[0]]} in row {wrong[0]} is outside 0 to {len(labels) - 1} "
            f"({listed(labels)})"
        )
    found: Array = np.asarray(to_task, dtype=np.int64)[values]
    return found


def _class_order(spec: TaskSpec, names: Sequence[str] | None, where: str) -> list[int]:
    """Say which of the task's labels each class number of the data is."""
    labels = spec.labels or ()
    if names is None:
        return list(range(len(labels)))
    order = [_position(spec, name, where) for name in names]
    if sorted(order) != list(range(len(labels))):
        raise DataError(f"{spec.name}: {where} has {len(names)} classes ({listed(names)}), not {listed(labels)}")
    return order


def _position(spec: TaskSpec, name: str, where: str) -> int:
    labels = spec.labels or ()
    for position, label in enumerate(labels):
        if same_label(name, label):
            return position
    raise DataError(f"{spec.name}: {where} has the label {name!r}, which is none of {listed(labels)}")
