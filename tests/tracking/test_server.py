from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mergelab.errors import TrackingError
from mergelab.tracking import TrackingConfig, open_tracking


@dataclass(frozen=True)
class Server:
    address: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(60)


@pytest.fixture
def server(workplace: Path) -> Iterator[Server]:
    """A real MLflow server on loopback, with its store and artifacts in the test's folder."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        port = once.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        "sqlite:///outputs/mlflow.db",
        "--artifacts-destination",
        str(workplace / "kept"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    started = Server(f"http://127.0.0.1:{port}", process)
    while not _answers(started.address):
        assert process.poll() is None, "the MLflow server did not start"
        time.sleep(0.2)
    yield started
    started.stop()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_a_server_takes_runs_with_artifacts_and_a_server_that_goes_away_is_one_line(
    server: Server,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_client: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    tracker = open_tracking(TrackingConfig())
    with tracker.start_run("ties", experiment="rte", params={"method": {"density": 0.2}}) as run:
        run.log_metrics({"report/accuracy": 0.6})
        run.log_dataset("rte", origin="folder", location="/data/rte", fingerprint="f" * 64, rows=277)
        run.log_table([{"a": 1}], "tables/summary.csv")
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params == {"method.density": "0.2"}
    assert recorded.inputs.dataset_inputs[0].dataset.name == "rte"
    assert [path.read_text() for path in (workplace / "kept").rglob("summary.csv")] == ["a\n1\n"]
    assert tracker.find_run({"mergelab.pid": str(os.getpid())}) == run.id
    assert tracker.ui_command() == server.address
    assert tracker.ui_page("rte").startswith(f"{server.address}/#/experiments/")

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    last = tracker.start_run("cut off", experiment="rte")
    server.stop()
    with pytest.raises(TrackingError, match=r"^cannot log the metrics of run cut off: ") as caught, last:
        last.log_metrics({"report/accuracy": 0.6})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
