"""What a run and a sweep return in Python: tables, scores and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.console.scores import columns, records

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    import plotly.graph_objects as go

    from mergelab.evaluation.results import ExperimentResult
    from mergelab.experiment.run import FinishedExperiment
    from mergelab.sweep.run import FinishedSweep


@dataclass(frozen=True)
class MergeRun:
    """An experiment that has run.

    Attributes:
        result: base, experts and last the merged model, with their scores; None where nothing was measured.
        run_id: the MLflow run's; None where it is not tracked.
        experiment: the name of the MLflow experiment.
        folder: where the run wrote its files.
        output: where the merged model is; None where it was not asked for.
    """

    result: ExperimentResult | None
    run_id: str | None
    experiment: str
    folder: Path
    output: Path | None

    @classmethod
    def of(cls, finished: FinishedExperiment) -> MergeRun:
        """Return what an experiment ended with."""
        return cls(finished.result, finished.run, finished.experiment, finished.folder, finished.output)

    @property
    def scores(self) -> dict[str, float]:
        """The merged model's scores: by metric, or of several tasks by ``task/metric``."""
        return {} if self.result is None else scores_of(self.result)

    @property
    def objective(self) -> float | None:
        """What a sweep would select on."""
        return None if self.result is None else self.result.objective

    @property
    def table(self) -> pd.DataFrame:
        """A row for each model: its scores with the bounds of their 95 % intervals, p-value, seconds, MB."""
        return table_of(self.result)

    def plot(self) -> go.Figure:
        """Draw every model's scores with their 95 % intervals."""
        return bars(self.result)

    def _repr_html_(self) -> str:
        return page_part(self.result, [_line("run", self.run_id), _line("model", self.output)])


@dataclass(frozen=True)
class SweepRun:
    """A sweep that has run.

    Attributes:
        results: the report on the winner, after the models that it is compared with; of several objectives one each.
        study: the trials, as Optuna has them.
        best: the winning trial; of several objectives the one that is best by the first.
        objectives: what trials were judged by, on the selecting examples.
        trials: a row for each trial.
        run_id: the MLflow run's; None where it is not tracked.
        experiment: the name of the MLflow experiment.
        folder: where the sweep wrote its files.
    """

    results: tuple[ExperimentResult, ...]
    study: optuna.Study
    best: optuna.trial.FrozenTrial
    objectives: tuple[str, ...]
    trials: tuple[Mapping[str, Any], ...]
    run_id: str | None
    experiment: str
    folder: Path

    @classmethod
    def of(cls, finished: FinishedSweep) -> SweepRun:
        """Return what a sweep ended with."""
        from mergelab.sweep.artifacts import trial_rows

        best = finished.study.best()
        assert best is not None  # without one there is an error, and no report
        return cls(
            tuple(report.result for report in finished.reports),
            finished.study.as_measured(),
            best,
            finished.objectives,
            tuple(trial_rows(finished.study, finished.objectives)),
            finished.run,
            finished.experiment,
            finished.folder,
        )

    @property
    def best_params(self) -> dict[str, Any]:
        """The winner's parameters."""
        return dict(self.best.params)

    @property
    def best_values(self) -> dict[str, float]:
        """The winner's score by objective, on the selecting examples."""
        return dict(zip(self.objectives, self.best.values, strict=True))

    @property
    def scores(self) -> dict[str, float]:
        """The winner's scores on the reporting examples, which selected nothing."""
        return scores_of(self.results[0]) if self.results else {}

    @property
    def report(self) -> pd.DataFrame:
        """A row for each model that the winner is compared with, and last the winner."""
        return table_of(self.results[0] if self.results else None)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each trial: how it ended, parameters, score on the selecting examples, seconds."""
        import pandas as pd

        return pd.DataFrame(list(self.trials))

    def plot(self) -> go.Figure:
        """Draw the scores of the complete trials in their order, and the best so far; stopped ones have no score."""
        from plotly.graph_objects import Figure, Scatter

        figure = Figure()
        for place, name in enumerate(self.objectives):
            complete = self._complete
            less = self.study.directions[place].name == "MINIMIZE"
            values = [trial.values[place] for trial in complete]
            best = [(min if less else max)(values[: number + 1]) for number in range(len(values))]
            numbers = [trial.number for trial in complete]
            said = [", ".join(f"{key}={value}" for key, value in trial.params.items()) for trial in complete]
            figure.add_trace(Scatter(x=numbers, y=values, text=said, mode="markers", name=name))
            figure.add_trace(Scatter(x=numbers, y=best, mode="lines", name=f"best {name}", line={"shape": "hv"}))
        stopped = len(self.trials) - len(self._complete)
        figure.update_xaxes(title=f"trial ({stopped} without a score: stopped early or failed)" if stopped else "trial")
        figure.update_yaxes(title="score on the selecting examples")
        figure.update_layout(template="plotly_white")
        return figure

    @property
    def _complete(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]

    def _repr_html_(self) -> str:
        lines = [
            _line("trials", f"{len(self._complete)} of {len(self.trials)} complete"),
            _line("best", ", ".join(f"{key}={value}" for key, value in self.best_params.items())),
            _line("run", self.run_id),
        ]
        return page_part(self.results[0] if self.results else None, lines)


# ------------------------------------------------------------------------------------------------- what both are of


def scores_of(result: ExperimentResult) -> dict[str, float]:
    """Return the last model's scores on the reporting examples: by metric, or of several tasks by ``task/metric``."""
    several = len(result.merged.scored) > 1
    return {
        f"{task}/{name}" if several else name: score.value
        for task, own in result.merged.scored.items()
        for name, score in own.report.items()
    }


def table_of(result: ExperimentResult | None) -> pd.DataFrame:
    """Return a result's table with a row for each model; without a result it is empty."""
    import pandas as pd

    return pd.DataFrame([] if result is None else records(result))


def bars(result: ExperimentResult | None) -> go.Figure:
    """Draw every model's scores with their 95 % intervals; nothing where nothing was measured."""
    from plotly.graph_objects import Bar, Figure

    figure = Figure()
    if result is None:
        return figure
    labels = [model.label for model in result.models]
    for column in columns(result):
        cells = [column.read(model) for model in result.models]
        above = [None if cell is None or cell.high is None else cell.high - cell.value for cell in cells]
        below = [None if cell is None or cell.low is None else cell.value - cell.low for cell in cells]
        error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        values = [None if cell is None else cell.value for cell in cells]
        figure.add_trace(Bar(x=labels, y=values, name=column.title, error_y=error))
    figure.update_layout(title=result.title, barmode="group", template="plotly_white")
    return figure


def page_part(result: ExperimentResult | None, lines: Sequence[str]) -> str:
    """Return what a notebook shows: the title, the table, what was measured, and lines of text."""
    if result is None:
        return "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    shown = [c.name for c in columns(result)]
    bounds = [f"{name}_{end}" for name in shown for end in ("low", "high")]
    found = table_of(result)
    kept = [name for name in ("model", *shown, *bounds, "p_value", "merge_seconds", "peak_mb") if name in found]
    table = found[kept] if kept and shown else found
    html = table.to_html(index=False, na_rep="", float_format=lambda value: f"{value:.4g}", border=0)
    notes = "<br>".join(escape(line) for line in result.note.splitlines())
    said = "".join(f"<div>{escape(line)}</div>" for line in lines if line)
    return f"<p><b>{escape(result.title)}</b></p>{html}<p>{notes}</p>{said}"


def _line(name: str, value: object) -> str:
    return "" if value is None else f"{name} {value}"
