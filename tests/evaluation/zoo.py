"""Many architectures, each built tiny by transformers with weights that matter, and tokenizers that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.tasks.tiny import WORDS

# What most configurations call their sizes; each takes what it knows.
SIZES: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 96, "hidden_act": "gelu",
}  # fmt: skip
LLAMA = {**SIZES, "hidden_act": "silu", "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
PAIR = {
    "vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 96,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0,
}  # fmt: skip
ROBERTA = {**SIZES, "pad_token_id": 1, "max_position_embeddings": 98, "type_vocab_size": 1}
GEMMA = {**LLAMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}
EXPERTS = {**LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Name → configuration class, its settings, kind of tokenizer. The name before a blank is transformers' own.
CLASSIFIERS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "bert": ("BertConfig", SIZES, "bert"),
    "roberta": ("RobertaConfig", ROBERTA, "roberta"),
    "xlm-roberta": ("XLMRobertaConfig", ROBERTA, "roberta"),
    "xlm-roberta-xl": ("XLMRobertaXLConfig", ROBERTA, "roberta"),
    "camembert": ("CamembertConfig", ROBERTA, "roberta"),
    "data2vec-text": ("Data2VecTextConfig", ROBERTA, "roberta"),
    "xmod": ("XmodConfig", {**ROBERTA, "default_language": "en_XX"}, "roberta"),
    "esm": ("EsmConfig", {**ROBERTA, "position_embedding_type": "absolute", "token_dropout": False}, "roberta"),
    "ibert": ("IBertConfig", {**ROBERTA, "quant_mode": False}, "roberta"),
    "distilbert": ("DistilBertConfig", {**SIZES, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, "bert"),
    "albert": ("AlbertConfig", {**SIZES, "embedding_size": 16}, "bert"),
    "deberta": ("DebertaConfig", {**SIZES, "relative_attention": True, "max_relative_positions": 16,
                                  "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}, "bert"),
    "deberta-v2": ("DebertaV2Config", {**SIZES, "relative_attention": True, "position_buckets": 8,
                                       "max_relative_positions": -1, "pos_att_type": ["c2p", "p2c"],
                                       "position_biased_input": False, "share_att_key": True,
                                       "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}, "bert"),
    "deberta-v2 with convolution": ("DebertaV2Config", {**SIZES, "conv_kernel_size": 3, "conv_act": "gelu"}, "bert"),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 16}, "bert"),
    "ernie": ("ErnieConfig", SIZES, "bert"),
    "megatron-bert": ("MegatronBertConfig", SIZES, "bert"),
    "rembert": ("RemBertConfig", {**SIZES, "input_embedding_size": 16, "output_embedding_size": 16}, "bert"),
    "roformer": ("RoFormerConfig", SIZES, "bert"),
    "modernbert": ("ModernBertConfig", {**SIZES, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
                                        "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8,
                                        "num_hidden_layers": 3, "reference_compile": False}, "bert"),
    "xlnet": ("XLNetConfig", {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
                              "pad_token_id": 5}, "xlnet"),
    "mpnet": ("MPNetConfig", ROBERTA, "roberta"),
    "longformer": ("LongformerConfig", {**ROBERTA, "attention_window": 8}, "roberta"),
    "big_bird": ("BigBirdConfig", {**SIZES, "attention_type": "original_full"}, "bert"),
    "big_bird sparse": ("BigBirdConfig", {**SIZES, "attention_type": "block_sparse", "block_size": 4,
                                          "num_random_blocks": 1}, "bert"),
    "funnel": ("FunnelConfig", {"vocab_size": 40, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48,
                                "block_sizes": [1, 1], "num_decoder_layers": 1}, "bert"),
    "convbert": ("ConvBertConfig", {**SIZES, "embedding_size": 32, "conv_kernel_size": 3}, "bert"),
    "squeezebert": ("SqueezeBertConfig", {**SIZES, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2,
                                          "intermediate_groups": 2, "output_groups": 2}, "bert"),
    "fnet": ("FNetConfig", {**SIZES, "use_tpu_fourier_optimizations": False}, "bert"),
    "mobilebert": ("MobileBertConfig", {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16,
                                        "num_feedforward_networks": 1}, "bert"),
    "nystromformer": ("NystromformerConfig", {**SIZES, "num_landmarks": 1, "segment_means_seq_len": 1,
                                              "conv_kernel_size": 3}, "bert"),
    "xlm": ("XLMConfig", {"vocab_size": 40, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0,
                          "max_position_embeddings": 96, "n_langs": 1}, "bert"),
    "gpt2": ("GPT2Config", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}, "end"),
    "gpt2 with padding": ("GPT2Config", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                         "n_positions": 96, "pad_token_id": 0}, "plain"),
    "gpt_neo": ("GPTNeoConfig", {**SIZES, "num_layers": 2, "num_heads": 4, "window_size": 4,
                                 "attention_types": [[["global", "local"], 1]]}, "end"),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}, "plain"),
    "gptj": ("GPTJConfig", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96,
                            "rotary_dim": 4}, "end"),
    "openai-gpt": ("OpenAIGPTConfig", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                       "n_positions": 96, "pad_token_id": 0}, "plain"),
    "ctrl": ("CTRLConfig", {"vocab_size": 40, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4,
                            "n_positions": 96, "pad_token_id": 0}, "plain"),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
                          "word_embed_proj_dim": 32}, "opt"),
    "bloom": ("BloomConfig", {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
              "plain"),
    "mpt": ("MptConfig", {"vocab_size": 40, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96,
                          "pad_token_id": 0}, "plain"),
    "falcon": ("FalconConfig", {**SIZES, "pad_token_id": 0, "new_decoder_architecture": False}, "plain"),
    "falcon with alibi": ("FalconConfig", {**SIZES, "pad_token_id": 0, "alibi": True}, "plain"),
    "llama": ("LlamaConfig", LLAMA, "plain"),
    "llama without padding": ("LlamaConfig", {**LLAMA, "pad_token_id": None}, "closed"),
    "llama that pads with its end": ("LlamaConfig", {**LLAMA, "pad_token_id": 3}, "closed"),
    "llama with padding -1": ("LlamaConfig", {**LLAMA, "pad_token_id": -1}, "closed"),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 6}, "plain"),
    "qwen2": ("Qwen2Config", {**LLAMA, "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
              "plain"),
    "qwen3": ("Qwen3Config", LLAMA, "plain"),
    "gemma": ("GemmaConfig", GEMMA, "plain"),
    "gemma2": ("Gemma2Config", {**GEMMA, "sliding_window": 6}, "plain"),
    "gemma3_text": ("Gemma3TextConfig", {**GEMMA, "sliding_window": 6, "layer_types": ["sliding_attention",
                                                                                       "full_attention"]}, "plain"),
    "phi3": ("Phi3Config", {**LLAMA, "sliding_window": 6}, "plain"),
    "phi3 with long positions": ("Phi3Config", {**LLAMA, "original_max_position_embeddings": 20, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}}, "plain"),
    "mixtral": ("MixtralConfig", {**EXPERTS, "sliding_window": 6}, "plain"),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS, "plain"),
    "jamba": ("JambaConfig", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                              "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}, "plain"),
    "t5": ("T5Config", T5, "bart"),
    "bart": ("BartConfig", PAIR, "bart"),
    "mbart": ("MBartConfig", PAIR, "bart"),
    "plbart": ("PLBartConfig", PAIR, "bart"),
}  # fmt: skip

GENERATORS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    **{name: CLASSIFIERS[name] for name in (
        "gpt2", "gpt_neo", "phi3 with long positions",
        "gpt_neox", "gptj", "openai-gpt", "ctrl", "xlnet", "opt", "bloom", "mpt", "falcon",
        "falcon with alibi", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral",
        "qwen3_moe", "jamba", "t5", "bart", "mbart",
    )},
    "mamba": ("MambaConfig", {**LLAMA, "state_size": 4, "use_mambapy": False}, "plain"),
    "rwkv": ("RwkvConfig", {**LLAMA, "attention_hidden_size": 32, "context_length": 96}, "plain"),
    "marian": ("MarianConfig", {**PAIR, "decoder_start_token_id": 0, "scale_embedding": True}, "bart"),
    "pegasus": ("PegasusConfig", {**PAIR, "decoder_start_token_id": 0}, "bart"),
    "led": ("LEDConfig", {**PAIR, "max_encoder_position_embeddings": 96, "max_decoder_position_embeddings": 96,
                          "attention_window": 8}, "bart"),
    "longt5": ("LongT5Config", {**T5, "local_radius": 3}, "bart"),
    "prophetnet": ("ProphetNetConfig", {
        **{key: value for key, value in PAIR.items() if key not in ("encoder_layers", "decoder_layers", "d_model")},
        "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4}, "bart"),
}  # fmt: skip


def architecture(name: str, table: Mapping[str, tuple[str, Mapping[str, Any], str]]) -> tuple[Any, Any]:
    """Return a configuration and a tokenizer; skip the test where this version of transformers lacks it."""
    import transformers

    cls, settings, kind = table[name]
    if not hasattr(transformers, cls):
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    return getattr(transformers, cls)(**settings), tokenizer(kind)


def randomised(model: Any, scale: float = 0.25) -> Any:
    """Draw every parameter anew, so that outputs of different inputs differ clearly."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


def tokenizer(kind: str) -> Any:
    """Build a tokenizer of a few words, with the special tokens of a kind of model where its checkpoints have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {
        "roberta": ["<s>", "<pad>", "</s>", "<unk>"],
        "opt": ["<s>", "<pad>", "</s>", "<unk>"],
        "xlnet": ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
    }.get(kind, ["<pad>", "<unk>", "<s>", "</s>"])
    more = [f"word{row}" for row in range(SIZES["vocab_size"] - len(special) - len(WORDS))]
    vocabulary = {word: row for row, word in enumerate([*special, *WORDS, *more])}
    unknown = next(word for word in special if "unk" in word.lower())
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = {
        "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "xlnet": ("$A:0 <sep>:0 <cls>:2", "$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2"),
        "bart": ("$A </s>", "$A </s> $B </s>"),
        "closed": ("<s> $A </s>", "<s> $A $B </s>"),
        "opt": ("<s> $A", "<s> $A $B"),
    }.get(kind, ("$A", "$A $B"))
    named = [(word, row) for word, row in vocabulary.items() if word in f"{single} {pair}".replace(":", " ").split()]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=named)
    pads = {"bert": "[PAD]", "end": None, "closed": None}.get(kind, "<pad>")
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, pad_token=pads, eos_token="[SEP]" if kind == "bert" else "</s>",
        padding_side="left" if kind == "xlnet" else "right", model_max_length=96,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"] if kind in ("bert", "xlnet") else inputs,
    )  # fmt: skip
