from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mergelab.errors import TrackingError
from mergelab.tracking import Tracker, TrackingConfig, open_tracking
from mergelab.tracking.processes import process_tag

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Server:
    address: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(60)


@pytest.fixture
def server(workplace: Path, tracker: Tracker) -> Iterator[Server]:
    """A real MLflow server on loopback, started by the very command that a user is shown."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        port = once.getsockname()[1]
    command = [*shlex.split(tracker.ui_command()), "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    started = Server(f"http://127.0.0.1:{port}", process)
    try:
        while not _answers(started.address):
            assert process.poll() is None, "the MLflow server did not start"
            time.sleep(0.2)
        yield started
    finally:
        started.stop()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_the_ui_serves_local_artifacts_a_server_takes_runs_and_one_that_goes_away_is_one_line(
    tracker: Tracker,
    server: Server,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_client: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with tracker.start_run("local", experiment="mini/rte") as local:
        local.log_text("method: ties", "config.yaml")
    page = f"{server.address}/get-artifact?path=config.yaml&run_uuid={local.id}"
    with urllib.request.urlopen(page, timeout=30) as answer:
        assert answer.read() == b"method: ties"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    remote = open_tracking(TrackingConfig())
    with remote.start_run("ties", experiment="rte", params={"method": {"density": 0.2}}) as run:
        run.log_metrics({"report/accuracy": 0.6})
        run.log_dataset("rte", origin="folder", location="/data/rte", fingerprint="f" * 64, rows=277)
        run.log_table([{"a": 1}], "tables/summary.csv")
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params == {"method.density": "0.2"}
    assert recorded.inputs.dataset_inputs[0].dataset.name == "rte"
    assert [path.read_text() for path in workplace.rglob("tables/summary.csv")] == ["a\n1\n"]
    assert remote.find_run(process_tag()) == run.id
    assert remote.ui_command() == server.address
    assert remote.ui_page("rte").startswith(f"{server.address}/#/experiments/")

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    last = remote.start_run("cut off", experiment="rte")
    server.stop()
    with pytest.raises(TrackingError, match=r"^cannot log the metrics of run cut off: ") as caught, last:
        last.log_metrics({"report/accuracy": 0.6})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
