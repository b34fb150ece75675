"""What is measured of a merge that is written as an adapter is what the folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import made as small
from tests.conftest import Outcome
from tests.standins import glue_table

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]


@pytest.fixture
def models(tmp_path: Path, workplace: Path) -> dict[str, Path]:
    """A classifier, two LoRA adapters of large changes with heads, and examples."""
    settings = {"r": 4, "lora_alpha": 12, "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}
    found: dict[str, Path] = {}
    for seed, name in ((1, "a"), (2, "b")):
        made = small.made(
            tmp_path, small.bert(num_labels=1), peft.LoraConfig(**settings), dtype=torch.float32, seed=seed
        )
        found |= {"base": made.base, name: made.adapter}
    table = glue_table("stsb", 60, 1)
    pq.write_table(table, workplace / "validation.parquet")
    small.tokenizer(found["base"], [*table["sentence1"].to_pylist(), *table["sentence2"].to_pylist()])
    return found | {"data": workplace}


def scores(command: Command, models: dict[str, Path], experts: str, *arguments: str) -> dict[str, str]:
    """Measure base, experts and merge; return what the table says of each."""
    outcome = command(
        f"models.base={models['base']}",
        f"models.experts={experts}",
        *("task=stsb", f"task.data_dir={models['data']}", "tracking=none", "eval.preflight=false"),
        *arguments,
    )
    assert outcome.code == 0, outcome.err
    rows = re.findall(r"^│ *(\S.*?) +│[^│]*?(-?\d\.\d{4})", outcome.out, re.MULTILINE)
    assert len(rows) >= 3, outcome.out
    return dict(rows)


def both(models: dict[str, Path]) -> str:
    return f"{{a: {models['a']}, b: {models['b']}}}"


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (("method=ties", "method.density=0.7", "method.lambda=2"), ("save.form=lora_svd", "save.rank=1")),
        (("method=task_arithmetic", "method.lambda=1"), ("save.form=lora_cat",)),
        (("method=peft_ties", "method.density=0.6"), ()),
    ],
)
def test_the_score_is_that_of_the_folder(
    method: tuple[str, ...], form: tuple[str, ...], models: dict[str, Path], mergelab_command: Command
) -> None:
    merged = scores(mergelab_command, models, both(models), *method, *form, "output=out")
    assert Path("out/adapter_config.json").is_file()
    read = scores(mergelab_command, models, "{folder: out}", "method=soup")
    (own,) = (score for name, score in merged.items() if name.endswith("of 2"))
    (folder,) = (score for name, score in read.items() if name.endswith("out"))
    assert own == folder
    if "save.rank=1" in form:
        dense = scores(mergelab_command, models, both(models), *method)
        (whole,) = (score for name, score in dense.items() if name.endswith("of 2"))
        assert whole != own, "the rank does not matter here, so that nothing is shown"


def test_without_an_output_nothing_is_written(models: dict[str, Path], mergelab_command: Command) -> None:
    before = sorted(Path().iterdir())
    scores(mergelab_command, models, both(models), "method=peft_linear")
    assert sorted(path for path in Path().iterdir() if path.name != "outputs") == [
        path for path in before if path.name != "outputs"
    ]


def test_the_factors_of_a_mode_are_applied_to_the_base_where_a_model_is_asked_for(
    models: dict[str, Path], mergelab_command: Command
) -> None:
    common = ("task=rte", "evaluate=false", "tracking=none", "method=peft_linear", "method.weights=[0.5,-1]")
    for out, form in (("adapter", ()), ("dense", ("save.form=dense",))):
        outcome = mergelab_command(
            f"models.base={models['base']}", f"models.experts={both(models)}", *common, f"output={out}", *form
        )
        assert outcome.code == 0, outcome.err
    tensors: dict[str, Any] = load_file("adapter/adapter_model.safetensors")
    dense, base = load_file("dense/model.safetensors"), load_file(models["base"] / "model.safetensors")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4
    changed = 0
    for name, tensor in dense.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in tensors:
            product = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
            torch.testing.assert_close(tensor, base[name] + product, rtol=1e-5, atol=1e-5)
            changed += 1
    assert changed == len([name for name in tensors if "lora_A" in name])


@pytest.mark.slow
def test_a_sweep_of_a_mode_writes_the_winners_factors(models: dict[str, Path], mergelab_command: Command) -> None:
    holdout = "eval.protocol=holdout"
    swept = scores(
        mergelab_command, models, both(models), "-m", "sweep=peft_ties", "sweep.n_trials=3", holdout, "output=out"
    )
    read = scores(mergelab_command, models, "{folder: out}", "method=soup", holdout)
    (folder,) = (score for name, score in read.items() if name.endswith("out"))
    (base,) = (score for name, score in swept.items() if name.endswith("base"))
    assert swept["best peft_ties"] == folder != base


def test_a_sweep_does_not_measure_what_a_rank_keeps(models: dict[str, Path], mergelab_command: Command) -> None:
    outcome = mergelab_command(
        f"models.base={models['base']}",
        f"models.experts={both(models)}",
        *("-m", "sweep=ties", "task=stsb", f"task.data_dir={models['data']}", "tracking=none"),
        *("save.form=lora_svd", "save.rank=2", "eval.protocol=holdout", "output=out"),
    )
    assert outcome.code == 2
    assert "save.form=lora_svd: a sweep measures the merges themselves" in outcome.err
    assert not Path("out").exists()
