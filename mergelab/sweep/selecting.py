"""A merged model evaluated on the selecting examples alone, its scores known after every batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics import example_statistics, part_members, score, value_of_rows
from mergelab.evaluation.scoring import TaskResult

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
        sizes = [self._size(name) for name in evaluator.data]
        self._firsts = dict(zip(evaluator.data, np.cumsum([0, *sizes]).tolist(), strict=False))

    @property
    def count(self) -> int:
        """Number of selecting examples of all tasks."""
        return sum(len(examples.select) for examples in self.evaluator.examples.values())

    def run(
        self,
        report: Callable[[Array, Array], None],
        *,
        parts: Sequence[float] | None = None,
        after_part: Callable[[], None] = lambda: None,
    ) -> None:
        """Predict task by task.

        Args:
            report: called after every batch with its examples' positions (b,) among the selecting examples of all
                tasks, and their scores (b,) by `example_scores`. What it raises ends the evaluation.
            parts: shares of the examples of each task, drawn at random, at which its parts end, the last one at 1: a
                part of each task is measured, then the next of each, in large batches. None: tasks one after the other,
                in random batches.
            after_part: called when a part of each task was measured. What it raises ends the evaluation.
        """

        def scored(name: str, positions: Array, outputs: Array, truth: Array) -> None:
            report(positions, example_scores(self.evaluator.data[name].spec, outputs, truth))

        last = next(reversed(self._firsts))
        for part, name in itertools.product(range(len(parts or (1.0,))), self._firsts):
            wanted = np.arange(self._size(name))
            if parts is not None:
                drawn = np.random.default_rng(self.seed).permutation(wanted)
                wanted = np.split(drawn, [max(round(share * len(drawn)), 1) for share in parts[:-1]])[part]
            if len(wanted) or parts is None:
                self._predict(name, wanted, scored, seed=self.seed if parts is None else None)
            if name == last:
                after_part()

    def run_in_rounds(self, report: Callable[[Array, Mapping[str, Array]], None], rounds: Array) -> None:
        """Predict round by round.

        Args:
            report: called after every batch with its examples' positions (b,) among the selecting examples of all
                tasks, and their statistics (b, c) by metric. What it raises ends the evaluation.
            rounds: (n,) the round in which each example of all tasks is measured; those with -1 are not measured.
        """

        def described(name: str, positions: Array, outputs: Array, truth: Array) -> None:
            report(positions, example_statistics(self.evaluator.data[name].spec, outputs, truth))

        of_tasks = dict(zip(self._firsts, np.split(rounds, list(self._firsts.values())[1:]), strict=True))
        if len(of_tasks) == 1:
            for name, own in of_tasks.items():
                wanted = np.flatnonzero(own >= 0)
                self._predict(name, wanted, described, rounds=own[wanted])
            return
        for one, name in itertools.product(np.unique(rounds[rounds >= 0]), of_tasks):
            if len(wanted := np.flatnonzero(of_tasks[name] == one)):
                self._predict(name, wanted, described)

    def _size(self, name: str) -> int:
        return len(self.evaluator.examples[name].select)

    def _predict(
        self,
        name: str,
        wanted: Array,
        report: Callable[[str, Array, Array, Array], None],
        seed: int | None = None,
        rounds: Array | None = None,
    ) -> None:
        data, select = self.evaluator.data[name], self.evaluator.examples[name].select

        def collect(batch: Array, outputs: Array) -> None:
            members = wanted[batch]
            self._batches[name].append((members, outputs))
            report(name, self._firsts[name] + members, outputs, data.truth[select[members]])

        self.evaluator.session.predict(
            data,
            partial(self.backbones.__getitem__, name),
            self.evaluator.session.heads[name],
            self.label,
            progress=self.evaluator.progress,
            members=select[wanted],
            watch=collect,
            seed=seed,
            rounds=rounds,
        )

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

    def result_from(self, name: str, seen: Array, statistics: Mapping[str, Array], *, whole: bool) -> TaskResult:
        """Score a task by what `statistics` returns; of a part (``whole`` false) there are no scores."""
        data, select = self.evaluator.data[name], self.evaluator.examples[name].select
        splits = [("", np.arange(len(seen)))]
        splits += [(f"_{part}", members) for part, members in part_members(data.spec, data.parts[select[seen]])]
        scores = {
            metric + suffix: value_of_rows(data.spec, metric, statistics[metric][members])
            for suffix, members in splits
            for metric in statistics
            if whole
        }
        less = (data.spec.primary,) if data.spec.direction == "minimize" else ()
        return TaskResult(name, data.spec.primary, scores, {}, len(seen), 0, less)

    def results(self, *, whole: bool = True) -> dict[str, TaskResult]:
        """Score the outputs so far; tasks without any are absent. Those of a part (``whole`` false) have no scores."""
        found = {}
        for name, batches in self._batches.items():
            if batches:
                data = self.evaluator.data[name]
                seen = self.evaluator.examples[name].select[np.concatenate([members for members, _ in batches])]
                outputs = np.concatenate([outputs for _, outputs in batches])
                scores = score(data.spec, outputs, data.truth[seen], parts=data.parts[seen]) if whole else {}
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
