"""Turn predictions into scores under a protocol, and keep predictions by content so that none is made twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import EvalConfig, cache_dir
from mergelab.tasks.protocol import holdout
from mergelab.tasks.statistics import bootstrap_interval, paired_test

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
    """One model's scores on one task."""

    task: str
    primary: str
    select: Mapping[str, float]
    report: Mapping[str, Score]
    select_examples: int
    report_examples: int

    @property
    def score(self) -> Score:
        """The task's primary metric on the reporting examples."""
        return self.report[self.primary]


def split_examples(data: TaskData, config: EvalConfig, seed: int) -> Examples:
    """Say which examples select and which report under the configured protocol."""
    everything = np.arange(len(data.labels))
    if config.protocol == "holdout":
        select, report = holdout(data.labels, config.holdout_fraction, seed)
        return Examples(select, report)
    return Examples(everything if config.protocol == "oracle" else everything[:0], everything)


def measure(data: TaskData, logits: Array, examples: Examples, config: EvalConfig, seed: int) -> TaskResult:
    """Score ``logits`` (n, C): plain metrics on the selecting examples, with intervals on the reporting ones."""
    from mergelab.tasks.metrics import score

    spec, labels, parts = data.spec, data.labels, data.parts
    select, shown = examples.select, examples.report
    selected = score(spec, logits[select], labels[select], parts=parts[select]) if len(select) else {}
    values = score(spec, logits[shown], labels[shown], parts=parts[shown])
    bounds = bootstrap_interval(
        spec, logits[shown], labels[shown], samples=config.bootstrap, seed=seed, parts=parts[shown]
    )
    report = {name: Score(value, *bounds[name]) for name, value in values.items()}
    return TaskResult(spec.name, spec.primary, selected, report, len(select), len(shown))


def compare(data: TaskData, logits: Array, other: Array, examples: Examples, config: EvalConfig, seed: int) -> float:
    """Answer the two-sided p-value that two models differ on the primary metric of the reporting examples."""
    report = examples.report
    return paired_test(
        data.spec, logits[report], other[report], data.labels[report], samples=max(config.bootstrap, 1000), seed=seed
    )


def prediction_key(parts: Mapping[str, Any]) -> str:
    """Hash everything that predictions depend on into one name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class PredictionCache:
    """Predictions on disk, by content: a file each, written beside its place and moved there."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "predictions"

    def get(self, key: str) -> tuple[Array, float] | None:
        """Answer the kept logits (n, C) and the seconds that they took, or ``None``."""
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as kept:
                return kept["logits"], float(kept["seconds"])
        except (OSError, ValueError, KeyError):
            return None

    def put(self, key: str, logits: Array, seconds: float) -> None:
        """Keep ``logits`` under ``key``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{key}.{os.getpid()}.npz"
        np.savez(unfinished, logits=logits, seconds=np.float64(seconds))
        os.replace(unfinished, self.folder / f"{key}.npz")
