"""Folders as people have them: FP8 weights, adapters, own code and files of other libraries, from the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergelab as ml
from mergelab.errors import ModelError
from tests.conftest import Outcome
from tests.vocabularies import llama

Command = Callable[..., Outcome]
TO_DISK = ["models.base=./base", "models.experts=[./a,./b]", "evaluate=false", "tracking=none", "output=out"]


def config_with(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def as_fp8(folder: Path, block: int = 16) -> dict[str, Tensor]:
    """Quantise a saved model's matrices in its layers; return the weights that it then stands for."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        meant[name] = stored[name] = tensor
        if tensor.dim() != 2 or not re.search(r"\.\d+\.", name):
            continue
        scale = torch.zeros(-(-tensor.shape[0] // block), -(-tensor.shape[1] // block))
        quantised, product = torch.zeros(tensor.shape).to(torch.float8_e4m3fn), torch.zeros(tensor.shape)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                at = (slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
                scale[row, column] = tensor[at].float().abs().max() / 448
                quantised[at] = (tensor[at].float() / scale[row, column]).to(torch.float8_e4m3fn)
                product[at] = quantised[at].float() * scale[row, column]
        stored[name], stored[f"{name}_scale_inv"], meant[name] = quantised, scale, product.to(tensor.dtype)
    assert stored.keys() != meant.keys()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    config_with(folder, quantization_config=said)
    return meant


def unquantise(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["soup", "task_arithmetic", "ties", "dare"])
def test_fp8_experts_merge_to_what_the_dequantised_merge_to(
    method: str, mergelab_command: Command, workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("base", "a", "b")):
        llama(workplace / name, seed, dtype=torch.bfloat16)
    meant = {name: as_fp8(workplace / name) for name in ("a", "b")}
    outcome = mergelab_command(*TO_DISK, f"method={method}")
    assert outcome.code == 0, outcome.err
    for name, tensors in meant.items():
        unquantise(workplace / name, tensors)
    shutil.move(workplace / "out", workplace / "of fp8")
    assert mergelab_command(*TO_DISK, f"method={method}").code == 0
    found, expected = (load_file(workplace / name / "model.safetensors") for name in ("of fp8", "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)
    configs = [json.loads((workplace / name / "config.json").read_text()) for name in ("of fp8", "out")]
    assert configs[0] == configs[1]
    model, info = AutoModelForCausalLM.from_pretrained(workplace / "of fp8", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_fp8_experts_are_measured_as_the_models_they_stand_for(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    run = [*arguments, "method=soup", "task=rte", "eval.cache=false", "tracking=none"]
    meant = {name: as_fp8(workplace / name) for name in ("a", "b", "c")}
    quantised = mergelab_command(*run)
    assert quantised.code == 0, quantised.err
    for name, tensors in meant.items():
        unquantise(workplace / name, tensors)
    plain = mergelab_command(*run)
    scores = [re.findall(r"\b\d\.\d{4}\b", outcome.out) for outcome in (quantised, plain)]
    assert scores[0]
    assert scores[0] == scores[1]


MODELING = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaForCausalLM
from .configuration_my import MyConfig
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig
class MyConfig(LlamaConfig):
    model_type = "mine"
"""


@pytest.fixture
def own_code(workplace: Path) -> Path:
    """Three models with their own code, which leaves a mark when it runs; return where."""
    marker = workplace / "the code ran"
    for seed, name in enumerate(("base", "a", "b")):
        llama(workplace / name, seed)
        names = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyForCausalLM"}
        config_with(workplace / name, model_type="mine", architectures=["MyForCausalLM"], auto_map=names)
        (workplace / name / "configuration_my.py").write_text(CONFIGURATION)
        (workplace / name / "modeling_my.py").write_text(MODELING.format(marker=str(marker)))
        (workplace / name / "LICENSE").write_text(f"of {name}")
    return marker


def test_a_model_with_its_own_code_is_merged_without_running_it_and_loads(
    own_code: Path, mergelab_command: Command, workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    outcome = mergelab_command(*TO_DISK, "method=soup")
    assert outcome.code == 0, outcome.err
    assert not own_code.exists()
    copied = next(line for line in outcome.out.replace("\n ", " ").splitlines() if line.startswith("copied"))
    assert {"LICENSE", "modeling_my.py", "configuration_my.py", "tokenizer.json"} <= set(re.findall(r"[\w.]+", copied))
    model = AutoModelForCausalLM.from_pretrained(workplace / "out", trust_remote_code=True)
    assert own_code.exists()
    a, b = (load_file(workplace / name / "model.safetensors")["model.embed_tokens.weight"] for name in "ab")
    torch.testing.assert_close(model.model.embed_tokens.weight.data, (a + b) / 2)


def test_a_model_with_its_own_code_is_not_run_whatever_standard_input_says(
    own_code: Path, mergelab_command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    outcome = mergelab_command("models.base=./base", "models.experts=[./a,./b]", "task=prompts", "tracking=none")
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.strip()]
    assert "its code is in modeling_my.py; mergelab runs no model code" in line
    with pytest.raises(ModelError, match=r"its code is in modeling_my\.py; mergelab runs no model code"):
        ml.soup([str(workplace / "a"), str(workplace / "b")], task="text-generation")
    assert not own_code.exists()


def test_a_tokenizer_with_its_own_code_is_not_run(mergelab_command: Command, workplace: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        llama(workplace / name, seed)
        settings = json.loads((workplace / name / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_my.My", None]}}
        (workplace / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (workplace / name / "tokenization_my.py").write_text(
            f"import pathlib\npathlib.Path({str(workplace / 'ran')!r}).touch()\n"
        )
    outcome = mergelab_command("models.base=./base", "models.experts=[./a,./b]", "task=prompts", "tracking=none")
    assert not (workplace / "ran").exists()
    if outcome.code:  # transformers 5 reads tokenizer.json without the class
        (line,) = [line for line in outcome.err.splitlines() if line.strip()]
        assert "mergelab runs no model code" in line
    assert mergelab_command(*TO_DISK, "method=soup").code == 0
    assert (workplace / "out" / "tokenization_my.py").is_file()
    assert not (workplace / "ran").exists()


@pytest.mark.parametrize("where", ["base", "a"])
@pytest.mark.parametrize("kind", ["adapter", "gptq", "gguf"])
def test_what_cannot_be_merged_is_one_line(kind: str, where: str, mergelab_command: Command, workplace: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        llama(workplace / name, seed)
    folder = workplace / where
    if kind == "adapter":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
        expected = (
            f"{where}: is a LoRA adapter of org/base" if where == "base" else "has adapter_config.json but no weights"
        )
    elif kind == "gptq":
        config_with(folder, quantization_config={"quant_method": "gptq", "bits": 4})
        expected = f"{where}: quantised with gptq: merge the unquantised checkpoint"
    else:
        (folder / "model.safetensors").unlink()
        (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
        expected = "model-Q4_K_M.gguf is a GGUF file"
    outcome = mergelab_command(*TO_DISK, "method=soup")
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.strip()]
    assert expected in line
    assert len(line) <= 400
    assert not (workplace / "out").exists()
    given: list[str | Path] = [workplace / name for name in ("base", "a", "b")]
    with pytest.raises(ModelError, match=re.escape(expected.removeprefix(f"{where}: "))):
        ml.soup(given, base_index=0, task="text-generation")
