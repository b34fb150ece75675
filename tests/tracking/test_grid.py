from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mergelab.tracking import RunRecord, Tracker
from mergelab.tracking.grid import best_child, shared_tags
from tests.forks import Forks
from tests.tracking.conftest import APP, environment

pytestmark = pytest.mark.slow

Grid = Callable[..., tuple[int, str, str]]
JOB = str(APP / "grid_job.py")
JOBLIB = pytest.param(
    ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    id="joblib",
    marks=pytest.mark.skipif(
        find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason="needs the joblib launcher"
    ),
)
BASIC = pytest.param((), id="basic")


@pytest.fixture
def grid(forks: Forks, workplace: Path) -> Grid:
    """Run the app in a process of its own; return its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        done = forks.run(JOB, *arguments, folder=workplace, environment=environment())
        return done.returncode, done.stdout, done.stderr

    return run


def families(tracker: Tracker) -> list[tuple[RunRecord, list[RunRecord]]]:
    """The parent runs, oldest first, each with its children in the order of their names."""
    runs = sorted(tracker.runs(), key=lambda run: run.name)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.tags]
    return [
        (parent, [run for run in runs if run.tags.get("mlflow.parentRunId") == parent.id])
        for parent in sorted(parents, key=lambda run: run.started)
    ]


@pytest.mark.parametrize("launcher", [BASIC, JOBLIB])
def test_a_grid_is_one_parent_run_with_a_child_per_job(
    grid: Grid, tracker: Tracker, mlflow_client: Any, launcher: tuple[str, ...], workplace: Path
) -> None:
    assert grid("-m", "method=soup,ties", "method.density=0.1,0.3", "task=rte", *launcher) == (
        0,
        "",
        "",
    )
    ((parent, children),) = families(tracker)
    assert parent.name == "grid: method=soup,ties density=0.1,0.3 (mini/rte)"
    assert (parent.experiment, parent.status) == ("mini/rte", "FINISHED")
    assert parent.params == {"overrides": "method=soup,ties method.density=0.1,0.3 task=rte", "jobs": "4"}
    assert parent.tags["mergelab.sweep_dir"] == str(workplace / "outputs" / "grids" / "first")
    assert [child.name for child in children] == [
        "soup density=0.1",
        "soup density=0.3",
        "ties density=0.1",
        "ties density=0.3",
    ]
    assert {(child.experiment, child.status, child.tags["mergelab.source"]) for child in children} == {
        ("mini/rte", "FINISHED", "mini")
    }
    assert (workplace / "decisions").read_text() == "asked\n"  # once, for all jobs
    assert parent.metrics["best/report/accuracy"] == pytest.approx(0.73)
    assert parent.metrics["best/report/accuracy_low"] == pytest.approx(0.68)
    assert parent.tags["mergelab.best_run_id"] == children[-1].id

    folder = Path(mlflow_client.download_artifacts(parent.id, ""))
    with (folder / "summary.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {child.name for child in children}
    best = rows["ties density=0.3"]
    assert (best["method"], best["method.density"], best["best"], best["status"]) == ("ties", "0.3", "*", "FINISHED")
    assert float(best["report/accuracy"]) == children[-1].metrics["report/accuracy"]
    assert list(best)[:6] == ["run", "method", "method.density", "status", "best", "report/accuracy"]
    assert len(json.loads((folder / "summary.json").read_text())) == 4


def test_a_grid_with_a_failing_job_is_failed_and_says_which(grid: Grid, tracker: Tracker) -> None:
    code, _, err = grid("-m", "method=soup,ties,dare", "behaviour=fail")
    assert code == 1
    assert "ValueError: no consensus" in err
    ((parent, children),) = families(tracker)
    assert [child.status for child in children] == ["FINISHED", "FINISHED", "FAILED"]
    assert children[2].tags["error"] == "ValueError: no consensus"
    assert parent.status == "FAILED"
    assert parent.tags["error"] == "2 of 3 jobs finished; ties density=0.2: ValueError: no consensus"
    assert parent.tags["mergelab.best_run_name"] == "dare density=0.2"


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        pytest.param(*BASIC.values, signal.SIGINT, id="basic"),
        pytest.param(*JOBLIB.values, signal.SIGTERM, id="joblib", marks=JOBLIB.marks),
    ],
)
def test_a_grid_that_is_asked_to_end_is_killed_with_the_job_that_was_running(
    start: Callable[..., Any], tracker: Tracker, launcher: tuple[str, ...], workplace: Path, number: int
) -> None:
    process = start(None, JOB, "-m", "method=ties,soup", "behaviour=hang", *launcher)
    while not list(workplace.glob("hanging-*")):
        assert process.popen.poll() is None
        time.sleep(0.05)
    process.signal(number)
    assert process.end()[0] != 0
    ((parent, children),) = families(tracker)
    assert (parent.status, parent.tags["error"]) == ("KILLED", "interrupted")
    assert {child.name: child.status for child in children}["ties density=0.2"] == "KILLED"
    assert not [run.name for run in tracker.runs(status="RUNNING")]


def test_the_next_grid_in_a_folder_closes_what_a_vanished_one_left_open_and_finds_its_own_parent(
    grid: Grid, tracker: Tracker, workplace: Path
) -> None:
    folder = str(workplace / "outputs" / "grids" / "first")
    gone = {
        "mergelab.pid": "999999999",
        "mergelab.kind": "grid",
        "mergelab.sweep_dir": folder,
        "mergelab.source": "hub",
    }
    left_open = tracker.start_run("grid: method=ties,soup", experiment="mini/rte", tags=gone)
    assert grid("-m", "method=ties,soup")[0] == 0
    (killed, none), (finished, children) = families(tracker)
    assert (killed.id, killed.status, none) == (left_open.id, "KILLED", [])
    assert (finished.status, len(children)) == ("FINISHED", 2)
    left_open.end("KILLED")


def test_a_grid_over_tasks_keeps_its_jobs_together_and_names_no_best_among_different_tasks(
    grid: Grid, tracker: Tracker
) -> None:
    assert grid("-m", "task=rte,sst2")[0] == 0
    ((parent, children),) = families(tracker)
    assert {run.experiment for run in (parent, *children)} == {"mini/rte,sst2"}
    assert "mergelab.best_run_id" not in parent.tags


def test_a_single_run_has_no_parent_and_writes_to_the_store_of_the_folder_it_was_started_in(
    grid: Grid, tracker: Tracker
) -> None:
    assert grid("method=ties", "hydra.job.chdir=true", "hydra.run.dir=elsewhere") == (0, "", "")
    ((run, children),) = families(tracker)
    assert (run.name, run.experiment, children) == ("ties density=0.2", "mini/rte", [])


def test_a_grid_without_tracking_leaves_no_trace(grid: Grid, tracker: Tracker, workplace: Path) -> None:
    assert grid("-m", "method=soup,ties", "tracking=none") == (0, "", "")
    assert tracker.runs() == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("tracking.uri=http://127.0.0.1:9", "error: cannot reach the tracking store http://127.0.0.1:9 ("),
        ("tracking.log_model=some", "error: tracking.log_model='some': must be one of 'none', 'best' or 'all'"),
    ],
)
def test_a_grid_whose_tracking_cannot_be_used_stops_before_its_first_job(
    grid: Grid, workplace: Path, override: str, line: str
) -> None:
    code, out, err = grid("-m", "method=soup,ties", override)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert not (workplace / "outputs" / "grids").exists()


def test_where_less_is_better_the_best_child_has_the_least() -> None:
    def child(value: float, **tags: str) -> RunRecord:
        tags = {"mergelab.primary_metric": "report/perplexity"} | {f"mergelab.{key}": tags[key] for key in tags}
        return RunRecord(str(value), "x", "e", "FINISHED", 0, 1, {}, {"report/perplexity": value}, tags)

    less = [child(value, direction="minimize") for value in (9.0, 7.0, 8.0)]
    more = [child(value) for value in (9.0, 7.0)]
    assert [best.id for best in (best_child(less), best_child(more)) if best] == ["7.0", "9.0"]
    assert best_child([]) is None


def test_a_grid_has_the_tags_that_all_of_its_jobs_share() -> None:
    def job(method: str, **more: str) -> RunRecord:
        tags = {"mergelab.method": method, "mergelab.task": "rte", "model.a.sha256": "12", "mergelab.pid": "1"} | more
        return RunRecord(method, method, "e", "FINISHED", 0, 1, {}, {}, tags)

    jobs = [job("ties"), job("soup"), job("dare", **{"mergelab.protocol": "full"})]
    assert shared_tags(jobs, 3) == {"mergelab.task": "rte", "model.a.sha256": "12"}
    assert shared_tags(jobs[:1], 3) == {}  # the others never began: they may have been of anything
    assert shared_tags([], 3) == {}
