"""Turn predictions into scores under a protocol, and keep predictions by content so that none is made twice."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.cache import cache_dir, warn_of_cache
from mergelab.config import EvalConfig
from mergelab.evaluation.bootstrap import bootstrap_interval, paired_test
from mergelab.tasks.metric import Direction, get_metric
from mergelab.tasks.splits import holdout
from mergelab.weights.unfinished import unfinished_file

if TYPE_CHECKING:
    from mergelab.tasks.data import TaskData

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Score:
    """A metric with the bounds of its 95 % bootstrap interval, all as fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Examples:
    """Which examples (positions in the data) select and which report; ``select`` is empty where nothing selects."""

    select: Array
    report: Array


@dataclass(frozen=True)
class TaskResult:
    """One model's scores on one task.

    Attributes:
        minimized: the metrics that are better when they are less.
        texts: of a task without metrics the prompts, each with what the model wrote.
    """

    task: str
    primary: str
    select: Mapping[str, float]
    report: Mapping[str, Score]
    select_examples: int
    report_examples: int
    minimized: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()

    @property
    def direction(self) -> Direction:
        """Whether models are better when the primary metric is greater, or when it is less."""
        return "minimize" if self.primary in self.minimized else "maximize"

    @property
    def score(self) -> Score:
        """The task's primary metric on the reporting examples."""
        return self.report[self.primary]


def split_examples(data: TaskData, config: EvalConfig, seed: int) -> Examples:
    """Say which examples select and which report under the configured protocol."""
    everything = np.arange(len(data))
    if not data.spec.metrics:
        return Examples(everything[:0], everything)
    if config.protocol == "holdout":
        select, report = holdout(data.labels, config.holdout_fraction, seed)
        return Examples(select, report)
    return Examples(everything if config.protocol == "oracle" else everything[:0], everything)


def measure(data: TaskData, outputs: Array, examples: Examples, config: EvalConfig, seed: int) -> TaskResult:
    """Score a model's outputs (n, …): plain metrics on the selecting examples, with intervals on the reporting ones.

    Of a task without metrics, the texts are the result.
    """
    from mergelab.evaluation.metrics import part_members, score

    spec, truth, parts = data.spec, data.truth, data.parts
    select, shown = examples.select, examples.report
    if not spec.metrics:
        texts = tuple((prompt, text) for (prompt,), text in zip(data.texts, outputs.tolist(), strict=True))
        return TaskResult(spec.name, "", {}, {}, 0, len(data), texts=texts)
    selected = score(spec, outputs[select], truth[select], parts=parts[select]) if len(select) else {}
    values = score(spec, outputs[shown], truth[shown], parts=parts[shown])
    bounds = bootstrap_interval(
        spec, outputs[shown], truth[shown], samples=config.bootstrap, seed=seed, parts=parts[shown]
    )
    report = {name: Score(value, *bounds[name]) for name, value in values.items()}
    suffixes = ["", *(f"_{name}" for name, _ in part_members(spec, parts[shown]))]
    less = [name for name in spec.metrics if name in values and get_metric(name).direction == "minimize"]
    minimized = tuple(name + suffix for suffix in suffixes for name in less)
    return TaskResult(spec.name, spec.primary, selected, report, len(select), len(shown), minimized)


def compare(data: TaskData, outputs: Array, other: Array, examples: Examples, config: EvalConfig, seed: int) -> float:
    """Return the two-sided p-value that two models differ on the primary metric of the reporting examples."""
    report = examples.report
    return paired_test(
        data.spec, outputs[report], other[report], data.truth[report], samples=max(config.bootstrap, 1000), seed=seed
    )


def prediction_key(parts: Mapping[str, Any]) -> str:
    """Hash everything that predictions depend on into one name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class PredictionCache:
    """Predictions on disk, by content: a file each, written beside its place and moved there."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "predictions"

    def get(self, key: str) -> tuple[Array, float] | None:
        """Return the kept outputs (n, …) and the seconds that they took, or ``None``."""
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as kept:
                outputs = kept["outputs"]
                return (_texts_of(outputs) if outputs.dtype == np.uint8 else outputs), float(kept["seconds"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            warn_of_cache(self.folder, error)
            return None

    def put(self, key: str, outputs: Array, seconds: float) -> None:
        """Keep ``outputs``, numbers or texts, under ``key``; where that fails, a `MergeWarning` says why."""
        if outputs.dtype == object:
            outputs = np.frombuffer(json.dumps(outputs.tolist()).encode(), dtype=np.uint8)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with unfinished_file(self.folder / f"{key}.npz") as unfinished, unfinished.open("wb") as file:
                np.savez(file, outputs=outputs, seconds=np.float64(seconds))
        except OSError as error:
            warn_of_cache(self.folder, error)


def _texts_of(content: Array) -> Array:
    """Read the texts that are kept as the bytes of a JSON list: (n,)."""
    texts = json.loads(content.tobytes())
    found = np.empty(len(texts), dtype=object)
    found[:] = texts
    return found


@dataclass(frozen=True)
class Prediction:
    """A model's outputs (n, …) for a task's examples, the seconds they took, and whether they came from the cache."""

    outputs: Array
    seconds: float
    cached: bool
