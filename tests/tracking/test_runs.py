from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mergelab.errors import TrackingError
from mergelab.tracking import Tracker, TrackingConfig, environment_tags, open_tracking
from mergelab.tracking.names import BASELINE_KEY


def test_a_run_records_parameters_metrics_and_tags_under_their_names(tracker: Tracker, mlflow_client: Any) -> None:
    params = {"method": {"name": "ties", "density": 0.2, "weights": [0.5, 0.5]}, "output": None}
    with tracker.start_run("ties", experiment="rte", params=params, tags={"mergelab.task": "rte", "none": None}) as run:
        run.log_metrics({"report/accuracy": 0.61, "report/accuracy_low": 0.55, "time/merge_s": 1})
        run.set_tags({"seed": 0})
    recorded = mlflow_client.get_run(run.id)
    assert recorded.info.run_name == "ties"
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params == {
        "method.name": "ties",
        "method.density": "0.2",
        "method.weights.0": "0.5",
        "method.weights.1": "0.5",
        "output": "null",
    }
    assert recorded.data.metrics == {"report/accuracy": 0.61, "report/accuracy_low": 0.55, "time/merge_s": 1.0}
    assert recorded.data.tags["mergelab.task"] == "rte"
    assert recorded.data.tags["seed"] == "0"
    assert "none" not in recorded.data.tags


def test_more_parameters_and_metrics_than_one_call_takes_are_all_recorded(tracker: Tracker, mlflow_client: Any) -> None:
    with tracker.start_run("many", experiment="rte", params={"layer": {str(i): i / 7 for i in range(250)}}) as run:
        run.log_metrics({f"layer/{i}": i for i in range(1100)})
    recorded = mlflow_client.get_run(run.id).data
    assert recorded.params["layer.249"] == str(249 / 7)
    assert (len(recorded.params), len(recorded.metrics)) == (250, 1100)


def test_a_run_says_in_which_environment_it_was_made(tracker: Tracker, mlflow_client: Any, tmp_path: Path) -> None:
    with tracker.start_run("ties", experiment="rte") as run:
        pass
    tags = mlflow_client.get_run(run.id).data.tags
    process = json.loads(tags["mergelab.process"])
    assert (process["mergelab.host"], process["mergelab.pid"]) == (socket.gethostname(), str(os.getpid()))
    assert "mlflow.user" in tags
    file = Path(mlflow_client.download_artifacts(run.id, "environment.json", str(tmp_path)))
    recorded = json.loads(file.read_text())
    assert recorded["process"] == process
    assert recorded["versions"]["torch"].startswith("2.")
    assert {"transformers", "mlflow"} <= set(recorded["versions"])
    assert {"python", "platform"} <= set(recorded)


def test_programs_that_a_repositorys_settings_name_are_not_run(tmp_path: Path) -> None:
    from mergelab.tracking.processes import _git_commit

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitattributes").write_text("*.txt filter=own\n")
    (tmp_path / "a.txt").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    ran = tmp_path.parent / f"{tmp_path.name}-ran"
    for key in ("core.fsmonitor", "filter.own.clean", "filter.own.process", "core.pager", "diff.external"):
        git("config", key, f"touch {ran}; cat")
    git("config", "filter.own.required", "true")
    hook = tmp_path / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {ran}\n")
    hook.chmod(0o755)
    os.utime(tmp_path / "a.txt", (1, 1))
    clean = _git_commit(str(tmp_path))
    (tmp_path / "a.txt").write_text("two")
    assert _git_commit(str(tmp_path)) == f"{clean}-dirty"
    assert not ran.exists()


def test_the_git_commit_of_the_working_folder_is_tagged_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    clean, changed = tmp_path / "clean", tmp_path / "changed"
    for folder in (clean, changed):
        folder.mkdir()
        monkeypatch.chdir(folder)
        git("init", "-q")
        (folder / "a").write_text("1")
        git("add", "a")
        git("commit", "-qm", "first")
        if folder == changed:
            (folder / "a").write_text("2")
        tags = environment_tags()
        assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
        assert tags["mlflow.source.git.dirty"] == ("true" if folder == changed else "false")


def test_a_dataset_is_an_input_of_the_run_with_its_size_and_whole_fingerprint(
    tracker: Tracker, mlflow_client: Any
) -> None:
    with tracker.start_run("ties", experiment="rte") as run:
        run.log_dataset(
            "rte",
            origin="hub",
            location="nyu-mll/glue",
            config="rte",
            split="validation",
            fingerprint="ab" * 32,
            rows=277,
            columns={"sentence1": "string", "label": "long"},
        )
    (used,) = mlflow_client.get_run(run.id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.source_type) == ("rte", "ab" * 8, "hugging_face")
    assert json.loads(used.dataset.source) == {"path": "nyu-mll/glue", "config_name": "rte", "split": "validation"}
    assert json.loads(used.dataset.profile) == {"num_rows": 277, "fingerprint": "ab" * 32}
    assert [column["name"] for column in json.loads(used.dataset.schema)["mlflow_colspec"]] == ["sentence1", "label"]
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "evaluation")]


def test_artifacts_lie_beside_the_store_and_can_be_read_back(
    tracker: Tracker, mlflow_client: Any, workplace: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1")
    with tracker.start_run("ties", experiment="mini/rte") as run:
        run.log_text("method: ties\n", "config.yaml")
        run.log_dict({"density": [0.2, "${not.resolved}"]}, "plots/values.yaml")
        run.log_dict({"a": 1}, "values.json")
        run.log_table([{"model": "base", "accuracy": 0.5}, {"model": "ties, merged", "p": 0.1}], "table.csv")
        run.log_artifact(tmp_path / "predictions.parquet", "predictions")
        run.log_artifacts(tmp_path / "model", "model")
    assert tracker.store is not None
    folder = Path(mlflow_client.download_artifacts(run.id, ""))
    assert folder.is_relative_to(workplace / "outputs" / "mlartifacts" / "mini_rte")
    assert (folder / "config.yaml").read_text() == "method: ties\n"
    assert (folder / "plots" / "values.yaml").read_text() == "density:\n- 0.2\n- ${not.resolved}\n"
    assert json.loads((folder / "values.json").read_text()) == {"a": 1}
    assert (folder / "table.csv").read_text() == 'model,accuracy,p\nbase,0.5,\n"ties, merged",,0.1\n'
    assert (folder / "predictions" / "predictions.parquet").read_bytes() == b"PAR1"
    assert (folder / "model" / "config.json").exists()


def test_a_child_run_names_its_parent(tracker: Tracker, mlflow_client: Any) -> None:
    parent = tracker.start_run("grid", experiment="rte")
    with tracker.start_run("ties", experiment="rte", parent=parent.id) as child:
        pass
    parent.end()
    assert mlflow_client.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id


def test_a_baseline_is_found_by_its_key_once_it_has_finished(tracker: Tracker) -> None:
    with pytest.raises(ZeroDivisionError), tracker.start_run("base", experiment="rte", tags={BASELINE_KEY: "k'1"}):
        raise ZeroDivisionError
    assert tracker.find_run({BASELINE_KEY: "k'1"}) is None
    with tracker.start_run("base", experiment="rte", tags={BASELINE_KEY: "k'1"}) as run:
        run.log_metrics({"report/accuracy": 0.5})
    assert tracker.find_run({BASELINE_KEY: "k'1"}) == run.id
    assert tracker.find_run({BASELINE_KEY: "k'1"}, experiment="sst2") is None
    assert tracker.find_run({BASELINE_KEY: "k'2"}) is None
    record = tracker.runs({BASELINE_KEY: "k'1"}, status="FINISHED")[0]
    assert (record.experiment, record.metrics) == ("rte", {"report/accuracy": 0.5})


def test_values_with_both_kinds_of_quotes_are_told_apart(tracker: Tracker) -> None:
    runs = {}
    for value in ("""a'"b""", """a'"c"""):
        with tracker.start_run("base", experiment="rte", tags={BASELINE_KEY: value}) as run:
            runs[value] = run.id
    assert {value: tracker.find_run({BASELINE_KEY: value}) for value in runs} == runs


def test_a_resumed_run_takes_more_and_ends_anew(tracker: Tracker, mlflow_client: Any) -> None:
    with pytest.raises(ZeroDivisionError), tracker.start_run("sweep", experiment="rte") as first:
        raise ZeroDivisionError
    with tracker.resume_run(str(first.id)) as run:
        assert mlflow_client.get_run(first.id).info.status == "RUNNING"
        run.log_metrics({"best": 1.0})
    assert (run.id, run.name, run.experiment) == (first.id, "sweep", "rte")
    assert mlflow_client.get_run(first.id).info.status == "FINISHED"
    with tracker.resume_run(str(first.id)) as again:
        assert (first.recorded, run.recorded, again.recorded) == (set(), set(), {"best"})


def test_with_tracking_off_everything_is_accepted_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = open_tracking(TrackingConfig(enabled=False))
    with tracker.start_run("ties", experiment="rte", params={"a": 1}, tags={"b": 2}) as run:
        run.log_metrics({"a": 1.0})
        run.log_params({"a": 1})
        run.set_tags({"a": 1})
        run.log_table([{"a": 1}], "a.csv")
        run.log_artifact("missing")
        run.log_artifacts("missing")
        run.log_dataset("rte", origin="hub", location="x", fingerprint="f", rows=1)
    assert run.id is None
    assert not tracker.enabled
    assert tracker.find_run({"b": "2"}) is None
    assert tracker.grid_parent("x") is None
    assert tracker.ui_command() == tracker.ui_page("rte") == ""
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_was_deleted_in_the_ui_is_named_with_the_way_back(
    tracker: Tracker, mlflow_client: Any
) -> None:
    number = mlflow_client.create_experiment("rte")
    mlflow_client.delete_experiment(number)
    with pytest.raises(
        TrackingError, match=rf"^experiment rte was deleted; .*mlflow experiments restore -x {number}`.*"
    ):
        tracker.start_run("ties", experiment="rte")


def test_parameters_that_the_store_refuses_leave_a_failed_run_not_a_running_one(
    tracker: Tracker, mlflow_client: Any
) -> None:
    with (
        tracker.start_run("ties", experiment="rte", params={"a": 1}) as run,
        pytest.raises(TrackingError, match=r"^cannot log"),
    ):
        run.log_params({"a": 2})
    with pytest.raises(TypeError):
        tracker.start_run("odd", experiment="rte", params={"columns": ({1}, {2})} | {"names": [{"a"}, b"b"]})
    assert not tracker.runs(status="RUNNING")
