"""Whole experiments on local models: head policies, protocols, suites, saving, caching, and how a run ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from tests.conftest import Outcome

Command = Callable[..., Outcome]


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("outputs/runs/*/*/result.json"))]


def runs(folder: Path, experiment: str = "rte") -> list[Any]:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def test_what_is_saved_scores_in_transformers_what_was_reported(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    outcome = mergelab_command(*arguments, "method=soup", "output=merged", "tracking=none")
    assert outcome.code == 0, outcome.err
    from transformers import pipeline

    pipe = pipeline("text-classification", model=str(workplace / "merged"))
    table = pq.read_table(workplace / "data" / "validation.parquet")
    pairs = [
        {"text": a, "text_pair": b}
        for a, b in zip(table["sentence1"].to_pylist(), table["sentence2"].to_pylist(), strict=True)
    ]
    names = ["entailment", "not_entailment"]
    right = [
        names.index(pipe(pair)["label"]) == label for pair, label in zip(pairs, table["label"].to_pylist(), strict=True)
    ]
    (result,) = results(workplace)
    assert result["models"][-1]["results"]["rte"]["report"]["accuracy"]["value"] == sum(right) / len(right)


def test_a_merge_alone_needs_no_data_and_writes_the_same_folder(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    assert mergelab_command(*arguments, "output=first", "tracking=none").code == 0
    outcome = mergelab_command(*arguments[:2], "evaluate=false", "output=second", "tracking=none")
    assert outcome.code == 0, outcome.err
    first, second = (load_file(workplace / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("policy", ["average", "expert:b"])
def test_the_head_is_whose_the_policy_says(
    mergelab_command: Command, arguments: list[str], workplace: Path, policy: str
) -> None:
    outcome = mergelab_command(*arguments, "method=soup", f"models.head={policy}", "output=merged", "tracking=none")
    assert outcome.code == 0, outcome.err
    heads = {name: load_file(workplace / name / "model.safetensors")["classifier.weight"] for name in "abc"}
    heads["c"] = heads["c"].flip(0)  # its labels are in the other order
    expected = heads["b"] if policy == "expert:b" else sum(heads.values()) / 3
    torch.testing.assert_close(load_file(workplace / "merged" / "model.safetensors")["classifier.weight"], expected)


def test_a_method_with_a_model_for_each_expert_measures_and_saves_the_one_whose_head_is_asked_for(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    outcome = mergelab_command(*arguments, "method=emr", "tracking=none")
    assert outcome.code == 2
    assert "method=emr: makes one model for each expert, and models.head=average does not say which" in outcome.err
    for name in "ab":
        chosen = [f"models.head=expert:{name}", f"output=emr-{name}", "tracking=none"]
        assert mergelab_command(*arguments, "method=emr", *chosen).code == 0
    merge_only = [*arguments, "method=emr", "models.head=expert:b", "evaluate=false", "tracking=none"]
    assert mergelab_command(*merge_only, "output=alone").code == 0
    a, b, alone = (load_file(workplace / name / "model.safetensors") for name in ("emr-a", "emr-b", "alone"))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(a[name], b[name])
    assert all(torch.equal(b[key], alone[key]) for key in b)
    base, expert = (load_file(workplace / each / "model.safetensors") for each in ("base", "b"))
    kept = b[name] != base[name]
    assert kept.any()
    assert ((b[name] - base[name]).sign() == (expert[name] - base[name]).sign())[kept].all()


def test_a_greedy_soup_is_chosen_on_the_examples_that_select(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    outcome = mergelab_command(*arguments, "method=greedy_soup", "tracking=none")
    assert outcome.code == 2
    assert "method=greedy_soup: chooses by scores, and with eval.protocol=full there are no examples" in outcome.err
    outcome = mergelab_command(*arguments, "method=greedy_soup", "eval.protocol=holdout", "output=merged")
    assert outcome.code == 0, outcome.err
    (run,) = (run for run in runs(workplace) if run.data.tags["mergelab.kind"] == "merge")
    chosen = run.data.tags["greedy_soup.chosen"].split(", ")
    assert 1 <= len(chosen) <= 3
    assert run.data.tags["greedy_soup.tried"].count(";") == 4  # three alone, two averages
    merged = load_file(workplace / "merged" / "model.safetensors")
    parts = [load_file(workplace / name / "model.safetensors") for name in chosen]
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(merged[name], sum(part[name] for part in parts) / len(parts))
    heads = [part["classifier.bias"].flip(0) if own == "c" else part["classifier.bias"]
             for own, part in zip(chosen, parts, strict=True)]  # fmt: skip
    torch.testing.assert_close(merged["classifier.bias"], sum(heads) / len(heads))


def test_the_bases_own_head_is_asked_for_in_vain_where_it_has_none(
    mergelab_command: Command, arguments: list[str]
) -> None:
    outcome = mergelab_command(*arguments, "models.head=base", "tracking=none")
    assert outcome.code == 2
    assert "models.head=base" in outcome.err
    assert "classifier.weight" in outcome.err


def test_under_holdout_other_examples_select_than_report(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    assert mergelab_command(*arguments, "eval.protocol=holdout", "eval.holdout_fraction=0.25").code == 0
    (merge,) = (run for run in runs(workplace) if run.data.tags["mergelab.kind"] == "merge")
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    table = pq.read_table(client.download_artifacts(merge.info.run_id, "predictions/rte.parquet"))
    selects, reports = table["selects"].to_numpy(), table["reports"].to_numpy()
    assert selects.sum() == 30
    assert (selects != reports).all()
    right = table["prediction"].to_numpy() == table["label"].to_numpy()
    assert merge.data.metrics["select/accuracy"] == pytest.approx(right[selects].mean())
    assert merge.data.metrics["report/accuracy"] == pytest.approx(right[reports].mean())


def test_oracle_is_labelled_so(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    outcome = mergelab_command(*arguments, "eval.protocol=oracle", "tracking=none")
    assert "ORACLE" in outcome.out
    (result,) = results(workplace)
    merged = result["models"][-1]["results"]["rte"]
    assert merged["select"]["accuracy"] == merged["report"]["accuracy"]["value"]


def test_base_and_experts_are_measured_once(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    for method in ("soup", "median"):
        assert mergelab_command(*arguments, f"method={method}").code == 0
    kinds = sorted(run.data.tags["mergelab.kind"] for run in runs(workplace))
    assert kinds == ["base", "expert", "expert", "expert", "merge", "merge"]
    assert [model["cached"] for model in results(workplace)[-1]["models"]] == [True] * 4 + [False]
    changed = load_file(workplace / "a" / "model.safetensors")
    changed["classifier.bias"] += 0.01
    from safetensors.torch import save_file

    save_file(changed, workplace / "a" / "model.safetensors", metadata={"format": "pt"})
    assert mergelab_command(*arguments, "method=soup").code == 0
    # The base is measured with the experts' averaged head, so that it is another model now.
    assert [model["cached"] for model in results(workplace)[-1]["models"]] == [False, False, True, True, False]


def test_a_failed_run_is_marked_failed_with_its_error(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    (workplace / "data" / "validation.parquet").write_bytes(b"not parquet")
    assert mergelab_command(*arguments).code == 2
    (run,) = runs(workplace)
    assert run.info.status == "FAILED"
    assert "validation.parquet" in run.data.tags["error"]


def test_a_killed_run_does_not_stay_running(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    (workplace / "slow.py").write_text(
        "import time\ndef merge(models):\n    open('started', 'w').close()\n    time.sleep(60)\n    return models[0]\n"
    )
    command = [sys.executable, "-m", "mergelab", "method=custom", "method.function=slow.merge", *arguments]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (workplace / "started").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert mergelab_command(*arguments, "method=soup").code == 0
    states = {
        run.data.params["method.name"]: run.info.status for run in runs(workplace) if "method.name" in run.data.params
    }
    assert states == {"custom": "KILLED", "soup": "FINISHED"}


def test_a_users_own_function_is_swept(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "def pull(base, experts, *, strength: float = 1.0):\n"
        "    return base + strength * (sum(experts) / len(experts) - base)\n"
    )
    sys.modules.pop("mine", None)
    outcome = mergelab_command(
        *arguments, "-m", "method=custom", "method.function=mine.pull", "method.strength=0.0,1.0", "tracking=none"
    )
    assert outcome.code == 0, outcome.err
    assert "method.strength=0.0" in outcome.out
    assert mergelab_command(*arguments, "method=custom", "method.function=mine.pull", "method.strength=big").code == 2
    found = [json.loads(file.read_text()) for file in sorted(workplace.glob("outputs/grids/*/*/*/result.json"))]
    base, full = found[0]["models"][0], found[1]["models"][-1]
    assert found[0]["models"][-1]["results"] == base["results"]
    assert mergelab_command(*arguments, "method=soup", "tracking=none").code == 0
    assert results(workplace)[-1]["models"][-1]["results"] == full["results"]


def test_a_failing_job_does_not_stop_its_grid(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    outcome = mergelab_command(*arguments, "-m", "method=slerp,soup")
    assert outcome.code == 2
    assert "exactly 2 experts" in outcome.err.splitlines()[-1]
    assert "soup" in outcome.out
    (parent,) = (run for run in runs(workplace) if run.data.tags["mergelab.kind"] == "grid")
    assert parent.info.status == "FAILED"


def test_weights_of_experts_reach_the_merge(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    weighted = ["models.experts={a: {reference: ./a, weight: 3}, b: ./b}"]
    merge_only = [arguments[0], *weighted, "evaluate=false", "tracking=none"]
    outcome = mergelab_command(*merge_only, "method=soup", "output=merged")
    assert outcome.code == 0, outcome.err
    a, b, merged = (load_file(workplace / name / "model.safetensors") for name in ("a", "b", "merged"))
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(merged[name], (3 * a[name] + b[name]) / 4)
    assert mergelab_command(*merge_only, "method=median", "output=other").code == 2


def test_the_best_jobs_model_is_logged_where_that_is_asked_for(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    grid = ["-m", "method=task_arithmetic", "method.lambda=0.3,20", "tracking.log_model=best"]
    outcome = mergelab_command(*arguments, *grid)
    assert outcome.code == 0, outcome.err
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    merges = [run for run in runs(workplace) if run.data.params.get("method.name") == "task_arithmetic"]
    best = max(merges, key=lambda run: run.data.metrics["report/accuracy"])
    (model,) = client.search_logged_models([best.info.experiment_id])
    assert (model.source_run_id, model.status) == (best.info.run_id, "READY")
    assert [metric.value for metric in model.metrics if metric.key == "report/accuracy"] == [
        best.data.metrics["report/accuracy"]
    ]
    assert not list(workplace.glob("outputs/grids/*/*/*/model"))
