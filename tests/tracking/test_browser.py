"""MLflow's own UI, in a real browser, opened by the links that are printed; skipped where there is none."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergelab.tracking import Tracker, names, views

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METRIC = "report/accuracy"


@pytest.fixture
def ui(workplace: Path) -> Iterator[str]:
    """The address of MLflow's UI on the workplace's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{workplace}/outputs/mlflow.db",
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
    with (workplace / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(1200):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait()


def shown(address: str, profile: Path) -> str:
    """What a browser shows of a page, without its tags: tried again until the table has rows."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
               "--window-size=2600,1200", "--virtual-time-budget=60000", "--dump-dom", address]  # fmt: skip
    text = ""
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        text = re.sub(r"<(script|style).*?</\1>", " ", done.stdout, flags=re.DOTALL)
        if "matching run" in text:
            break
    return re.sub(r"<[^>]+>", " ", text)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium to open MLflow's UI")
@pytest.mark.parametrize("view", [views.MERGES, views.BASELINES])
def test_the_printed_link_opens_the_view(tracker: Tracker, ui: str, tmp_path: Path, view: str) -> None:
    runs: dict[str, tuple[str, Any]] = {
        "rte ties density=0.3": ("merge", {"method": {"name": "ties", "density": 0.3, "lambda": 1.0}}),
        "rte soup": ("merge", {"method": {"name": "soup"}}),
        "expert a (full)": ("expert", {"role": "expert", "eval": {"protocol": "full"}}),
        "a trial": ("trial", {"method": {"name": "ties"}}),
    }
    for number, (name, (kind, params)) in enumerate(runs.items()):
        tags = {names.KIND: kind, **({names.BASELINE_KEY: "k"} if kind == "expert" else {})}
        with tracker.start_run(name, experiment="rte", tags=tags, params=params) as run:
            run.log_metrics({METRIC: 0.8 - number / 16, names.low(METRIC): 0.5, names.high(METRIC): 0.9})
    tracker.save_views("rte", [views.merges(METRIC, minimized=False), views.baselines(METRIC, minimized=False)])
    page = tracker.ui_page("rte", view=view)
    text = shown(ui + page.removeprefix("http://127.0.0.1:5000"), tmp_path / "profile")
    assert "You're viewing a shared view" in text.replace("&#39;", "'")
    is_merges = view == views.MERGES
    assert [name for name in runs if name in text] == (list(runs)[:2] if is_merges else list(runs)[2:3])
    columns = ["method.name", "method.lambda", "method.density"] if is_merges else [names.ROLE, "eval.protocol"]
    for column in (*columns, METRIC, names.low(METRIC), names.high(METRIC)):
        assert column in text, column
    assert ("2" if is_merges else "1") in re.findall(r"(\d+)\s+matching run", text)
    if is_merges:
        assert text.index("rte ties density=0.3") < text.index("rte soup")
