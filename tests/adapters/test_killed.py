"""Commands on adapters, killed at a random moment: the same command again gives what an undisturbed one does.

``MERGELAB_KILLS`` sets how often each kind is killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergelab.adapters.writing import whole_folder
from tests.standins import BERT_RTE_EXPERTS, glue_table
from tests.test_killed_commands import assert_kills_leave_no_trace, begin, empty_store

__all__ = ["begin", "empty_store"]
pytestmark = pytest.mark.slow

COMMANDS = {
    "sweep": ["-m", "sweep=ties", "sweep.n_trials=4", "sweep.study_name=s", "sweep.seed=1"],
    "sweep of sums": ["-m", "sweep=task_arithmetic", "sweep.n_trials=4", "sweep.study_name=s", "save.form=lora_cat"],
}


def write_lora(folder: Path, base: Path, seed: int) -> None:
    """Write LoRA of all queries and outputs of a BERT."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith(("query.weight", "output.dense.weight")):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=draw) * 0.3
            tensors[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=draw) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def fresh(bert_checkpoints: Mapping[str, Path], empty_store: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a folder to start a command in, with a classifier, adapters on it, data, an empty store and no cache."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(bert_checkpoints[BERT_RTE_EXPERTS[1]], folder / "base")
        for seed, adapter in enumerate("abc"):
            write_lora(folder / adapter, folder / "base", seed)
        (folder / "data").mkdir()
        pq.write_table(glue_table("rte", 120, 1), folder / "data" / "validation.parquet")
        (folder / "outputs").mkdir()
        shutil.copy(empty_store, folder / "outputs" / "mlflow.db")
        return folder

    return make


def test_what_a_killed_process_left_of_an_adapter_is_removed(tmp_path: Path) -> None:
    remains = tmp_path / f".out.tmp-{'0' * 32}.partial"
    remains.mkdir()
    (remains / "adapter_model.safetensors").write_bytes(b"")
    with whole_folder(tmp_path / "out") as making:
        (making / "adapter_config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "adapter_config.json"]


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_same_command_again_gives_what_an_undisturbed_one_does(
    kind: str, begin: Callable[..., tuple[int, Callable[[], int]]], fresh: Callable[[str], Path]
) -> None:
    models = ["models.base=./base", "models.experts=[./a,./b,./c]", "task.data_dir=data", "eval.preflight=false"]
    assert_kills_leave_no_trace(kind, [*COMMANDS[kind], *models], begin, fresh)
