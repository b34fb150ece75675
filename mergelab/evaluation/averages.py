"""One number for several tasks: the average, and the average relative to each task's own expert."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mergelab.errors import DataError, listed


def average(scores: Mapping[str, float]) -> float:
    """Average the members' primary metrics: ``{task: score}``, each task counting once whatever its size."""
    if not scores:
        raise DataError("no task was measured, there is nothing to average")
    return sum(scores.values()) / len(scores)


def normalised(
    scores: Mapping[str, float], experts: Mapping[str, float], minimized: Collection[str] = ()
) -> dict[str, float]:
    """Divide each task's score by that of the task's own expert: 1.0 is as good as not merging, more is better.

    Of the tasks in ``minimized``, whose scores are better when they are less, the expert's is divided by the score.

    Raises:
        DataError: a task's expert was not measured, or its score is not positive.
    """
    if lacking := [task for task in scores if task not in experts]:
        raise DataError(f"no expert was measured on {listed(lacking)}, there is nothing to normalise by")
    if low := [f"{task} {experts[task]:.4f}" for task in scores if not experts[task] > 0]:
        raise DataError(f"cannot normalise by an expert's score that is not positive: {listed(low)}")
    ratios = {task: score / experts[task] for task, score in scores.items()}
    return {task: 1 / ratio if task in minimized and ratio else ratio for task, ratio in ratios.items()}


def normalised_average(
    scores: Mapping[str, float], experts: Mapping[str, float], minimized: Collection[str] = ()
) -> float:
    """Average `normalised` over the tasks.

    Raises:
        DataError: as `normalised` and `average`.
    """
    return average(normalised(scores, experts, minimized))
