"""The cards of output folders: whole with the folder, right in what they claim, without this machine's paths."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mergelab.weights import writer
from tests.adapters import made as small
from tests.conftest import Outcome
from tests.experiment.test_run import runs

Command = Callable[..., Outcome]


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    return found


def block(folder: Path, language: str) -> str:
    """Return the text of a card's block of code."""
    text = ModelCard.load(folder / "README.md").text
    return text.partition(f"```{language}\n")[2].partition("\n```")[0]


def licensed(folder: Path, name: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {name}\n---\n")


def test_the_card_has_the_runs_scores_and_what_makes_the_model_again(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    for name in ("base", "a", "b", "c"):
        licensed(workplace / name, "mit")
    outcome = mergelab_command(*arguments, "method=ties", "method.density=0.3", "eval.protocol=holdout", "output=one")
    assert outcome.code == 0, outcome.err
    data = metadata(workplace / "one")
    assert data["tags"] == ["mergelab", "merge", "ties"]
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        *("mit", "transformers", "text-classification"),
    )
    assert "base_model" not in data, "none of the models is one of the hub's"
    (run,) = (run for run in runs(workplace) if run.data.tags["mergelab.kind"] == "merge")
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation"
    assert result["dataset"]["type"] != "nyu-mll/glue", "whether the user's files are GLUE's is not known"
    (metric,) = result["metrics"]
    metrics = run.data.metrics
    assert (metric["type"], metric["value"]) == ("accuracy", metrics["report/accuracy"])
    assert metric["args"] == {
        "protocol": "holdout",
        "examples": 60,
        "interval_95": [metrics["report/accuracy_low"], metrics["report/accuracy_high"]],
    }
    text = (workplace / "one" / "README.md").read_text()
    assert run.info.run_id in text
    assert f"{metrics['report/accuracy']:.4f}" in text

    settings = OmegaConf.create(block(workplace / "one", "yaml"))
    assert settings.method.density == 0.3
    assert list(settings.models.experts) == ["a", "b", "c"]
    assert "one" not in settings.values()
    program, *again = shlex.split(block(workplace / "one", "bash").removeprefix("python -m "))
    assert program == "mergelab"
    again[-1] = "output=two"
    data_dir = [f"{one}" if not one.startswith("task.data_dir") else "task.data_dir=data" for one in again]
    assert mergelab_command(*(one.replace("[a,b,c]", "[./a,./b,./c]") for one in data_dir)).code == 0
    one, two = (load_file(workplace / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_path_of_this_machine_and_no_secret_is_in_a_card(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    where = [argument.replace("./", f"{workplace}/").replace("=data", f"={workplace}/data") for argument in arguments]
    store = f"tracking.uri=sqlite:///{workplace}/private/mlflow.db?password=opensesame"
    outcome = mergelab_command(*where, "method=soup", f"output={workplace}/deep/down/merged", store)
    assert outcome.code == 0, outcome.err
    folder = workplace / "deep" / "down" / "merged"
    for name in ("README.md", "mergelab.json"):
        text = (folder / name).read_text()
        for secret in (str(workplace), str(workplace.parent), "deep", "private", "opensesame", os.path.expanduser("~")):
            assert secret not in text, (name, secret)
        assert "mlflow.db" in text
    assert "models.base=base" in block(folder, "bash")


def test_a_merge_of_merges_says_what_each_was_made_of(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    models, alone = arguments[:2], ["evaluate=false", "method=soup"]
    assert mergelab_command(*models, *alone, "output=first").code == 0
    assert mergelab_command("models.base=./base", "models.experts=[./first,./c]", *alone, "output=second").code == 0
    last = ["models.base=./base", "models.experts={x: ./second, y: ./b}", "evaluate=false", "method=task_arithmetic"]
    assert mergelab_command(*last, "tracking=none", "output=third").code == 0
    found = json.loads((workplace / "third" / "mergelab.json").read_text())
    assert "run" not in found
    second = found["experts"][0]["merge"]
    first = second["experts"][0]["merge"]
    ids = {run.info.run_id for run in runs(workplace)}
    assert {second["run"], first["run"]} == ids
    assert [one["model"] for one in first["experts"]] == ["a", "b", "c"]
    assert len(first["experts"][0]["sha256"]) == 64
    tree = block(workplace / "third", "text").splitlines()
    assert tree[2] == "├── x: second"
    assert tree[3] == f"│   made by mergelab: soup(normalize=True), run {second['run']}"
    assert tree[5] == "│   ├── first: first"
    assert tree[-1] == "└── y: b"
    assert not (workplace / "third" / "mergelab.json").read_text().count(str(workplace))


def test_the_card_is_there_when_the_folder_gets_its_name(
    mergelab_command: Command, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def rename(source: Path, target: Path) -> None:
        seen.append(sorted(path.name for path in Path(source).iterdir()))
        raise OSError(5, "no more")

    monkeypatch.setattr(writer.os, "rename", rename)
    for further in (["evaluate=false"], []):
        assert mergelab_command(*arguments, "method=soup", "output=merged", "tracking=none", *further).code == 2
    assert len(seen) == 2
    assert all({"README.md", "mergelab.json", "config.json"} <= set(names) for names in seen)
    assert not (workplace / "merged").exists()


def test_an_adapters_card_is_pefts(mergelab_command: Command, workplace: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    for seed, name in enumerate("ab"):
        made = small.made(workplace / name, small.bert(), peft.LoraConfig(**settings), dtype=torch.float32, seed=seed)
        made.adapter.rename(workplace / f"lora-{name}")
    outcome = mergelab_command(
        *(f"models.base={made.base}", "models.experts=[./lora-a,./lora-b]", "task=rte", "evaluate=false"),
        *("method=task_arithmetic", "save.form=lora_cat", "output=merged", "tracking=none"),
    )
    assert outcome.code == 0, outcome.err
    data = metadata(workplace / "merged")
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-classification")
    assert data["tags"] == ["mergelab", "merge", "task_arithmetic", "transformers"]
    assert "PeftModel.from_pretrained" in block(workplace / "merged", "python")


@pytest.mark.slow
def test_a_sweeps_winner_has_a_card_with_its_point_and_its_reported_scores(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    sweep = ["-m", "sweep=task_arithmetic", "sweep.n_trials=2", "output=best", "tracking.log_model=best"]
    outcome = mergelab_command(*arguments, *sweep)
    assert outcome.code == 0, outcome.err
    (report,) = (run for run in runs(workplace) if run.data.tags["mergelab.kind"] == "report")
    (result,) = metadata(workplace / "best")["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == report.data.metrics["report/accuracy"]
    merge = json.loads((workplace / "best" / "mergelab.json").read_text())
    assert merge["run"] == report.info.run_id
    assert merge["parameters"]["lambda"] == float(report.data.params["method.lambda"])
    command = block(workplace / "best", "bash")
    assert f"method.lambda={report.data.params['method.lambda']}" in command
    assert "sweep" not in command
    assert "-m " not in command.removeprefix("python -m mergelab")


@pytest.mark.slow
def test_a_card_of_the_miniature_never_claims_glue(mergelab_command: Command, workplace: Path) -> None:
    outcome = mergelab_command("source=mini", "method=soup", "task=rte", "output=merged", "tracking=none")
    assert outcome.code == 0, outcome.err
    data = metadata(workplace / "merged")
    assert "miniature" in data["tags"]
    assert not {"base_model", "license"} & data.keys()
    assert data["model-index"][0]["results"][0]["dataset"] == {
        "name": "mini/rte", "type": "mergelab-miniature", "split": "validation",
    }  # fmt: skip
    text = (workplace / "merged" / "README.md").read_text()
    assert "**Miniature.**" in text
    assert "nyu-mll" not in text.partition("## How to make it again")[0]
