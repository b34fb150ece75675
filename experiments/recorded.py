"""Sweeps whose every trial was measured whole, recorded example by example, so that no model is needed to compare ways.

A recorded sweep is a Parquet file with a row for each model: its ``role`` (``trial``, ``base`` or ``expert``), its
``point`` in the unit cube of the search space, and its ``statistics``, the numbers that the metric needs of each
selecting example, to four decimals. The file's metadata say what the metric is: of a suite the mean of the primary
metrics of its tasks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.evaluation.metrics import value_of_rows
from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
_KEY = b"mergelab"


@dataclass(frozen=True)
class Recorded:
    """A recorded sweep.

    Attributes:
        name: the file's.
        tasks: each with its primary metric; more than one for a suite.
        counts: selecting examples of each task.
        trials: by task, (t, n, c) statistics of the trials.
        points: (t, d) of the trials, in the unit cube.
        models: by task, (e, n, c) statistics of the base and of the experts that were measured on it.
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    counts: tuple[int, ...]
    trials: Mapping[str, Array]
    points: Array
    models: Mapping[str, Array]

    @classmethod
    def read(cls, file: Path) -> Recorded:
        """Read a Parquet file."""
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        said = json.loads(table.schema.metadata[_KEY])
        rows = table.to_pylist()
        tasks = tuple(
            TaskSpec(name=one["task"], version=1, kind=one["kind"], metrics=(one["metric"],), primary=one["metric"],
                     labels=one["labels"] and tuple(one["labels"]))
            for one in said
        )  # fmt: skip
        found: dict[str, dict[str, list[Array]]] = {"trial": {}, "model": {}}
        for row in rows:
            of = found["trial" if row["role"] == "trial" else "model"]
            numbers = np.array(row["statistics"], np.float64)
            sizes = [one["count"] * one["columns"] * (one["task"] in row["tasks"]) for one in said]
            for one, part in zip(said, np.split(numbers, np.cumsum(sizes)[:-1]), strict=True):
                if len(part):
                    of.setdefault(one["task"], []).append(part.reshape(one["count"], one["columns"]))
        points = np.array([row["point"] for row in rows if row["role"] == "trial"], np.float64)
        trials, models = ({name: np.stack(each) for name, each in of.items()} for of in found.values())
        return cls(file.stem, tasks, tuple(one["count"] for one in said), trials, points, models)

    @property
    def size(self) -> int:
        """Number of selecting examples of all tasks."""
        return sum(self.counts)

    @cached_property
    def values(self) -> Array:
        """(t,) what the trials score, the better the higher."""
        return np.mean([self.scores_of(task) for task in self.tasks], axis=0)

    def scores_of(self, task: TaskSpec) -> Array:
        """Return what the trials (t,) score on one task, the better the higher."""
        sign = -1.0 if task.direction == "minimize" else 1.0
        return np.array([sign * value_of_rows(task, task.primary, rows) for rows in self.trials[task.name]])

    def ordered(self, order: Array) -> Recorded:
        """Return the sweep with its trials in an order."""
        trials = {name: rows[order] for name, rows in self.trials.items()}
        return replace(self, trials=trials, points=self.points[order])


def record(file: Path, overrides: Sequence[str]) -> None:
    """Run a sweep that measures every trial whole, and write what it and its base and experts score.

    The study is beside the file until that is written: the same command again goes on.
    """
    import tempfile

    from mergelab.__main__ import main as mergelab

    file.parent.mkdir(parents=True, exist_ok=True)
    study = file.with_suffix(".study.db").resolve()
    url = f"sqlite:///{study}"
    # A pruner that never prunes has the statistics stored.
    own = ["sweep.study_name=s", f"sweep.storage={url}", "sweep.evaluation=pruned",
           "sweep.pruner={name:futility,n_startup_steps:1000000000}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["mergelab", "-m", *overrides, *own, "tracking=none", f"hydra.sweep.dir={folder}"]
        mergelab()
    _write(file, url)
    study.unlink()


def _write(file: Path, url: str) -> None:
    import optuna
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mergelab.evaluation.metrics import example_statistics
    from mergelab.experiment import loaded
    from mergelab.sweep.reporting import unpacked_statistics
    from mergelab.sweep.space import in_cube
    from mergelab.sweep.storage import open_storage
    from mergelab.sweep.study import STATISTICS

    ((_, models),) = loaded._last
    data, examples = models.evaluator.data, models.evaluator.examples
    tasks = [one.spec for one in data.values()]
    rows: list[dict[str, Any]] = []
    for one in optuna.load_study(storage=open_storage(url), study_name="s").trials:
        if STATISTICS in one.user_attrs:
            name = " ".join(f"{key.removeprefix('method.')}={value:.4f}" for key, value in one.params.items())
            stored = unpacked_statistics(one.user_attrs[STATISTICS])
            keys = [f"{spec.name}/{spec.primary}" if len(tasks) > 1 else spec.primary for spec in tasks]
            parts = {spec.name: stored[key] for spec, key in zip(tasks, keys, strict=True)}
            point = in_cube(one.params, one.distributions).tolist()
            rows.append({"role": "trial", "name": name, "point": point, "parts": parts})
    trials = len(rows)
    for model in models.baselines:
        parts = {}
        for spec in (one for one in tasks if one.name in model.predictions):
            select = examples[spec.name].select
            outputs, truth = model.predictions[spec.name].outputs[select], data[spec.name].truth[select]
            parts[spec.name] = example_statistics(spec, outputs, truth)[spec.primary]
        rows.append({"role": model.role, "name": Path(model.label).name, "point": [], "parts": parts})
    said = [
        {"task": spec.name, "kind": spec.kind, "metric": spec.primary, "labels": spec.labels,
         "count": len(rows[0]["parts"][spec.name]), "columns": rows[0]["parts"][spec.name].shape[1]}
        for spec in tasks
    ]  # fmt: skip
    for row in rows:
        parts = row.pop("parts")
        row |= {
            "tasks": list(parts),
            "statistics": np.concatenate([each.ravel() for each in parts.values()]).round(4).tolist(),
        }
    numbers, texts = pa.list_(pa.float32()), pa.list_(pa.string())
    fields = [("role", pa.string()), ("name", pa.string()), ("point", numbers), ("tasks", texts)]
    schema = pa.schema([*fields, ("statistics", numbers)], metadata={_KEY: json.dumps(said)})
    pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd", compression_level=15)
    print(f"{file}: {trials} trials, {len(rows) - trials} models, {sum(one['count'] for one in said)} examples")
