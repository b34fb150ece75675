"""What a sweep's jobs see to in other processes and on other machines."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from mergelab.errors import SweepError, TrackingError
from mergelab.sweep.config import TrialJob
from mergelab.sweep.launcher import fit_launcher, mask_passwords, open_study, open_tracker, worker_context
from mergelab.tracking import TrackingConfig, open_tracking


def job(folder: Path, **changes: Any) -> TrialJob:
    told = {"study": "s", "number": 0, "source": "local", "folder": str(folder), "host": socket.gethostname(), "pid": 1}
    return TrialJob(**{**told, **changes})


@pytest.fixture
def hydra(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that Hydra has started, with what it writes about it; the folder in which the job finds itself."""
    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    node = {"runtime": {"output_dir": str(workplace / "0")}, "output_subdir": ".hydra", "job": {"chdir": False}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(node))
    monkeypatch.chdir(elsewhere)
    return elsewhere


def test_a_worker_works_in_the_sweeps_folder_and_leaves_ctrl_c_to_the_sweeper(hydra: Path, workplace: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with worker_context(job(workplace)):
        assert Path.cwd() == workplace
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before


def test_a_job_in_the_sweepers_own_process_changes_nothing(hydra: Path, workplace: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with worker_context(job(workplace, pid=os.getpid())):
        assert Path.cwd() == hydra
        assert signal.getsignal(signal.SIGINT) == before


def test_a_machine_without_the_sweeps_folder_is_one_line(hydra: Path, workplace: Path) -> None:
    with (
        pytest.raises(SweepError, match=r"the folder .*gone, where it was started on .*; start it in a folder"),
        worker_context(job(workplace / "gone")),
    ):
        pass


def test_what_hydra_wrote_keeps_no_passwords(hydra: Path, workplace: Path) -> None:
    (workplace / "0" / ".hydra").mkdir(parents=True)
    file = workplace / "0" / ".hydra" / "overrides.yaml"
    file.write_text("- sweep.storage=postgresql+psycopg://lab:secret@db/study\n- tracking.uri=https://me:secret@host\n")
    with worker_context(job(workplace)):
        text = file.read_text()
    assert text == "- sweep.storage=postgresql+psycopg://lab:***@db/study\n- tracking.uri=https://me:***@host\n"


def test_a_password_among_a_urls_options_is_masked_too(workplace: Path) -> None:
    (workplace / "multirun.yaml").write_text("storage: 'postgresql+psycopg://db/study?user=lab&password=secret'\n")
    mask_passwords(workplace)
    assert "secret" not in (workplace / "multirun.yaml").read_text()


def test_a_file_of_another_machine_is_refused(workplace: Path) -> None:
    other = job(workplace, host="another")
    with pytest.raises(SweepError, match=r"outputs/sweeps.db: is a file of another, and a trial runs on .*postgresql"):
        open_study(f"sqlite:///{workplace}/outputs/sweeps.db", other)
    with pytest.raises(SweepError, match=r"study.log: is not there on .*must be shared with another"):
        open_study(f"journal:{workplace}/study.log", other)
    with pytest.raises(TrackingError, match=r"mlflow.db is a file of another, .*need a tracking server"):
        open_tracker(TrackingConfig(), other)
    assert list(workplace.iterdir()) == []  # nothing was made in their place


def test_a_storage_without_the_study_and_a_store_without_the_sweeps_run_are_one_line(workplace: Path) -> None:
    with pytest.raises(SweepError, match=r"has no study s, seen from"):
        open_study(f"sqlite:///{workplace}/other.db", job(workplace))
    with pytest.raises(TrackingError, match=r"does not have the sweep's run .*for the workers too"):
        open_tracker(TrackingConfig(), job(workplace, parent="0" * 32))


def test_a_worker_records_where_the_sweep_does_whatever_its_environment_says(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{workplace}/the-sweeps.db"
    with open_tracking(TrackingConfig(uri=store)).start_run("sweep", experiment="rte") as parent:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/another.db")
    tracker = open_tracker(TrackingConfig(), job(workplace, tracking=store, parent=parent.id))
    assert tracker.store is not None
    assert tracker.store.uri == store


@pytest.mark.parametrize(("address", "size"), [(None, 1), ("10.0.0.1:6379", None), ("local", 1)])
def test_ray_starts_a_job_again_as_often_as_the_sweep_would_and_joins_running_clusters(
    address: str | None, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    settings = OmegaConf.create({"init": {"address": address}, "remote": {"num_gpus": 1}})
    launcher: Any = SimpleNamespace(ray_cfg=settings)
    fit_launcher(launcher, 2)
    assert settings.remote == {"num_gpus": 1, "max_retries": 2}
    settings.init.setdefault("object_store_memory", 1)  # what Ray's launcher does next, and Ray refuses in a cluster
    assert settings.init.object_store_memory == size
    settings.remote.max_retries = 0
    fit_launcher(launcher, 2)
    assert settings.remote.max_retries == 0
