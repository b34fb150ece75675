"""A store that was moved or copied: where new artifacts go, where old ones are found, and what stays as it was."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mergelab.errors import TrackingError
from mergelab.tracking import Tracker, TrackingConfig, open_tracking
from mergelab.tracking.sqlite_urls import sqlite_url

ODD_NAMES = ["moved", "a?b", "50% of it", "a%20b", "50%25", "#1", "à la [carte]={x},$y", "x;y&z=1?u=2"]


def record(tracker: Tracker, name: str, experiment: str = "rte") -> str:
    with tracker.start_run(name, experiment=experiment) as run:
        run.log_text(name, "notes/name.txt")
    assert run.id
    return run.id


def opened(folder: Path) -> tuple[Tracker, Any]:
    """The store in the folder's outputs, as mergelab opens it afterwards, and MLflow's own client on it."""
    url = sqlite_url(folder / "outputs" / "mlflow.db")
    return open_tracking(TrackingConfig(uri=url)), MlflowClient(url)


def noted(client: Any, run_id: str) -> str:
    """What MLflow itself finds in a run's artifact; a client remembers where a run's artifacts were."""
    artifacts = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
    return Path(artifacts.download_artifacts("notes/name.txt")).read_text()


def place(client: Any, run_id: str) -> Path:
    folder = Path(url2pathname(urlsplit(client.get_run(run_id).info.artifact_uri).path))
    assert (folder / "notes" / "name.txt").is_file()
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def location(folder: Path) -> Path:
    return folder / "outputs" / "mlartifacts" / "rte"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_after_a_move_old_artifacts_are_found_and_new_ones_are_beside_them(
    tracker: Tracker, workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = record(tracker, "old")
    there = workplace.parent / "further" / name
    there.parent.mkdir()
    monkeypatch.chdir(workplace.parent)
    workplace.rename(there)
    monkeypatch.chdir(there)
    moved = open_tracking(TrackingConfig())
    new = record(moved, "new")
    _, client = opened(there)
    assert place(client, old) == location(there) / old / "artifacts"
    assert place(client, new) == location(there) / new / "artifacts"
    assert (noted(client, old), noted(client, new)) == ("old", "new")
    assert [run.id for run in moved.runs(experiment="rte")] == [new, old]
    assert not workplace.exists()
    assert sorted(path.name for path in there.parent.iterdir()) == [name]


def test_a_copy_is_a_store_of_its_own_and_the_original_is_left_alone(tracker: Tracker, workplace: Path) -> None:
    old = record(tracker, "old")
    before = contents(workplace)
    copy = workplace.parent / "copy"
    shutil.copytree(workplace, copy)
    other, client = opened(copy)
    new = record(other, "new")
    with other.resume_run(old) as run:
        run.log_text("again", "notes/name.txt")
    assert place(client, new) == location(copy) / new / "artifacts"
    assert noted(client, old) == "again"
    assert contents(workplace) == before
    again, original = opened(workplace)
    assert noted(original, old) == "old"
    assert place(original, record(again, "third")).is_relative_to(workplace)


def test_a_store_reached_through_a_link_is_the_same_store(tracker: Tracker, workplace: Path) -> None:
    old = record(tracker, "old")
    link = workplace.parent / "link"
    link.symlink_to(workplace)
    linked, client = opened(link)
    new = record(linked, "new")
    assert linked is tracker
    assert {place(client, run).parent.parent for run in (old, new)} == {location(workplace)}


def test_outputs_may_be_a_link_that_moves_with_the_project(
    workplace: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = workplace.parent / "disk"
    (workplace / "outputs").rename(disk)
    (workplace / "outputs").symlink_to(disk)
    old = record(open_tracking(TrackingConfig()), "old")
    there = workplace.rename(workplace.with_name("there"))
    monkeypatch.chdir(there)
    tracker, client = opened(there)
    assert {place(client, run).parent.parent for run in (old, record(tracker, "new"))} == {disk / "mlartifacts" / "rte"}
    assert not workplace.exists()


def test_what_was_put_elsewhere_on_purpose_stays_there(tracker: Tracker, workplace: Path, mlflow_client: Any) -> None:
    elsewhere = workplace.parent / "big disk" / "rte"
    mlflow_client.create_experiment("rte", artifact_location=elsewhere.as_uri())
    mlflow_client.create_experiment("bucket", artifact_location="s3://bucket/rte")
    old = record(tracker, "old")
    there = workplace.rename(workplace.with_name("there"))
    moved, client = opened(there)
    new = record(moved, "new")
    assert {place(client, run).parent.parent for run in (old, new)} == {elsewhere}
    assert client.get_experiment_by_name("bucket").artifact_location == "s3://bucket/rte"
    # Of a store that mergelab has not written to before, too.
    assert client.get_experiment("0").artifact_location == (there / "outputs" / "mlartifacts" / "0").as_uri()


def test_logged_models_registered_models_and_traces_move_too(
    tracker: Tracker, workplace: Path, mlflow_client: Any
) -> None:
    run = record(tracker, "old")
    experiment = mlflow_client.get_experiment_by_name("rte").experiment_id
    model = mlflow_client.create_logged_model(experiment, name="merged")
    mlflow_client.create_registered_model("merged")
    mlflow_client.create_model_version("merged", f"{location(workplace).as_uri()}/{run}/artifacts/notes", run)
    with closing(sqlite3.connect(workplace / "outputs" / "mlflow.db")) as store:
        trace = (f"{location(workplace).as_uri()}/traces/tr-1/artifacts",)
        store.execute(
            "INSERT INTO trace_info (request_id, experiment_id, timestamp_ms, status) VALUES ('t', 1, 0, 'OK')"
        )
        store.execute("INSERT INTO trace_tags VALUES ('mlflow.artifactLocation', ?, 't')", trace)
        store.commit()
    there = workplace.rename(workplace.with_name("there"))
    _, client = opened(there)
    assert client.get_logged_model(model.model_id).artifact_location.startswith(location(there).as_uri())
    assert client.get_model_version("merged", "1").source == f"{location(there).as_uri()}/{run}/artifacts/notes"
    with closing(sqlite3.connect(there / "outputs" / "mlflow.db")) as store:
        text = "\n".join(store.iterdump())
    assert f"{location(there).as_uri()}/traces/tr-1/artifacts" in text
    assert f"{workplace.as_uri()}/" not in text


def test_a_store_may_move_again_and_back_and_into_a_folder_of_its_own(tracker: Tracker, workplace: Path) -> None:
    runs = [record(tracker, "0")]
    database = workplace / "outputs"
    for number, step in enumerate(("second/outputs", "third", workplace.name + "/outputs", "inner"), 1):
        target = (database / step) if step == "inner" else workplace.parent / step
        parts = list(database.iterdir())
        target.mkdir(parents=True, exist_ok=True)
        for part in parts:
            part.rename(target / part.name)
        database = target
        moved = open_tracking(TrackingConfig(uri=sqlite_url(database / "mlflow.db")))
        runs.append(record(moved, str(number)))
        client = MlflowClient(sqlite_url(database / "mlflow.db"))
        assert [noted(client, run) for run in runs] == [str(index) for index in range(number + 1)]
        assert {place(client, run).parent.parent for run in runs} == {database / "mlartifacts" / "rte"}
    for part in list(database.iterdir()):  # and up again
        part.rename(database.parent / part.name)
    _, client = opened(workplace)
    assert {place(client, run).parent.parent for run in runs} == {location(workplace)}


def test_a_database_moved_alone_still_finds_artifacts_and_writes_beside_itself(
    tracker: Tracker, workplace: Path
) -> None:
    old, other = record(tracker, "old"), record(tracker, "other")
    there = workplace.with_name("there")
    (there / "outputs").mkdir(parents=True)
    shutil.copy(workplace / "outputs" / "mlflow.db", there / "outputs")
    before = contents(workplace)
    moved, client = opened(there)
    assert place(client, record(moved, "new")).is_relative_to(there)
    assert noted(client, old) == "old"
    with moved.resume_run(old) as run:
        run.log_text("more", "more.txt")
    assert sorted(path.name for path in place(client, old).iterdir()) == ["environment.json", "more.txt", "notes"]
    assert place(client, old).is_relative_to(there)
    assert contents(workplace) == before
    # The artifacts follow later.
    shutil.copytree(location(workplace) / other, location(there) / other)
    script = "from mergelab.tracking import *; open_tracking(TrackingConfig())"
    subprocess.run([sys.executable, "-c", script], cwd=there, check=True, env=os.environ)
    assert place(client, other).is_relative_to(there)


def test_artifacts_come_here_though_another_path_to_the_store_was_used_meanwhile(
    tracker: Tracker, workplace: Path, mlflow_client: Any
) -> None:
    # As a container does that has the same folder under another name.
    record(tracker, "old")
    with closing(sqlite3.connect(workplace / "outputs" / "mlflow.db")) as store:
        elsewhere = "/nowhere/outputs/mlartifacts/rte"
        store.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'rte'", (f"file://{elsewhere}",))
        store.execute("INSERT INTO mergelab_folders VALUES ('/nowhere/outputs')")
        store.commit()
    new = record(tracker, "new")
    assert mlflow_client.get_run(new).info.artifact_uri == f"file://{elsewhere}/{new}/artifacts"
    assert (location(workplace) / new / "artifacts" / "notes" / "name.txt").read_text() == "new"
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_a_deleted_experiment_is_one_line_whose_command_restores_it(
    tracker: Tracker, workplace: Path, mlflow_client: Any, cached: bool
) -> None:
    record(tracker, "old")
    mlflow_client.delete_experiment(mlflow_client.get_experiment_by_name("rte").experiment_id)
    if not cached:
        tracker._experiments.clear()
    with pytest.raises(TrackingError, match=r"experiment rte was deleted; restore it with `.*` or set") as caught:
        tracker.start_run("new", experiment="rte")
    command = str(caught.value).split("`")[1]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    subprocess.run(["/bin/sh", "-c", command], cwd=workplace, check=True, env=environment, capture_output=True)
    assert record(tracker, "new")
    assert shlex.split(command)[0] == "MLFLOW_TRACKING_URI=sqlite:///outputs/mlflow.db"
