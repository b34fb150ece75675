"""An adapter on its base has the values of the library's own dense form, and computes what its forward pass does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small

peft = pytest.importorskip("peft")

TEXT = {"input_ids": small.INPUTS}
BOTH = {"input_ids": small.INPUTS, "decoder_input_ids": small.INPUTS.flip(0)}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32)}


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings))


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (small.bert, lora(target_modules=["query", "value"], task_type="SEQ_CLS"), TEXT),
    "all layers": (small.llama, lora(target_modules="all-linear", task_type="CAUSAL_LM"), TEXT),
    "rslora": (small.llama, lora(target_modules=["q_proj", "down_proj"], use_rslora=True), TEXT),
    "patterns": (
        small.llama,
        lora(
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            alpha_pattern={r"layers\.1\.self_attn\..*": 11, "q_proj": 5},
        ),
        TEXT,
    ),
    "conv1d": (small.gpt2, lora(target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM"), TEXT),
    "conv1d and linear": (
        lambda: small.gpt2(tie_word_embeddings=False),
        lora(target_modules=["c_attn", "c_proj", "lm_head"], task_type="CAUSAL_LM"),
        TEXT,
    ),
    "embedding": (small.llama, lora(target_modules=["embed_tokens", "q_proj"]), TEXT),
    "conv2d": (small.convnet, lora(target_modules=["convolution"], modules_to_save=["classifier"]), IMAGE),
    "dora": (small.bert, lora(target_modules=["query", "dense"], use_dora=True, task_type="SEQ_CLS"), TEXT),
    "dora conv1d": (small.gpt2, lora(target_modules=["c_attn", "c_proj"], use_dora=True), TEXT),
    "dora embedding": (small.llama, lora(target_modules=["embed_tokens", "q_proj"], use_dora=True), TEXT),
    "dora conv2d": (small.convnet, lora(target_modules=["convolution"], use_dora=True), IMAGE),
    "bias of B": (small.bert, lora(target_modules=["query"], lora_bias=True, task_type="SEQ_CLS"), TEXT),
    "bias all": (small.bert, lora(target_modules=["query"], bias="all", task_type="SEQ_CLS"), TEXT),
    "bias lora_only": (small.bert, lora(target_modules=["query"], bias="lora_only", task_type="SEQ_CLS"), TEXT),
    "token rows": (small.llama, lora(target_modules=["q_proj"], trainable_token_indices=[3, 7, 11]), TEXT),
    "token rows, tied": (
        lambda: small.llama(tie_word_embeddings=True),
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]}),
        TEXT,
    ),
    "tokens alone": (small.llama, peft.TrainableTokensConfig(token_indices=[2, 9]), TEXT),
    "modules to save": (small.llama, lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]), TEXT),
    "ia3": (
        small.bert,
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
        ),
        TEXT,
    ),
    "ia3 conv1d": (
        small.gpt2,
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        TEXT,
    ),
    "t5": (small.t5, lora(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"), BOTH),
    "t5 cross-attention": (small.t5, lora(target_modules=r".*EncDecAttention\.(q|k|v|o)"), BOTH),
    "bart": (small.bart, lora(target_modules=["q_proj", "fc1"], task_type="SEQ_2_SEQ_LM"), BOTH),
    "encoder-decoder": (small.bert2bert, lora(target_modules=["query", "value"]), BOTH),
    "classifier of a decoder": (
        lambda: small.llama("LlamaForSequenceClassification"),
        lora(target_modules=["q_proj"], task_type="SEQ_CLS"),
        TEXT,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_the_library_does(tmp_path: Path, kind: str) -> None:
    build, config, inputs = KINDS[kind]
    made = small.made(tmp_path, build(), config)
    checkpoint = open_model(on_base(made.base, made.adapter, where="a"))
    computed = small.outputs(small.loaded(checkpoint), **inputs)
    expected = small.outputs(made.peft, **inputs)
    torch.testing.assert_close(computed, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, small.outputs(build().double(), **inputs), atol=1e-3), (
        "the adapter does nothing"
    )
    dense = made.dense()
    for name in list(checkpoint.keys()):
        torch.testing.assert_close(checkpoint.get(name), dense[name], rtol=1e-10, atol=1e-10, msg=f"{kind}: {name}")
        assert tuple(checkpoint.get(name).shape) == checkpoint.shape(name)
        assert checkpoint.get(name).dtype == checkpoint.dtype(name)
