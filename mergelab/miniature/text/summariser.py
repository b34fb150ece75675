"""Make the tiny BERT-to-BERT, an encoder and a decoder with cross-attention, and its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mergelab.miniature.text.recipe import Summarisers
from mergelab.miniature.text.train import Loss, Training
from mergelab.miniature.tokenizer import CLS, MAX_LENGTH, PAD, SEP
from mergelab.miniature.train import EncodedTexts, batches, encode_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertConfig


def _config(numbers: Summarisers, vocabulary: int, positions: int, **more: Any) -> BertConfig:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=numbers.base.hidden,
        num_hidden_layers=numbers.base.layers,
        num_attention_heads=numbers.base.heads,
        intermediate_size=numbers.feed_forward,
        max_position_embeddings=positions,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=numbers.base.spread,
        pad_token_id=PAD,
        **more,
    )


def make_bert2bert(numbers: Summarisers, vocabulary: int) -> Any:
    """Make an untrained model, initialised from torch's global generator; both halves have equal word embeddings."""
    from transformers import EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig

    tokens = {"decoder_start_token_id": CLS, "bos_token_id": CLS, "eos_token_id": SEP, "pad_token_id": PAD}
    encoder = _config(numbers, vocabulary, MAX_LENGTH)
    decoder = _config(numbers, vocabulary, numbers.written, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, **tokens)
    model = EncoderDecoderModel(config)
    words = model.encoder.embeddings.word_embeddings.state_dict()
    model.decoder.bert.embeddings.word_embeddings.load_state_dict(words)
    model.generation_config = GenerationConfig(max_length=numbers.written, **tokens)
    return model


def bert2bert_training(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[tuple[str, ...]], *, batch: int, rate: float, seed: int
) -> Training:
    """Plan one pass of ``model`` over ``pairs`` of a text and its summary."""
    texts = encode_texts(tokenizer, [(text,) for text, _ in pairs])
    summaries = encode_texts(tokenizer, [(summary,) for _, summary in pairs])
    plan = batches(texts.lengths, batch, torch.Generator().manual_seed(seed))
    return Training(model, _loss(texts, summaries), plan, rate)


def _loss(texts: EncodedTexts, summaries: EncodedTexts) -> Loss:
    def loss(model: Any, rows: list[int]) -> Tensor:
        inputs, targets = texts.batch(rows)[0], summaries.batch(rows)[0]
        logits = model(
            input_ids=inputs,
            attention_mask=(inputs != PAD).long(),
            decoder_input_ids=targets[:, :-1],
            use_cache=False,
        ).logits
        return functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=PAD)

    return loss
