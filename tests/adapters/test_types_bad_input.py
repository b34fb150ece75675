"""What is no adapter of its type is one line that names it; no tensor is skipped, and no type that is not read."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergelab.adapters.peft import KINDS
from mergelab.errors import MergelabError
from mergelab.models.adapted import on_base
from tests.adapters import made as small
from tests.adapters.test_peft_types import MLP, PLAIN, loha, stored, vera

peft = pytest.importorskip("peft")


def broken(made: small.Made, change: Callable[[dict[str, torch.Tensor]], object], **settings: Any) -> None:
    """Change an adapter's tensors, and settings."""
    held = stored(made.adapter)
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, made.adapter / "adapter_model.safetensors")
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refusal(made: small.Made) -> str:
    with pytest.raises(MergelabError, match=r"^a: ") as caught:
        on_base(made.base, made.adapter, where="a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400
    return str(caught.value)


def layers(held: dict[str, torch.Tensor], end: str) -> list[str]:
    """List the tensors whose names end so, those of the first query layer first."""
    return sorted(
        (name for name in held if name.endswith(end)), key=lambda name: "layer.0.attention.self.query" not in name
    )


def without(end: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held.pop(layers(held, end)[0])


def with_part(end: str, like: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Put one more tensor beside a layer's."""
    return lambda held: held.update({layers(held, like)[0].replace(like, end): torch.ones(4, 4)})


def cut(end: str, axis: int = 0) -> Callable[[dict[str, torch.Tensor]], object]:
    def apply(held: dict[str, torch.Tensor]) -> None:
        name = layers(held, end)[0]
        held[name] = held[name].narrow(axis, 0, held[name].shape[axis] - 1)

    return apply


def same(held: dict[str, torch.Tensor]) -> None:
    del held


BAD: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "no E": ("adalora", without("lora_E"), {}, r"query has lora_A, lora_B without lora_E"),
    "other E": (
        "adalora",
        cut("lora_E"),
        {},
        r"A is \[5, 16\] \(r, inputs\), E is \[4, 1\] \(r, 1\) and B is \[16, 5\]",
    ),
    "no init_r": ("adalora", same, {"init_r": "5"}, r"init_r in its .* must be a positive integer, and is '5'"),
    "alpha": ("adalora", same, {"lora_alpha": None}, r"the lora_alpha of .* must be a number, and is None"),
    "another ranknum": ("adalora", with_part("ranknum", "lora_E"), {}, r"the ranknum of .*query is not init_r=5"),
    "dora": ("adalora", same, {"use_dora": True}, r"use_dora=True in its adapter_config.json cannot be merged"),
    "lora's tensors": (
        "adalora",
        with_part("lora_B.weight", "lora_B"),
        {},
        r"lora_B.weight is none that an adapter of",
    ),
    "no w1_b": ("loha", without("hada_w1_b"), {}, r"query has hada_w1_a, hada_w2_a, hada_w2_b without hada_w1_b"),
    "a core alone": ("loha", with_part("hada_t1", "hada_w1_a"), {}, r"hada_t1, .* without hada_t2"),
    "ranks of loha": (
        "loha",
        cut("hada_w1_a", 1),
        {},
        r"the factors of .*query do not fit together: \[16, 3\], \[4, 16\]",
    ),
    "sizes of loha": (
        "loha",
        cut("hada_w1_a"),
        {},
        r"the two products of .*query have shapes \[15, 16\] and \[16, 16\]",
    ),
    "alpha of loha": ("loha", same, {"alpha": "x"}, r"the alpha of .* must be a number, and is 'x'"),
    "pattern of loha": ("loha", same, {"alpha_pattern": {"(": 1}}, r"alpha_pattern in its .* is no set of patterns"),
    "both w1": ("lokr", with_part("lokr_w1_a", "lokr_w1"), {}, r"lokr_w1, lokr_w1_a, .* which do not go together"),
    "no w2_b": ("lokr", without("lokr_w2_b"), {}, r"query has lokr_w1, lokr_w2_a without lokr_w2_b"),
    "sizes of lokr": ("lokr", cut("lokr_w1"), {}, r"of shape \[12, 16\], and that of the base is float32\[16, 16\]"),
    "use_rslora of loha": ("loha", same, {"use_rslora": True}, r"use_rslora=True in its adapter_config.json cannot"),
    "no projections": ("vera", without("vera_A"), {}, r"the model has vera_B without vera_A"),
    "neither": (
        "vera",
        lambda held: [held.pop(f"base_model.vera_{part}") for part in "AB"],
        {},
        r"the model has no projections, without vera_A, vera_B",
    ),
    "drawn and there": (
        "vera",
        same,
        {"save_projection": False},
        r"holds vera_A and vera_B, and save_projection=false",
    ),
    "narrow A": ("vera", cut("vera_A", 1), {}, r"at most 23 inputs, and that of the base has 16 and 24"),
    "narrow B": ("vera", cut("vera_B"), {}, r"trained for a .* it belongs to another base"),
    "ranks of vera": ("vera", cut("vera_A"), {}, r"the ranks of its vera tensors differ"),
    "outputs of vera": ("vera", cut("vera_lambda_b"), {}, r"query of 15 outputs .* that of the base has 16 and 16"),
    "another layer's A": (
        "vera",
        with_part("vera_A", "vera_lambda_b"),
        {},
        r"vera_A is none that an adapter of type VERA",
    ),
    "seed": ("vera", same, {"projection_prng_key": "x"}, r"projection_prng_key in its .* is no integer, but 'x'"),
    "a part of a norm": ("norms", with_part("running_mean", "weight"), {}, r"running_mean is none that an adapter of"),
    "NaN": (
        "loha",
        lambda held: held.update({name: held[name] * torch.nan for name in layers(held, "hada_w2_a")[:1]}),
        {},
        r"hada_w2_a holds NaN or infinity",
    ),
    "layer_replication": ("adalora", same, {"layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_one_line(what: str, tmp_path: Path) -> None:
    kind, change, settings, line = BAD[what]
    made = small.made(tmp_path, small.bert(), PLAIN[kind], dtype=torch.float32)
    broken(made, change, **settings)
    assert re.search(line, refusal(made)), refusal(made)


def test_a_layer_that_its_type_does_not_adapt_is_refused(tmp_path: Path) -> None:
    """Such as the transposed and the embedding ones that happen to have a fitting shape."""
    made = small.made(tmp_path, small.gpt2(), loha(target_modules=["lm_head"]), dtype=torch.float32)
    square = {f"hada_w{at}_{part}": torch.ones((16, 4) if part == "a" else (4, 16)) for at in (1, 2) for part in "ab"}
    for layer, said in {"transformer.h.0.attn.c_proj": "Conv1D", "transformer.wpe": "Embedding"}.items():
        rows = 32 if said == "Embedding" else 16
        tensors = {
            f"base_model.model.{layer}.{part}": torch.ones(rows, 4) if part.endswith("_a") else tensor
            for part, tensor in square.items()
        }
        save_file(tensors, made.adapter / "adapter_model.safetensors")
        assert f"of layers of the classes Linear, Conv1d, Conv2d, and {layer} is a {said}" in refusal(made)


@pytest.mark.parametrize("kind", PLAIN)
def test_no_tensor_is_skipped_whatever_its_name_or_shape(kind: str, tmp_path: Path) -> None:
    made = small.made(tmp_path, small.bert(), PLAIN[kind], dtype=torch.float32)
    whole = stored(made.adapter)
    names = [name for name in whole if "layer.1" not in name]
    assert len(names) >= 5
    for name in names:
        stem, _, leaf = name.rpartition(".")
        changes = [{f"{stem}.{leaf}x": whole[name]}, {f"{stem}x.{leaf}": whole[name]}]
        changes += [{name: whole[name].narrow(axis, 0, size - 1)} for axis, size in enumerate(whole[name].shape)]
        changes += [{name: whole[name][None]}, {}]
        for change in changes:
            held = {key: tensor for key, tensor in whole.items() if key != name} | change
            save_file({key: t.contiguous() for key, t in held.items()}, made.adapter / "adapter_model.safetensors")
            refusal(made)


# -------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_that_the_library_may_have_rounded_are_not_drawn(dtype: torch.dtype, tmp_path: Path) -> None:
    made = small.made(tmp_path, small.bert(), vera(save_projection=False, **MLP), dtype=dtype)
    line = refusal(made)
    assert "PEFT rounds what it draws to the dtype in which the base was loaded" in line
    assert "save it again with save_projection=True" in line


def test_projections_of_a_part_are_not_drawn(tmp_path: Path) -> None:
    """They follow from the sizes of all layers."""
    made = small.made(tmp_path, small.t5(), vera(target_modules=["q", "wo"], save_projection=False))
    with pytest.raises(MergelabError, match="its projections are not stored, and follow from all its layers"):
        on_base(made.base, made.adapter, where="a", part="encoder")
    saved = small.made(tmp_path, small.t5(), vera(target_modules=["q", "wo"]), seed=3)
    on_base(saved.base, saved.adapter, where="a", part="encoder")


# ---------------------------------------------------------------------------------------------------------- other types

OTHERS = sorted({each.value for each in peft.PeftType} - set(KINDS))


def converts(kind: str) -> bool:
    """Whether the library can fit LoRA to an adapter of a type."""
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(kind)]
    layer = f"{tuner.__module__.rpartition('.')[0]}.layer"
    if importlib.util.find_spec(layer) is None:
        return False
    own = [each for each in vars(importlib.import_module(layer)).values() if getattr(each, "__module__", "") == layer]
    return any("supports_lora_conversion" in vars(each) for each in own)


@pytest.mark.parametrize("kind", [*OTHERS, "BONE", "SOMETHING", ["LORA"], 3])
def test_every_other_type_is_refused_by_name(kind: Any, tmp_path: Path) -> None:
    made = small.made(tmp_path, small.bert(), peft.LoraConfig(target_modules=["query"]), dtype=torch.float32)
    broken(made, same, peft_type=kind)
    line = refusal(made)
    assert f"is of peft_type {kind!r}; adapters of type {', '.join(KINDS)} can be merged" in line
    if kind in OTHERS:
        learns_prompts = issubclass(
            peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)], peft.PromptLearningConfig
        )
        assert ("this type has no weights of the base" in line) or not learns_prompts
        if not learns_prompts and kind not in ("ADAPTION_PROMPT", "XLORA", "POLY"):
            assert "PeftModel.merge_and_unload" in line
            assert ("convert_to_lora" in line) == converts(kind)
