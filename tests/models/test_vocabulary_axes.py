"""A model whose tokens are in another order is read as the model it is, for every tensor and in whatever dimension."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergelab.config import VocabConfig
from mergelab.errors import ModelError
from mergelab.models.vocabulary import merged_vocabulary, vocabulary_size
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint

SPECIAL = ["<pad>", "<unk>", "</s>"]
WORDS = [*SPECIAL, *(f"w{number}" for number in range(13))]
SIZE = len(WORDS)  # also the hidden size, so that square matrices are everywhere
ORDER = [0, 1, 2, *range(SIZE - 1, 2, -1)]

SMALL = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {
    **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in (("layers", 1), ("ffn_dim", SIZE))},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": SIZE, "max_position_embeddings": SIZE},
    **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None},
}
T5 = {"d_model": SIZE, "d_kv": 8, "d_ff": SIZE, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BERT_HEAD = {"cls.predictions.bias": 0, "cls.predictions.decoder.bias": 0}

# The class, its config's settings, and what of it has an entry for each token: the names and the dimensions.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "bart": ("BartForConditionalGeneration", BART, {"model.shared.weight": 0, "final_logits_bias": 1}),
    "marian": (
        "MarianMTModel",
        {**BART, "decoder_vocab_size": SIZE, "bos_token_id": None},
        {"model.shared.weight": 0, "final_logits_bias": 1},
    ),
    "pegasus": ("PegasusForConditionalGeneration", BART, {"model.shared.weight": 0, "final_logits_bias": 1}),
    "t5": ("T5ForConditionalGeneration", T5, {"shared.weight": 0}),
    "untied t5": (
        "T5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False},
        {"shared.weight": 0, "lm_head.weight": 0},
    ),
    "bert": (
        "BertForMaskedLM",
        {**SMALL, "max_position_embeddings": SIZE},
        {"bert.embeddings.word_embeddings.weight": 0, **BERT_HEAD},
    ),
    "roberta": (
        "RobertaForMaskedLM",
        {**SMALL, "max_position_embeddings": SIZE},
        {"roberta.embeddings.word_embeddings.weight": 0, "lm_head.bias": 0},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": SIZE, "hidden_dim": SIZE, "n_layers": 1, "n_heads": 2, "max_position_embeddings": SIZE},
        {"distilbert.embeddings.word_embeddings.weight": 0, "vocab_projector.bias": 0},
    ),
    "electra": (
        "ElectraForMaskedLM",
        {**SMALL, "embedding_size": SIZE, "max_position_embeddings": SIZE},
        {"electra.embeddings.word_embeddings.weight": 0, "generator_lm_head.bias": 0},
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        {"d_model": SIZE, "d_inner": SIZE, "n_layer": 1, "n_head": 2},
        {"transformer.word_embedding.weight": 0, "lm_loss.bias": 0},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": SIZE, "n_inner": SIZE, "n_layer": 1, "n_head": 2, "n_positions": SIZE},
        {"transformer.wte.weight": 0},
    ),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": SIZE, "n_inner": SIZE, "n_layer": 1, "n_head": 2, "n_positions": SIZE, "rotary_dim": 4},
        {"transformer.wte.weight": 0, "lm_head.weight": 0, "lm_head.bias": 0},
    ),
    "llama": (
        "LlamaForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"model.embed_tokens.weight": 0, "lm_head.weight": 0},
    ),
    "neox": (
        "GPTNeoXForCausalLM",
        {**SMALL, "max_position_embeddings": SIZE, "tie_word_embeddings": False},
        {"gpt_neox.embed_in.weight": 0, "embed_out.weight": 0},
    ),
}


def tokenizer(folder: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def saved(folder: Path, kind: str, *, seed: int = 0, words: Sequence[str] = WORDS) -> Path:
    """Save a model without zeros or ones, and its tokenizer."""
    import transformers

    name, settings, _ = KINDS[kind]
    cls = getattr(transformers, name)
    sizes = {key: len(words) for key in ("vocab_size", "decoder_vocab_size") if key in settings or key == "vocab_size"}
    torch.manual_seed(seed)
    model = cls(cls.config_class(**{**settings, **sizes}))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(folder)
    tokenizer(folder, words)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def permuted(folder: Path, kind: str) -> Path:
    """Bring the tokens of a saved model into `ORDER`, with everything that belongs to them."""
    axes = KINDS[kind][2]
    tensors = stored(folder)
    assert axes.keys() & tensors.keys()
    write(
        folder,
        {
            name: torch.from_numpy(np.take(tensor.numpy(), ORDER, axis=axes[name])) if name in axes else tensor
            for name, tensor in tensors.items()
        },
    )
    tokenizer(folder, [WORDS[row] for row in ORDER])
    return folder


def read_by_token(*folders: Path, policy: str = "base") -> list[Any]:
    vocabulary = merged_vocabulary(
        VocabConfig(source=policy), [open_checkpoint(folder, folder.name) for folder in folders]
    )
    models = align(vocabulary.models[0], vocabulary.models[1:], backbone_prefix="", adapt=vocabulary.adapt)
    return [models.base, *models.experts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_its_tokens_in_another_order_is_read_as_the_model_it_is(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind)
    other = permuted(saved(tmp_path / "other", kind), kind)
    changed = [name for name, tensor in stored(base).items() if not torch.equal(tensor, stored(other)[name])]
    assert set(changed) == KINDS[kind][2].keys() & stored(base).keys()
    _, expert = read_by_token(base, other)
    for name, tensor in stored(base).items():
        assert torch.equal(expert.get(name), tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_has_the_entries_of_new_tokens_in_every_tensor(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind)
    other = saved(tmp_path / "other", kind, seed=1, words=[*WORDS, "new", "newer"])
    models = read_by_token(base, other, policy="union")
    axes = KINDS[kind][2]
    for name, tensor in stored(base).items():
        own = stored(other)[name]
        first, second = (np.asarray(model.get(name)) for model in models)
        assert first.shape == second.shape == tuple(own.shape)
        np.testing.assert_array_equal(second, own.numpy())
        if name in axes:
            common, new = np.split(first, [SIZE], axis=axes[name])
            np.testing.assert_array_equal(common, tensor.numpy())
            np.testing.assert_array_equal(new, np.take(own.numpy(), [SIZE, SIZE + 1], axis=axes[name]))


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "roberta", "llama", "xlnet"])
@pytest.mark.parametrize("policy", ["base", "union"])
def test_the_saved_config_says_the_number_of_rows_wherever_it_says_one(kind: str, policy: str, tmp_path: Path) -> None:
    import transformers

    base = saved(tmp_path / "base", kind)
    other = saved(tmp_path / "other", kind, seed=1, words=[*WORDS, "new", "newer"])
    vocabulary = merged_vocabulary(VocabConfig(source=policy), [open_checkpoint(folder) for folder in (base, other)])
    models = align(vocabulary.models[0], vocabulary.models[1:], backbone_prefix="", adapt=vocabulary.adapt)
    for like in (base, other):
        with vocabulary.companions(like) as folder:
            tensors = {name: models.experts[0].get(name).clone() for name in stored(other)}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            said = json.loads((folder / "config.json").read_text())
            assert {said[key] for key in said if key.endswith("vocab_size") and key != "type_vocab_size"} == {
                vocabulary.size
            }
            cls = getattr(transformers, KINDS[kind][0])
            _, info = cls.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert not info["mismatched_keys"]


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 5}, 5),
        ({"text_config": {"vocab_size": 7}, "vocab_size": 5}, 7),
        ({"llm_config": {"vocab_size": 7}, "vision_config": {"hidden_size": 3}}, 7),
        ({"thinker_config": {"text_config": {"vocab_size": 7}}}, 7),
        ({"a": {"vocab_size": 7}, "b": {"vocab_size": 8}}, None),
        ({"encoder": {"vocab_size": 7}, "decoder": {"vocab_size": 7}}, None),
    ],
)
def test_the_number_of_rows_is_found_where_it_is_nested(config: Mapping[str, Any], size: int | None) -> None:
    assert vocabulary_size(config) == size


def without_class(folder: Path) -> None:
    """Make a folder's model one that transformers does not have."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "architectures": ["MyForCausalLM"]}))


def test_what_cannot_be_decided_is_one_line_and_what_differs_in_size_is_decided(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    other = permuted(saved(tmp_path / "other", "llama"), "llama")
    longer = saved(tmp_path / "longer", "llama", seed=1, words=[*WORDS, "new"])
    for folder in (base, other, longer):
        without_class(folder)
        size = SIZE + (folder == longer)
        write(folder, stored(folder) | {"odd.projection": torch.randn(3, size)})
    with pytest.raises(
        ModelError, match=r"^base: model\.layers\.0.* of shape .16. cannot be merged by token"
    ) as caught:
        read_by_token(base, other)
    assert len(str(caught.value)) < 400
    models = read_by_token(base, longer, policy="union")
    assert torch.equal(models[1].get("odd.projection"), stored(longer)["odd.projection"])
    assert torch.equal(models[0].get("odd.projection")[:, :SIZE], stored(base)["odd.projection"])
    assert torch.equal(models[0].get("odd.projection")[:, SIZE], stored(longer)["odd.projection"][:, SIZE])
