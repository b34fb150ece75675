"""Models that are divided among devices: here the CPU's memory and files, which accelerate runs as it does GPUs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mergelab
from mergelab.errors import ConfigError, ModelError
from mergelab.evaluation.dispatch import prepare
from mergelab.evaluation.options import EvaluationOptions
from mergelab.evaluation.spread import Limits, is_spread, placed
from mergelab.tasks.data import TaskData
from mergelab.weights.conversion import load_weights
from mergelab.weights.module import named_tensors
from mergelab.weights.state_dict import StateDict
from tests.experiment.test_text_experiment import SAMSUM, WIKITEXT, Command, models, place
from tests.tasks.conftest import pairs, rte
from tests.tasks.tiny import classifier
from tests.tasks.writers import prompts, writer

__all__ = ["models", "pairs", "place", "rte"]

CPU = torch.device("cpu")
pytest.importorskip("accelerate")


def divided(module: nn.Module, share: float = 0.6, dtype: torch.dtype | None = None) -> nn.Module:
    """Divide a module, of which the memory may hold a share."""
    size = sum(each.numel() * (dtype or each.dtype).itemsize for each in module.parameters())
    found = placed(module, CPU, dtype, {"cpu": int(size * share)})
    assert is_spread(found)
    assert any(each.is_meta for each in found.parameters())
    return found


def others(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor * 1.25 for name, tensor in module.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert2bert"])
def test_texts_are_those_of_the_undivided_model_whatever_weights_are_written(
    kind: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These sum otherwise, which bfloat16 shows.
    monkeypatch.setattr("mergelab.evaluation.packed_linear._can_pack", lambda _dtype: False)
    monkeypatch.setattr("mergelab.evaluation.packed_linear._fused_activation", lambda _module: None)
    model, tokenizer = writer(kind)
    inputs, options = prepare(prompts(6), model.config, tokenizer), EvaluationOptions(dtype=dtype)
    whole = divided(writer(kind)[0], dtype=dtype)
    expected = inputs.run(model, options).tolist()
    assert inputs.run(whole, options).tolist() == expected
    before = {name: tensor.data_ptr() for name, tensor in named_tensors(whole).items()}
    load_weights(whole, others(model))
    load_weights(model, others(model))
    assert {name: tensor.data_ptr() for name, tensor in named_tensors(whole).items()} == before
    assert all(torch.equal(t.to(dtype or t.dtype), named_tensors(whole)[n]) for n, t in model.named_parameters())
    assert inputs.run(whole, options).tolist() == inputs.run(model, options).tolist()


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_logits_are_those_of_the_undivided_model(kind: str, pairs: TaskData) -> None:
    model, tokenizer = classifier(kind)
    whole = divided(classifier(kind)[0], share=0.8)
    inputs = prepare(pairs, model.config, tokenizer)
    load_weights(whole, dict(model.named_parameters(remove_duplicate=False)))
    assert torch.allclose(torch.from_numpy(inputs.run(whole)), torch.from_numpy(inputs.run(model)), atol=1e-5)


def test_a_model_in_another_dtype_than_is_asked_for_is_an_error() -> None:
    model, tokenizer = writer("llama")
    inputs = prepare(prompts(2), model.config, tokenizer)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM: is on several devices in float32, and is to be run in"):
        inputs.run(divided(model), EvaluationOptions(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({0: 10**9}, r"eval.max_memory=\{0: ...\}: device=cpu has no GPUs \(they are numbered from 0\)"),
        ({"cpu": 10}, r"eval.max_memory=\{'cpu': 10\}: leaves the first layer of LlamaForCausalLM no room on cpu"),
    ],
)
def test_limits_that_cannot_be_kept_are_one_line(limits: Limits, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        placed(writer("llama")[0], CPU, None, limits)


def test_without_accelerate_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM: 0.0 GB are to be .* pip install 'mergelab\[devices\]'"):
        placed(writer("llama")[0], CPU, None, {"cpu": 10**5})


def scores(folder: Path) -> list[Any]:
    """Return what was measured in the last run."""
    file = max(folder.glob("outputs/runs/*/*/result.json"))
    return [
        {task: each["report"] for task, each in m["results"].items()} for m in json.loads(file.read_text())["models"]
    ]


@pytest.mark.parametrize("task", [WIKITEXT, SAMSUM], ids=["perplexity", "generation"])
def test_a_run_gives_the_same_scores(task: tuple[str, ...], mergelab_command: Command, place: Path) -> None:
    fixed = (*task, "method=task_arithmetic", "eval.preflight=false", "eval.cache=false", "tracking=none", "device=cpu")
    assert mergelab_command(*fixed).code == 0
    expected = scores(place)
    outcome = mergelab_command(*fixed, "eval.max_memory={cpu: 300kB}")
    assert outcome.code == 0, outcome.err
    assert "GPT2LMHeadModel: its parts are divided among cpu" in outcome.out + outcome.err
    for found, own in zip(scores(place), expected, strict=True):
        assert found == {name: _near(each) for name, each in own.items()}
    assert not list(place.rglob("offload-*"))


def _near(report: dict[str, dict[str, float]]) -> Any:
    return {
        metric: {key: pytest.approx(value, rel=1e-4) for key, value in own.items()} for metric, own in report.items()
    }


def test_a_sweep_writes_its_merges_into_the_divided_model(mergelab_command: Command, place: Path) -> None:
    def perplexities(*more: str) -> list[float]:
        before = set(place.glob("outputs/**/result.json"))
        outcome = mergelab_command(
            "-m", *WIKITEXT, "method=task_arithmetic", "method.lambda=0.2,0.7", "device=cpu", *more
        )
        assert outcome.code == 0, outcome.err
        files = sorted(set(place.glob("outputs/**/result.json")) - before)
        reports = [json.loads(file.read_text())["models"][-1]["results"]["wikitext"]["report"] for file in files]
        return [report["token_perplexity"]["value"] for report in reports]

    expected = perplexities("tracking=none")
    assert len(set(expected)) == 2
    assert perplexities("tracking=none", "eval.max_memory={cpu: 300kB}") == pytest.approx(expected, rel=1e-5)


def test_methods_that_learn_from_examples_need_one_device(mergelab_command: Command, place: Path) -> None:
    for split in ("train", "test"):
        (place / "own" / "wikitext-2-raw-v1").mkdir(parents=True, exist_ok=True)
        shutil.copy(
            place / "data" / "wikitext-2-raw-v1" / "test.parquet", place / f"own/wikitext-2-raw-v1/{split}.parquet"
        )
    told = [each for each in WIKITEXT if each != "task.data_dir=data"]
    outcome = mergelab_command(
        *told, "task.data_dir=own", "method=fisher", "eval.max_memory={cpu: 300kB}", "device=cpu", "tracking=none"
    )
    assert outcome.code == 2
    assert "a GPT2LMHeadModel on several devices cannot learn from examples; device=cpu" in outcome.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{gpu: 1GB}", "'gpu' is no device: cpu is one, and 0, 1, ... are the GPUs"),
        ("1GB", "error: eval.max_memory='1GB': must be a mapping"),
        ("{cpu: 300}", "error: eval.max_memory.cpu='300': must be a number with kB, MB, GB or TB for each device"),
        ("{0: 1GB}", "error: eval.max_memory={0: ...}: device=cpu has no GPUs"),
    ],
)
def test_bad_limits_are_one_line(given: str, said: str, mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command(*WIKITEXT, "method=soup", f"eval.max_memory={given}", "device=cpu", "tracking=none")
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_models_without_values_are_not_merged() -> None:
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    for merge in (lambda: mergelab.soup([nn.Linear(3, 2), empty]), lambda: StateDict.from_model(empty)):
        with pytest.raises(ModelError, match=r"weight has no values \(it is on the meta device: offloaded, or never"):
            merge()


@pytest.mark.parametrize(("gpus", "share", "rest"), [(4, 0.4, False), (8, 0.3, False), (1, 0.5, True)])
def test_without_limits_free_gpus_are_used_evenly_and_the_cpu_for_what_is_left(
    gpus: int, share: float, rest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 60}
    module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=16, **size))
    whole = sum(each.numel() * 4 for each in module.parameters())
    found: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _number: (int(whole * share), whole))
    monkeypatch.setattr("accelerate.dispatch_model", lambda _module, places, **_more: found.update(places))
    placed(module, torch.device("cuda"), None)
    used: dict[Any, int] = dict.fromkeys(found.values(), 0)
    for name, parameter in module.named_parameters():
        at = max((part for part in found if f"{name}.".startswith(f"{part}.")), key=len)
        used[found[at]] += parameter.numel() * 4
    assert ("cpu" in used) is rest
    assert len(used) > gpus / 2
    assert all(held <= share * whole for number, held in used.items() if number != "cpu")
    assert rest or max(used.values()) < 2.5 * whole / gpus


def test_a_limit_of_a_gpu_beside_the_one_that_was_asked_for_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"max_memory=\{1: ...\}: device=cuda:1 has no GPUs; device=cuda has all"):
        placed(writer("llama")[0], torch.device("cuda:1"), None, {1: 10**9})
