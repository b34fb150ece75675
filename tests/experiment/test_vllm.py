"""``eval.engine=vllm``, against a stand-in for vLLM that has its calls and computes with transformers on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mergelab.errors import ConfigError, ModelError, NonFinite
from mergelab.evaluation.generation import encode_prompts
from mergelab.evaluation.options import EvaluationOptions
from mergelab.evaluation.vllm_engine import VllmEngine, engine_memory
from tests.conftest import Outcome
from tests.experiment.test_text_experiment import MODELS, Command
from tests.tasks.tiny import sentences
from tests.tasks.writers import given, save_writers, writer

STANDIN = Path(__file__).parents[1] / "vllm_standin"
ROWS = 10
TEXTS = ("task=prompts", "task.decoding.max_new_tokens=8", "task.max_prompt_tokens=60", *MODELS)
SUMS = (
    "task=samsum", "task.data_dir=data", "task.max_prompt_tokens=40", "task.decoding.max_new_tokens=8",
    "eval.preflight=false", *MODELS,
)  # fmt: skip
VLLM = "eval.engine=vllm"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, imported anew."""
    monkeypatch.syspath_prepend(STANDIN)
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "1" if "SERIAL" in name else "ERROR")
    import vllm

    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with three Llamas, data, and an empty cache."""
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    save("llama", workplace)
    (workplace / "data" / "samsum").mkdir(parents=True)
    rows = {"dialogue": [text[:50] for text in sentences(ROWS, 0)], "summary": sentences(ROWS, 1)}
    pq.write_table(pa.table(rows), workplace / "data" / "samsum" / "validation.parquet")
    return workplace


def save(kind: str, folder: Path, names: tuple[str, ...] = ("base", "a", "b"), **settings: Any) -> None:
    """Save a tiny model and two that are not very near it."""
    save_writers(folder, kind, names, 0.1, **settings)


def texts(place: Path, task: str = "prompts") -> dict[str, list[str]]:
    """What each model wrote in the last run, by its label."""
    file = max(place.glob("outputs/runs/*/*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    models = json.loads(file.read_text())["models"]
    return {model["label"]: [text for _, text in model["results"][task]["texts"]] for model in models}


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def of(vllm: Any, kind: str) -> list[Any]:
    return [what for each, what in vllm.events if each == kind]


def refused(outcome: Outcome) -> str:
    """The one line of a command that ends with 2."""
    assert outcome.code == 2, outcome.out
    (line,) = (line for line in outcome.err.splitlines() if "eval.engine=vllm" in line or "device=" in line)
    assert "Traceback" not in outcome.err
    return line


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_base_experts_and_merges_write_what_transformers_writes(
    kind: str, mergelab_command: Command, place: Path, vllm: Any
) -> None:
    save(kind, place)
    done(mergelab_command(*TEXTS, "method=task_arithmetic", "tracking=none"))
    wanted = texts(place)
    assert len({tuple(each) for each in wanted.values()}) == 4
    outcome = done(mergelab_command(*TEXTS, "method=task_arithmetic", "tracking=none", VLLM))
    assert texts(place) == wanted
    assert "evaluate  prompts: protocol full, float32, vllm\n" in outcome.out
    assert len(of(vllm, "start")) == 1
    assert len(of(vllm, "update")) == 4, "each model is handed over once"
    (names,) = {tuple(each) for each in of(vllm, "update")}
    assert ("lm_head.weight" in names) == (kind == "llama"), "GPT-2's is tied"


def test_a_command_of_its_own_process_writes_the_same(place: Path) -> None:
    wanted = {}
    for engine in ("transformers", "vllm"):
        environment = {**os.environ, "PYTHONPATH": f"{STANDIN}:{Path(__file__).parents[2]}"}
        command = [sys.executable, "-m", "mergelab", *TEXTS, "method=soup", "tracking=none", f"eval.engine={engine}"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        wanted[engine] = texts(place)
    assert wanted["vllm"] == wanted["transformers"]


def test_every_trial_of_a_sweep_is_handed_to_one_engine(mergelab_command: Command, place: Path, vllm: Any) -> None:
    sweep = ("-m", "sweep=task_arithmetic", "sweep.study_name=s", "sweep.sampler=random", "sweep.pruner=none")
    scores = []
    for engine in ("transformers", "vllm"):
        storage = f"sweep.storage=sqlite:///{engine}.db"
        done(mergelab_command(*SUMS, *sweep, "sweep.n_trials=4", storage, "tracking=none", f"eval.engine={engine}"))
        study = optuna.load_study(storage=f"sqlite:///{place}/{engine}.db", study_name="s")
        scores.append([(trial.params, trial.values) for trial in study.trials])
    assert scores[0] == scores[1]
    assert len({str(values) for _, values in scores[0]}) > 1
    assert len(of(vllm, "start")) == 1
    assert len(of(vllm, "update")) >= 3 + 4


@pytest.mark.parametrize("stop", ["[e]", "[' a','th']"])
def test_texts_end_at_stop_texts_end_tokens_and_lengths_as_in_transformers(
    stop: str, mergelab_command: Command, place: Path, vllm: Any
) -> None:
    save("llama", place, eos_token_id=[256, 101, 32])
    settings = (*TEXTS, "method=soup", "tracking=none", f"task.decoding.stop={stop}", "task.decoding.min_new_tokens=2")
    done(mergelab_command(*settings))
    wanted = texts(place)
    done(mergelab_command(*settings, VLLM))
    assert texts(place) == wanted
    vllm.events.clear()
    vllm.fault = "early stop"
    done(mergelab_command(*settings, VLLM, "eval.cache=false"))
    assert texts(place) == wanted, "what vLLM takes for a stop text and is none does not end a text"


def test_sampling_is_asked_for_as_the_task_says(mergelab_command: Command, place: Path, vllm: Any) -> None:
    sampled = ("task.decoding.do_sample=true", "task.decoding.temperature=0.7", "task.decoding.top_p=0.8")
    done(mergelab_command(*TEXTS, *sampled, "method=soup", "tracking=none", VLLM))
    first = texts(place)
    given = of(vllm, "generate")[1]
    assert {(each.temperature, each.top_p, each.max_tokens, each.ignore_eos) for each in given} == {(0.7, 0.8, 8, True)}
    assert len({each.seed for each in given}) == len(given), "each example has a seed"
    done(mergelab_command(*TEXTS, *sampled, "method=soup", "tracking=none", VLLM, "eval.cache=false"))
    assert texts(place) == first
    done(mergelab_command(*TEXTS, *sampled, "task.decoding.seed=1", "method=soup", "tracking=none", VLLM))
    assert texts(place) != first


def test_texts_of_one_engine_are_not_taken_for_those_of_the_other(
    mergelab_command: Command, place: Path, vllm: Any
) -> None:
    done(mergelab_command(*TEXTS, "method=soup", "tracking=none"))
    done(mergelab_command(*TEXTS, "method=soup", "tracking=none", VLLM))
    assert len(of(vllm, "update")) == 4
    done(mergelab_command(*TEXTS, "method=median", "tracking=none", VLLM))
    assert len(of(vllm, "update")) == 4 + 1, "base and experts are in the cache"


def test_the_precision_is_the_evaluations(mergelab_command: Command, place: Path, vllm: Any) -> None:
    done(mergelab_command(*TEXTS, "method=soup", "tracking=none", VLLM, "eval.dtype=bfloat16"))
    assert of(vllm, "start")[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("drop a tensor", "LlamaForCausalLM gives the tokens of a prompt a mean log-probability of"),
        ("drop an update", "the engine has the weights 'mergelab 1' after an update to 'mergelab 2'"),
        ("prefixes stay", "the engine cannot forget the prefixes that it has of earlier weights"),
        ("old texts", "a text was generated by the weights default, not by the last"),
        ("no gpu", "vLLM 0.33.0 cannot start: Failed to infer device type, please set the environment variable"),
    ],
)
def test_an_engine_without_the_weights_is_one_line(
    fault: str, line: str, mergelab_command: Command, place: Path, vllm: Any
) -> None:
    vllm.fault = fault
    outcome = mergelab_command(*TEXTS, "method=soup", "tracking=none", VLLM)
    assert line in refused(outcome)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("task=wikitext",), "generates texts, and wikitext is a language modelling task; eval.engine=transformers"),
        (("task=rte",), "generates texts, and rte is a classification task"),
        ((*TEXTS, "task.decoding.num_beams=2"), "prompts: task.decoding.num_beams=2, which eval.engine=vllm cannot do"),
        ((*TEXTS, "task.decoding.no_repeat_ngram_size=2"), "task.decoding.no_repeat_ngram_size=2, which"),
        (
            (*TEXTS, "task.decoding.do_sample=true", "task.decoding.temperature=3"),
            "task.decoding.temperature=3.0 is not from 0.01 to 2.0, which eval.engine=vllm cannot do",
        ),
    ],
)
def test_what_vllm_cannot_do_is_one_line_before_models_are_opened(
    settings: tuple[str, ...], line: str, mergelab_command: Command, place: Path, vllm: Any
) -> None:
    (place / "base" / "model.safetensors").write_bytes(b"")
    assert line in refused(mergelab_command(*settings, "method=soup", "tracking=none", *MODELS, VLLM))


def test_vllm_that_is_not_installed_is_one_line(
    mergelab_command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergelab.evaluation.vllm_support.find_spec", lambda _name: None)
    line = refused(mergelab_command(*TEXTS, "method=soup", VLLM))
    assert line.endswith("needs the package vllm, which is not installed: pip install 'mergelab[vllm]'")


def test_an_encoder_decoder_is_one_line(mergelab_command: Command, place: Path, vllm: Any) -> None:
    save("t5", place)
    line = refused(mergelab_command(*TEXTS, "method=soup", "tracking=none", VLLM))
    assert "runs decoders alone, and T5ForConditionalGeneration has an encoder" in line


# -------------------------------------------------------------------------------------------------- without a command


def test_another_module_and_longer_texts_start_another_engine(vllm: Any) -> None:
    options = EvaluationOptions(engine=VllmEngine())
    for kind, lengths, starts in (("gpt2", (20, 9, 30), 2), ("llama", (30,), 3), ("gpt2", (5,), 4)):
        model, tokenizer = writer(kind)
        for length in lengths:
            prompts = encode_prompts(given([text[:length] for text in sentences(3, 0)]), model.config, tokenizer)
            assert prompts.run(model, options).tolist() == prompts.run(model).tolist()
        assert len(of(vllm, "start")) == starts
    assert [start["max_model_len"] for start in of(vllm, "start")][:2] == [20 + 64, 30 + 64]


def test_stacked_experts_are_handed_over_as_files_have_them(vllm: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, num_local_experts=3,
        bos_token_id=257, eos_token_id=256)).eval()  # fmt: skip
    prompts = encode_prompts(
        given(["A text", "Another one"], decoding={"max_new_tokens": 9}), model.config, writer("llama")[1]
    )
    assert prompts.run(model, EvaluationOptions(engine=VllmEngine())).tolist() == prompts.run(model).tolist()
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in of(vllm, "update")[0]


def test_weights_larger_than_a_buffer_have_a_larger_one(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergelab.evaluation.vllm_engine._BUFFER_BYTES", 4096)
    model, tokenizer = writer("gpt2")
    prompts = encode_prompts(given(["A text", "Another one"], decoding={"max_new_tokens": 9}), model.config, tokenizer)
    assert prompts.run(model, EvaluationOptions(engine=VllmEngine())).tolist() == prompts.run(model).tolist()


def test_examples_come_by_rounds(vllm: Any) -> None:
    model, tokenizer = writer("gpt2")
    prompts = encode_prompts(
        given([text[:40] for text in sentences(6, 0)], decoding={"max_new_tokens": 4}), model.config, tokenizer
    )
    seen: list[list[int]] = []
    options = EvaluationOptions(engine=VllmEngine(), rounds=np.array([1, 0, 1, 2, 0, 1]))
    found = prompts.run(model, options, watch=lambda members, _: seen.append(sorted(members.tolist())))
    assert seen == [[1, 4], [0, 2, 5], [3]]
    assert found.tolist() == prompts.run(model).tolist()


def test_a_trial_may_stop_between_parts_in_drawn_order(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergelab.evaluation.vllm_engine._AT_ONCE", 4)
    model, tokenizer = writer("gpt2")
    prompts = encode_prompts(
        given([text[:40] for text in sentences(10, 0)], decoding={"max_new_tokens": 4}), model.config, tokenizer
    )
    seen: list[list[int]] = []
    options = EvaluationOptions(engine=VllmEngine(), seed=5)
    found = prompts.run(model, options, watch=lambda members, _: seen.append(members.tolist()))
    assert [len(part) for part in seen] == [4, 4, 2]
    order = [member for part in seen for member in part]
    assert sorted(order) == list(range(10)) != order
    assert found.tolist() == prompts.run(model).tolist()

    def stop(_members: Any, _texts: Any) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        prompts.run(model, options, watch=stop)
    assert prompts.run(model, options).tolist() == found.tolist()
    assert len(of(vllm, "start")) == 1, "the engine goes on"


def test_nan_is_an_error(vllm: Any) -> None:
    model, tokenizer = writer("gpt2")
    prompts = encode_prompts(given(["A text", "Another one"]), model.config, tokenizer)
    options = EvaluationOptions(engine=VllmEngine())
    prompts.run(model, options)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(NonFinite, match="outputs are NaN while it generates"):
        prompts.run(model, options)


def test_tensors_apart_that_a_config_ties_are_refused(vllm: Any) -> None:
    model, tokenizer = writer("gpt2")
    prompts = encode_prompts(given(["A text", "Another one"]), model.config, tokenizer)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ModelError, match="the merge has tensors apart that a model's config ties"):
        prompts.run(model, EvaluationOptions(engine=VllmEngine()))


def test_ends_that_vllm_has_no_equal_of_are_refused(vllm: Any) -> None:
    model, tokenizer = writer("gpt2")
    options = EvaluationOptions(engine=VllmEngine())
    model.generation_config.eos_token_id = 7
    prompts = encode_prompts(given(["A text"], decoding={"min_new_tokens": 2}), model.config, tokenizer)
    with pytest.raises(ModelError, match="would hold back token 256 too, which does not end texts of GPT2LMHeadModel"):
        prompts.run(model, options)
    model.generation_config.forced_eos_token_id = 7
    with pytest.raises(ModelError, match="has no equal of forced_eos_token_id"):
        encode_prompts(given(["A text"]), model.config, tokenizer).run(model, options)


def test_the_engine_takes_a_share_of_what_is_free_on_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (45 << 30, 80 << 30))
    assert engine_memory(torch.device("cuda")) == {"gpu_memory_utilization": 0.45}
    assert engine_memory(torch.device("cpu")) == {}
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1 and device=cuda choose another one"):
        engine_memory(torch.device("cuda:1"))
