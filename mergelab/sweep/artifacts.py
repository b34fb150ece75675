"""A study as artifacts of its run: its trials, its plots, and the study itself."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.report.plots import Stopped, draw
from mergelab.sweep.outcome import TrialOutcome
from mergelab.sweep.study import ERROR, OUTCOME
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.sweep.study import SweepStudy
    from mergelab.tracking import Run


_TIMES = {"merge_s": "merge_seconds", "eval_s": "eval_seconds"}


def log_study(run: Run, study: SweepStudy, objectives: Sequence[str]) -> None:
    """Log the table of trials, plots, and the study in a file that Optuna and its dashboard open."""
    if run.id is None:
        return
    run.log_table(trial_rows(study, objectives), names.TRIALS)
    with tempfile.TemporaryDirectory() as folder:
        plots = Path(folder) / names.PLOTS
        plots.mkdir()
        draw(study.as_measured(), stopped_trials(study), objectives, plots)
        run.log_artifacts(plots, names.PLOTS)
        file = Path(folder) / names.STUDY_FILE
        copy_study(study, file)
        run.log_artifact(file)


def trial_rows(study: SweepStudy, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """List the trials: parameters, scores, estimates with bounds, how they ended, examples measured, seconds.

    Only complete trials have scores; their estimates are these.
    """
    rows = []
    for trial in study.trials:
        stored = trial.user_attrs.get(OUTCOME)
        outcome = None if stored is None else TrialOutcome.read(stored)
        row = {"trial": trial.number, "state": trial.state.name.lower(), **trial.params}
        for name, value in zip(objectives, outcome.values if outcome else (), strict=False):
            estimate = outcome.estimate if outcome else None
            stopped = outcome is not None and outcome.pruned_at is not None
            row[f"select {name}"] = "" if stopped else value
            row[f"estimate {name}"] = value
            row[f"estimate {name} low"] = estimate.low if estimate else "" if stopped else value
            row[f"estimate {name} high"] = estimate.high if estimate else "" if stopped else value
        row["examples"] = (outcome.pruned_at or outcome.examples) if outcome else ""
        row |= {key: f"{stored[name]:.3f}" for key, name in _TIMES.items() if stored}
        row |= {"error": trial.user_attrs.get(ERROR, ""), "run": outcome.run if outcome and outcome.run else ""}
        rows.append(row)
    return rows


def stopped_trials(study: SweepStudy) -> dict[int, Stopped]:
    """Return the estimates of the trials that were stopped early, by number."""
    found = {}
    for trial in study.trials:
        stored = trial.user_attrs.get(OUTCOME)
        if trial.state.name == "PRUNED" and stored and (one := TrialOutcome.read(stored).estimate) is not None:
            found[trial.number] = Stopped(one.value, one.low, one.high)
    return found


def copy_study(study: SweepStudy, file: Path) -> None:
    """Write the study to a new SQLite file."""
    import optuna

    from mergelab.sweep.storage import open_storage
    from mergelab.tracking.sqlite_urls import sqlite_url

    storage = open_storage(sqlite_url(file))
    whole = study.as_measured()
    optuna.copy_study(from_study_name=whole.study_name, from_storage=whole._storage, to_storage=storage)
    storage.remove_session()
