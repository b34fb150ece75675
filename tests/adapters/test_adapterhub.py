"""Adapters of the Adapters library are read, merged and written in the environment that does not have the library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergelab as ml
from mergelab.errors import MergelabError
from mergelab.models.adapted import on_base, open_model
from tests.adapters import adapterhub_made as library
from tests.adapters import made as small
from tests.adapters.adapterhub_made import BOTTLENECK, LORA, bottleneck, merged, of_bert, with_head, written
from tests.conftest import Outcome

Command = Callable[..., Outcome]
QUERY = "bert.encoder.layer.0.attention.self.query"
ATTENTION = "transformer.h.0.attn.c_attn"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    small.bert().save_pretrained(tmp_path / "base")
    small.tokenizer(tmp_path / "base")
    return tmp_path / "base"


def tensors_of(base: Path, adapter: Path) -> dict[str, Tensor]:
    opened = open_model(on_base(base, adapter, where="a"))
    return {name: opened.get(name).clone() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("described", "scale"),
    [
        ({}, 3.0),
        ({"version": "adapters.1.0.1"}, 1.0),
        ({"version": "adapters.1.1.0.dev0"}, 1.0),
        ({"version": "adapters.1.1.0"}, 3.0),
        ({"version": "3.2.1"}, 3.0),
    ],
)
def test_alpha_is_the_rank_before_1_1(described: dict[str, Any], scale: float, base: Path, tmp_path: Path) -> None:
    tensors = of_bert()
    found = tensors_of(base, written(tmp_path / "a", tensors, **described))
    a, b = (tensors[f"{QUERY}.loras.a.lora_{each}"].double() for each in "AB")
    stored = load_file(base / "model.safetensors")
    expected = stored[f"{QUERY}.weight"].double() + scale * b @ a
    torch.testing.assert_close(found[f"{QUERY}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, stored[name])}
    assert changed == {name.replace(".loras.a.lora_A", ".weight") for name in tensors if name.endswith("lora_A")}


def test_the_rank_is_the_tensors(base: Path, tmp_path: Path) -> None:
    three = tensors_of(base, written(tmp_path / "a", of_bert(3), {**LORA, "r": 8}))
    stated = tensors_of(base, written(tmp_path / "b", of_bert(3), {**LORA, "r": 3}))
    assert all(torch.equal(tensor, stated[name]) for name, tensor in three.items())


@pytest.mark.parametrize("matrices", ["q", "v", "kv", "vq", "qkv"])
@pytest.mark.parametrize("mode", ["add", "scale"])
def test_a_fused_projection_changes_in_its_own_thirds(matrices: str, mode: str, tmp_path: Path) -> None:
    model: Any = small.gpt2()
    model.save_pretrained(tmp_path / "base")
    thirds = [at for at, matrix in enumerate("qkv") if matrix in matrices]
    config = {**LORA, "attn_matrices": list(matrices), "composition_mode": mode, "r": 2 if mode == "add" else 1}
    b = library.drawn(16 * len(thirds), int(config["r"]), seed=5)
    a = library.drawn(2 * len(thirds), 16, seed=6)
    tensors = {f"{ATTENTION}.loras.a.lora_B": b} | ({f"{ATTENTION}.loras.a.lora_A": a} if mode == "add" else {})
    found = tensors_of(tmp_path / "base", written(tmp_path / "a", tensors, config, model_type="gpt2"))
    for leaf in ("weight", "bias"):
        expected = model.state_dict()[f"{ATTENTION}.{leaf}"].double().clone()
        expected = expected.T.contiguous() if leaf == "weight" else expected
        for number, third in enumerate(thirds):
            rows = slice(16 * third, 16 * third + 16)
            own = b[16 * number : 16 * number + 16].double()
            if mode == "add" and leaf == "weight":
                expected[rows] += 3 * own @ a[2 * number : 2 * number + 2].double()
            elif mode == "scale":
                expected[rows] *= own if leaf == "weight" else own[:, 0]
        if mode == "scale":  # the library multiplies the other thirds by α as well
            expected *= 6
        tensor = found[f"{ATTENTION}.{leaf}"].double()
        torch.testing.assert_close(tensor.T if leaf == "weight" else tensor, expected, rtol=1e-5, atol=1e-6)


def test_safetensors_and_the_older_format_hold_the_same(base: Path, tmp_path: Path) -> None:
    before = tensors_of(base, written(tmp_path / "a", of_bert()))
    (tmp_path / "a" / "pytorch_adapter.bin").unlink()
    save_file(of_bert(), tmp_path / "a" / "adapter.safetensors")
    after = tensors_of(base, tmp_path / "a")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_base_without_a_prefix_and_a_name_of_its_own(base: Path, tmp_path: Path) -> None:
    bare = {name.removeprefix("bert."): tensor for name, tensor in of_bert(name="sts").items()}
    folder = written(tmp_path / "a", bare, name="sts", model_name=str(base))
    reference = tensors_of(base, written(tmp_path / "b", of_bert()))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in tensors_of(base, folder).items())
    merged = ml.soup([str(folder)], task="text-classification")  # on the base that it names
    assert torch.equal(merged.model.state_dict()[f"{QUERY}.weight"], reference[f"{QUERY}.weight"])


def test_a_head_brings_its_labels(base: Path, tmp_path: Path) -> None:
    head = {"heads.a.1.weight": library.drawn(3, 16), "heads.a.1.bias": library.drawn(3)}
    settings = {"head_type": "classification", "layers": 1, "activation_function": None, "use_pooler": True}
    folder = with_head(written(tmp_path / "a", of_bert()), head, {**settings, "label2id": {"p": 0, "q": 1, "r": 2}})
    opened = open_model(on_base(base, folder, where="a"))
    assert opened.config["id2label"] == {"0": "p", "1": "q", "2": "r"}
    assert torch.equal(opened.get("classifier.weight"), head["heads.a.1.weight"])
    assert torch.equal(opened.get("classifier.bias"), head["heads.a.1.bias"])


# ---------------------------------------------------------------------------------------------------------- bad input


def settings(**changed: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"config": content["config"] | changed}))

    return apply


def described(**changed: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return apply


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        change(held)
        torch.save(held, folder / "pytorch_adapter.bin")

    return apply


def head(config: dict[str, Any] | None, tensors: dict[str, Tensor], **described: Any) -> Callable[[Path], None]:
    return lambda folder: with_head(folder, tensors, config, **described) and None


def file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"x") and None


def without_a(held: dict[str, Tensor]) -> None:
    for key in [key for key in held if key.endswith("lora_A")]:
        del held[key]


def both(first: Callable[[Path], None], second: Callable[[Path], None], folder: Path) -> None:
    first(folder)
    second(folder)


class Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def pickled(folder: Path) -> None:
    torch.save({"x": Runs(str(folder / "ran"))}, folder / "pytorch_adapter.bin")


A, B = f"{QUERY}.loras.a.lora_A", f"{QUERY}.loras.a.lora_B"
TWO_LAYERS = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "bias": True}
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "gate": (settings(use_gating=True), r"use_gating=true .* its gates depend on the input"),
    "dora": (settings(use_dora=True), r"use_dora=true .* and cannot be merged; DoRA of PEFT can"),
    "vera": (settings(vera_d=0.1), r"vera_d=0.1 in its"),
    "unknown": (settings(something=3), r"something=3 in its adapter_config.json cannot be merged"),
    "mode": (settings(composition_mode="mul"), r"composition_mode='mul' must be add or scale"),
    "alpha": (settings(alpha="x"), r"alpha of .*query must be a number, and is 'x'"),
    "prompt": (settings(architecture="prompt_tuning"), r"architecture 'prompt_tuning' of the Adapters library"),
    "reft": (settings(architecture="reft"), r"architecture 'reft' of the Adapters library"),
    "bottleneck": (settings(architecture=None), r"has a bottleneck part .* save.form=module_average \(method=soup"),
    "prefix": (settings(architecture="prefix_tuning"), r"has a prefix-tuning part"),
    "union": (settings(architecture="union", configs=[LORA, BOTTLENECK]), r"has a bottleneck part"),
    "two": (settings(architecture="union", configs=[LORA, LORA]), r"a union of several LoRA parts"),
    "old union": (
        lambda folder: both(
            settings(architecture="union", configs=[LORA]), described(version="adapters.1.0.0"), folder
        ),
        r"a union of version adapters.1.0.0, where LoRA was trained without its scale \(alpha=6, r=2\)",
    ),
    "empty union": (settings(architecture="union", configs=[]), r"the union in its adapter_config.json has no"),
    "A without B": (tensors(lambda held: held.pop(B)), r"query has lora_A without lora_B"),
    "B without A": (tensors(lambda held: held.pop(A)), r"query has lora_B without lora_A, and its composition_mode"),
    "ranks": (tensors(lambda held: held.update({A: torch.ones(3, 16)})), r"ranks of .* differ: A is \[3, 16\]"),
    "NaN": (tensors(lambda held: held[A].fill_(float("nan"))), r"lora_A holds NaN or infinity"),
    "other name": (
        tensors(lambda held: held.update({A.replace(".a.", ".b."): held.pop(A)})),
        r"the tensor .*loras.b.lora_A is none that LoRA 'a' should have",
    ),
    "gate's tensor": (
        tensors(lambda held: held.update({f"{QUERY}.loras.a.gate.weight": torch.ones(1, 16)})),
        r"loras.a.gate.weight is none",
    ),
    "another base": (
        tensors(lambda held: held.update({B: torch.ones(20, 2)})),
        r"trained for a .*query.weight of shape \[20, 16\].*belongs to another base",
    ),
    "another type": (
        described(model_type="roberta"),
        r"was trained on a model of type roberta, and the base is a bert",
    ),
    "no such names": (
        tensors(lambda held: [held.update({key.replace("query", "mixer"): held.pop(key)}) for key in list(held)]),
        r"2 of 4 names of the adapter match nothing in the base",
    ),
    "ia3 of two columns": (
        lambda folder: both(settings(composition_mode="scale"), tensors(without_a), folder),
        r"the IA³ vector of .* is \[16, 2\], and must be \(outputs, 1\)",
    ),
    "fusion": (file("pytorch_model_adapter_fusion.bin"), r"pytorch_model_adapter_fusion.bin is an AdapterFusion layer"),
    "embedding": (file("embedding.pt"), r"embedding.pt is an embedding of its own"),
    "head alone": (file("model_head.safetensors"), r"has model_head.safetensors without head_config.json"),
    "head of another kind": (
        head({"head_type": "masked_lm", "layers": 2}, {"heads.a.1.weight": torch.ones(2, 2)}),
        r"its masked_lm head .* is none that bert models of transformers have",
    ),
    "head of another shape": (
        head({**TWO_LAYERS, "activation_function": "relu"}, {"heads.a.1.weight": torch.ones(2, 2)}),
        r"its classification head \(layers=2, activation_function=relu, use_pooler=None, bias=True\) is none",
    ),
    "head without bias": (
        head(TWO_LAYERS, {f"heads.a.{at}.weight": torch.ones(16, 16) for at in (1, 4)}),
        r"its classification head lacks 1.bias, 4.bias",
    ),
    "head's tensor": (head(TWO_LAYERS, {"heads.b.1.weight": torch.ones(2, 2)}), r"heads.b.1.weight of its head has no"),
    "pickle": (pickled, r"pytorch_adapter.bin needs arbitrary unpickling"),
    "truncated": (
        lambda folder: (
            (folder / "pytorch_adapter.bin").write_bytes((folder / "pytorch_adapter.bin").read_bytes()[:300]) and None
        ),
        r"pytorch_adapter.bin",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_merged_is_one_line(what: str, base: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", of_bert())
    on_base(base, folder, where="a")
    spoil, line = BAD[what]
    spoil(folder)
    with pytest.raises(MergelabError, match=f"^a: .*{line}") as caught:
        on_base(base, folder, where="a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert not (folder / "ran").exists()


def test_the_base_of_an_adapter_that_cannot_be_merged_is_not_looked_for(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", bottleneck(), BOTTLENECK, model_name="org/nowhere")
    with pytest.raises(MergelabError, match="has a bottleneck part"):
        ml.soup([str(folder)], task="text-classification")


# ------------------------------------------------------------------------------------------------------------ outputs


def test_what_is_written_for_the_library_reads_back(base: Path, tmp_path: Path, mergelab_command: Command) -> None:
    a, b = written(tmp_path / "a", of_bert()), written(tmp_path / "b", of_bert(3, name="b", seed=1), name="b")
    given = ("method=task_arithmetic", "method.lambda=1", "method.weights=[1,-0.5]", "save.form=lora_cat")
    merged(mergelab_command, base, {"a": a, "b": b}, *given, "save.library=adapters")
    found, stored = tensors_of(base, Path("out")), load_file(base / "model.safetensors")
    expected = stored[f"{QUERY}.weight"].double()
    for weight, tensors, name, scale in ((1, of_bert(), "a", 3.0), (-0.5, of_bert(3, name="b", seed=1), "b", 2.0)):
        factors = [tensors[f"{QUERY}.loras.{name}.lora_{each}"].double() for each in "BA"]
        expected = expected + weight * scale * factors[0] @ factors[1]
    torch.testing.assert_close(found[f"{QUERY}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["config"]["r"], config["config"]["alpha"], config["config"]["attn_matrices"]) == (5, 5, ["q", "v"])
    assert (config["name"], config["version"], config["model_name"]) == ("merged", "adapters.1.3.0", str(base))
    head = torch.load("out/pytorch_model_head.bin", weights_only=True)
    assert torch.equal(head["classifier.weight"], stored["classifier.weight"])


def test_a_fused_projection_is_written_at_the_sum_of_the_ranks(tmp_path: Path, mergelab_command: Command) -> None:
    small.gpt2().save_pretrained(tmp_path / "base")
    given = {}
    for seed, (name, matrices) in enumerate({"a": "qv", "b": "v"}.items()):
        tensors = {
            f"{ATTENTION}.loras.{name}.lora_B": library.drawn(16 * len(matrices), 2, seed=seed),
            f"{ATTENTION}.loras.{name}.lora_A": library.drawn(2 * len(matrices), 16, seed=seed + 9),
        }
        config = {**LORA, "attn_matrices": list(matrices)}
        given[name] = written(tmp_path / name, tensors, config, name=name, model_type="gpt2")
    merged(mergelab_command, tmp_path / "base", given, "method=soup", "save.form=lora_cat", "save.library=adapters")
    held = torch.load("out/pytorch_adapter.bin", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
        f"{ATTENTION}.loras.merged.lora_A": (8, 16),  # q and v, each of rank 4: the sum of the two in v
        f"{ATTENTION}.loras.merged.lora_B": (32, 4),
    }


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "dense": (("save.library=adapters",), "save.library=adapters: is for adapters"),
    "library": (
        ("save.library=adapter", "save.form=lora_cat"),
        "save.library='adapter': must be one of 'peft' or",
    ),
    "biases": (
        ("save.form=lora_svd", "save.rank=2", "save.library=adapters", "models.experts.b=${models.base}/../biased"),
        "LayerNorm.* changes, which the Adapters library does not adapt; save.library=peft or save.form=dense",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_library_cannot_hold_is_refused(
    what: str, base: Path, tmp_path: Path, mergelab_command: Command
) -> None:
    model: Any = small.bert()
    torch.nn.init.ones_(model.bert.encoder.layer[0].output.LayerNorm.weight)
    model.save_pretrained(tmp_path / "biased")
    given = {"a": written(tmp_path / "a", of_bert())}
    outcome = merged(mergelab_command, base, given, "method=soup", *REFUSED[what][0], code=2)
    (found,) = [each for each in outcome.err.splitlines() if each.strip() and "Writing model" not in each]
    assert re.search(REFUSED[what][1], found), found
    assert len(found) <= 400
    assert not Path("out").exists()
