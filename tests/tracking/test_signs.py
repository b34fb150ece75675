"""Runs of processes elsewhere are closed once these give no more sign of life."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mergelab.tracking import Tracker

OPEN_A_RUN = """
import time
from mergelab.tracking import TrackingConfig, open_tracking, signs
signs.SIGN_S = 0.1
run = open_tracking(TrackingConfig()).start_run("ties", experiment="rte", tags={"mergelab.boot": "another machine"})
print(run.id, flush=True)
input()
run.end()
print("ended", flush=True)
time.sleep(60)
"""


def sign(mlflow_client: Any, run_id: str) -> float:
    return float(mlflow_client.get_run(run_id).data.tags["mergelab.alive"])


@pytest.mark.parametrize("place", [{"mergelab.boot": "another"}, {"mergelab.pid_namespace": "pid:[1]"}], ids=str)
def test_a_run_from_elsewhere_is_closed_when_its_last_sign_of_life_is_old(
    tracker: Tracker, mlflow_client: Any, place: Mapping[str, str]
) -> None:
    now = time.time()
    ages = {"silent": 700, "quiet": 300, "ahead of this clock": -300}
    runs = {
        name: tracker.start_run(name, experiment="rte", tags={**place, "mergelab.alive": str(now - age)})
        for name, age in ages.items()
    }
    here = tracker.start_run("here", experiment="rte", tags={"mergelab.alive": str(now - 10_000)})  # it lives
    assert tracker.reconcile() == [runs["silent"].id]
    closed = mlflow_client.get_run(runs["silent"].id)
    assert closed.info.status == "KILLED"
    assert closed.data.tags["error"].endswith(f" on {socket.gethostname()} gave no more sign of life")
    for run in (here, *runs.values()):
        run.end()  # also the one that was closed by mistake
        assert mlflow_client.get_run(run.id).info.status == "FINISHED"


def test_an_open_run_is_tagged_again_and_again_and_a_closed_one_no_more(
    start: Callable[..., Any], mlflow_client: Any
) -> None:
    process = start(OPEN_A_RUN)
    run_id = process.line()
    first = sign(mlflow_client, run_id)
    assert abs(first - time.time()) < 60
    while sign(mlflow_client, run_id) <= first:
        time.sleep(0.05)
    process.popen.stdin.write("\n")
    process.popen.stdin.flush()
    assert process.line() == "ended"
    time.sleep(0.3)  # what was under way
    last = sign(mlflow_client, run_id)
    time.sleep(0.5)
    assert sign(mlflow_client, run_id) == last
    process.signal(signal.SIGKILL)
