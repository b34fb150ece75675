"""PEFT's types beside LoRA: AdaLoRA, LoHa, LoKr, VeRA and tuned norms are the library's own models; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergelab as ml
from mergelab.errors import MergelabError
from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.adapters.test_dense import BOTH, IMAGE, TEXT
from tests.adapters.test_experts import dense
from tests.adapters.test_outputs import assert_equal, merged, through_peft
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

ATTENTION = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
MLP = {"target_modules": ["query", "intermediate.dense", "output.dense"], "task_type": "SEQ_CLS"}


def adalora(**settings: Any) -> Any:
    return peft.AdaLoraConfig(**({"init_r": 5, "target_r": 2, "total_step": 10, "lora_alpha": 7} | settings))


def loha(**settings: Any) -> Any:
    return peft.LoHaConfig(**({"r": 4, "alpha": 5} | settings))  # of an exact quotient: PEFT rounds it to float32


def lokr(**settings: Any) -> Any:
    return peft.LoKrConfig(**({"r": 2, "alpha": 5} | settings))


def vera(**settings: Any) -> Any:
    return peft.VeraConfig(**({"r": 6, "projection_prng_key": 4} | settings))


SOUND = {"input_values": torch.linspace(-1, 1, 2 * 40).double().view(2, 40).sin()}
CONVOLUTIONS = r".*conv_layers\.\d\.conv"

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adalora": (small.bert, adalora(**MLP), TEXT),
    "adalora conv1d": (small.gpt2, adalora(target_modules=["c_attn", "c_proj"]), TEXT),
    "adalora conv2d": (small.convnet, adalora(target_modules=["convolution"]), IMAGE),
    "adalora t5": (small.t5, adalora(target_modules=["q", "wo"]), BOTH),
    "adalora without alpha": (small.bert, adalora(lora_alpha=0, **ATTENTION), TEXT),
    "adalora settings that it does not use": (
        small.bert,
        adalora(use_rslora=True, alpha_pattern={"query": 30}, **ATTENTION),
        TEXT,
    ),
    "adalora token rows": (small.llama, adalora(target_modules=["q_proj"], trainable_token_indices=[3, 7]), TEXT),
    "loha": (small.bert, loha(**MLP), TEXT),
    "loha patterns": (
        small.llama,
        loha(
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            alpha_pattern={r"layers\.1\.self_attn\..*": 11, "q_proj": 3},
            rank_dropout=0.2,
            module_dropout=0.1,
        ),
        TEXT,
    ),
    "loha t5": (small.t5, loha(target_modules=["q", "v", "wi"]), BOTH),
    "loha conv2d": (small.convnet, loha(target_modules=["convolution"]), IMAGE),
    "loha effective conv2d": (small.convnet, loha(target_modules=["convolution"], use_effective_conv2d=True), IMAGE),
    "loha effective conv of one dimension": (
        small.speech,
        loha(target_modules=CONVOLUTIONS, use_effective_conv2d=True),
        SOUND,
    ),
    "loha conv of one dimension": (small.speech, loha(target_modules=CONVOLUTIONS), SOUND),
    "lokr": (small.bert, lokr(**MLP), TEXT),
    "lokr whole": (small.bert, lokr(r=30, **MLP), TEXT),
    "lokr whole with patterns": (
        small.llama,
        lokr(
            r=30,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 25},
            alpha_pattern={"q_proj": 3},
        ),
        TEXT,
    ),
    "lokr both": (
        lambda: small.bert(hidden_act="relu"),
        lokr(r=1, decompose_both=True, decompose_factor=8, rank_dropout=0.1, rank_dropout_scale=True, **MLP),
        TEXT,
    ),
    "lokr t5": (small.t5, lokr(target_modules=["k", "wo"], init_weights="lycoris"), BOTH),
    "lokr conv2d": (small.convnet, lokr(r=1, target_modules=["convolution"]), IMAGE),
    "lokr whole conv2d": (small.convnet, lokr(r=9, target_modules=["convolution"]), IMAGE),
    "lokr effective conv2d": (
        small.convnet,
        lokr(r=1, decompose_both=True, target_modules=["convolution"], use_effective_conv2d=True),
        IMAGE,
    ),
    "lokr conv of one dimension": (small.speech, lokr(r=1, target_modules=CONVOLUTIONS), SOUND),
    "lokr whole conv of one dimension": (small.speech, lokr(r=9, target_modules=CONVOLUTIONS), SOUND),
    "vera": (small.bert, vera(**MLP), TEXT),
    "vera drawn": (small.bert, vera(save_projection=False, **MLP), TEXT),
    "vera conv1d": (small.gpt2, vera(target_modules=["c_attn", "c_fc"]), TEXT),
    "vera conv1d drawn": (small.gpt2, vera(target_modules=["c_attn", "c_fc"], save_projection=False), TEXT),
    "vera t5": (small.t5, vera(target_modules=["q", "wo"], d_initial=0.3), BOTH),
    "vera biases": (small.bert, vera(bias="vera_only", **ATTENTION), TEXT),
    "norms": (small.bert, peft.LNTuningConfig(target_modules=["LayerNorm"]), TEXT),
    "norms of llama": (small.llama, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), TEXT),
}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_the_library_does(tmp_path: Path, kind: str) -> None:
    build, config, inputs = KINDS[kind]
    made = small.made(tmp_path, build(), config)
    checkpoint = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(made.peft, **inputs)
    torch.testing.assert_close(small.outputs(small.loaded(checkpoint), **inputs), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, small.outputs(build().double(), **inputs), atol=1e-3), (
        "the adapter does nothing"
    )
    library = made.dense()
    for name in list(checkpoint.keys()):
        torch.testing.assert_close(checkpoint.get(name), library[name], rtol=1e-10, atol=1e-10, msg=f"{kind}: {name}")
        assert tuple(checkpoint.get(name).shape) == checkpoint.shape(name)
