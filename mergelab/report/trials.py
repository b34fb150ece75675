"""The trials of a sweep: where each lies in the search space, and its score or the estimate of a stopped one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergelab.console.scores import Cell
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.report.selection import LoggedRun

_SPACE = f"{names.SPACE}."


@dataclass(frozen=True)
class Trial:
    """A trial's point and what was found there, on the selecting examples.

    Attributes:
        run: its run.
        number: in the study.
        point: the value of each swept key: a number where it is one.
        score: its score on all selecting examples; None where it was stopped.
        estimate: of a stopped trial, the score that it would have had, with its bounds; None where that is not known.
        stopped: of a stopped trial, after how many examples, in words.
        objectives: its scores by name, as far as they are known.
    """

    run: LoggedRun
    number: int
    point: Mapping[str, float | str]
    score: float | None
    estimate: Cell | None
    stopped: str
    objectives: Mapping[str, float]

    @property
    def cell(self) -> Cell | None:
        """The score, or else the estimate."""
        return self.estimate if self.score is None else Cell(self.score)


def read_trials(runs: Sequence[LoggedRun], parent: LoggedRun | None) -> tuple[Trial, ...]:
    """Read trials from their runs, in the order of their numbers.

    Args:
        runs: the trials of one sweep.
        parent: the sweep's run, which has the search space; None: every number of the method that varies is swept.
    """
    varied = _varied(runs)
    found = [_trial(run, point_of(run, parent, varied)) for run in runs]
    return tuple(sorted(found, key=lambda trial: trial.number))


def point_of(run: LoggedRun, parent: LoggedRun | None, varied: Sequence[str] = ()) -> dict[str, float | str]:
    """Return the value that a run has for each swept key; without a sweep's search space, for each of ``varied``."""
    keys = (swept_keys(parent) if parent is not None else []) or varied
    return {key: _value(run.record.params[key]) for key in keys if key in run.record.params}


def swept_keys(parent: LoggedRun) -> list[str]:
    """Return the config keys that a sweep's trials vary."""
    return [key.removeprefix(_SPACE) for key in parent.record.params if key.startswith(_SPACE)]


def described(point: Mapping[str, float | str]) -> str:
    """Write a point in short: ``density=0.2 lambda=1``."""
    return " ".join(
        f"{key.removeprefix('method.')}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in point.items()
    )


def judged_by(runs: Sequence[LoggedRun]) -> tuple[str, bool]:
    """Return the metric that trials are judged by, such as ``accuracy``, and whether less of it is better."""
    for run in runs:
        if name := run.record.tags.get(names.PRIMARY):
            return _plain(name), run.record.tags.get(names.DIRECTION) == "minimize"
    return "", False


def number(text: str) -> float | None:
    """Return the number that a parameter is; None where it is none."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if abs(found) != float("inf") and found == found else None


def _trial(run: LoggedRun, point: Mapping[str, float | str]) -> Trial:
    metrics, tags = run.record.metrics, run.record.tags
    judged, _ = judged_by([run])
    stopped = tags.get(names.PRUNED, "")
    own = {_plain(name): value for name, value in metrics.items() if name.startswith(_SELECT)}
    estimate = names.estimate_metric(judged)
    bounds = metrics.get(names.low(estimate)), metrics.get(names.high(estimate))
    return Trial(
        run,
        int(found[0]) if (found := re.findall(r"\d+", tags.get(names.TRIAL, ""))) else 0,
        point,
        None if stopped else own.get(judged),
        Cell(metrics[estimate], *bounds) if stopped and estimate in metrics else None,
        stopped,
        {} if stopped else own,
    )


_SELECT = names.select_metric("")


def _plain(name: str) -> str:
    return name.removeprefix(_SELECT)


def _value(text: str) -> float | str:
    found = number(text)
    return text if found is None else found


def _varied(runs: Sequence[LoggedRun]) -> list[str]:
    """Name the method's parameters that differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.record.params if key.startswith("method."))
    return [key for key in keys if len({run.record.params.get(key) for run in runs}) > 1]
