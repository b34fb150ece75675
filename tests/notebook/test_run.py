"""``ml.run`` and ``ml.sweep`` make the command line's runs, return objects, and leave the process as it was."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergelab as ml
from mergelab.errors import ConfigError, DataError, MergelabError, ModelError
from mergelab.evaluation.results import read_result
from mergelab.tracking import RunRecord, TrackingConfig, names, open_tracking
from tests.conftest import Outcome

Command = Callable[..., Outcome]
SWEEP = {"n_trials": 3, "sampler": "random", "pruner": "none"}
# Tags and metrics that differ between any two runs, and what says which program made the run.
OF_ONE_RUN = {
    *(names.PID, names.STARTED, names.STARTED_TICKS, names.ALIVE, names.RUN_FOLDER, names.COMMAND),
    *("mlflow.runName", "mlflow.artifactLocation", names.DESCRIPTION),  # the description has the command
}


pytestmark = pytest.mark.usefixtures("workplace")


def models(arguments: list[str]) -> dict[str, Any]:
    """The fixture's models and data as keywords."""
    return {
        "models": {"base": "./base", "experts": ["./a", "./b", "./c"]},
        "task": {"name": "rte", "data_dir": Path("data")},
    }


def runs(workplace: Path, kind: str) -> list[RunRecord]:
    tracker = open_tracking(TrackingConfig(uri=f"sqlite:///{workplace}/outputs/mlflow.db"))
    return tracker.runs({names.KIND: kind})


def test_a_run_is_the_command_lines(
    mergelab_command: Command, arguments: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = mergelab_command(*arguments, "method=ties", "task=rte", "method.density=0.3", "seed=3")
    assert typed.code == 0, typed.err
    found = ml.run(method={"name": "ties", "density": 0.3}, seed=3, **models(arguments))
    assert capsys.readouterr().out == ""
    own, theirs = runs(workplace, "merge")
    assert own.id == found.run_id
    assert own.name == theirs.name == "rte ties density=0.3"
    assert own.experiment == theirs.experiment == found.experiment
    assert own.params == theirs.params
    assert {key: value for key, value in own.tags.items() if key not in OF_ONE_RUN} == {
        key: value for key, value in theirs.tags.items() if key not in OF_ONE_RUN
    }
    scores = {key: value for key, value in own.metrics.items() if not key.startswith(("time/", "memory/"))}
    assert scores == {key: value for key, value in theirs.metrics.items() if key in scores}
    assert found.scores == {"accuracy": own.metrics["report/accuracy"]}
    assert read_result(found.folder / "result.json").merged.score == found.objective


def test_a_run_is_a_table_a_page_and_a_plot(arguments: list[str]) -> None:
    import pandas as pd

    found = ml.run(*arguments, method="soup", task="rte", tracking="none")
    assert found.run_id is None
    assert isinstance(found.table, pd.DataFrame)
    assert list(found.table.model) == ["./base", "./a", "./b", "./c", "soup of 3"]
    assert found.table.accuracy.iloc[-1] == found.scores["accuracy"]
    assert (found.table.accuracy_low <= found.table.accuracy).all()
    page = found._repr_html_()
    assert "soup of 3" in page
    assert "120 validation examples" in page
    (bars,) = found.plot().data
    assert list(bars.y) == list(found.table.accuracy)
    assert bars.error_y.array[0] == pytest.approx(found.table.accuracy_high[0] - found.table.accuracy[0])


def test_names_are_text_on_the_page(arguments: list[str], workplace: Path) -> None:
    (workplace / "a").rename(workplace / "<script>")
    found = ml.run(
        models={"base": "./base", "experts": ["./<script>", "./b"]}, method="soup", tracking="none",
        task={"name": "rte", "data_dir": "data"},
    )  # fmt: skip
    assert "<script>" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()


def test_a_merge_without_a_measurement_has_a_folder_and_no_scores(arguments: list[str], workplace: Path) -> None:
    found = ml.run(*arguments, method="soup", evaluate=False, output=workplace / "merged", tracking="none")
    assert found.output == workplace / "merged"
    assert (workplace / "merged" / "config.json").is_file()
    assert (found.scores, found.objective, len(found.table), len(found.plot().data)) == ({}, None, 0, 0)
    assert str(workplace / "merged") in found._repr_html_()


def test_verbose_writes_what_the_command_writes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ml.run(*arguments, method="soup", tracking="none", verbose=True)
    assert "soup of 3" in capsys.readouterr().out


def test_a_sweep_has_trials_a_winner_and_a_report(
    arguments: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ml.sweep(method="ties", **SWEEP, **models(arguments))
    assert capsys.readouterr().out == ""
    assert list(found.table.trial) == [0, 1, 2]
    assert set(found.table.state) == {"complete"}
    assert set(found.best_params) == {"method.density", "method.lambda"}
    best = found.table["select accuracy"].max()
    assert found.best_values == {"accuracy": best}
    assert list(found.report.model)[-1] == "best ties"
    (run,) = runs(workplace, "sweep")
    assert run.id == found.run_id
    assert run.metrics["best/select_accuracy"] == best
    assert len(runs(workplace, "trial")) == 3
    (report,) = runs(workplace, "report")
    assert found.scores == {"accuracy": report.metrics["report/accuracy"]}
    points, line = found.plot().data
    assert list(points.y) == list(found.table["select accuracy"])
    assert line.y[-1] == best
    assert "3 of 3 complete" in found._repr_html_()


def test_a_sweep_goes_on_where_it_stopped(arguments: list[str]) -> None:
    first = ml.sweep(*arguments, method="ties", tracking="none", **SWEEP)
    again = ml.sweep(*arguments, method="ties", tracking="none", **SWEEP | {"n_trials": 4})
    assert len(again.table) == 4
    assert list(again.table["select accuracy"][:3]) == list(first.table["select accuracy"])


def test_a_search_space_is_given_as_ranges(arguments: list[str]) -> None:
    found = ml.sweep(
        *arguments,
        method="ties",
        params={"method.density": (0.4, 0.6), "method.lambda": [0.5, 1.0]},
        tracking="none",
        **SWEEP,
    )
    assert found.table["method.density"].between(0.4, 0.6).all()
    assert set(found.table["method.lambda"]) <= {0.5, 1.0}


BAD: list[tuple[dict[str, Any], type[MergelabError], str]] = [
    ({"method": "tis"}, ConfigError, "did you mean 'ties'"),
    ({"method": {"name": "ties", "density": 7}}, ConfigError, "method.density=7: must be"),
    ({"method": {"name": "ties", "densty": 0.1}}, ConfigError, "did you mean 'density'"),
    ({"metod": "ties"}, ConfigError, "no such keyword 'metod'; did you mean 'method'"),
    ({"seed": "many"}, ConfigError, "seed"),
    ({"models": {"base": torch.nn.Linear(1, 1)}}, ConfigError, "models.base=Linear"),
    ({"models": {"base": "./nowhere", "experts": ["./a"]}}, ModelError, "nowhere"),
    ({"task": {"name": "rte", "data_dir": "./nowhere"}}, DataError, "nowhere"),
]


@pytest.mark.parametrize(("settings", "kind", "said"), BAD)
def test_bad_input_is_an_error_of_ours(
    settings: dict[str, Any], kind: type[MergelabError], said: str, arguments: list[str]
) -> None:
    with pytest.raises(kind, match=said.replace("[", r"\[")):
        ml.run(**{"tracking": "none", **models(arguments), **settings})


@pytest.mark.parametrize("override", ["-m", "--help", "method=", "seed=1,2", "method=[ties,dare]"])
def test_bad_overrides_are_errors_of_ours(override: str, arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        ml.run(*arguments, override, tracking="none")


def test_a_sweep_of_nothing_is_an_error_of_ours(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="say what is swept"):
        ml.sweep(*arguments, n_trials=2)
    with pytest.raises(ConfigError, match="no such keyword 'trials'"):
        ml.sweep(*arguments, method="ties", trials=2)
    with pytest.raises(MergelabError, match="protocol"):
        ml.sweep(*arguments, "eval.protocol=full", method="ties", n_trials=2)


def test_a_users_sys_exit_does_not_end_the_process(arguments: list[str], workplace: Path) -> None:
    (workplace / "leaving.py").write_text("import sys\ndef leave(models):\n    sys.exit(3)\n")
    sys.path.insert(0, str(workplace))
    try:
        with pytest.raises(ConfigError, match=r"leaving\.leave.*sys\.exit\(3\)"):
            ml.run(*arguments, method={"name": "custom", "function": "leaving.leave"}, tracking="none")
    finally:
        sys.path.remove(str(workplace))
        sys.modules.pop("leaving", None)


def state() -> dict[str, Any]:
    """What a program has set up, and expects to find again."""
    import matplotlib
    from hydra import version
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    root = logging.getLogger()
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBUS)},
        "logging": (root.level, list(root.handlers), logging.raiseExceptions),
        # The tracking store sets defaults of MLflow's where there are none, for as long as it is open.
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        "working folder": Path.cwd(),
        "arguments": list(sys.argv),
        "collection": gc.isenabled(),
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.instance().cfg, version.getbase()),
        "backend": matplotlib.get_backend(),
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.mark.parametrize("collecting", [True, False])
def test_the_process_is_left_as_it_was(arguments: list[str], collecting: bool) -> None:
    from hydra import compose, initialize
    from hydra.core.global_hydra import GlobalHydra

    gc.enable() if collecting else gc.disable()
    torch.set_num_threads(2)
    try:
        with initialize(version_base="1.2", config_path=None):
            before = state()
            ml.run(*arguments, method="soup")
            assert state() == before
            ml.sweep(*arguments, method="ties", **SWEEP)
            assert state() == before
            with pytest.raises(ConfigError):
                ml.run(*arguments, method="nothing")
            assert state() == before
            assert compose(overrides=["+a=1"]).a == 1
    finally:
        gc.enable()
        torch.set_num_threads(1)
        GlobalHydra.instance().clear()


def test_a_notebooks_event_loop_is_no_obstacle(arguments: list[str]) -> None:
    async def cell() -> Any:
        here = ml.run(*arguments, method="soup", tracking="none")
        beside = await asyncio.to_thread(ml.run, *arguments, method="soup", tracking="none")
        return here, beside

    here, beside = asyncio.run(cell())
    assert here.scores == beside.scores


def test_the_package_of_sweeps_is_the_function_of_that_name(arguments: list[str]) -> None:
    import mergelab.sweep.config  # noqa: F401

    with pytest.raises(ConfigError, match="say what is swept"):
        ml.sweep()
