"""The literal command through the real hub code: stand-ins under the real names, from a server on loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from tests.forks import Forks
from tests.hub_server import HubServer
from tests.standins import BERT_RTE_EXPERTS

pytestmark = pytest.mark.slow
Command = Callable[..., CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def command(hub: HubServer, folder: Path, forks: Forks) -> Command:
    """Run ``python -m mergelab`` on the hub."""

    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        env = {**os.environ, **hub.environment(folder / "home"), "MERGELAB_CACHE": str(folder / "cache")}
        return forks.run("-m", "mergelab", *arguments, folder=folder, environment={**env, **environment})

    return run


def test_the_main_command_downloads_merges_measures_and_records(folder: Path, command: Command) -> None:
    done = command("method=ties", "task=rte")
    assert done.returncode == 0, done.stderr
    for repository in BERT_RTE_EXPERTS:
        assert repository in done.stdout
    assert "warning" not in done.stderr.lower(), done.stderr
    assert "mini" not in done.stdout

    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("rte")
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["mergelab.kind"] for run in runs)
    assert kinds == ["base", *["expert"] * 5, "merge"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    merge = next(run for run in runs if run.data.tags["mergelab.kind"] == "merge")
    assert merge.data.params["method.density"] == "0.2"
    assert merge.data.params["method.lambda"] == "1.0"
    assert 0.5 < merge.data.metrics["report/accuracy"] <= 1.0
    assert merge.data.metrics["report/accuracy_low"] <= merge.data.metrics["report/accuracy"]
    assert merge.data.metrics["time/merge_s"] > 0
    assert merge.data.tags["mergelab.source"] == "hub"
    assert merge.data.tags["model.textattack"].startswith("textattack/bert-base-uncased-RTE@")
    assert len(merge.data.tags["model.base.sha256"]) == 64
    assert merge.inputs.dataset_inputs[0].dataset.name == "rte"

    predictions = pq.read_table(client.download_artifacts(merge.info.run_id, "predictions/rte.parquet"))
    assert predictions.num_rows == 240
    agreement = (predictions["prediction"].to_numpy() == predictions["label"].to_numpy()).mean()
    assert agreement == pytest.approx(merge.data.metrics["report/accuracy"])

    # Once fetched, everything works without the hub, and base and experts are not measured again.
    again = command("method=soup", "task=rte", "source=hub", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["mergelab.kind"] for run in runs)
    assert kinds == ["base", *["expert"] * 5, "merge", "merge"]
    newest = json.loads(max(folder.glob("outputs/runs/*/*/result.json")).read_text())
    assert [model["cached"] for model in newest["models"]] == [True] * 6 + [False]


def test_a_hub_id_that_does_not_exist_is_named(command: Command) -> None:
    done = command("source=hub", "models.experts.textattack=textattack/bert-base-RTE")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "textattack/bert-base-RTE" in done.stderr
    assert "does not exist" in done.stderr
