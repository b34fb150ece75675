"""Small bases and PEFT adapters with random weights, saved by the libraries themselves, and PEFT's own results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
INPUTS = torch.tensor([[5, 7, 11, 3, 2, 9], [1, 4, 8, 15, 16, 23]])


def bert(cls: str = "BertForSequenceClassification", **settings: Any) -> nn.Module:
    config = transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32, **settings)
    return _drawn(getattr(transformers, cls), config)


def gpt2(cls: str = "GPT2LMHeadModel", **settings: Any) -> nn.Module:
    settings = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32} | settings
    settings |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return _drawn(getattr(transformers, cls), transformers.GPT2Config(**settings))


def llama(cls: str = "LlamaForCausalLM", **settings: Any) -> nn.Module:
    settings = {**SIZES, "intermediate_size": 24, "tie_word_embeddings": False, "pad_token_id": 0} | settings
    return _drawn(getattr(transformers, cls), transformers.LlamaConfig(**settings))


def t5(**settings: Any) -> nn.Module:
    settings = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2} | settings
    settings |= {"decoder_start_token_id": 0}
    return _drawn(transformers.T5ForConditionalGeneration, transformers.T5Config(**settings))


def bart(**settings: Any) -> nn.Module:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"vocab_size": 48, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes |= {"max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return _drawn(transformers.BartForConditionalGeneration, transformers.BartConfig(**sizes, **settings))


def bert2bert() -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}
    encoder = transformers.BertConfig(**sizes)
    decoder = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.vocab_size = 1, 0, 48
    return _drawn(transformers.EncoderDecoderModel, config)


def convnet(**settings: Any) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, **settings
    )
    return _drawn(transformers.ResNetForImageClassification, config)


def _drawn(cls: Any, config: Any) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that nothing is 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@dataclass
class Made:
    """A base and an adapter, saved, and the adapter as PEFT runs it, in float64."""

    base: Path
    adapter: Path
    peft: Any

    def dense(self) -> dict[str, Tensor]:
        """PEFT's own dense form, in float64."""
        return dict(self.peft.merge_and_unload().state_dict())


def made(folder: Path, model: Any, config: Any, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Made:
    """Save ``model`` in ``dtype``, and an adapter with random weights of the peft configuration ``config``."""
    base = folder / "base"
    if not base.exists():
        model.to(dtype).save_pretrained(base)
    return Made(base, *adapter(folder / f"adapter{seed}", model, config, seed=seed))


def adapter(folder: Path, model: Any, config: Any, *, seed: int = 0, scale: float = 0.3) -> tuple[Path, Any]:
    import peft

    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    wrapped.save_pretrained(folder)
    return folder, wrapped


def tokenizer(folder: Path, texts: Sequence[str] = ()) -> None:
    """Write a tokenizer with a word for each row of the embeddings: the most frequent ones of texts."""
    counted = Counter(re.findall(r"\w+", " ".join(texts).lower()))
    usual = [*(word for word, _ in counted.most_common(43)), *(f"w{number}" for number in range(43))][:43]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *usual]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def loaded(checkpoint: Any) -> nn.Module:
    """Load an opened model into transformers' class, from its config and its tensors alone, as float64."""
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    cls = getattr(transformers, checkpoint.config["architectures"][0])
    tensors = {name: checkpoint.get(name).clone() for name in (*checkpoint.keys(), *checkpoint.aliases())}
    module, info = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"], info
    return module.eval()


def outputs(module: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return module(**inputs).logits
