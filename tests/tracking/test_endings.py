from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from mergelab.errors import ModelError
from mergelab.tracking import Tracker

OPEN_A_RUN = """
import os, signal, time
from mergelab.tracking import TrackingConfig, open_tracking
tracker = open_tracking(TrackingConfig())
{before}
with tracker.start_run("ties", experiment="rte") as run:
    print(run.id, flush=True)
    {inside}
"""


def test_a_run_that_raises_is_failed_with_its_error_in_one_line(tracker: Tracker, mlflow_client: Any) -> None:
    with pytest.raises(ModelError), tracker.start_run("ties", experiment="rte") as run:
        raise ModelError("expert howey/rte: no config.json\nmore")
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.status == "FAILED"
    assert recorded.data.tags["error"] == "expert howey/rte: no config.json"


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
    process = start(OPEN_A_RUN.format(before="", inside="time.sleep(100)"))
    run_id = process.line()
    process.signal(number)
    assert process.end()[0] in (code, 128 + number)
    recorded = mlflow_client.get_run(run_id)
    assert (recorded.info.status, recorded.data.tags["error"]) == ("KILLED", said)


def test_a_run_whose_process_vanished_is_closed_when_the_store_is_opened_next(
    start: Callable[..., Any], mlflow_client: Any
) -> None:
    inside = "run.log_metrics({'a': 1}); print(flush=True); time.sleep(100)"
    process = start(OPEN_A_RUN.format(before="", inside=inside))
    run_id = process.line()
    process.line()
    process.signal(signal.SIGKILL)
    process.end()
    assert mlflow_client.get_run(run_id).info.status == "RUNNING"
    start("from mergelab.tracking import *; open_tracking(TrackingConfig())").end()
    recorded = mlflow_client.get_run(run_id)
    assert recorded.info.status == "KILLED"
    assert recorded.data.tags["error"] == f"process {process.popen.pid} ended without closing the run"
    # It ended when it last gave a sign of life, not when it was found.
    assert recorded.info.end_time == mlflow_client.get_metric_history(run_id, "a")[0].timestamp


def test_runs_of_living_processes_and_of_other_hosts_are_left_alone(
    tracker: Tracker, start: Callable[..., Any], mlflow_client: Any
) -> None:
    process = start(OPEN_A_RUN.format(before="", inside="time.sleep(100)"))
    living = process.line()
    own = tracker.start_run("own", experiment="rte")
    gone = {"mergelab.pid": "999999999", "mergelab.process_start": "1.0"}
    elsewhere = tracker.start_run("elsewhere", experiment="rte", tags=gone | {"mergelab.host": "elsewhere"})
    contained = tracker.start_run("contained", experiment="rte", tags=gone | {"mergelab.pid_namespace": "pid:[1]"})
    unknown = mlflow_client.create_run(tracker.experiment("rte"))
    assert tracker.reconcile() == []
    for run_id in (living, own.id, elsewhere.id, contained.id, unknown.info.run_id):
        assert mlflow_client.get_run(run_id).info.status == "RUNNING"
    for run in (own, elsewhere, contained):
        run.end()


def test_another_process_under_the_same_number_does_not_keep_a_dead_run_alive(
    tracker: Tracker, mlflow_client: Any
) -> None:
    an_hour_before = psutil.Process().create_time() - 3600
    run = tracker.start_run("ties", experiment="rte", tags={"mergelab.process_start": str(an_hour_before)})
    assert tracker.reconcile() == [run.id]
    run.end("KILLED")


def test_sigterm_has_its_default_meaning_before_and_after_runs(tracker: Tracker) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with tracker.start_run("parent", experiment="rte") as parent:
        with tracker.start_run("child", experiment="rte", parent=parent.id):
            pass
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigterm_handler_of_the_users_own_is_left_alone(start: Callable[..., Any], mlflow_client: Any) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: run.log_metrics({'handled': 1}))"
    process = start(OPEN_A_RUN.format(before=before, inside="os.kill(os.getpid(), signal.SIGTERM)"))
    run_id = process.line()
    assert process.end()[0] == 0
    recorded = mlflow_client.get_run(run_id)
    assert (recorded.info.status, recorded.data.metrics) == ("FINISHED", {"handled": 1.0})


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


def test_a_zombie_counts_as_ended(tracker: Tracker, start: Callable[..., Any], mlflow_client: Any) -> None:
    if sys.platform == "win32":
        pytest.skip("needs zombies")
    process = start(OPEN_A_RUN.format(before="", inside="os.kill(os.getpid(), signal.SIGKILL)"))
    run_id = process.line()
    while psutil.Process(process.popen.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    assert tracker.reconcile() == [run_id]
    assert os.waitpid(process.popen.pid, 0)[1] == signal.SIGKILL
    process.popen.returncode = -signal.SIGKILL
