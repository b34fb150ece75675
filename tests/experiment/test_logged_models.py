"""What is logged with ``tracking.log_model`` is what MLflow loads: it predicts what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from tests.adapters import made as small
from tests.conftest import Outcome
from tests.experiment.test_merge_to_disk import llama
from tests.experiment.test_text_experiment import SAMSUM, WIKITEXT, models, place  # noqa: F401
from tests.models import pairs
from tests.standins import GPT2_BASE, glue_table

Command = Callable[..., Outcome]


@pytest.fixture
def store(workplace: Path) -> Iterator[MlflowClient]:
    """The default store of the fresh folder; MLflow's own functions use it from the first look at it, not before."""
    yield MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    mlflow.set_tracking_uri(None)


def logged(client: MlflowClient, experiment: str = "rte") -> tuple[Run, list[LoggedModel]]:
    """Return the one run of a merge, and the models that it logged, by name."""
    mlflow.set_tracking_uri(client.tracking_uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    (run,) = client.search_runs([number], "tags.`mergelab.kind` = 'merge'")
    found = client.search_logged_models([number])
    assert {model.source_run_id for model in found} == {run.info.run_id}
    assert {output.model_id for output in run.outputs.model_outputs} == {model.model_id for model in found}
    assert {model.status for model in found} == {"READY"}
    return run, sorted(found, key=lambda model: model.name)


def predictions(client: MlflowClient, run: Run, task: str = "rte") -> Mapping[str, list[Any]]:
    file = client.download_artifacts(run.info.run_id, f"predictions/{task}.parquet")
    table: Mapping[str, list[Any]] = pq.read_table(file).to_pydict()
    return table


def average(*folders: Path) -> dict[str, torch.Tensor]:
    found = [load_file(folder / "model.safetensors") for folder in folders]
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def test_a_classifier_predicts_what_was_measured_under_the_tasks_labels(
    mergelab_command: Command, arguments: list[str], workplace: Path, store: MlflowClient
) -> None:
    outcome = mergelab_command(
        *arguments, "method=soup", "tracking.log_model=best", "tracking.register=entailment", "output=merged"
    )
    assert outcome.code == 0, outcome.err
    run, (model,) = logged(store)
    pipe = mlflow.transformers.load_model(f"runs:/{run.info.run_id}/model")
    assert pipe.task == "text-classification"
    table, found = pq.read_table("data/validation.parquet").to_pydict(), predictions(store, run)
    names = ["entailment", "not_entailment"]  # of GLUE; the third expert has them in the other order
    for row in range(20):
        said = pipe({"text": table["sentence1"][row], "text_pair": table["sentence2"][row]}, top_k=2)
        logits = torch.tensor([found[f"output_{output}"][row] for output in (0, 1)])
        expected = dict(zip(names, logits.softmax(0).tolist(), strict=True))
        assert {one["label"]: one["score"] for one in said} == pytest.approx(expected, abs=1e-5)

    assert model.params == run.data.params
    assert model.tags["mergelab.method"] == "soup"
    (dataset,) = (one.dataset for one in run.inputs.dataset_inputs)
    scores = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in scores.items()} == run.data.metrics
    assert scores["report/accuracy"].dataset_digest == dataset.digest
    assert scores["time/merge_s"].dataset_name is None
    for name in run.data.metrics:
        assert len(store.get_metric_history(run.info.run_id, name)) == 1, name

    version = store.get_model_version("entailment", "1")
    assert (version.source, version.run_id) == (model.artifact_location, run.info.run_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "entailment", "version": 1}]
    again = mlflow.transformers.load_model("models:/entailment/1")
    assert torch.equal(again.model.classifier.weight, pipe.model.classifier.weight)
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().split()} == {
        "mlflow", "torch", "transformers", "accelerate",
    }  # fmt: skip
    assert (folder / "model" / "README.md").read_bytes() == (workplace / "merged" / "README.md").read_bytes()
    assert "huggingface.co//" not in "".join(f.read_text() for f in folder.glob("*") if f.suffix in (".txt", ".md"))


def test_a_causal_model_writes_what_it_wrote_and_finds_texts_as_likely(
    mergelab_command: Command,
    place: Path,  # noqa: F811
    store: MlflowClient,
) -> None:
    log = ("method=soup", "eval.preflight=false", "tracking.log_model=all")
    assert mergelab_command(*SAMSUM, *log).code == 0
    run, (model,) = logged(store, "samsum")
    pipe = mlflow.transformers.load_model(f"models:/{model.model_id}")
    assert pipe.task == "text-generation"
    table = predictions(store, run, "samsum")
    for prompt, said in list(zip(table["prompt"], table["prediction"], strict=True))[:4]:
        (written,) = pipe(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)
        assert written["generated_text"] == said

    assert mergelab_command(*WIKITEXT, *log).code == 0
    run, (model,) = logged(store, "wikitext")
    pipe = mlflow.transformers.load_model(f"models:/{model.model_id}")
    table = predictions(store, run, "wikitext")
    # The first text is shorter than a window, and nothing stands before it but the line break it begins with.
    ids = pipe.tokenizer(table["text"][0], return_tensors="pt")["input_ids"]
    loss = pipe.model(ids, labels=ids).loss * (ids.shape[1] - 1)
    merged = average(place / "a", place / "b")
    twin = type(pipe.model)(pipe.model.config)
    twin.load_state_dict(merged, strict=False)
    assert loss.item() == pytest.approx((twin.eval()(ids, labels=ids).loss * (ids.shape[1] - 1)).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["t5", "bert2bert"])
def test_a_sequence_to_sequence_model_is_given_back_with_its_tokenizer(
    kind: str, mergelab_command: Command, workplace: Path, store: MlflowClient
) -> None:
    import transformers

    for seed, name in enumerate("ab"):
        getattr(pairs, kind)(workplace / name, seed)
    merge = ["models.base=null", "models.experts=[./a,./b]", "method=soup", "task=samsum", "evaluate=false"]
    outcome = mergelab_command(*merge, "output=merged", "tracking.log_model=best")
    assert outcome.code == 0, outcome.err
    _, (model,) = logged(store, "samsum")
    parts = mlflow.transformers.load_model(f"models:/{model.model_id}", return_type="components")
    own = transformers.AutoConfig.from_pretrained(workplace / "a")
    twin = type(parts["model"])(own)
    twin.load_state_dict(average(workplace / "a", workplace / "b"), strict=False)
    twin.tie_weights()
    ids = parts["tokenizer"]("the cat sat on the mat", return_tensors="pt")["input_ids"]
    labels = torch.tensor([[4, 5, 6]])
    found = parts["model"].eval()(input_ids=ids, labels=labels).logits
    torch.testing.assert_close(found, twin.eval()(input_ids=ids, labels=labels).logits)
    if transformers.__version__ >= "5":  # which has no pipeline for such models
        with pytest.raises(MlflowException, match="'return_type'='components'"):
            mlflow.transformers.load_model(f"models:/{model.model_id}")
        with pytest.raises(MlflowException, match="python_function"):
            mlflow.pyfunc.load_model(f"models:/{model.model_id}")


@pytest.mark.slow
def test_of_a_head_for_each_task_each_model_is_logged_with_its_own(
    mergelab_command: Command,
    gpt2_checkpoints: Mapping[str, Path],
    workplace: Path,
    store: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    experts = ", ".join(f"{task}: {gpt2_checkpoints[f'tanganke/gpt2_{task}']}" for task in ("rte", "sst2"))
    for task in ("rte", "sst2"):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, 40, 1), workplace / "data" / task / "validation.parquet")
    outcome = mergelab_command(
        *("task=suite", "task.members=[rte,sst2]", "task.data_dir=data", "models.head=per_task", "method=soup"),
        *(f"models.base={gpt2_checkpoints[GPT2_BASE]}", f"models.experts={{{experts}}}"),
        *("tracking.log_model=best", "tracking.register=suite"),
    )
    assert outcome.code == 0, outcome.err
    run, both = logged(store, "suite")
    assert [model.name for model in both] == ["model-rte", "model-sst2"]
    for task, labels in (("rte", ["entailment", "not_entailment"]), ("sst2", ["negative", "positive"])):
        pipe = mlflow.transformers.load_model(f"models:/suite-{task}/1")
        table = pq.read_table(workplace / "data" / task / "validation.parquet").to_pydict()
        found = predictions(store, run, task)["prediction"]
        for row in range(12):
            inputs = {"text": table["sentence"][row]} if task == "sst2" else {
                "text": table["sentence1"][row], "text_pair": table["sentence2"][row],
            }  # fmt: skip
            assert labels.index(pipe(inputs)["label"]) == found[row]
    scores = {metric.key: metric for metric in both[0].metrics}
    assert scores["report/sst2/accuracy"].dataset_name == "sst2"
    assert scores["report/average"].dataset_name is None


@pytest.mark.parametrize("form", ["lora_cat", "lora_svd"])
def test_of_an_adapter_the_base_with_the_adapter_in_it_is_logged(
    form: str, mergelab_command: Command, workplace: Path, store: MlflowClient
) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    targets = {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
    given = {}
    for seed, name in enumerate("ab"):
        made = small.made(workplace, small.bert(), peft.LoraConfig(r=2, **targets), dtype=torch.float32, seed=seed)
        given |= {"base": made.base, name: made.adapter}
    small.tokenizer(given["base"])
    experts = f"{{a: {given['a']}, b: {given['b']}}}"
    outcome = mergelab_command(
        *(f"models.base={given['base']}", f"models.experts={experts}", "task=rte", "evaluate=false", "output=merged"),
        *("method=task_arithmetic", "method.lambda=0.7", f"save.form={form}", "tracking.log_model=best"),
        *(("save.rank=3",) if form == "lora_svd" else ()),
    )
    assert outcome.code == 0, outcome.err
    _, (model,) = logged(store)
    pipe = mlflow.transformers.load_model(f"models:/{model.model_id}")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(given["base"])
    wrapped = peft.PeftModel.from_pretrained(base, workplace / "merged").eval()
    with torch.no_grad():
        expected = wrapped(small.INPUTS).logits
        torch.testing.assert_close(pipe.model.eval()(small.INPUTS).logits, expected, rtol=1e-5, atol=1e-6)
    tags = mlflow.transformers.load_model(f"models:/{model.model_id}", return_type="components")
    assert tags["task"] == "text-classification"


def test_what_mlflow_cannot_load_is_logged_as_files_and_said_to_be(
    mergelab_command: Command, workplace: Path, store: MlflowClient
) -> None:
    for seed, name in enumerate("ab"):
        llama(workplace / name, seed)  # without a tokenizer
    merge = ["models.base=null", "models.experts=[./a,./b]", "method=soup", "task=prompts", "evaluate=false"]
    outcome = mergelab_command(*merge, "output=merged", "tracking.log_model=best")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.err.replace("│", " ").split())
    assert "logged as files alone, which mlflow.transformers cannot load: the model has no tokenizer_config" in said
    _, (model,) = logged(store, "prompts")
    folder = Path(model.artifact_location.removeprefix("file://"))
    written = {path.name: path.read_bytes() for path in (workplace / "merged").iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


def test_a_model_is_registered_only_where_it_is_logged(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    for setting in ("tracking=none", "tracking.log_model=none"):
        outcome = mergelab_command(*arguments, "method=soup", setting, "tracking.register=mine")
        assert outcome.code == 2
        assert outcome.err.startswith("error: tracking.register=mine: only logged models are registered")
        assert len(outcome.err.splitlines()) == 1
    assert not list(workplace.glob("outputs/runs/*/*/result.json"))
