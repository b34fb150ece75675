"""Sweeps over adapters hold the base and the factors, and a trial is the merge that its parameters alone would give."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.engine.warm_session import MergeSession, check_memory
from mergelab.errors import InsufficientMemoryError
from mergelab.models.adapted import on_base, open_model
from mergelab.sweep.storage import open_storage
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.checkpoint import open_checkpoint
from tests.adapters import made as small
from tests.conftest import Outcome
from tests.standins import glue_table

Command = Callable[..., Outcome]
peft = pytest.importorskip("peft")

STEPS: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": [{"weights": [1.0, -0.5]}, {"weights": [0.3, 0.9], "lambda": 0.7}, {"lambda": 0.2}],
    "soup": [{}, {"weights": [3.0, 1.0]}],
    "ties": [{"density": 0.3}, {"density": 0.3, "lambda": 0.5}, {"density": 0.6, "lambda": 0.5}, {"density": 0.3}],
    "dare": [{"density": 0.5}, {"density": 0.5, "lambda": 0.7}, {"density": 0.9}],
    "tsv_m": [{}, {"lambda": 0.4}],
    "slerp": [{"t": 0.3}, {"t": 0.6}],
}


def opened(folder: Path, *, count: int = 2, sizes: dict[str, int] | None = None, **settings: Any) -> AlignedModels:
    given = {"r": 3, "lora_alpha": 5, "task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]} | settings
    experts = []
    for seed in range(count):
        made = small.made(folder, small.bert(**sizes or {}), peft.LoraConfig(**given), dtype=torch.float32, seed=seed)
        experts.append(open_model(on_base(made.base, made.adapter, where="a"), f"e{seed}"))
    return align(open_checkpoint(folder / "base", "base"), experts, ignore=["classifier.*"])


def targets_of(models: AlignedModels) -> dict[str, Tensor]:
    return {name: torch.full(models.experts[0].shape(name), 9.0) for name in models.names}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "bias": "all"}], ids=["lora", "dora"])
@pytest.mark.parametrize("method", STEPS)
def test_a_trial_has_the_bits_of_the_merge_done_alone(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    models = opened(tmp_path, **settings)
    base, targets = models.base, targets_of(models)
    assert base is not None
    session = MergeSession(models, targets)
    for parameters in (*STEPS[method], *STEPS[method]):
        session.merge(get_method(method), parameters)
        alone = merge_to_dict(get_method(method), parameters, models)
        assert all(torch.equal(target, alone[name]) for name, target in targets.items()), parameters
    if not get_method(method).returns_task_vector:
        return
    changed = {name for name, target in targets.items() if not torch.equal(target, base.get(name))}
    expected = {name for name in models.names if name.endswith(("query.weight", "output.dense.weight"))}
    assert changed - {name for name in changed if name.endswith("bias")} == expected
    assert settings or changed == expected


def storages() -> Iterator[tuple[int, int]]:
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            yield each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
def test_a_session_of_adapters_holds_the_base_and_the_factors(method: str, tmp_path: Path) -> None:
    models = opened(tmp_path, count=8, sizes={"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6})
    assert models.base is not None
    base = sum(models.base.get(name).nbytes for name in models.names)
    factors = sum(path.stat().st_size for path in tmp_path.glob("adapter*/adapter_model.safetensors"))
    targets = targets_of(models)
    gc.collect()
    before = dict(storages())
    session = MergeSession(models, targets)
    for step in STEPS[method]:
        session.merge(get_method(method), {key: value for key, value in step.items() if key != "weights"})
    gc.collect()
    new = sum({place: size for place, size in storages() if place not in before}.values())
    assert new < 3 * base  # the dense experts would take 8 times the base's memory
    assert base < session.held_bytes <= base + factors
    check_memory(models, 2 * base + factors)  # with a merged task vector in float32
    with pytest.raises(InsufficientMemoryError):
        check_memory(models, 2 * base)


def test_what_someone_else_has_written_is_merged_anew(tmp_path: Path) -> None:
    models = opened(tmp_path)
    targets = targets_of(models)
    session = MergeSession(models, targets)
    for scale in (0.5, 0.5):
        session.merge(get_method("task_arithmetic"), {"lambda": scale})
        alone = merge_to_dict(get_method("task_arithmetic"), {"lambda": scale}, models)
        assert all(torch.equal(target, alone[name]) for name, target in targets.items())
        for target in targets.values():
            target.zero_()


@pytest.fixture
def models(tmp_path: Path, workplace: Path) -> dict[str, str]:
    """A classifier, two adapters on it, and a table of examples."""
    given = {"r": 3, "lora_alpha": 5, "task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]}
    found: dict[str, str] = {}
    for seed, name in ((1, "a"), (2, "b")):
        model: Any = small.bert()
        with torch.no_grad():  # so that the label depends on the text: half of all texts have each
            model.bert.embeddings.word_embeddings.weight.mul_(10)
            logits = model(torch.randint(5, 48, (64, 12), generator=torch.Generator().manual_seed(0))).logits
            model.classifier.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
        made = small.made(tmp_path, model, peft.LoraConfig(**given), dtype=torch.float32, seed=seed)
        found |= {"base": str(made.base), name: str(made.adapter)}
    small.tokenizer(Path(found["base"]))
    pq.write_table(glue_table("rte", 60, 1), workplace / "validation.parquet")
    return found


def settings(models: dict[str, str], workplace: Path) -> list[str]:
    return [
        f"models.base={models['base']}",
        f"models.experts={{a: {models['a']}, b: {models['b']}}}",
        *("task=rte", f"task.data_dir={workplace}", "tracking=none", "eval.preflight=false"),
    ]


def trials() -> list[optuna.trial.FrozenTrial]:
    open_storage.cache_clear()
    return optuna.load_study(storage="sqlite:///outputs/sweeps.db", study_name="s").trials


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["ties"])
def test_a_trial_scores_as_the_single_merge_and_a_sweep_goes_on(
    sweep: str, models: dict[str, str], workplace: Path, mergelab_command: Command
) -> None:
    shared = [*settings(models, workplace), "eval.protocol=oracle"]
    swept = ["-m", f"sweep={sweep}", *shared, "sweep.study_name=s", "sweep.seed=1"]
    outcome = mergelab_command(*swept, "sweep.n_trials=3")
    assert outcome.code == 0, outcome.err
    first = trials()
    assert len(first) == 3
    assert len({trial.value for trial in first}) > 1
    complete = [trial for trial in first if trial.state == optuna.trial.TrialState.COMPLETE]  # others are pruned
    assert complete
    for trial in complete:
        chosen = [f"{key}={value!r}" for key, value in trial.params.items()]
        single = mergelab_command(f"method={sweep}", *shared, *chosen, "hydra.run.dir=single")
        assert single.code == 0, single.err
        merged = json.loads(Path("single/result.json").read_text())["models"][-1]
        assert merged["role"] == "merged"
        assert trial.value == merged["results"]["rte"]["select"]["accuracy"]
    outcome = mergelab_command(*swept, "sweep.n_trials=4")
    assert outcome.code == 0, outcome.err
    assert [trial.value for trial in trials()][:3] == [trial.value for trial in first]
    assert len(trials()) == 4
