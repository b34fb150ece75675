"""Tiny models of the kinds that encoder-decoders are joined of, each in a folder with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "dog", "ran", "this", "is", "a"),
    *("really", "long", "text", "corresponding", "summary", "and", "it", "was", "##s", "."),
]
POSITIONS = 40


def bert_config(**settings: Any) -> Any:
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": len(WORDS), "max_position_embeddings": POSITIONS, **sizes, **settings}
    return BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)


def gpt2_config(**settings: Any) -> Any:
    from transformers import GPT2Config

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "vocab_size": 257}
    return GPT2Config(**{**sizes, "bos_token_id": 256, "eos_token_id": 256, **settings})


def words(folder: Path, vocabulary: list[str] = WORDS) -> Path:
    """Save BERT's kind of tokenizer."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    BertTokenizer.from_pretrained(folder, model_max_length=POSITIONS).save_pretrained(folder)
    return folder


def letters(folder: Path) -> Path:
    """Save GPT-2's kind of tokenizer: 256 bytes and the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: row for row, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end)
    whole.save_pretrained(folder)
    return folder


def saved(folder: Path, make: Any, seed: int = 0) -> Path:
    """Save a model whose weights are drawn with ``seed``, its biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def bert(folder: Path, seed: int = 0, *, head: str = "BertForMaskedLM", **settings: Any) -> Path:
    """Save a BERT."""
    import transformers

    return words(saved(folder, lambda: getattr(transformers, head)(bert_config(**settings)), seed))


def gpt2(folder: Path, seed: int = 0, *, head: str = "GPT2LMHeadModel", **settings: Any) -> Path:
    """Save a GPT-2."""
    import transformers

    return letters(saved(folder, lambda: getattr(transformers, head)(gpt2_config(**settings)), seed))


def bart(folder: Path, seed: int = 0) -> Path:
    """Save a BART: a sequence-to-sequence model whose two embeddings are one."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    size = {"vocab_size": len(WORDS), "d_model": 16, "max_position_embeddings": POSITIONS}
    config = BartConfig(**size, **layers, **sizes, **ids, forced_eos_token_id=3)
    return words(saved(folder, lambda: BartForConditionalGeneration(config), seed))


def t5(folder: Path, seed: int = 0, *, head: str = "T5ForConditionalGeneration") -> Path:
    """Save a T5."""
    import transformers

    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return words(saved(folder, lambda: getattr(transformers, head)(config), seed))


def bert2bert(folder: Path, seed: int = 0) -> Path:
    """Save an encoder-decoder that is trained, as far as anyone can tell, with settings of generation of its own."""
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    def make() -> Any:
        config = EncoderDecoderConfig.from_encoder_decoder_configs(bert_config(), bert_config())
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 2, 3, 0
        config.vocab_size = len(WORDS)
        model = EncoderDecoderModel(config)
        model.generation_config.update(
            decoder_start_token_id=2, eos_token_id=3, pad_token_id=0, num_beams=3, max_length=12, length_penalty=2.0
        )
        return model

    return words(saved(folder, make, seed))


def lora(folder: Path, base: Path, seed: int, *, classes: int = 0) -> Path:
    """Write a LoRA adapter of the attention of a model in ``base``, as PEFT does; with a classifier of some classes."""
    import json

    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(seed)
    held = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith(("query.weight", "value.weight")):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            held[f"{layer}.lora_A.weight"] = torch.randn(4, tensor.shape[1], generator=draw)
            held[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(tensor.shape[0], 4, generator=draw)
    config: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    if classes:
        for layer, outputs in (("bert.pooler.dense", 16), ("classifier", classes)):
            held[f"base_model.model.{layer}.weight"] = torch.randn(outputs, 16, generator=draw)
            held[f"base_model.model.{layer}.bias"] = torch.randn(outputs, generator=draw)
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["pooler.dense", "classifier"]}
    folder.mkdir()
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return folder


def changed(folder: Path, base: Path) -> Path:
    """Copy the model in ``base`` with other weights in its attention."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    draw = torch.Generator().manual_seed(9)
    held = load_file(base / "model.safetensors")
    for name, tensor in held.items():
        if ".attention." in name:
            held[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder
