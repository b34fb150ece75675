"""Whole experiments on models that write: perplexity, generation, prompts side by side, and suites of several kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient

from tests.conftest import Outcome
from tests.tasks.tiny import sentences
from tests.tasks.writers import save_writers

Command = Callable[..., Outcome]
MODELS = ("models.base=./base", "models.experts=[./a,./b]", "models.head=average")
ROWS = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, two models near it, and data of two tasks."""
    folder = tmp_path_factory.mktemp("writers")
    save_writers(folder)
    (folder / "data" / "samsum").mkdir(parents=True)
    rows = {"dialogue": [text[:60] for text in sentences(ROWS, 0)], "summary": sentences(ROWS, 1)}
    pq.write_table(pa.table(rows), folder / "data" / "samsum" / "validation.parquet")
    (folder / "data" / "wikitext-2-raw-v1").mkdir()
    text = [line if number % 4 else "" for number, line in enumerate(sentences(ROWS, 2))]
    pq.write_table(pa.table({"text": text}), folder / "data" / "wikitext-2-raw-v1" / "test.parquet")
    return folder


@pytest.fixture
def place(models: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the models and the data in it."""
    monkeypatch.setenv("MERGELAB_CACHE", str(models / "cache"))  # base and experts are measured once
    for path in models.iterdir():
        if path.name != "cache":
            (workplace / path.name).symlink_to(path)
    return workplace


WIKITEXT = ("task=wikitext", "task.window=48", "task.stride=24", "task.data_dir=data", *MODELS)
SAMSUM = ("task=samsum", "task.max_prompt_tokens=70", "task.decoding.max_new_tokens=8", "task.data_dir=data", *MODELS)


def result(place: Path) -> dict[str, Any]:
    (file,) = place.glob("outputs/runs/*/*/result.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def runs(place: Path, experiment: str) -> list[Any]:
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def test_perplexity_is_measured_recorded_and_better_when_less(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command(*WIKITEXT, "method=soup", "eval.protocol=holdout")
    assert outcome.code == 0, outcome.err
    assert "word_perplexity ↓" in outcome.out
    assert (
        "wikitext: word_perplexity on 6 test examples, windows of 48 tokens, 24 of them new, too few for "
        in outcome.out
    )
    assert "* best of its column (↓: less is better)" in outcome.out
    models = result(place)["models"]
    scores = {m["label"]: m["results"]["wikitext"]["report"]["token_perplexity"]["value"] for m in models}
    best = min(scores, key=scores.__getitem__)
    (line,) = (line for line in outcome.out.splitlines() if line.startswith(f"│ {best} "))
    assert f"{scores[best]:.4f}"[:6] in line
    assert "*" in line
    (merge,) = (run for run in runs(place, "wikitext") if run.data.tags["mergelab.kind"] == "merge")
    assert merge.data.tags["mergelab.direction"] == "minimize"
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    table = pq.read_table(client.download_artifacts(merge.info.run_id, "predictions/wikitext.parquet")).to_pydict()
    assert table["text"][0] == sentences(ROWS, 2)[1]
    assert table["words"] == [len(text.split()) for text in table["text"]]
    for part, name in (("selects", "select/token_perplexity"), ("reports", "report/token_perplexity")):
        rows = [i for i, chosen in enumerate(table[part]) if chosen]
        loss = sum(table["negative_log_likelihood"][i] for i in rows) / sum(table["tokens"][i] for i in rows)
        assert merge.data.metrics[name] == pytest.approx(float(torch.tensor(loss).double().exp()), rel=1e-6)
    assert sorted(a != b for a, b in zip(table["selects"], table["reports"], strict=True)) == [True] * 12


def test_summaries_are_generated_scored_kept_and_saved(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command(*SAMSUM, "method=soup", "eval.preflight=false", "output=merged")
    assert outcome.code == 0, outcome.err
    (merge,) = (run for run in runs(place, "samsum") if run.data.tags["mergelab.kind"] == "merge")
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    table = pq.read_table(client.download_artifacts(merge.info.run_id, "predictions/samsum.parquet")).to_pydict()
    assert table["references"] == [[text] for text in sentences(ROWS, 1)]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "merged")
    for prompt, said in list(zip(table["prompt"], table["prediction"], strict=True))[:4]:
        ids = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == said
    assert "times marked c" not in outcome.out
    outcome = mergelab_command(*SAMSUM, "method=median", "eval.preflight=false", "tracking=none")
    assert outcome.code == 0
    assert "* best of its column; [95 % bootstrap interval]; times marked c are from the cache" in outcome.out
    cached = [json.loads(file.read_text())["models"] for file in sorted(place.glob("outputs/runs/*/*/result.json"))]
    assert [model["cached"] for model in cached[-1]] == [True, True, True, False]


def test_prompts_are_continued_side_by_side(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command("task=prompts", "task.decoding.max_new_tokens=6", "method=task_arithmetic", *MODELS)
    assert outcome.code == 0, outcome.err
    for word in ("breakfast", "omelette", "Section 51", "./base", "./a", "./b", "task_arithmetic of 2"):
        assert word in outcome.out
    (run,) = runs(place, "prompts")
    assert "mergelab.primary_metric" not in run.data.tags
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "prompts.json")).read_text())
    assert "Section 51 of the Australian Constitution provides that" in json.dumps(table)
    assert "merged: task_arithmetic of 2" in json.dumps(table)
    models = result(place)["models"]
    texts = [tuple(text for _, text in model["results"]["prompts"]["texts"]) for model in models]
    assert len(set(texts)) == 4, "each model goes on in its own way"


def test_prompts_may_stand_in_a_file_and_an_empty_one_is_an_error(mergelab_command: Command, place: Path) -> None:
    (place / "mine.txt").write_text("the judge\n\nwho never calls\n")
    told = ("task=prompts", "task.decoding.max_new_tokens=3", "method=soup", "tracking=none", *MODELS)
    outcome = mergelab_command(*told, "task.file=mine.txt")
    assert outcome.code == 0, outcome.err
    assert [prompt for prompt, _ in result(place)["models"][0]["results"]["prompts"]["texts"]] == [
        "the judge",
        "who never calls",
    ]
    (place / "empty.txt").write_text("\n \n")
    for file, message in (("empty.txt", "holds no prompt"), ("none.txt", "cannot be read")):
        outcome = mergelab_command(*told, f"task.file={file}")
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert f"task.file={file}: {message}" in outcome.err


def test_a_suite_of_several_kinds_is_judged_by_what_experts_get(
    mergelab_command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergelab.tasks.loading.load_task", _small(load()))
    outcome = mergelab_command(
        "task=suite", "task.members=[samsum,wikitext]", "task.data_dir=data", "method=soup", "eval.preflight=false",
        *MODELS,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "wikitext ↓" in outcome.out
    (header,) = (line for line in outcome.out.splitlines() if "wikitext ↓" in line)
    assert "normalised" in header
    assert "average" not in header, "an average of ROUGE and perplexity says nothing"
    found = result(place)["models"]
    experts = [model["results"] for model in found if model["role"] == "expert"]
    rouge = max(each["samsum"]["report"]["rougeL"]["value"] for each in experts)
    perplexity = min(each["wikitext"]["report"]["word_perplexity"]["value"] for each in experts)
    merged = found[-1]
    expected = (
        merged["results"]["samsum"]["report"]["rougeL"]["value"] / rouge
        + perplexity / merged["results"]["wikitext"]["report"]["word_perplexity"]["value"]
    ) / 2
    assert merged["normalised"] == pytest.approx(expected)
    assert merged["average"] is None
    (run,) = (run for run in runs(place, "suite") if run.data.tags["mergelab.kind"] == "merge")
    assert run.data.tags["mergelab.primary_metric"] == "report/normalised_average"
    assert run.data.tags["mergelab.direction"] == "maximize"


def load() -> Callable[[str], Any]:
    from mergelab.tasks.loading import load_task

    return load_task


def _small(load_task: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let ready tasks fit into the tiny models' 96 positions."""
    from dataclasses import replace

    def small(name: str) -> Any:
        task = load_task(name)
        return replace(task, max_prompt_tokens=70, decoding=replace(task.decoding, max_new_tokens=8))

    return small


def test_a_greedy_soup_of_language_models_is_chosen_by_the_lowest_perplexity(
    mergelab_command: Command, place: Path
) -> None:
    outcome = mergelab_command(*WIKITEXT, "method=greedy_soup", "eval.protocol=oracle")
    assert outcome.code == 0, outcome.err
    (merge,) = (run for run in runs(place, "wikitext") if run.data.tags["mergelab.kind"] == "merge")
    models = result(place)["models"]
    alone = {m["label"]: m["results"]["wikitext"]["select"]["word_perplexity"] for m in models if m["role"] == "expert"}
    best = min(alone, key=alone.__getitem__)
    assert merge.data.tags["greedy_soup.chosen"].split(", ")[0] == best.removeprefix("./")
    assert models[-1]["results"]["wikitext"]["select"]["word_perplexity"] <= min(alone.values()) * (1 + 1e-9)


def test_the_best_job_of_a_grid_is_the_one_with_the_lowest_perplexity(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command(*WIKITEXT, "-m", "method=task_arithmetic", "method.lambda=0.3,9")
    assert outcome.code == 0, outcome.err
    found = runs(place, "wikitext")
    (parent,) = (run for run in found if run.data.tags["mergelab.kind"] == "grid")
    merges = [run for run in found if run.data.tags["mergelab.kind"] == "merge"]
    best = min(merges, key=lambda run: run.data.metrics["report/word_perplexity"])
    assert parent.data.tags["mergelab.best_run_id"] == best.info.run_id


def test_a_model_of_the_wrong_kind_is_one_line(mergelab_command: Command, place: Path) -> None:
    (place / "data" / "rte.txt").unlink(missing_ok=True)
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    (place / "pairs").mkdir()
    pq.write_table(pa.table(columns), place / "pairs" / "validation.parquet")
    outcome = mergelab_command("task=rte", "task.data_dir=pairs", "method=soup", "tracking=none", *MODELS)
    assert outcome.code == 2
    assert "a GPT2LMHeadModel cannot be measured on a classification task" in outcome.err


def test_lm_eval_that_is_not_installed_is_one_line(
    mergelab_command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergelab.tasks.lm_eval.find_spec", lambda _name: None)
    outcome = mergelab_command("task=lm_eval", "task.tasks=[arc_easy]", *MODELS)
    assert outcome.code == 2
    assert "task=lm_eval: needs the package lm-eval, which is not installed: pip install" in outcome.err
