"""A study as artifacts of its run: its trials, its plots, and the study itself."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.report.plots import draw
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
        draw(study.study, len(study.space.distributions), objectives, plots)
        run.log_artifacts(plots, names.PLOTS)
        file = Path(folder) / names.STUDY_FILE
        copy_study(study, file)
        run.log_artifact(file)


def trial_rows(study: SweepStudy, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """List the trials: parameters, scores, how they ended, examples measured, seconds."""
    rows = []
    for trial in study.trials:
        outcome = trial.user_attrs.get(OUTCOME, {})
        scores = dict(zip(objectives, outcome.get("values", ()), strict=False))
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                **trial.params,
                **{f"select {name}": value for name, value in scores.items()},
                "examples": outcome.get("pruned_at") or outcome.get("examples", ""),
                **{key: f"{outcome[name]:.3f}" for key, name in _TIMES.items() if name in outcome},
                "error": trial.user_attrs.get(ERROR, ""),
                "run": outcome.get("run") or "",
            }
        )
    return rows


def copy_study(study: SweepStudy, file: Path) -> None:
    """Write the study to a new SQLite file."""
    import optuna

    from mergelab.sweep.storage import open_storage
    from mergelab.tracking.sqlite_urls import sqlite_url

    storage = open_storage(sqlite_url(file))
    optuna.copy_study(from_study_name=study.study.study_name, from_storage=study.storage, to_storage=storage)
    storage.remove_session()
