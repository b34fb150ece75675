"""A merged model evaluated on the selecting examples alone, its scores known after every batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics import example_statistics, part_members, score, value_of_rows
from mergelab.evaluation.scoring import TaskResult
from mergelab.sweep.targets import scores_for

if TYPE_CHECKING:
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.loaded import Backbones
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


class SelectingEvaluation:
    """The outputs of one merged model on the selecting examples, collected batch by batch.

    Args:
        evaluator: has the examples.
        backbones: the merged tensors for each task.
        label: names the model where progress is shown.
        seed: draws the order of the batches.
    """

    def __init__(self, evaluator: Evaluator, backbones: Backbones, label: str, seed: int) -> None:
        self.evaluator, self.backbones, self.label, self.seed = evaluator, backbones, label, seed
        self._batches: dict[str, list[tuple[Array, Array]]] = {name: [] for name in evaluator.data}

    @property
    def count(self) -> int:
        """Number of selecting examples of all tasks."""
        return sum(len(examples.select) for examples in self.evaluator.examples.values())

    def run(
        self,
        report: Callable[[Array, Array], None],
        rounds: Array | None = None,
        metric: str | None = None,
        without: Array | None = None,
        parts: Sequence[float] | None = None,
        after_part: Callable[[], None] = lambda: None,
    ) -> None:
        """Predict task by task.

        Args:
            report: called after every batch with its examples' positions (b,) among the selecting examples of all
                tasks, and their scores (b,). What it raises ends the evaluation.
            rounds: (n,) the round in which each example is measured, of the only task; None: batches in random order.
            metric: the scores are what this metric is estimated from; None: they are those of `example_scores`.
            without: (k,) positions of the only task's examples that are not measured; None: all are.
            parts: shares of the examples of each task, drawn at random, at which its parts end, the last one at 1: a
                part of each task is measured, then the next of each, in large batches. None: tasks one after the other,
                in random batches.
            after_part: called when a part of each task was measured. What it raises ends the evaluation.
        """
        selecting = {name: self.evaluator.examples[name].select for name in self.evaluator.data}
        firsts = dict(zip(selecting, np.cumsum([0, *map(len, selecting.values())]), strict=False))
        last = next(reversed(selecting))
        for part, name in itertools.product(range(len(parts or (1.0,))), selecting):
            data, select, first = self.evaluator.data[name], selecting[name], int(firsts[name])
            wanted = np.setdiff1d(np.arange(len(select)), () if without is None else without)
            if parts is not None:
                drawn = np.random.default_rng(self.seed).permutation(wanted)
                wanted = np.split(drawn, [max(round(share * len(drawn)), 1) for share in parts[:-1]])[part]
            if len(wanted) or parts is None:
                self.evaluator.session.predict(
                    data,
                    partial(self.backbones.__getitem__, name),
                    self.evaluator.session.heads[name],
                    self.label,
                    progress=self.evaluator.progress,
                    members=select[wanted],
                    watch=partial(self._collect, report, name, first, metric, wanted),
                    seed=self.seed if parts is None else None,
                    rounds=rounds,
                )
            if name == last:
                after_part()

    def _collect(
        self,
        report: Callable[[Array, Array], None],
        name: str,
        first: int,
        metric: str | None,
        wanted: Array,
        batch: Array,
        outputs: Array,
    ) -> None:
        members = wanted[batch]
        data, select = self.evaluator.data[name], self.evaluator.examples[name].select
        truth = data.truth[select[members]]
        self._batches[name].append((members, outputs))
        if metric is None:
            scores = example_scores(data.spec, outputs, truth)
        else:
            scores = scores_for(data.spec, metric, example_statistics(data.spec, outputs, truth)[metric])
        report(first + members, scores)

    def statistics(self, name: str) -> tuple[Array, dict[str, Array]]:
        """Return the positions (k,) of a task's examples that were measured, in ascending order, and their statistics.

        The positions count among the task's selecting examples; the statistics (k, c) are by metric, as
        `mergelab.evaluation.metrics.example_statistics` has them.
        """
        data, select = self.evaluator.data[name], self.evaluator.examples[name].select
        members = np.concatenate([members for members, _ in self._batches[name]])
        outputs = np.concatenate([outputs for _, outputs in self._batches[name]])
        order = np.argsort(members)
        seen = members[order]
        return seen, example_statistics(data.spec, outputs[order], data.truth[select[seen]])

    def result_from(self, name: str, seen: Array, statistics: Mapping[str, Array]) -> TaskResult:
        """Score a task by what `statistics` returns."""
        data, select = self.evaluator.data[name], self.evaluator.examples[name].select
        splits = [("", np.arange(len(seen)))]
        splits += [(f"_{part}", members) for part, members in part_members(data.spec, data.parts[select[seen]])]
        scores = {
            metric + suffix: value_of_rows(data.spec, metric, statistics[metric][members])
            for suffix, members in splits
            for metric in statistics
        }
        less = (data.spec.primary,) if data.spec.direction == "minimize" else ()
        return TaskResult(name, data.spec.primary, scores, {}, len(seen), 0, less)

    def results(self) -> dict[str, TaskResult]:
        """Score the outputs so far; tasks without any are absent."""
        found = {}
        for name, batches in self._batches.items():
            if batches:
                data = self.evaluator.data[name]
                seen = self.evaluator.examples[name].select[np.concatenate([members for members, _ in batches])]
                outputs = np.concatenate([outputs for _, outputs in batches])
                scores = score(data.spec, outputs, data.truth[seen], parts=data.parts[seen])
                less = (data.spec.primary,) if data.spec.direction == "minimize" else ()
                found[name] = TaskResult(name, data.spec.primary, scores, {}, len(seen), 0, less)
        return found


def example_scores(spec: TaskSpec, outputs: Array, truth: Array) -> Array:
    """Score single examples (n,), the better the higher.

    Right or wrong for classification, the negative squared error for regression, the primary metric of each text
    alone for the others.
    """
    if spec.kind == "regression":
        return np.asarray(-((outputs[:, 0].astype(np.float64) - truth) ** 2))
    if spec.kind == "classification":
        return np.asarray(outputs.argmax(axis=1) == truth, dtype=np.float64)
    rows = example_statistics(spec, outputs, truth)[spec.primary]
    sign = -1.0 if spec.direction == "minimize" else 1.0
    return np.array([sign * value_of_rows(spec, spec.primary, row[None]) for row in rows])
