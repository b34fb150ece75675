"""What cannot be reported is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mergelab.report.__main__ import main
from mergelab.tracking import TrackingConfig, names, open_tracking
from tests.conftest import Outcome
from tests.report.conftest import Store, right_on


def refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert len(line) <= 410
    for part in parts:
        assert part in line
    assert not Path("report").exists()


def test_no_store_is_said_and_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "sqlite:///outputs/mlflow.db: there is no such store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_is_said(workplace: Path, report: Callable[..., Outcome]) -> None:
    refused(report(), "has no runs of mergelab's", "--tracking-uri")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("rtee", "did you mean 'rte'"),
        ("method=tie", "no runs match"),
        ("0" * 32, "has no run of mergelab's with this id"),
        ("4b3", "neither an experiment, nor a tag key=value, nor a run's id"),
        ("a'b`c=\"d'", "no runs match"),
    ],
)
def test_runs_that_do_not_exist(compared: Store, report: Callable[..., Outcome], wanted: str, said: str) -> None:
    refused(report(wanted), said)


def test_a_metric_that_no_run_has(compared: Store, report: Callable[..., Outcome]) -> None:
    refused(report("rte", "--metric=acuracy"), "no run has it; did you mean 'accuracy'?")


def test_runs_without_any_result(store: Store, report: Callable[..., Outcome]) -> None:
    store.run("merge", "task=rte", status="FAILED", name="rte ties")
    refused(report(), "no scores; rte ties: failed: it broke")


def test_a_server_that_cannot_be_reached(workplace: Path, report: Callable[..., Outcome]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(report(f"--tracking-uri=http://user:secret@127.0.0.1:{port}"), "cannot reach the tracking store")


@pytest.mark.parametrize("kind", ["file", "other files"])
def test_an_output_that_holds_something_else_stays_as_it_is(
    compared: Store, report: Callable[..., Outcome], kind: str
) -> None:
    taken = Path("taken")
    if kind == "other files":
        taken.mkdir()
    file = taken if kind == "file" else taken / "notes.txt"
    file.write_text("mine")
    refused(report("rte", "--output=taken"), "--output=taken")
    assert file.read_text() == "mine"
    assert list(taken.iterdir()) == [file] if taken.is_dir() else True


def test_a_report_is_replaced_and_may_be_logged(compared: Store, report: Callable[..., Outcome]) -> None:
    run = compared.run("merge", "method=dare", "task=rte", correct=right_on(150), name="rte dare")
    assert report(run).code == 0
    first = Path("report/report.html").read_bytes()
    assert report(run, "--log").code == 0
    assert Path("report/report.html").read_bytes()[:100] == first[:100]
    logged = compared.tracker.client.list_artifacts(run, "report")
    assert "report/report.html" in [one.path for one in logged]


def test_a_report_on_several_runs_is_logged_to_none(compared: Store, report: Callable[..., Outcome]) -> None:
    refused(report("rte", "--log"), "--log: the report is about 6 sweeps, grids or runs")


def test_without_output_the_folder_is_named_after_the_runs(compared: Store) -> None:
    assert main(["rte", "method=ties"]) == 0
    (folder,) = Path("outputs/reports").iterdir()
    assert folder.name.startswith("rte-method-ties-")


def test_a_read_report_writes_nothing_to_the_store(compared: Store, report: Callable[..., Outcome]) -> None:
    before = {run.id: (run.tags, run.metrics, run.status) for run in compared.tracker.runs()}
    assert report("rte").code == 0
    assert {run.id: (run.tags, run.metrics, run.status) for run in compared.tracker.runs()} == before
    assert open_tracking(TrackingConfig()) is compared.tracker
    assert names.OURS
