from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from mergelab.errors import ModelError
from mergelab.tracking import Tracker, TrackingConfig, open_tracking, processes

pytestmark = pytest.mark.slow

OPEN_A_RUN = """
import time
from mergelab.tracking import TrackingConfig, open_tracking
with open_tracking(TrackingConfig()).start_run("ties", experiment="rte") as run:
    run.log_metrics({"a": 1.0})
    print(run.id, flush=True)
    time.sleep(100)
"""


def test_a_run_that_raises_is_failed_with_its_error_in_one_line(tracker: Tracker, mlflow_client: Any) -> None:
    with pytest.raises(ModelError), tracker.start_run("ties", experiment="rte") as run:
        raise ModelError("expert howey/rte: no config.json\nmore")
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.status == "FAILED"
    assert recorded.data.tags["error"] == "expert howey/rte: no config.json more"  # as the command line says it


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ZeroDivisionError("division by zero"), "FAILED", "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (SystemExit(2), "FAILED", "exited with 2"),
        (SystemExit(0), "FINISHED", None),
    ],
)
def test_the_status_tells_how_a_run_ended(
    tracker: Tracker, mlflow_client: Any, error: BaseException, status: str, said: str | None
) -> None:
    with pytest.raises(type(error)), tracker.start_run("ties", experiment="rte") as run:
        raise error
    recorded = mlflow_client.get_run(run.id)
    assert (recorded.info.status, recorded.data.tags.get("error")) == (status, said)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, -signal.SIGINT, "interrupted"), (signal.SIGTERM, 128 + signal.SIGTERM, "terminated by SIGTERM")],
)
def test_a_run_whose_process_is_asked_to_end_is_killed(
    start: Callable[..., Any], mlflow_client: Any, number: int, code: int, said: str
) -> None:
    process = start(OPEN_A_RUN)
    run_id = process.line()
    process.signal(number)
    assert process.end()[0] in (code, 128 + number)
    recorded = mlflow_client.get_run(run_id)
    assert (recorded.info.status, recorded.data.tags["error"]) == ("KILLED", said)


def test_a_run_whose_process_vanished_is_closed_when_the_store_is_opened_next(
    start: Callable[..., Any], mlflow_client: Any
) -> None:
    process = start(OPEN_A_RUN)
    run_id = process.line()
    process.signal(signal.SIGKILL)
    process.end()
    assert mlflow_client.get_run(run_id).info.status == "RUNNING"
    open_tracking(TrackingConfig())
    recorded = mlflow_client.get_run(run_id)
    assert recorded.info.status == "KILLED"
    assert recorded.data.tags["error"] == f"process {process.popen.pid} ended without closing the run"
    # It ended when it last gave a sign of life, not when it was found.
    assert recorded.info.end_time == mlflow_client.get_metric_history(run_id, "a")[0].timestamp


def of_process(process: psutil.Process) -> dict[str, str]:
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    started = {"mergelab.process_start": str(process.create_time()), "mergelab.process_start_ticks": ticks}
    return {"mergelab.pid": str(process.pid), **started}


def test_runs_of_living_processes_and_of_other_hosts_are_left_alone(tracker: Tracker, mlflow_client: Any) -> None:
    living = of_process(psutil.Process(os.getppid()))
    gone = {"mergelab.pid": "999999999", "mergelab.process_start": "1.0"}
    places = [{"mergelab.boot": "another"}, {"mergelab.pid_namespace": "pid:[1]"}]
    tags = [{}, living, *(gone | place for place in places)]
    runs = [tracker.start_run("left alone", experiment="rte", tags=each) for each in tags]
    foreign = mlflow_client.create_run(tracker.experiment("rte")).info.run_id
    assert tracker.reconcile() == []
    assert {mlflow_client.get_run(run_id).info.status for run_id in (foreign, *(run.id for run in runs))} == {"RUNNING"}
    for run in runs:
        run.end()


def test_a_run_that_ends_while_the_runs_are_looked_through_stays_finished(
    tracker: Tracker, mlflow_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"mergelab.pid": "999999999", "mergelab.process_start": "1.0"}
    run = tracker.start_run("ties", experiment="rte", tags=gone)

    def ended(tags: Mapping[str, str]) -> bool:
        run.end()  # between the list of runs and the look at their processes
        return True

    monkeypatch.setattr(processes, "has_ended", ended)
    assert tracker.reconcile() == []
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.status == "FINISHED"
    assert "error" not in recorded.data.tags


def test_another_process_under_the_same_number_does_not_keep_a_dead_run_alive(
    tracker: Tracker, mlflow_client: Any
) -> None:
    ticks = of_process(psutil.Process())["mergelab.process_start_ticks"]
    run = tracker.start_run("ties", experiment="rte", tags={"mergelab.process_start_ticks": str(int(ticks) - 1)})
    assert tracker.reconcile() == [run.id]
    run.end("KILLED")


def test_sigterm_has_its_default_meaning_before_and_after_runs(tracker: Tracker) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with tracker.start_run("parent", experiment="rte") as parent:
        with tracker.start_run("child", experiment="rte", parent=parent.id):
            pass
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigterm_handler_of_the_users_own_is_left_alone(tracker: Tracker, mlflow_client: Any) -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    try:
        with tracker.start_run("ties", experiment="rte") as run:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled == [signal.SIGTERM]
    assert mlflow_client.get_run(run.id).info.status == "FINISHED"


def test_a_worker_threads_run_is_closed_like_any_other(tracker: Tracker, mlflow_client: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def record(name: str) -> str:
        with tracker.start_run(name, experiment="rte") as run:
            run.log_metrics({"a": 1.0})
        return str(run.id)

    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(record, "abcd"))
    assert {mlflow_client.get_run(run_id).info.status for run_id in ids} == {"FINISHED"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform == "win32", reason="needs zombies")
def test_a_process_that_nobody_has_waited_for_counts_as_ended(tracker: Tracker) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = tracker.start_run("ties", experiment="rte", tags=of_process(psutil.Process(process.pid)))
    assert tracker.reconcile() == []
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    assert tracker.reconcile() == [run.id]
    process.communicate()
    run.end("KILLED")


def test_an_abandoned_run_is_left_to_whoever_has_it(tracker: Tracker, mlflow_client: Any) -> None:
    with tracker.start_run("ties", experiment="rte") as run:
        run.abandon()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run.end("FAILED", "too late")
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.status == "RUNNING"
    assert "error" not in recorded.data.tags
