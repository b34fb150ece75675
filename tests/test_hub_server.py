"""The loopback hub against the real clients, each in a process of its own: they read HF_ENDPOINT when imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow.parquet
import pytest
from safetensors import safe_open

from tests.hub_fixtures import GPT2_TASKS
from tests.hub_server import HubServer
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, BIN_ONLY, GLUE, GPT2_BASE, OTHER_LABEL_ORDER, glue_table

pytestmark = pytest.mark.slow

Client = Callable[..., Any]


def test_transformers_loads_models_tokenizers_and_pipelines(hub: HubServer, client: Client) -> None:
    answer = client(f"""
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
model, report = AutoModelForSequenceClassification.from_pretrained({BERT_BASE!r}, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained({BERT_BASE!r})
classify = pipeline("text-classification", model={BIN_ONLY!r})
result = dict(
    model=type(model).__name__, missing=sorted(report["missing_keys"]), words=tokenizer.tokenize("The king never"),
    labels=[answer["label"] for answer in classify([dict(text="The king leads.", text_pair="The king never leads."),
                                                    dict(text="The king leads.", text_pair="The king openly leads.")])],
)
""")
    assert answer["model"] == "BertForSequenceClassification"
    assert answer["missing"] == ["classifier.bias", "classifier.weight"]  # so gamma and beta were understood
    assert answer["words"] == ["the", "king", "never"]
    assert answer["labels"] == ["LABEL_1", "LABEL_0"]
    got = [path for method, path in hub.requests if method == "GET"]
    assert any(path.startswith(f"/{BERT_BASE}/resolve/") and path.endswith("model.safetensors") for path in got)
    assert any(path.startswith(f"/{BIN_ONLY}/resolve/") and path.endswith("pytorch_model.bin") for path in got)


def test_huggingface_hub_downloads_files_and_snapshots_by_revision(
    hub: HubServer, client: Client, bert_checkpoints: Mapping[str, Path]
) -> None:
    main = hub.add_model("org/model", bert_checkpoints[BERT_BASE])
    tagged = hub.add_model("org/model", bert_checkpoints[OTHER_LABEL_ORDER], revision="v2")
    answer = client(f"""
from pathlib import Path
from huggingface_hub import HfApi, get_paths_info, hf_hub_download, snapshot_download
snapshot = Path(snapshot_download("org/model"))
result = dict(
    snapshot=snapshot.name,
    files=sorted(p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()),
    tagged=Path(hf_hub_download("org/model", "config.json", revision="v2")).parent.name,
    by_commit=Path(hf_hub_download("org/model", "config.json", revision={tagged!r})).read_text(),
    paths=[(each.path, each.size) for each in get_paths_info("org/model", ["onnx/model.onnx", "none"])],
    tree=sorted(each.path for each in HfApi().list_repo_tree("org/model")),
    refs=sorted(branch.name for branch in HfApi().list_repo_refs("org/model").branches),
)
""")
    folder = bert_checkpoints[BERT_BASE]
    assert answer["snapshot"] == main
    assert answer["files"] == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert answer["tagged"] == tagged
    assert answer["by_commit"] == (bert_checkpoints[OTHER_LABEL_ORDER] / "config.json").read_text()
    assert answer["paths"] == [["onnx/model.onnx", (folder / "onnx/model.onnx").stat().st_size]]
    assert "onnx" in answer["tree"]
    assert "onnx/model.onnx" not in answer["tree"]
    assert answer["refs"] == ["main", "v2"]


def test_datasets_loads_a_task_as_it_does_from_the_hub(hub: HubServer, client: Client, glue_folder: Path) -> None:
    answer = client("""
import datasets
rows = datasets.load_dataset("nyu-mll/glue", "rte", split="validation")
result = dict(columns=rows.column_names, labels=rows.features["label"].names, rows=rows.to_list(),
              splits=sorted(datasets.get_dataset_split_names("nyu-mll/glue", "rte")))
""")
    assert answer["columns"] == ["sentence1", "sentence2", "label", "idx"]
    assert answer["labels"] == ["entailment", "not_entailment"]
    assert answer["splits"] == ["train", "validation"]
    assert (
        answer["rows"] == pyarrow.parquet.read_table(glue_folder / "rte/validation-00000-of-00001.parquet").to_pylist()
    )


def test_a_warm_cache_works_when_the_hub_is_offline(hub: HubServer, client: Client) -> None:
    load = """
import datasets
from huggingface_hub import snapshot_download
path = snapshot_download("google-bert/bert-base-uncased")
result = dict(path=path, rows=len(datasets.load_dataset("nyu-mll/glue", "rte", split="validation")))
"""
    first = client(load)
    assert first["rows"] == 240
    hub.requests.clear()
    assert client(load, HF_HUB_OFFLINE="1") == first
    assert hub.requests == []


@pytest.mark.parametrize("logged_in", [False, True])
def test_refusals_are_those_of_the_hub(
    logged_in: bool, hub: HubServer, client: Client, bert_checkpoints: Mapping[str, Path]
) -> None:
    hub.missing_status, hub.gated_status = (404, 403) if logged_in else (401, 401)
    hub.add_model("org/gated", bert_checkpoints[BIN_ONLY], gated=True)
    expected = {
        "hf_hub_download('org/none', 'config.json')": "RepositoryNotFoundError",
        "snapshot_download('org/none')": "RepositoryNotFoundError",
        f"hf_hub_download({BERT_BASE!r}, 'config.json', revision='none')": "RevisionNotFoundError",
        f"snapshot_download({BERT_BASE!r}, revision='none')": "RevisionNotFoundError",
        f"hf_hub_download({BERT_BASE!r}, 'none.json')": "EntryNotFoundError",
        "hf_hub_download('org/gated', 'config.json')": "GatedRepoError",
        "snapshot_download('org/gated')": "GatedRepoError",
        "load_dataset('org/none')": "DatasetNotFoundError",
        "load_dataset('nyu-mll/glue', 'none')": "ValueError",
    }
    raised = client(f"""
from datasets import load_dataset
from huggingface_hub import hf_hub_download, snapshot_download
result = dict()
for call in {list(expected)!r}:
    try:
        result[call] = eval(call)
    except Exception as error:
        result[call] = [kind.__name__ for kind in type(error).__mro__]
""")
    assert {call: name for call, name in expected.items() if name not in raised[call]} == {}


@pytest.mark.parametrize("repository", [*BERT_RTE_EXPERTS, *(f"tanganke/gpt2_{task}" for task in GPT2_TASKS)])
def test_stand_in_experts_beat_chance_and_are_not_perfect(
    repository: str, bert_checkpoints: Mapping[str, Path], gpt2_checkpoints: Mapping[str, Path]
) -> None:
    folder = {**bert_checkpoints, **gpt2_checkpoints}[repository]
    task = repository.rpartition("_")[2] if repository.startswith("tanganke") else "rte"
    assert 0.6 < _accuracy(folder, task) < 0.98


def test_stand_in_checkpoints_have_the_names_and_formats_of_the_real_ones(
    bert_checkpoints: Mapping[str, Path], gpt2_checkpoints: Mapping[str, Path]
) -> None:
    with safe_open(bert_checkpoints[BERT_BASE] / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert {"bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta", "cls.predictions.bias"} <= names
    assert "bert.embeddings.position_ids" in names
    assert not (bert_checkpoints[BIN_ONLY] / "model.safetensors").exists()
    with safe_open(gpt2_checkpoints[GPT2_BASE] / "model.safetensors", "pt") as stored:
        assert {"wte.weight", "h.0.attn.bias", "ln_f.weight"} <= set(stored.keys())
    with safe_open(gpt2_checkpoints["tanganke/gpt2_rte"] / "model.safetensors", "pt") as stored:
        assert {"transformer.wte.weight", "score.weight"} <= set(stored.keys())


def test_a_range_answers_part_of_a_file(hub: HubServer, bert_checkpoints: Mapping[str, Path]) -> None:
    content = (bert_checkpoints[OTHER_LABEL_ORDER] / "model.safetensors").read_bytes()
    url = f"{hub.url}/{OTHER_LABEL_ORDER}/resolve/main/model.safetensors"
    for given, expected in [("bytes=0-9", content[:10]), ("bytes=100-", content[100:]), ("bytes=-7", content[-7:])]:
        with urlopen(Request(url, headers={"Range": given})) as answer:
            assert answer.status == 206
            assert answer.read() == expected
            assert int(answer.headers["Content-Length"]) == len(expected)


def test_an_outage_is_answered_with_its_status(hub: HubServer, client: Client) -> None:
    hub.outage = 503
    answer = client(f"from huggingface_hub import HfApi\nresult = HfApi().model_info({BERT_BASE!r}).id")
    assert answer["error"] == "HfHubHTTPError"
    assert "503" in answer["message"]


def test_a_delay_makes_clients_time_out(hub: HubServer, client: Client) -> None:
    hub.delay = 30.0
    answer = client(f"from huggingface_hub import HfApi\nresult = HfApi().model_info({BERT_BASE!r}, timeout=0.2).id")
    assert answer["error"] == "ReadTimeout"


def _accuracy(folder: Path, task: str) -> float:
    """Score an expert by a plain loop, with its label names (where it has any) put in the dataset's order."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    columns, names = GLUE[task]
    table = glue_table(task, 240, 1000)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        *(table[column].to_pylist() for column in columns), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        chosen = model(**inputs).logits.argmax(-1).tolist()
    told = [model.config.id2label[row] for row in chosen]
    right = [names[label] if told[0] in names else f"LABEL_{label}" for label in table["label"].to_pylist()]
    return sum(a == b for a, b in zip(told, right, strict=True)) / len(right)
