"""Read a task's examples from the hub or from a folder of Parquet files, and check them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mergelab.errors import DataError, HubError, listed
from mergelab.tasks.labels import same_label
from mergelab.tasks.protocol import stratified_sample

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
Origin = Literal["hub", "folder", "mini"]


@dataclass(frozen=True)
class TaskData:
    """A task's examples, checked.

    ``texts`` has one text per column and example. ``labels`` (n,) are int64 in the order of ``spec.labels``, -1 where
    hidden, or float32 scores, NaN where hidden. ``parts`` (n,) is the position in ``spec.splits`` of the split that an
    example is from, ``idx`` (n,) its number there. ``fingerprint`` is the SHA-256 of texts and labels.
    """

    spec: TaskSpec
    texts: tuple[tuple[str, ...], ...]
    labels: Array
    idx: Array
    parts: Array
    split: str
    origin: Origin
    location: str
    fingerprint: str

    @property
    def labelled(self) -> bool:
        """Whether the labels are known, so that predictions can be scored."""
        return not bool((np.isnan(self.labels) if self.spec.is_regression else self.labels < 0).any())


@dataclass(frozen=True)
class _Rows:
    """One split's examples."""

    texts: list[tuple[str, ...]]
    labels: Array
    idx: Array


def load_data(
    spec: TaskSpec,
    *,
    data_dir: Path | str | None = None,
    origin: Origin | None = None,
    limit: int | None = None,
    split: str | None = None,
    seed: int = 0,
) -> TaskData:
    """Load the splits of a task, or the one named ``split``.

    Args:
        spec: the task; its dataset is asked from the hub (through its cache, honouring ``HF_HUB_OFFLINE`` and
            ``HF_ENDPOINT``) where there is no ``data_dir``.
        data_dir: a folder with ``<task>/<split>.parquet`` or ``<split>.parquet``, or the hub's shards
            ``<split>-00000-of-0000N.parquet`` in either place.
        origin: what the data are called in records; by default ``folder`` or ``hub``.
        limit: examples to keep of each split. They are drawn so that every label keeps its share, and stay in order.
        split: one split instead of the task's own.
        seed: of the draw.

    Raises:
        DataError: files, columns, texts or labels are missing or unusable. HubError: the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise DataError(f"task.limit={limit}: must be at least 1")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if split is not None:
        spec = replace(spec, splits=(split,))
    rows = [_from_hub(spec, name) if folder is None else _from_folder(spec, folder, name) for name in spec.splits]
    if limit is not None:
        rows = [_limited(part, limit, seed) for part in rows]
    texts = tuple(text for part in rows for text in part.texts)
    labels = np.concatenate([part.labels for part in rows])
    return TaskData(
        spec=spec,
        texts=texts,
        labels=labels,
        idx=np.concatenate([part.idx for part in rows]),
        parts=np.repeat(np.arange(len(rows)), [len(part.texts) for part in rows]),
        split="+".join(spec.splits),
        origin=origin or ("hub" if folder is None else "folder"),
        location=spec.path + (f"/{spec.config}" if spec.config else "") if folder is None else str(folder),
        fingerprint=_fingerprint(texts, labels),
    )


def _limited(rows: _Rows, limit: int, seed: int) -> _Rows:
    if limit >= len(rows.texts):
        return rows
    kept = stratified_sample(rows.labels, limit, seed)
    return _Rows([rows.texts[i] for i in kept], rows.labels[kept], rows.idx[kept])


def _fingerprint(texts: Sequence[tuple[str, ...]], labels: Array) -> str:
    digest = hashlib.sha256(labels.tobytes())
    for example in texts:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- hub, folder


def _from_hub(spec: TaskSpec, split: str) -> _Rows:
    import datasets

    from mergelab.models import hub

    where = f"{spec.path}{f'/{spec.config}' if spec.config else ''}"
    reachable = hub.reachable()
    try:
        with _no_bars(), contextlib.nullcontext() if reachable else hub.offline():
            found = datasets.load_dataset(spec.path, spec.config, split=split, revision=spec.revision)
    except Exception as error:  # the transport's own exceptions come from several libraries, by version
        if not reachable:
            message = f"the hub at {hub.endpoint()} cannot be reached, and the local cache does not have it"
            raise HubError(f"{spec.name}: cannot load {where}: {message}") from error
        kind = DataError if isinstance(error, ValueError) else HubError
        raise kind(f"{spec.name}: cannot load {where} from the hub: {_first_line(error)}") from error
    names = getattr(found.features.get(spec.label_column), "names", None)
    return _rows(spec, found.with_format("arrow")[:], names, f"{where}, split {split}")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep ``datasets`` from drawing progress bars."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_folder(spec: TaskSpec, folder: Path, split: str) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not folder.is_dir():
        raise DataError(f"task.data_dir={folder}: there is no such folder")
    files = _files(spec, folder, split)
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file, partitioning=None))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file}: not a readable Parquet file: {_first_line(error)}") from error
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(
            f"{spec.name}: the shards of {split} in {files[0].parent} differ: {_first_line(error)}"
        ) from error
    return _rows(spec, table, _class_names(spec, tables[0].schema), str(files[0]))


def _files(spec: TaskSpec, folder: Path, split: str) -> list[Path]:
    """Find the file or all the shards of a split."""
    for place in (folder / spec.name, folder):
        if (whole := place / f"{split}.parquet").is_file():
            return [whole]
        shards = sorted(place.glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
        if shards:
            count = int(shards[0].stem.rsplit("-", 1)[1])
            if len(shards) != count:
                raise DataError(f"{spec.name}: {place} has {len(shards)} of the {count} shards of {split}")
            return shards
    present = sorted(
        {
            re.sub(r"-\d+-of-\d+$", "", file.stem)
            for place in (folder / spec.name, folder)
            for file in place.glob("*.parquet")
        }
    )
    hint = f"; it has {listed(present)} (task.splits=[...] chooses)" if present else ""
    raise DataError(
        f"{spec.name}: no data of the split {split} in {folder} (looked for {spec.name}/{split}.parquet, "
        f"{split}.parquet and {split}-00000-of-NNNNN.parquet){hint}"
    )


def _class_names(spec: TaskSpec, schema: Any) -> list[str] | None:
    """Read the names of the label's classes from the metadata that ``datasets`` writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[spec.label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


# ------------------------------------------------------------------------------------------------------------- checking


def _rows(spec: TaskSpec, table: Any, names: Sequence[str] | None, where: str) -> _Rows:
    """Check a split's table and bring its labels into the task's order."""
    needed = [*spec.columns, spec.label_column]
    if missing := [column for column in needed if column not in table.column_names]:
        raise DataError(
            f"{spec.name}: {where} lacks the columns {listed(missing)}: needs {listed(needed)}, "
            f"has {listed(table.column_names)}"
        )
    if table.num_rows == 0:
        raise DataError(f"{spec.name}: {where} has no examples")
    texts = [_texts(spec, table[column], column, where) for column in spec.columns]
    labels = _scores(spec, table, where) if spec.labels is None else _classes(spec, table, names, where)
    has_idx = "idx" in table.column_names and table["idx"].null_count == 0
    idx = table["idx"].to_numpy() if has_idx else np.arange(table.num_rows)
    return _Rows(list(zip(*texts, strict=True)), labels, idx)


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
