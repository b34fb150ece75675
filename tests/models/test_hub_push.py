"""Pushes to a hub on loopback: refused before anything is merged, or a repository that others load the model from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mergelab.models.hub_push import without_places
from tests.forks import Forks
from tests.hub_server import HubServer
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS

Command = Callable[..., CompletedProcess[str]]
TOKEN = "hf_standin"
MERGE = (
    *("method=soup", f"models.experts=[{BERT_RTE_EXPERTS[3]},{BERT_RTE_EXPERTS[4]}]", "task=rte", "source=hub"),
    *("evaluate=false", "output=merged", "tracking=none"),
)
LOADED = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("org/merged")
tokenizer = AutoTokenizer.from_pretrained("org/merged")
sums = [float(each.double().sum()) for each in model.parameters()]
result = dict(sum=sum(sums), labels=model.config.id2label, size=len(tokenizer))
"""


@pytest.fixture
def command(hub: HubServer, place: Path, forks: Forks) -> Command:
    """Run ``python -m mergelab`` on the hub, logged in."""

    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        env = {**os.environ, **hub.environment(place / "home"), "MERGELAB_CACHE": str(place / "cache")}
        return forks.run(
            *("-m", "mergelab", *arguments), folder=place, environment={**env, "HF_TOKEN": TOKEN, **environment}
        )

    return run


def refused(done: CompletedProcess[str], line: str, folder: Path) -> None:
    assert (done.returncode, done.stderr.splitlines()) == (2, [f"error: {line}"]), done
    assert not (folder / "merged").exists()
    assert not (folder / "outputs").exists() or not list((folder / "outputs").rglob("*.safetensors"))


def weights_fetched(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and path.endswith((".safetensors", ".bin"))]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"HF_TOKEN": ""}, "there is no token of the hub; log in (`hf auth login`) or set HF_TOKEN"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and nothing can be uploaded"),
        ({"HF_TOKEN": "hf_other"}, "the hub does not take the token (HF_TOKEN, or that of `hf auth login`)"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_a_push_that_cannot_be_is_one_line_before_anything_is_merged(
    hub: HubServer, place: Path, command: Command, environment: Mapping[str, str], line: str
) -> None:
    hub.uploads.tokens[TOKEN] = ("org",)
    (place / "a").mkdir()
    local = ["models.base=null", "models.experts=[./a]", "source=auto"] if "HF_ENDPOINT" in environment else []
    done = command(*MERGE, *local, "save.push_to_hub=org/merged", **environment)
    refused(done, f"save.push_to_hub=org/merged: {line}", place)
    assert not weights_fetched(hub)


@pytest.mark.parametrize("kind", ["another model", "public", "not ours to write", "a grid", "no id"])
def test_a_repository_that_must_not_be_written_to_is_named_before_anything_is_merged(
    kind: str, hub: HubServer, place: Path, command: Command, tmp_path: Path
) -> None:
    hub.uploads.tokens[TOKEN] = ("org",)
    further, line = ["save.push_to_hub=org/merged"], ""
    if kind == "another model":
        hub.add_model("org/merged", _folder(tmp_path / "other", "model.safetensors"))
        line = (
            "save.push_to_hub=org/merged: the repository exists and holds no merge of mergelab's; choose another name"
        )
    elif kind == "public":
        hub.add_model("org/merged", _folder(tmp_path / "other", "mergelab.json"))
        line = "save.push_to_hub=org/merged: the repository is public; save.private=false says that this is meant"
    elif kind == "not ours to write":
        further = ["save.push_to_hub=google-bert/bert-base-uncased"]
        line = (
            "save.push_to_hub=google-bert/bert-base-uncased: the repository exists and holds no merge of mergelab's; "
            "choose another name"
        )
    elif kind == "a grid":
        further += ["-m", "method=soup,median"]
        line = (
            "save.push_to_hub=org/merged: all jobs of method=soup,median would write into one repository; "
            "'save.push_to_hub=org/merged-${hydra:job.num}' is one for each"
        )
    else:
        further = ["save.push_to_hub=merged"]
        line = "save.push_to_hub='merged': must be a repository of the hub, org/name"
    merge = [each for each in MERGE if kind != "a grid" or not each.startswith(("output", "evaluate"))]
    refused(command(*merge, *further), line, place)
    assert not weights_fetched(hub)


@pytest.mark.slow
def test_a_push_makes_a_private_repository_that_the_model_is_loaded_from(
    hub: HubServer, place: Path, command: Command, client: Any, tmp_path: Path
) -> None:
    hub.uploads.tokens[TOKEN] = ("org",)
    pushed = ("save.push_to_hub=org/merged", "save.max_shard_size=40kB")
    done = command(*MERGE, *pushed)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/merged" in done.stdout
    repository = hub.repository("org/merged")
    assert repository is not None
    assert repository.private
    files = repository.revisions["main"].files_on_disk
    written = {path.name: path.read_bytes() for path in (place / "merged").iterdir()}
    assert {name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"} == written
    assert len([name for name in files if name.endswith(".safetensors")]) > 1

    card = hub.uploads.cards[-1]
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == [BERT_BASE, BERT_RTE_EXPERTS[3], BERT_RTE_EXPERTS[4]]
    assert data["base_model_relation"] == "merge"
    assert "license" not in data, "the base alone declares one"
    assert "save.push_to_hub" not in card
    assert str(tmp_path) not in card
    merge = json.loads(files["mergelab.json"].read_text())
    assert all(len(model["revision"]) == 40 for model in (merge["base"], *merge["experts"]))

    found = client(LOADED, HF_TOKEN=TOKEN)
    assert found["labels"] == {"0": "entailment", "1": "not_entailment"}, found
    assert client(LOADED).get("error"), "without the token it is not to be seen"

    # The next push, in one file, leaves none of the shards, which would be loaded in its place.
    (place / "merged").rename(place / "earlier")
    done = command(*MERGE, "save.push_to_hub=org/merged", "method=task_arithmetic", "method.lambda=0.4")
    assert done.returncode == 0, done.stderr
    files = repository.revisions["main"].files_on_disk
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert client(LOADED, HF_TOKEN=TOKEN)["sum"] != found["sum"]

    # What was pushed is a merge of ours to the next merge.
    nested = ("method=soup", f"models.experts=[org/merged,{BERT_RTE_EXPERTS[3]}]", "output=next")
    done = command(*MERGE[2:], *nested)
    assert done.returncode == 0, done.stderr
    (first, _) = json.loads((place / "next" / "mergelab.json").read_text())["experts"]
    assert first["merge"]["method"] == "task_arithmetic"
    assert ModelCard.load(place / "next" / "README.md").data.base_model[1] == "org/merged"


@pytest.mark.parametrize("place", ["/home/me/secret/model", "./model", "~/model", "C:\\\\model", "org/model"])
def test_a_pushed_config_does_not_say_where_its_model_was_on_this_machine(tmp_path: Path, place: str) -> None:
    folder = _folder(tmp_path / "model", "mergelab.json")
    (folder / "rte").mkdir()
    (folder / "rte" / "config.json").write_text(json.dumps({"_name_or_path": place, "model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": place, "model_max_length": 9}))
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.json")}
    with without_places(folder) as clean:
        found = {file.relative_to(clean): json.loads(file.read_text()) for file in clean.rglob("*.json")}
    kept = place == "org/model"
    assert found == {
        Path("mergelab.json"): {},
        Path("rte/config.json"): {**({"_name_or_path": place} if kept else {}), "model_type": "bert"},
        Path("tokenizer_config.json"): {**({"name_or_path": place} if kept else {}), "model_max_length": 9},
    }
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.json")} == before


def _folder(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "config",
    [
        "base_model: org/base\nmodels:\n- model: /home/me/secret+org/lora\n",
        "base_model: '/home/me/secret'\n",
        "slices:\n- sources:\n  - model:\n      model:\n        path: /home/me/a+b\n",
        "models:\n- model: org/a\n- model: org/b@v1\n",
    ],
)
def test_a_mergekit_config_of_folders_of_this_machine_is_not_pushed(tmp_path: Path, config: str) -> None:
    folder = _folder(tmp_path / "model", "mergelab.json")
    (folder / "mergekit_config.yml").write_text(config)
    with without_places(folder) as clean:
        assert (clean / "mergekit_config.yml").is_file() == ("org/b@v1" in config)
        assert (clean / "mergelab.json").is_file()
    assert (folder / "mergekit_config.yml").read_text() == config
