"""Bad input gets one line that names what is wrong and what would be right, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, Outcome
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table

Command = Callable[..., Outcome]

CASES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("method=tis",), ("method=tis", "'ties'", "adamerging, ", " and ", "more")),
    (("task=rtee",), ("task=rtee", "'rte'")),
    (("models=bert_base_rt",), ("models=bert_base_rt", "'bert_base_rte'")),
    (("sede=1",), ("sede", "'seed'")),
    (("eval.protocl=full",), ("eval.protocl", "'eval.protocol'")),
    (("eval.protocol=al",), ("eval.protocol='al'", "'holdout'")),
    (("eval.holdout_fraction=1.5",), ("eval.holdout_fraction=1.5", "less than 1")),
    (("method.density=0",), ("method.density=0", "greater than 0")),
    (("method.density=-0.1",), ("method.density=-0.1", "greater than 0")),
    (("method.density=1.1",), ("method.density=1.1", "at most 1")),
    (("method.density=few",), ("method.density='few'", "number")),
    (("method.densty=0.1",), ("method.densty", "'density'")),
    (("method.lambda=big",), ("method.lambda='big'", "number")),
    (("method.lambda=nan",), ("method.lambda", "number")),
    (("models.base=null",), ("ties", "base")),
    (("method=slerp", "models.experts=[a/b,c/d,e/f]"), ("slerp", "2", "3")),
    (("models.head=expert:nobody", "source=mini"), ("models.head", "nobody")),
    (("models.head=mean",), ("models.head='mean'", "average")),
    (("models.experts.howey.wight=2",), ("models.experts.howey",)),
    (("models.base=./nowhere",), ("./nowhere", "does not exist")),
    (("models.base='not a name'",), ("not a name", "hub id")),
    (("task.limit=0",), ("task.limit", "0")),
    (("task.members=[rte,sst]", "task=suite"), ("sst", "'sst2'")),
    (("evaluate=false",), ("evaluate=false", "output")),
    (("method=custom",), ("method.function",)),
    (("method=custom", "method.function=nowhere.median"), ("nowhere",)),
    (("device=gpu",), ("device='gpu'", "cuda")),
    (("source=mini", "task=qnli"), ("qnli", "rte")),
    (("tracking.log_model=some",), ("tracking.log_model='some'", "'best'")),
    (("experiment=bert_rtee",), ("experiment=bert_rtee", "'bert_rte'")),
]


@pytest.mark.parametrize(("arguments", "named"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_a_wrong_setting_is_one_line_before_anything_is_loaded(
    mergelab_command: Command, workplace: Path, arguments: tuple[str, ...], named: tuple[str, ...]
) -> None:
    outcome = mergelab_command(*arguments)
    assert_one_line(outcome, *named)
    assert not list(workplace.rglob("*.safetensors"))


def test_a_wrong_setting_leaves_nothing_behind(mergelab_command: Command, workplace: Path) -> None:
    for arguments in (("method.density=7",), ("task.limit=0",), ("models.head=mean",), ("sweep=ties",), ("seed=x",)):
        assert_one_line(mergelab_command(*arguments, "source=mini"))
        assert not list(workplace.iterdir()), arguments


def test_the_traceback_of_an_error_can_be_asked_for(workplace: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "1"}
    for override in ("method.density=7", "sede=1", "~models.experts.x"):
        command = [sys.executable, "-m", "mergelab", override]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "Traceback (most recent call last):" in done.stderr


def test_a_setting_may_refer_to_the_runs_folder(mergelab_command: Command, models: Path) -> None:
    outcome = mergelab_command(*LOCAL, "output='${hydra:runtime.output_dir}/merged'", "evaluate=false")
    assert outcome.code == 0, outcome.err
    assert len(list(models.glob("outputs/runs/*/*/merged/model.safetensors"))) == 1


def assert_one_line(outcome: Outcome, *named: str) -> None:
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for text in named:
        assert text in lines[0], f"{text!r} is not in {lines[0]!r}"


@pytest.fixture
def models(bert_checkpoints: Mapping[str, Path], workplace: Path) -> Path:
    """A base, two experts and RTE-shaped data, to be damaged."""
    for name, repository in (("base", BERT_BASE), ("a", BERT_RTE_EXPERTS[1]), ("b", BERT_RTE_EXPERTS[2])):
        shutil.copytree(bert_checkpoints[repository], workplace / name)
    (workplace / "data").mkdir()
    pq.write_table(glue_table("rte", 60, 1), workplace / "data" / "validation.parquet")
    return workplace


LOCAL = ("models.base=./base", "models.experts=[./a,./b]", "task.data_dir=data", "tracking=none")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_undamaged_local_models_work(mergelab_command: Command, models: Path) -> None:
    outcome = mergelab_command(*LOCAL)
    assert outcome.code == 0, outcome.err
    assert "accuracy" in outcome.out


def test_a_folder_without_config_is_named(mergelab_command: Command, models: Path) -> None:
    (models / "a" / "config.json").unlink()
    assert_one_line(mergelab_command(*LOCAL), "/a", "config.json")


def test_a_folder_without_weights_is_named(mergelab_command: Command, models: Path) -> None:
    (models / "a" / "model.safetensors").unlink()
    assert_one_line(mergelab_command(*LOCAL), "/a ", "model.safetensors")


def test_a_truncated_file_is_named(mergelab_command: Command, models: Path) -> None:
    file = models / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_one_line(mergelab_command(*LOCAL), "/b/model.safetensors")


def test_a_file_that_is_not_safetensors_is_named(mergelab_command: Command, models: Path) -> None:
    (models / "b" / "model.safetensors").write_bytes(b"<html>404</html>" * 100)
    assert_one_line(mergelab_command(*LOCAL), "/b/model.safetensors")


def test_another_shape_is_named_with_both_shapes(mergelab_command: Command, models: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.bias"
    rewrite(models / "b", lambda tensors: tensors.update({name: torch.zeros(7)}))
    assert_one_line(mergelab_command(*LOCAL), name, "7", "32")


def test_missing_and_additional_tensors_are_listed(mergelab_command: Command, models: Path) -> None:
    missing, extra = "bert.encoder.layer.0.output.dense.bias", "bert.encoder.layer.9.output.dense.bias"
    rewrite(models / "b", lambda tensors: tensors.update({extra: tensors.pop(missing)}))
    assert_one_line(mergelab_command(*LOCAL), "'b'", missing, extra)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_with_model_and_tensor(
    mergelab_command: Command, models: Path, value: float
) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite(models / "b", lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    assert_one_line(mergelab_command(*LOCAL, "eval.preflight=false"), "b: ", name)


class Arbitrary:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def test_a_bin_file_that_needs_arbitrary_code_is_refused_and_not_run(mergelab_command: Command, models: Path) -> None:
    (models / "a" / "model.safetensors").unlink()
    torch.save({"weights": Arbitrary()}, models / "a" / "pytorch_model.bin")
    assert_one_line(mergelab_command(*LOCAL), "/a/pytorch_model.bin")
    assert not (models / "executed").exists()


def test_labels_that_cannot_be_aligned_are_named(mergelab_command: Command, models: Path) -> None:
    file = models / "a" / "config.json"
    config = json.loads(file.read_text()) | {"id2label": {"0": "sports", "1": "politics"}}
    file.write_text(json.dumps(config))
    assert_one_line(mergelab_command(*LOCAL), "./a", "sports", "entailment")


def test_data_without_the_needed_columns_are_named(mergelab_command: Command, models: Path) -> None:
    file = models / "data" / "validation.parquet"
    pq.write_table(pq.read_table(file).rename_columns(["premise", "hypothesis", "label", "idx"]), file)
    assert_one_line(mergelab_command(*LOCAL), "sentence1", "premise")


def test_an_expert_at_chance_is_named_and_can_be_let_through(mergelab_command: Command, models: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("classifier.weight", "classifier.bias"):
            tensors[name] = tensors[name].flip(0).contiguous()

    rewrite(models / "a", swap)
    assert_one_line(mergelab_command(*LOCAL), "./a", "chance", "eval.preflight=false")
    assert mergelab_command(*LOCAL, "eval.preflight=false").code == 0


def test_an_output_folder_in_use_is_left_as_it_is(mergelab_command: Command, models: Path) -> None:
    (models / "merged").mkdir()
    (models / "merged" / "mine.txt").write_text("keep")
    assert_one_line(mergelab_command(*LOCAL, "output=merged"), "merged", "not empty")
    assert [file.name for file in (models / "merged").iterdir()] == ["mine.txt"]


def test_an_output_folder_that_cannot_be_made_is_named(mergelab_command: Command, models: Path) -> None:
    (models / "file").write_text("")
    assert_one_line(mergelab_command(*LOCAL, "output=file/merged"), "file")


def test_a_run_folder_that_cannot_be_made_is_named(mergelab_command: Command, workplace: Path) -> None:
    (workplace / "outputs").write_text("in the way")
    assert_one_line(mergelab_command("source=mini"), "outputs")


def test_an_unreachable_hub_is_an_error_with_source_hub(mergelab_command: Command) -> None:
    assert_one_line(mergelab_command("source=hub"), "hub", "source=mini")
