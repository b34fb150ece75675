"""``task=lm_eval``: lm-eval's own numbers, over any part of its documents (needs the extra lm-eval)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from mergelab.evaluation.lm_eval import LmEvalRun
from mergelab.tasks.data import load_data
from mergelab.tasks.loading import tasks_from_config
from tests.experiment.test_text_experiment import MODELS, Command, result, runs
from tests.tasks.tiny import sentences
from tests.tasks.writers import save_writers

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.usefixtures("tasks")

CHOICE = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: FOLDER/NAME.jsonl}
test_split: train
fewshot_split: train
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: f1, higher_is_better: true}
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {data_files: FOLDER/words.jsonl}
test_split: train
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{choices[label]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: FOLDER/words.jsonl}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: FOLDER/words.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf}
filter_list:
  - {name: first-word, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
"""
GROUP = """
group: both
task: [first, second]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: SIZED}
"""
COUNTS = {"first": 14, "second": 26, "words": 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two experts."""
    folder = tmp_path_factory.mktemp("writers")
    save_writers(folder)
    return folder


@pytest.fixture
def place(models: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the models in it."""
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    for name in ("base", "a", "b"):
        (workplace / name).symlink_to(models / name)
    return workplace


@pytest.fixture(name="tasks")
def written_tasks(place: Path) -> Path:
    """A folder of lm-eval tasks of every type of request, and of a group."""
    folder = place / "tasks"
    folder.mkdir()
    random = np.random.default_rng(0)
    texts = [text.split() for text in sentences(80, 5) if len(text.split()) > 5]
    for name, count in COUNTS.items():
        rows = [texts[at] for at in random.permutation(len(texts))[:count]]
        written = [
            {"text": " ".join(row[:4]), "choices": [row[4], row[0]], "label": int(random.integers(2))} for row in rows
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    for name in ("first", "second"):
        _write(folder, name, CHOICE.replace("NAME", name))
    for name, text in {"words": WORDS, "rolling": ROLLING, "written": WRITTEN}.items():
        _write(folder, name, text)
    _write(folder, "both", GROUP.replace("SIZED", "true"))
    _write(folder, "evenly", GROUP.replace("both", "evenly").replace("SIZED", "false"))
    return folder


def _write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))


def _told(names: str) -> tuple[str, ...]:
    return ("task=lm_eval", f"task.tasks=[{names}]", "task.include_path=tasks", "method=soup", *MODELS)


def _by_lm_eval(place: Path, names: list[str], **rest: Any) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(place / "merged"), batch_size=4, device="cpu"),
        tasks=names,
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        **rest,
    )
    return found


@pytest.mark.parametrize("names", ["words", "rolling", "written", "both", "evenly", "first,words"])
def test_its_numbers_are_those_of_lm_eval(mergelab_command: Command, place: Path, names: str) -> None:
    outcome = mergelab_command(*_told(names), "output=merged")
    assert outcome.code == 0, outcome.err
    own = result(place)["models"][-1]["results"]["lm_eval"]["report"]
    found = _by_lm_eval(place, names.split(","))["results"]
    expected = {
        f"{task}/{key.replace(',none', '').replace(',', '_')}": value
        for task, values in found.items()
        for key, value in values.items()
        if "," in key and "stderr" not in key
    }
    assert {name: score["value"] for name, score in own.items()} == pytest.approx(expected, rel=1e-5)
    assert all(score["low"] <= score["value"] <= score["high"] for score in own.values())


def test_a_model_that_is_divided_among_devices_has_the_same_numbers(mergelab_command: Command, place: Path) -> None:
    fixed = (*_told("words,rolling,written"), "eval.cache=false", "device=cpu", "tracking=none")
    assert mergelab_command(*fixed).code == 0
    expected = result(place)["models"]
    shutil.rmtree(place / "outputs")
    assert mergelab_command(*fixed, "eval.max_memory={cpu: 300kB}").code == 0
    for found, own in zip(result(place)["models"], expected, strict=True):
        scores = [{key: each["value"] for key, each in m["results"]["lm_eval"]["report"].items()} for m in (found, own)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_part_selects_and_the_rest_reports_with_the_prompts_of_the_whole(
    mergelab_command: Command,
    place: Path,
) -> None:
    outcome = mergelab_command(*_told("both"), "eval.protocol=holdout", "output=merged")
    assert outcome.code == 0, outcome.err
    own = result(place)["models"][-1]["results"]["lm_eval"]
    assert (own["select_examples"], own["report_examples"]) == (20, 20)
    (run,) = (run for run in runs(place, "lm_eval") if run.data.tags["mergelab.kind"] == "merge")
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    table = pq.read_table(client.download_artifacts(run.info.run_id, "predictions/lm_eval.parquet")).to_pydict()
    samples = _by_lm_eval(place, ["both"], log_samples=True)["samples"]
    right = {
        (task, sample["doc_id"]): sample["acc"]
        for task, name in enumerate(("first", "second"))
        for sample in samples[name]
    }
    for part, score in (
        ("selects", own["select"]["both/acc"]),
        ("reports", own["report"]["both/acc"]["value"]),
    ):
        members = [
            right[task, number]
            for task, number, chosen in zip(table["task"], table["idx"], table[part], strict=True)
            if chosen
        ]
        assert len(members) == 20
        assert score == pytest.approx(np.mean(members))


def test_a_part_has_the_outputs_that_it_has_in_the_whole(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = {"name": "lm_eval", "version": 1, "kind": "lm_eval", "tasks": ["both", "words"], "include_path": "tasks"}
    (spec,) = tasks_from_config(task).tasks
    data = load_data(spec)
    assert (len(data), spec.primary) == (60, "both/acc")
    run = LmEvalRun(spec, AutoTokenizer.from_pretrained("a"), data.labels, data.idx)
    model = AutoModelForCausalLM.from_pretrained("a")
    whole = run.run(model)
    members = np.random.default_rng(0).permutation(60)[:25]
    part = run.take(members).run(model)
    for own, other in zip(part, whole[members], strict=True):
        values, expected = json.loads(own), json.loads(other)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert value == pytest.approx(expected[name], rel=1e-5)


def test_a_sweep_selects_on_its_part(mergelab_command: Command, place: Path) -> None:
    told = ("-m", "sweep=task_arithmetic", "sweep.n_trials=2", "eval.protocol=holdout", "method=task_arithmetic")
    outcome = mergelab_command(*_told("words"), "task.primary=words/perplexity", *told)
    assert outcome.code == 0, outcome.err
    assert "selects words/perplexity (minimize)" in outcome.out
    assert "trials are not pruned: lm-eval measures all examples at once" in outcome.out
    trials = [run for run in runs(place, "lm_eval") if run.data.tags["mergelab.kind"] == "trial"]
    trials.sort(key=lambda run: int(run.data.tags["mergelab.trial"]))
    scores = [run.data.metrics["select/words/perplexity"] for run in trials]
    assert f"best: trial {scores.index(min(scores))}, " in outcome.out


def test_other_documents_under_the_same_name_are_measured_anew(
    mergelab_command: Command,
    place: Path,
    tasks: Path,
) -> None:
    scores = []
    for text in (WORDS, WORDS.replace("{{text}}", "Well, {{text}}")):
        _write(tasks, "words", text)
        outcome = mergelab_command(*_told("words"), "task.primary=words/perplexity")
        assert outcome.code == 0, outcome.err
        files = sorted(place.glob("outputs/runs/*/*/result.json"), key=lambda file: file.stat().st_mtime)
        scores.append([model["results"]["lm_eval"]["report"] for model in json.loads(files[-1].read_text())["models"]])
    assert all(a["words/perplexity"] != b["words/perplexity"] for a, b in zip(*scores, strict=True))


def test_a_report_tests_models_on_the_same_documents(mergelab_command: Command, place: Path) -> None:
    for method in ("soup", "median"):
        outcome = mergelab_command(*_told("words"), f"method={method}", "task.primary=words/perplexity")
        assert outcome.code == 0, outcome.err
    outcome = mergelab_command("report", "lm_eval")
    assert outcome.code == 0, outcome.err
    assert "p: paired bootstrap against the best expert (./b), two-sided; Holm's correction for 2 tests" in outcome.out


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (("task.primary=words/perplexty",), "lm-eval reports words/acc, words/perplexity; did you mean"),
        (("task.tasks=[wrods]",), "lm-eval has no task 'wrods'; did you mean 'words'?"),
        (("task.include_path=nowhere",), "task.include_path=nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(
    mergelab_command: Command,
    place: Path,
    told: tuple[str, ...],
    message: str,
) -> None:
    outcome = mergelab_command(*_told("words"), *told)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_without_a_measurement_no_task_is_loaded(mergelab_command: Command, place: Path, tasks: Path) -> None:
    (tasks / "words.jsonl").unlink()
    outcome = mergelab_command(*_told("words"), "evaluate=false", "output=merged")
    assert outcome.code == 0, outcome.err
    outcome = mergelab_command(*_told("words"), "output=measured")
    assert outcome.code == 2
    assert "task.tasks: lm-eval cannot load words" in outcome.err
    assert not (place / "measured").exists()


def test_prefetch_lists_the_data_of_its_tasks(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command("prefetch", *_told("words"))
    assert outcome.code == 0, outcome.err
    assert "json (lm-eval's words)" in outcome.out
    assert "there" in outcome.out
