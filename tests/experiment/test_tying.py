"""What models' configs tie is one tensor, however often it is stored; what is equal by accident is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import mergelab as ml
from mergelab.errors import ModelError
from mergelab.weights.conversion import tied_parameters
from tests import layouts
from tests.conftest import Outcome

Command = Callable[..., Outcome]
VERSION_5 = int(transformers.__version__.partition(".")[0]) >= 5
SIZE = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, Callable[..., Any]] = {
    "llama": lambda tie=True: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, tie_word_embeddings=tie)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=20,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZE, max_position_embeddings=16)),
    "llava": lambda: layouts.build("tied llava", 0),
}


def _random(kind: str, seed: int, **options: Any) -> Any:
    model = KINDS[kind](**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _everything(model: Any) -> dict[str, Tensor]:
    """Return every tensor under every name: tied ones more than once."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _save(model: Any, folder: Path, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return load_file(folder / "model.safetensors")


def _merge(command: Command, *more: str, base: str = "models.base=./base") -> Outcome:
    models = [base, "models.experts={a: ./a, b: ./b}"]
    return command("task=prompts", *models, "evaluate=false", "output=out", "tracking=none", *more)


def _loaded(model: Any, folder: Path) -> Any:
    """Load a merge; all of its parameters come from its files."""
    merged, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return merged


@pytest.mark.parametrize("method", ["soup", "dare", "dare_ties", "della", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_tensor_that_is_stored_twice_has_one_value(kind, method, mergelab_command: Command, workplace) -> None:
    models = [_random(kind, seed) for seed in range(3)]
    for model, at in zip(models, ("base", "a", "b"), strict=True):
        _save(model, workplace / at, _everything(model))
    outcome = _merge(mergelab_command, f"method={method}")
    assert outcome.code == 0, outcome.err
    ties = tied_parameters(models[0])
    assert ties
    stored = load_file(workplace / "out" / "model.safetensors")
    for alias, name in ties.items():
        assert not {alias, name} <= stored.keys()
    merged = _loaded(models[0], workplace / "out")
    assert tied_parameters(merged) == ties
    if method == "soup":
        a, b = models[1].state_dict(), models[2].state_dict()
        for name, value in merged.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, (a[name] + b[name]) / 2)


@pytest.mark.parametrize("twice", [("base",), ("a",), ("a", "b"), ("base", "b")])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_it_does_not_matter_which_models_store_it_twice(kind, twice, mergelab_command: Command, workplace) -> None:
    models = {at: _random(kind, seed) for seed, at in enumerate(("base", "a", "b"))}
    for at, model in models.items():
        _save(model, workplace / at)
    assert _merge(mergelab_command, "method=dare", "output=once").code == 0
    for at in twice:
        _save(models[at], workplace / at, _everything(models[at]))
    assert _merge(mergelab_command, "method=dare").code == 0
    once, out = (_loaded(models["a"], workplace / at).state_dict() for at in ("once", "out"))
    assert all(torch.equal(once[name], out[name]) for name in once)


@pytest.mark.parametrize("tie", [False, True])
def test_what_is_equal_by_accident_stays_two_tensors(tie, mergelab_command: Command, workplace) -> None:
    accident = {"model.norm.weight": "model.layers.0.input_layernorm.weight"}
    for seed, at in enumerate(("base", "a", "b")):
        model = _random("llama", seed, tie=tie)
        tensors = _everything(model)
        for name, other in accident.items():
            tensors[name] = tensors[other].clone()
        if not tie:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        else:
            del tensors["lm_head.weight"]
        _save(model, workplace / at, tensors)
    assert _merge(mergelab_command, "method=dare").code == 0
    out = load_file(workplace / "out" / "model.safetensors")
    assert out.keys() == tensors.keys()
    assert not torch.equal(out["model.norm.weight"], out["model.layers.0.input_layernorm.weight"])
    if not tie:
        assert not torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def _untied(workplace: Path, *which: str, config: bool) -> dict[str, Any]:
    """Save a base and two experts, of which some have another output embedding; their config says so or not."""
    models = {}
    for seed, at in enumerate(("base", "a", "b")):
        models[at] = model = _random("llama", seed, tie=at not in which)
        tensors = _everything(model)
        if at not in which:
            del tensors["lm_head.weight"]
        _save(model, workplace / at, tensors)
        if at in which and not config:
            content = json.loads((workplace / at / "config.json").read_text())
            (workplace / at / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    return models


MIXED = [("b",), ("a", "b"), ("base",), ("base", "a")]


@pytest.mark.parametrize("config", [True, pytest.param(False, marks=pytest.mark.skipif(not VERSION_5, reason="5"))])
@pytest.mark.parametrize("which", MIXED)
def test_models_of_which_some_are_untied_are_refused(which, config, mergelab_command: Command, workplace) -> None:
    _untied(workplace, *which, config=config)
    outcome = _merge(mergelab_command, "method=soup")
    assert outcome.code == 2
    line = outcome.err.strip()
    assert "\n" not in line
    assert len(line) <= 400
    assert "lm_head.weight" in line
    assert "models.untie=true" in line
    assert all(f"{name}" in line.partition("differ in")[2] for name in which)
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("config", [True, pytest.param(False, marks=pytest.mark.skipif(not VERSION_5, reason="5"))])
@pytest.mark.parametrize("which", MIXED)
def test_they_are_merged_untied_on_request(which, config, mergelab_command: Command, workplace) -> None:
    models = _untied(workplace, *which, config=config)
    outcome = _merge(mergelab_command, "method=task_arithmetic", "method.lambda=0.5", "models.untie=true")
    assert outcome.code == 0, outcome.err
    assert AutoConfig.from_pretrained(workplace / "out").tie_word_embeddings is False
    merged = _loaded(models["a"], workplace / "out")
    base, a, b = (models[at].state_dict() for at in ("base", "a", "b"))
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, base[name] + 0.5 * ((a[name] - base[name]) + (b[name] - base[name])))
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


@pytest.mark.skipif(not VERSION_5, reason="transformers 4 ties what a config ties, whatever is stored")
def test_models_that_all_store_other_values_are_untied_as_transformers_5_reads_them(
    mergelab_command: Command, workplace
) -> None:
    models = _untied(workplace, "base", "a", "b", config=False)
    outcome = _merge(mergelab_command, "method=soup")
    assert outcome.code == 0, outcome.err
    merged = _loaded(models["a"], workplace / "out")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, (models["a"].state_dict()[name] + models["b"].state_dict()[name]) / 2)


@pytest.mark.skipif(VERSION_5, reason="transformers 5 reads such a model as untied")
def test_values_that_transformers_4_would_not_read_are_refused(mergelab_command: Command, workplace) -> None:
    _untied(workplace, "b", config=False)
    outcome = _merge(mergelab_command, "method=soup")
    assert outcome.code == 2
    assert "b: its config ties lm_head.weight" in outcome.err


def test_an_output_embedding_that_is_nowhere_is_refused(mergelab_command: Command, workplace) -> None:
    for seed, at in enumerate(("base", "a", "b")):
        model = _random("llama", seed, tie=False)
        tensors = _everything(model)
        del tensors["lm_head.weight"]
        _save(model, workplace / at, tensors)
    outcome = _merge(mergelab_command, "method=soup")
    assert outcome.code == 2
    assert "lm_head.weight is not in its weights" in outcome.err


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_merge_whose_config_ties_nothing_stores_both_names(which, mergelab_command: Command, workplace) -> None:
    models = {at: _random("llama", seed) for seed, at in enumerate(("base", "a", "b"))}
    for at, model in models.items():
        _save(model, workplace / at, _everything(model) if at == which else None)
    content = json.loads((workplace / which / "config.json").read_text())
    (workplace / which / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    outcome = _merge(mergelab_command, "method=dare")
    assert outcome.code == 0, outcome.err
    merged = _loaded(models["a"], workplace / "out")
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_the_library_ties_and_unties_as_the_command_line_does(workplace) -> None:
    models = [_random("llama", seed) for seed in range(2)]
    apart = _random("llama", 2, tie=False)
    merged = ml.dare([*models, _random("llama", 3)], base_index=0)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with pytest.raises(ModelError, match="untie=true"):
        ml.soup([*models, apart])
    for order in ([*models, apart], [apart, *models]):
        untied = ml.soup(order, untie=True)
        assert untied.config.tie_word_embeddings is False
        for name, value in untied.state_dict().items():
            torch.testing.assert_close(value, sum(model.state_dict()[name] for model in order) / 3)


def test_merging_plain_models_does_not_import_transformers(workplace) -> None:
    import subprocess
    import sys

    for tie in (True, False):
        for seed, at in enumerate(("base", "a", "b")):
            _save(_random("llama", seed, tie=tie), workplace / f"{at}{tie}")
        code = (
            "import sys; from mergelab.__main__ import main\n"
            f"sys.argv = ['mergelab', 'method=soup', 'task=prompts', 'models.base=./base{tie}', "
            f"'models.experts={{a: ./a{tie}, b: ./b{tie}}}', 'evaluate=false', 'output=out{tie}', 'tracking=none']\n"
            "main(); print('imported' if 'transformers' in sys.modules else 'not imported')"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip().endswith("not imported")
