"""Build the small models of the table with ``transformers``, and save them as it does, each with a tokenizer."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.zoo import GPT2, GROUPED, LABELS, POSITIONS, SMALL, STOP_WORD, VOCABULARY, WORDS, Kind


def is_known(kind: Kind) -> bool:
    """Return whether the installed transformers has this architecture."""
    import transformers

    return hasattr(transformers, kind.model) and hasattr(transformers, kind.config)


def save_models(kind: Kind, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> None:
    """Save ``base`` and the experts ``a`` and ``b`` of an architecture below ``folder``.

    Experts are a base with every parameter moved by about a third of its scale; parameters that the architecture ties
    stay tied. ``saving`` is passed on to ``save_pretrained``.
    """
    for seed, name in enumerate(("base", "a", "b")):
        model = _network(kind)
        _fill(model, kind, seed)
        if kind.task == "generation":
            _set_generation(model, kind)
        model.to(dtype).eval().save_pretrained(folder / name, **saving)
        tokenizer(kind).save_pretrained(folder / name)


def _network(kind: Kind) -> nn.Module:
    import transformers as t

    if kind.name == "bert2gpt2":
        return _joined(kind, t.GPT2Config(vocab_size=VOCABULARY, **GPT2))
    if kind.name == "bert2bert":
        return _joined(kind, t.BertConfig(vocab_size=VOCABULARY, **SMALL, max_position_embeddings=POSITIONS))
    if kind.name == "llava":
        text = t.LlamaConfig(vocab_size=VOCABULARY, **kind.ids, **GROUPED, max_position_embeddings=POSITIONS)
        vision = t.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4, projection_dim=16)
        config = t.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=kind.special.index("<mask>"), **kind.ids
        )
        return t.LlavaForConditionalGeneration(config)
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, **kind.ids, **kind.settings}
    if kind.task == "classification":
        settings |= {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    return getattr(t, kind.model)(getattr(t, kind.config)(**settings))  # type: ignore[no-any-return]


def _joined(kind: Kind, decoder: Any) -> nn.Module:
    """Join a BERT encoder with a decoder."""
    import transformers as t

    encoder = t.BertConfig(vocab_size=VOCABULARY, **SMALL, max_position_embeddings=POSITIONS, pad_token_id=0)
    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.update(kind.ids)
    return t.EncoderDecoderModel(config)  # type: ignore[no-any-return]


def _fill(model: nn.Module, kind: Kind, seed: int) -> None:
    """Give every parameter the values of a base, moved by 0.4 of their scale for an expert (``seed`` above 0).

    They depend on the parameter's name and shape, so that each version of transformers makes the same model. A
    generator's matrices are so large that what it writes depends on what it reads.
    """
    matrices, vectors = (0.12, 0.12) if kind.task == "classification" else (0.35, 0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # sinusoidal positions
                continue
            scale = matrices if parameter.dim() > 1 else vectors
            start = 0.0 if parameter.dim() > 1 else parameter
            moved = 0.4 * _noise(name, seed, parameter) if seed else 0.0
            parameter.copy_(start + scale * (_noise(name, 0, parameter) + moved))


def _noise(name: str, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.randn(like.shape, generator=generator)


def _set_generation(model: Any, kind: Kind) -> None:
    """Give a generator settings of its own: it samples by default, and two tokens end its texts."""
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.max_new_tokens = True, 0.7, 0.9, 5
    for name, token in kind.ids.items():
        setattr(own, name, [token, STOP_WORD] if name == "eos_token_id" else token)


def tokenizer(kind: Kind) -> Any:
    """Make a word-level tokenizer that places special tokens as the architecture's own does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*kind.special, *WORDS))}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, double = {
        "pairs": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "pairs without types": ("<s> $A </s>", "<s> $A </s> $B </s>"),
        "pairs before the class token": ("$A </s> <s>:2", "$A </s> $B:1 </s>:1 <s>:2"),
        "running text": ("<s> $A", "<s> $A $B"),
        "source": ("$A </s>", "$A $B </s>"),
    }[kind.reads]
    special = [(token, words[token]) for token in ("<s>", "</s>")]
    fast.post_processor = processors.TemplateProcessing(single=single, pair=double, special_tokens=special)
    names = ["input_ids", "attention_mask"]
    if kind.reads in ("pairs", "pairs before the class token") and kind.name != "deberta_v2":
        names.insert(1, "token_type_ids")
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if kind.task == "classification":
        tokens |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    side = "left" if kind.name == "xlnet" else "right"
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_input_names=names, padding_side=side, model_max_length=POSITIONS - 8, **tokens
    )
