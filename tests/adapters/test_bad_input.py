"""What is no adapter of the base, or cannot be merged, is one line that names it, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergelab as ml
from mergelab.errors import MergelabError
from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        held = load_file(file)
        change(held)
        save_file(held, file)

    return apply


def config(**settings: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return apply


def renamed(held: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in held if old in name]:
        held[name.replace(old, new)] = held.pop(name)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Runs(str(folder / "ran"))}, folder / "adapter_model.bin")


class Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def linked(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    outside = folder.parent / "outside.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)


def shard(held: dict[str, torch.Tensor]) -> None:
    held[f"{QUERY}.lora_A.weight"] = torch.zeros(0)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another base": (
        tensors(lambda held: held.update({f"{QUERY}.lora_B.weight": torch.ones(20, 2)})),
        r"trained for a bert.encoder.layer.0.attention.self.query.weight of shape \[20, 16\], and that of the base is "
        r"float32\[16, 16\]: it belongs to another base",
    ),
    "no such names": (
        tensors(lambda held: renamed(held, "attention.self.query", "mixer")),
        r"2 of 4 names of the adapter match nothing in the base \(BertForSequenceClassification\): "
        r"bert.encoder.layer.0.mixer, bert.encoder.layer.1.mixer$",
    ),
    "A without B": (
        tensors(lambda held: held.__delitem__(f"{QUERY}.lora_B.weight")),
        r"bert.encoder.layer.0.attention.self.query has lora_A without lora_B",
    ),
    "B without A": (
        tensors(lambda held: held.__delitem__(f"{QUERY}.lora_A.weight")),
        r"has lora_B without lora_A",
    ),
    "NaN": (
        tensors(lambda held: held.update({f"{QUERY}.lora_A.weight": torch.full((2, 16), float("nan"))})),
        rf"{QUERY}.lora_A.weight holds NaN or infinity",
    ),
    "other ranks": (
        tensors(lambda held: held.update({f"{QUERY}.lora_A.weight": torch.ones(3, 16)})),
        r"the ranks of bert.encoder.layer.0.attention.self.query differ: A is \[3, 16\] .* B is \[16, 2\]",
    ),
    "ungathered": (tensors(shard), r"the factors of .*query must be matrices; A is \[0\]"),
    "unknown tensor": (
        tensors(lambda held: held.update({f"{QUERY}.hada_w1_a": torch.ones(2, 2)})),
        rf"the tensor {QUERY}.hada_w1_a is none that an adapter of type LORA should have",
    ),
    "prefix tensor": (
        tensors(lambda held: held.update({"prompt_embeddings": torch.ones(2, 2)})),
        r"the tensor prompt_embeddings is none",
    ),
    "magnitude alone": (
        tensors(lambda held: held.update({f"{QUERY}x.lora_magnitude_vector": torch.ones(16)})),
        r"queryx has a magnitude without lora_A and lora_B",
    ),
    "no magnitudes": (config(use_dora=True), r"use_dora is set, and .*query.* has no lora_magnitude_vector"),
    "two heads": (
        tensors(lambda held: held.update({"base_model.model.classifier.modules_to_save.weight": torch.ones(2, 16)})),
        r"it holds two different tensors for classifier.weight",
    ),
    "peft_type": (config(peft_type="PREFIX_TUNING"), r"is of peft_type 'PREFIX_TUNING'; adapters of type LORA, IA3"),
    "no peft_type": (config(peft_type=None), r"names no peft_type"),
    "not LoRA": (config(peft_type="IA3"), rf"the tensor {QUERY}.lora_A.weight is none that an adapter of type IA3"),
    "a head alone": (
        tensors(lambda held: [held.pop(name) for name in list(held) if "lora" in name]),
        r"it is of type LORA and has no tensors of this type",
    ),
    "pissa": (config(init_lora_weights="pissa_niter_4"), r"init_lora_weights='pissa_niter_4' changed the base's"),
    "number as initialisation": (config(init_lora_weights=7), r"init_lora_weights=7"),
    "alora": (config(alora_invocation_tokens=[3]), r"alora_invocation_tokens=\[3\] in its adapter_config.json cannot"),
    "unknown setting": (config(use_something=True), r"use_something=True in its adapter_config.json cannot be merged"),
    "alpha": (config(lora_alpha="8"), r"the lora_alpha of .* must be a number, and is '8'"),
    "pattern": (config(alpha_pattern={"(": 3}), r"alpha_pattern in its adapter_config.json is no set of patterns"),
    "patterns": (config(alpha_pattern=[3]), r"alpha_pattern"),
    "task": (config(task_type=3), r"task_type in its adapter_config.json must be text"),
    "not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{") and None, "is not readable JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]") and None, "must hold a JSON object"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"has adapter_config.json but no weights; looked for adapter_model.safetensors, adapter_model.bin",
    ),
    "pickle": (pickled, r"adapter_model.bin needs arbitrary unpickling"),
    "truncated": (truncated, r"adapter_model.safetensors is truncated or damaged"),
    "empty file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"") and None,
        r"adapter_model.safetensors is not a safetensors file, or is damaged",
    ),
    "nothing": (tensors(lambda held: held.clear()), r"holds no tensors"),
    "link": (linked, r"adapter_model.safetensors is a link that leads out of the adapter's folder"),
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    made = small.made(tmp_path, small.bert(), settings, dtype=torch.float32)
    return made.base, made.adapter


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_merged_is_one_line(what: str, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    on_base(base, adapter, where="a")
    spoil, line = BAD[what]
    spoil(adapter)
    with pytest.raises(MergelabError, match=f"^a: .*{line}") as caught:
        on_base(base, adapter, where="a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert not (adapter / "ran").exists()


@pytest.mark.parametrize("what", ["another base", "no such names", "NaN", "pickle", "truncated", "peft_type"])
def test_from_the_command_line_nothing_is_written(
    what: str, pair: tuple[Path, Path], mergelab_command: Callable[..., Outcome]
) -> None:
    base, adapter = pair
    BAD[what][0](adapter)
    outcome = mergelab_command(
        *(f"models.base={base}", f"models.experts={{a: {adapter}}}", "task=rte", "method=soup"),
        *("evaluate=false", "output=out", "tracking=none"),
    )
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.strip() and "Writing model" not in line]
    assert "models.experts.a: " in line
    assert len(line) <= 400
    assert not Path("out").exists()
    with pytest.raises(MergelabError):
        ml.soup([str(base), str(adapter)], base_index=0, task="text-classification")


def test_the_links_of_a_hub_cache_are_followed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    repository = tmp_path / "models--org--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in adapter.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    linked, plain = (open_model(on_base(base, folder, where="a")) for folder in (snapshot, adapter))
    assert linked.keys() == plain.keys()
    assert all(torch.equal(linked.get(name), plain.get(name)) for name in plain.keys())  # noqa: SIM118


def test_a_file_of_plain_tensors_is_read_without_safetensors(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    reference = open_model(on_base(base, adapter, where="a"))
    before = {name: reference.get(name).clone() for name in list(reference.keys())}
    held = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(held, adapter / "adapter_model.bin")
    after = open_model(on_base(base, adapter, where="a"))
    assert all(torch.equal(after.get(name), tensor) for name, tensor in before.items())


def test_an_adapter_on_a_model_in_memory_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(MergelabError, match="is an adapter, and the base is a model in memory; give a hub id"):
        ml.soup([small.bert(), str(pair[1])], base_index=0)


def test_a_base_that_the_adapter_does_not_name_has_to_be_given(pair: tuple[Path, Path]) -> None:
    config(base_model_name_or_path=None)(pair[1])
    with pytest.raises(MergelabError, match="does not name its base"):
        ml.soup([str(pair[1])], task="text-classification")


def test_a_quantised_base_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(MergelabError, match="the base: quantised with gptq"):
        on_base(base, adapter, where="a")


@pytest.mark.parametrize("target", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_one_end_of_tied_embeddings_comes_apart_or_is_refused(target: list[str], tmp_path: Path) -> None:
    model: Any = small.llama(tie_word_embeddings=True)
    made = small.made(tmp_path, model, peft.LoraConfig(r=2, target_modules=target))
    small.tokenizer(made.base)
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(made.peft, input_ids=small.INPUTS)
    assert opened.config["tie_word_embeddings"] is False
    torch.testing.assert_close(small.outputs(small.loaded(opened), input_ids=small.INPUTS), expected)
    given = [str(made.base), str(made.adapter)]
    with pytest.raises(MergelabError, match=r"are one tied tensor in .* or give untie=true"):
        ml.task_arithmetic(given, lambda_=1, task="text-generation")
    merged = ml.task_arithmetic(given, lambda_=1, task="text-generation", untie=True)
    torch.testing.assert_close(small.outputs(merged.model.double(), input_ids=small.INPUTS), expected)


@pytest.mark.parametrize("tied", ["ensure_weight_tying", "modules_to_save"])
def test_both_ends_that_are_changed_alike_stay_tied(tied: str, tmp_path: Path) -> None:
    model: Any = small.llama(tie_word_embeddings=True)
    if tied == "ensure_weight_tying":
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    else:
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        )
    made = small.made(tmp_path, model, settings)
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    assert opened.config["tie_word_embeddings"] is True
    expected = small.outputs(made.peft, input_ids=small.INPUTS)
    torch.testing.assert_close(small.outputs(small.loaded(opened), input_ids=small.INPUTS), expected)


def test_an_encoder_decoder_cannot_be_untied(tmp_path: Path) -> None:
    made = small.made(tmp_path, small.bart(), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(MergelabError, match="encoder-decoders cannot be untied"):
        on_base(made.base, made.adapter, where="a")
