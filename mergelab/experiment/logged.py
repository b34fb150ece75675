"""The numbers that are logged with every run: a merge, a grid's job, a trial, a sweep's report, a base, an expert.

To log another one, write a function of `Measured` and add it to `LOGGED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from mergelab.evaluation.results import ModelResult, peak_memory_mb
from mergelab.tracking import names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.session import Session


@dataclass(frozen=True)
class Measured:
    """A model that was measured, as the functions of `LOGGED` take it.

    Attributes:
        result: its scores, seconds and memory; of a pruned trial the scores on the examples it was measured on.
        session: the opened models that were merged; None where adapters were averaged without a model.
        backbones: the merged tensors by task and name; empty for the base, an expert, and a merge written to disk.
    """

    result: ModelResult
    session: Session | None
    backbones: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def scores(measured: Measured) -> dict[str, float]:
    """Return each task's scores: ``report/accuracy`` with its interval, ``select/accuracy``; in suites by task."""
    found: dict[str, float] = {}
    results = measured.result.results
    for task, result in results.items():
        of = task if len(results) > 1 else None
        for metric, score in result.report.items():
            name = names.report_metric(metric, of)
            found |= {name: score.value, names.low(name): score.low, names.high(name): score.high}
        found |= {names.select_metric(metric, of): value for metric, value in result.select.items()}
    return found


def averages(measured: Measured) -> dict[str, float]:
    """Return a suite's averages, where its scores can be averaged."""
    result = measured.result
    selecting = [one for one in result.results.values() if one.select]
    found = {
        names.REPORT_AVERAGE: result.average,
        names.REPORT_NORMALISED: result.normalised,
        names.SELECT_NORMALISED: result.select_normalised,
    }
    if len(selecting) > 1 and len({one.direction for one in selecting}) == 1:
        found[names.SELECT_AVERAGE] = fmean(one.select[one.primary] for one in selecting)
    return _known(found)


def paired_test(measured: Measured) -> dict[str, float]:
    """Return the p-value of the paired test against the best expert."""
    return _known({names.P_VS_BEST_EXPERT: measured.result.p_value})


def examples(measured: Measured) -> dict[str, float]:
    """Return the number of selecting examples that were measured."""
    count = sum(result.select_examples for result in measured.result.results.values())
    return {names.SELECT_EXAMPLES: count} if count else {}


def costs(measured: Measured) -> dict[str, float]:
    """Return seconds of merging and of evaluating, and the process's peak memory in MB."""
    result = measured.result
    return _known(
        {
            names.MERGE_SECONDS: result.merge_seconds,
            names.EVAL_SECONDS: result.eval_seconds,
            names.PEAK_MB: result.peak_mb,
        }
    )


LOGGED: tuple[Callable[[Measured], Mapping[str, float]], ...] = (
    scores,
    averages,
    paired_test,
    examples,
    costs,
)


def with_logged(measured: Measured) -> ModelResult:
    """Return the result with all its numbers by the names that they are logged under."""
    logged: dict[str, float] = {}
    for function in LOGGED:
        logged |= function(measured)
    return replace(measured.result, logged=logged)


def measure_merged(
    evaluator: Evaluator,
    backbones: Mapping[str, Mapping[str, Tensor]],
    label: str,
    baselines: Sequence[ModelResult],
    merge_seconds: float,
) -> ModelResult:
    """Evaluate merged weights, given for each task, and return scores, costs and all that is logged."""
    result = evaluator.merged(backbones, label, baselines)
    result = replace(result, merge_seconds=merge_seconds, peak_mb=peak_memory_mb())
    return with_logged(Measured(result, evaluator.session, backbones))


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
