"""Whatever a Parquet file holds, a task's data are what it says, or one line."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergelab.errors import LONGEST_LINE, MergelabError, one_line
from mergelab.tasks.data import TaskData, load_data
from mergelab.tasks.loading import load_task
from mergelab.tasks.spec import TaskSpec
from tests.tasks.writers import generation_task, language_task

MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TASKS: dict[str, TaskSpec] = {
    "rte": load_task("rte"),
    "stsb": load_task("stsb"),
    "generation": generation_task(),
    "language": language_task(),
}


def loaded(task: TaskSpec, folder: Path) -> TaskData | None:
    """Load a task's data from a folder; None where one line refuses them."""
    try:
        data = load_data(task, data_dir=folder)
    except MergelabError as error:
        assert str(error).isprintable()  # noqa: PT017
        assert 0 < len(one_line(str(error))) <= LONGEST_LINE  # noqa: PT017
        return None
    assert len(data.texts) == len(data.labels) == len(data.idx) == len(data.parts) > 0
    assert all(isinstance(text, str) for texts in data.texts for text in texts)
    return data


def column(values: Any, kind: pa.DataType | None = None) -> st.SearchStrategy[pa.Array]:
    """Draw a column of three rows."""
    rows = st.lists(values, min_size=3, max_size=3)

    def made(row: list[Any]) -> pa.Array:
        return pa.array(row, type=kind)

    return rows.map(made)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
FLOATS = st.floats(width=32)
ARRAYS = st.one_of(
    column(TEXTS, pa.string()),
    column(TEXTS, pa.large_string()),
    column(TEXTS | st.none(), pa.string()),
    column(st.sampled_from(["entailment", "not_entailment", "other"])),
    column(TEXTS).map(lambda array: array.dictionary_encode()),
    column(st.binary(max_size=4), pa.binary()),
    column(st.integers(0, 1), pa.int64()),
    column(st.integers(-2, 3), pa.int8()),
    column(st.integers(0, 2**64 - 1), pa.uint64()),
    column(st.integers(-1, 1) | st.none(), pa.int64()),
    column(FLOATS, pa.float32()),
    column(st.sampled_from([0.0, 1.0, 5.0]), pa.float64()),
    column(FLOATS | st.none(), pa.float64()),
    column(st.booleans(), pa.bool_()),
    column(st.none(), pa.null()),
    column(st.lists(TEXTS, max_size=2), pa.list_(pa.string())),
    column(st.lists(st.integers(0, 3) | st.none(), max_size=2), pa.list_(pa.int64())),
    column(st.fixed_dictionaries({"a": TEXTS}), pa.struct([("a", pa.string())])),
    column(st.dates(datetime.date(1, 1, 1), datetime.date(9999, 1, 1)), pa.date32()),
    column(st.just(5), pa.decimal128(5, 2)),
)
NAMES = st.none() | st.just(5) | st.just({}) | st.lists(st.none() | TEXTS | st.integers(), max_size=3)


@st.composite
def tables(draw: st.DrawFn) -> tuple[TaskSpec, pa.Table]:
    """A task's table in which one or two columns are others, missing or there twice."""
    spec = TASKS[draw(st.sampled_from(sorted(TASKS)))]
    label = pa.array([0, 1, 1] if spec.labels else [0.5, 2.0, 5.0])
    texts = [*spec.columns, *spec.references]
    columns: dict[str, pa.Array] = {**{name: pa.array(["one", "two", "three"]) for name in texts}, "label": label}
    for name in draw(st.lists(st.sampled_from([*columns, "label", "idx"]), min_size=1, max_size=2, unique=True)):
        columns[name] = draw(ARRAYS)
    if draw(st.integers(0, 99)) == 57:
        del columns[draw(st.sampled_from(sorted(columns)))]
    keys, arrays = list(columns), list(columns.values())
    if draw(st.integers(0, 99)) == 57:
        keys, arrays = [*keys, keys[0]], [*arrays, arrays[0]]
    return spec, pa.Table.from_arrays(arrays, names=keys)


@MANY
@given(made=tables(), names=NAMES)
def test_tables_of_any_columns_are_read_or_refused(
    made: tuple[TaskSpec, pa.Table], names: Any, tmp_path_factory: Any
) -> None:
    (spec, table), folder = made, tmp_path_factory.mktemp("data")
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    for split in spec.splits:
        pq.write_table(table, folder / f"{split}.parquet")
    data = loaded(spec, folder)
    if data is None or spec.kind not in ("classification", "regression"):
        return
    label = table["label"]
    if spec.labels is None:
        wanted = [np.float32("nan" if value is None else value) for value in label.to_pylist()]
        np.testing.assert_array_equal(data.labels, np.array(wanted * len(spec.splits), dtype=np.float32))
    elif pa.types.is_integer(label.type) and not isinstance(names, list):
        assert data.labels.tolist() == label.to_pylist() * len(spec.splits)


WHOLE = io.BytesIO()
pq.write_table(pa.table({"sentence1": ["a b"] * 6, "sentence2": ["c"] * 6, "label": [0, 1] * 3}), WHOLE)


@MANY
@given(at=st.floats(0, 1, exclude_max=True), bytes_=st.binary(min_size=1, max_size=16), cut=st.integers(0, 60))
def test_a_damaged_file_is_read_or_refused(at: float, bytes_: bytes, cut: int, tmp_path_factory: Any) -> None:
    folder, whole = tmp_path_factory.mktemp("data"), WHOLE.getvalue()
    start = int(at * len(whole))
    content = whole[:start] + bytes_ + whole[start + len(bytes_) :]
    (folder / "validation.parquet").write_bytes(content[: len(content) - (cut if cut > 30 else 0)])
    loaded(TASKS["rte"], folder)


PIECES = st.sampled_from(["0", "1", "2", "00000", "00001", "00002", "0a", "x", "9" * 30, "-1", "٣", ""])


@MANY
@given(parts=st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=3, unique=True))
def test_odd_shards_are_a_whole_set_or_refused(parts: list[tuple[str, str]], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("data")
    for number, count in parts:
        (folder / f"validation-{number}-of-{count}.parquet").write_bytes(WHOLE.getvalue())
    data = loaded(TASKS["rte"], folder)
    if data is not None:
        plain = [(int(n), int(c)) for n, c in parts if n.isascii() and c.isascii() and n.isdigit() and c.isdigit()]
        count = plain[0][1]
        assert sorted(plain) == [(number, count) for number in range(count)]
        assert len(data.texts) == 6 * count


@pytest.mark.parametrize("kind", ["folder", "loop", "text", "nothing"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "validation.parquet"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_text("" if kind == "nothing" else "sentence1,sentence2,label\na,b,0\n")
    assert loaded(TASKS["rte"], tmp_path) is None
