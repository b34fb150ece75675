"""Read a task's examples from the hub or from a folder of Parquet files."""

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

from mergelab.config import local_path
from mergelab.errors import DataError, HubError, listed
from mergelab.tasks.rows import TaskRows, read_rows

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
# What follows the split in a shard's name, as ``datasets`` writes it.
_SHARD = re.compile(r"-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)")
Origin = Literal["hub", "folder", "mini", "given"]


@dataclass(frozen=True)
class TaskData:
    """A task's examples, checked.

    Attributes:
        texts: what a model gets of each example: for a classifier one text or a pair, for a generator the prompt; for
            language modelling what stands between the example before and this one, and the text that is scored.
        labels: (n,) int64 in the order of ``spec.labels``, -1 where hidden, or float32 scores, NaN where hidden; zeros
            where there is nothing to divide the examples by.
        idx: (n,) an example's number in its split.
        parts: (n,) the position in ``spec.splits`` of the split that an example is from.
        fingerprint: the SHA-256 of texts, labels and references.
        references: (n,) of tuples of texts, the answers that generated texts are compared with; ``None``: there are
            none.
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
    references: Array | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, members: Array) -> TaskData:
        """Return the examples at the positions ``members`` (m,); the fingerprint stays that of all."""
        return replace(
            self,
            texts=tuple(self.texts[at] for at in members),
            labels=self.labels[members],
            idx=self.idx[members],
            parts=self.parts[members],
            references=None if self.references is None else self.references[members],
        )

    @property
    def truth(self) -> Array:
        """What a model's outputs are compared with: (n,) labels, or tuples of reference texts."""
        return self.labels if self.references is None else self.references

    @property
    def labelled(self) -> bool:
        """Whether the labels are known, so that predictions can be scored."""
        return not bool((np.isnan(self.labels) if self.spec.is_regression else self.labels < 0).any())


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
        limit: examples to keep of each split. They are drawn so that every label keeps its share, and stay in order; of
            rows that are read as one text they are the first.
        split: one split instead of the task's own.
        seed: of the draw.

    Raises:
        DataError: files, columns, texts or labels are missing or unusable. HubError: the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise DataError(f"task.limit={limit}: must be at least 1")
    if spec.kind == "prompts":
        return _prompts(spec, limit)
    if spec.kind == "lm_eval":
        return _lm_eval_data(spec)
    folder = None if data_dir is None else local_path(str(data_dir), "task.data_dir")
    if split is not None:
        spec = replace(spec, splits=(split,))
    rows = [_from_hub(spec, name) if folder is None else _from_folder(spec, folder, name) for name in spec.splits]
    if limit is not None:
        # TaskRows that are read as one text stay together.
        rows = [part.sample(limit, seed) if spec.join is None else part.first(limit) for part in rows]
    texts = tuple(text for part in rows for text in part.texts)
    labels = np.concatenate([part.labels for part in rows])
    references = np.concatenate([part.references for part in rows if part.references is not None] or [labels[:0]])
    return TaskData(
        spec=spec,
        texts=texts,
        labels=labels,
        idx=np.concatenate([part.idx for part in rows]),
        parts=np.repeat(np.arange(len(rows)), [len(part.texts) for part in rows]),
        split="+".join(spec.splits),
        origin=origin or ("hub" if folder is None else "folder"),
        location=spec.path + (f"/{spec.config}" if spec.config else "") if folder is None else str(folder),
        fingerprint=_fingerprint(texts, labels, references),
        references=references if len(references) else None,
    )


def _prompts(spec: TaskSpec, limit: int | None) -> TaskData:
    """Take the prompts that the configuration lists, or those of the file that it names, one a line.

    Raises:
        DataError: the file cannot be read, or holds none.
    """
    texts = [text for text in spec.prompts if text.strip()]
    if spec.file is not None:
        file = local_path(spec.file, "task.file")
        try:
            texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"task.file={spec.file}: cannot be read: {_first_line(error)}") from error
        if not texts:
            raise DataError(f"task.file={spec.file}: holds no prompt; it needs one on each line")
    rows = tuple((text,) for text in texts[:limit])
    zeros = np.zeros(len(rows), dtype=np.int64)
    return TaskData(
        spec, rows, zeros, np.arange(len(rows)), zeros, "prompts", "given", spec.file or "task.prompts",
        _fingerprint(rows, zeros, zeros[:0]),
    )  # fmt: skip


def _lm_eval_data(spec: TaskSpec) -> TaskData:
    """Take the documents of lm-eval's tasks; those of each task are a class, so that every choice has its share."""
    from mergelab.tasks.lm_eval import documents

    texts, tasks, numbers, fingerprint = documents(spec)
    rows, zeros = tuple((text,) for text in texts), np.zeros(len(texts), np.int64)
    return TaskData(
        spec, rows, tasks, numbers, zeros, listed(spec.lm_eval_tasks), "given", "lm-eval", fingerprint
    )  # fmt: skip


def _fingerprint(texts: Sequence[tuple[str, ...]], labels: Array, references: Array) -> str:
    digest = hashlib.sha256(labels.tobytes())
    for example in (*texts, *references):
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- hub, folder


def _from_hub(spec: TaskSpec, split: str) -> TaskRows:
    import datasets

    from mergelab.models import hub

    where, part = f"{spec.path}{f'/{spec.config}' if spec.config else ''}", spec.slices.get(split, split)
    reachable = hub.reachable()
    try:
        with _no_bars(), contextlib.nullcontext() if reachable else hub.offline():
            found = datasets.load_dataset(spec.path, spec.config, split=part, revision=spec.revision)
    except Exception as error:  # the transport's own exceptions come from several libraries, by version
        if not reachable:
            message = f"the hub at {hub.endpoint()} cannot be reached, and the local cache does not have it"
            raise HubError(f"{spec.name}: cannot load {where}: {message}") from error
        kind = DataError if isinstance(error, ValueError) else HubError
        raise kind(f"{spec.name}: cannot load {where} from the hub: {_first_line(error)}") from error
    names = getattr(found.features.get(spec.label_column), "names", None)
    return read_rows(spec, found.with_format("arrow")[:], names, f"{where}, split {part}")


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


def _from_folder(spec: TaskSpec, folder: Path, split: str) -> TaskRows:
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
    return read_rows(spec, table, _class_names(spec, tables[0].schema), str(files[0]))


def _files(spec: TaskSpec, folder: Path, split: str) -> list[Path]:
    """Find the file or all the shards of a split."""
    places = _places(spec, folder)
    for place in places:
        if (whole := place / f"{split}.parquet").is_file():
            return [whole]
        if shards := _shards(spec, place, split):
            return shards
    present = sorted({re.sub(r"-\d+-of-\d+$", "", file.stem) for place in places for file in place.glob("*.parquet")})
    hint = f"; it has {listed(present)} (task.splits=[...] chooses)" if present else ""
    raise DataError(
        f"{spec.name}: no data of the split {split} in {folder} (looked for {spec.name}/{split}.parquet, "
        f"{split}.parquet and {split}-00000-of-NNNNN.parquet){hint}"
    )


def _shards(spec: TaskSpec, place: Path, split: str) -> list[Path]:
    """Find the shards of a split, in order; a set is whole, and the only one."""
    named = {path: _SHARD.fullmatch(path.stem.removeprefix(split)) for path in place.glob("*.parquet")}
    sets: dict[int, dict[int, Path]] = {}
    for path, match in sorted(named.items()):
        if match is not None and path.stem.startswith(split):
            sets.setdefault(int(match["count"]), {})[int(match["number"])] = path
    if len(sets) > 1:
        raise DataError(f"{spec.name}: {place} has shards of {split} of several sets: of {listed(map(str, sets))}")
    for count, shards in sets.items():
        if len(shards) != count or max(shards) >= count:
            raise DataError(f"{spec.name}: {place} has {len(shards)} of the {count} shards of {split}")
        return [shards[number] for number in range(count)]
    return []


def _places(spec: TaskSpec, folder: Path) -> list[Path]:
    """List where in a folder a task's files may be: under the task's name, under its dataset's, or plainly."""
    names = dict.fromkeys([spec.name, *filter(None, [spec.config])])
    return [*(folder / name for name in names), folder]


def _class_names(spec: TaskSpec, schema: Any) -> list[str] | None:
    """Read the names of the label's classes from the metadata that ``datasets`` writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[spec.label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
