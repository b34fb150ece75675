"""MergeSession starts: an encoder and a decoder joined as transformers does it, with what generation needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergelab.cache import cache_dir
from mergelab.errors import ModelError
from mergelab.models.encoder_decoder import newly_initialised, warm_start
from tests.models import pairs

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def opened(folder: Path) -> Any:
    from transformers import EncoderDecoderModel

    return EncoderDecoderModel.from_pretrained(folder)


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "narrow gpt2"])
def test_a_warm_start_is_transformers_own_bit_for_bit(tmp_path: Path, decoder: str) -> None:
    from transformers import EncoderDecoderModel

    first = pairs.bert(tmp_path / "encoder", 1)
    if decoder == "bert":
        second = pairs.bert(tmp_path / "d", 2)
    else:
        second = pairs.gpt2(tmp_path / "d", 2, n_embd=16 if decoder == "gpt2" else 8)
    folder = warm_start(first, second, where="models.base", seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        own = EncoderDecoderModel.from_encoder_decoder_pretrained(first, second)
    found = opened(folder).state_dict()
    assert found.keys() == own.state_dict().keys()
    assert [name for name, value in own.state_dict().items() if not torch.equal(value, found[name])] == []
    assert any(name.startswith("enc_to_dec_proj") for name in found) == (decoder == "narrow gpt2")


def test_what_no_checkpoint_has_is_known_and_drawn_with_the_seed(tmp_path: Path) -> None:
    first, second = pairs.bert(tmp_path / "a", 1), pairs.gpt2(tmp_path / "b", 2, n_embd=8)
    one, again, other = (warm_start(first, second, where="models.base", seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    new = newly_initialised(one)
    kinds = ("crossattention", "ln_cross_attn", "encoder.pooler", "enc_to_dec_proj")  # a masked LM has no pooler
    assert new == {name for name in weights(one) if any(kind in name for kind in kinds)}
    drawn, drawn_again = weights(one), weights(other)
    differing = {name for name in drawn if not torch.equal(drawn[name], drawn_again[name])}
    assert differing
    assert differing <= new
    assert {name for name in new - differing if not name.endswith("bias")} == {
        n for n in new if n.endswith("ln_cross_attn.weight")
    }


def test_a_decoder_of_a_sequence_to_sequence_model_brings_its_embeddings_and_its_cross_attention(
    tmp_path: Path,
) -> None:
    from transformers import BartForConditionalGeneration

    first, second = pairs.bert(tmp_path / "a", 1), pairs.bart(tmp_path / "b", 2)
    folder = warm_start(first, second, where="models.base")
    assert newly_initialised(folder) == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    joined, bart = opened(folder), BartForConditionalGeneration.from_pretrained(second)
    decoder = joined.decoder.model.decoder.state_dict()
    assert all(torch.equal(value, decoder[name]) for name, value in bart.model.decoder.state_dict().items())
    assert torch.equal(joined.decoder.lm_head.weight, bart.lm_head.weight)
    states, tokens = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 6, 7]])
    with torch.no_grad():
        expected = bart(encoder_outputs=(states,), decoder_input_ids=tokens).logits
        found = joined(encoder_outputs=(states,), decoder_input_ids=tokens).logits
    torch.testing.assert_close(found, expected)
    assert joined.generation_config.forced_eos_token_id == 3


def test_parts_of_a_saved_encoder_decoder_are_taken_with_what_they_have_learnt(tmp_path: Path) -> None:
    whole, plain = pairs.bert2bert(tmp_path / "whole", 1), pairs.bert(tmp_path / "plain", 2)
    own = weights(whole)
    its_decoder = warm_start(plain, whole, where="models.base")
    found = weights(its_decoder)
    assert all(torch.equal(found[name], own[name]) for name in own if name.startswith("decoder."))
    assert torch.equal(
        found["encoder.embeddings.word_embeddings.weight"], weights(plain)["bert.embeddings.word_embeddings.weight"]
    )
    assert not any(name.startswith("decoder.") for name in newly_initialised(its_decoder))
    generation = opened(its_decoder).generation_config
    assert (generation.num_beams, generation.length_penalty, generation.max_length) == (3, 2.0, 12)
    its_encoder = warm_start(whole, plain, where="models.base")
    found = weights(its_encoder)
    assert all(torch.equal(found[name], own[name]) for name in own if name.startswith("encoder."))
    assert set(newly_initialised(its_encoder)) == {name for name in own if "crossattention" in name}
    again = warm_start(plain, its_encoder, where="models.base")  # still untrained
    assert {name for name in own if "crossattention" in name} <= newly_initialised(again)


@pytest.mark.parametrize(
    ("decoder", "given", "expected"),
    [
        (pairs.bert, {}, (2, 3, 0)),
        (pairs.gpt2, {}, (256, 256, 256)),
        (pairs.bart, {}, (3, 3, 0)),
        (pairs.bert2bert, {}, (2, 3, 0)),
        (pairs.gpt2, {"pad_token_id": 0, "decoder_start_token_id": 7}, (7, 256, 0)),
    ],
)
def test_tokens_to_start_to_end_and_to_pad_with_are_set_wherever_transformers_looks(
    tmp_path: Path, decoder: Callable[[Path], Path], given: dict[str, int], expected: tuple[int, int, int]
) -> None:
    folder = warm_start(pairs.bert(tmp_path / "a"), decoder(tmp_path / "b"), where="models.base", token_ids=given)
    model = opened(folder)
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    assert tuple(getattr(model.config, name) for name in names) == expected
    assert tuple(getattr(model.generation_config, name) for name in names) == expected
    assert model.config.vocab_size == model.config.decoder.vocab_size
    ids = torch.tensor([[2, 5, 6, 3]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=1)
    assert written[0, 0] == expected[0]
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_each_side_has_its_own_tokenizer_where_they_differ(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first, second = pairs.bert(tmp_path / "a"), pairs.gpt2(tmp_path / "b")
    folder = warm_start(first, second, where="models.base")
    assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids == [2, 5, 6, 3]
    writes = AutoTokenizer.from_pretrained(folder, subfolder="decoder_tokenizer")
    assert writes.decode(AutoTokenizer.from_pretrained(second)("a cat").input_ids) == "a cat"
    assert not (warm_start(first, pairs.bert(tmp_path / "c", 4), where="models.base") / "decoder_tokenizer").exists()


def without_tokens(folder: Path) -> Path:
    for file in [*folder.glob("*token*"), *folder.glob("vocab*")]:
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("encoder", "decoder", "given", "said"),
    [
        (pairs.gpt2, pairs.bert, {}, r"models\.base\.encoder: a is a decoder-only model \(gpt2\)"),
        (pairs.t5, pairs.bert, {}, r"models\.base\.encoder: a is a sequence-to-sequence model \(t5\)"),
        (pairs.bert, pairs.t5, {}, r"models\.base\.decoder: b cannot be a decoder: transformers has no causal t5"),
        (
            pairs.bert,
            "llama",
            {},
            r"models\.base\.decoder: b cannot be a decoder: llama models have no cross-attention",
        ),
        (pairs.bert, "narrow", {}, r"models\.base: the encoder gives 16 features .* cross-attention takes 12"),
        (pairs.bert, "no tokens", {}, r"models\.base: the decoder b does not say which .* decoder_start token; say"),
        (pairs.bert, "no tokens", {"decoder_start_token_id": 1}, r"models\.base: the decoder b does not .* pad token"),
        (pairs.bert, pairs.bert, {"pad_token_id": 99}, r"models\.base\.pad_token_id=99: the decoder b has 25 tokens"),
    ],
)
def test_what_cannot_be_joined_is_one_line_that_names_it(
    tmp_path: Path, encoder: Any, decoder: Any, given: dict[str, int], said: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    first, place = encoder(tmp_path / "a"), tmp_path / "b"
    if decoder == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        second = pairs.saved(place, lambda: LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)))
    elif decoder == "narrow":
        second = pairs.bert(place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "cross_attention_hidden_size": 12}))
    elif decoder == "no tokens":
        second = without_tokens(pairs.bert(place, pad_token_id=None))
    else:
        second = decoder(place)
    with pytest.raises(ModelError, match=said) as error:
        warm_start(first, second, where="models.base", token_ids=given)
    assert "\n" not in str(error.value)
    assert [path for path in (cache_dir() / "encoder-decoders").iterdir() if path.is_dir()] == []


def test_another_weight_or_setting_makes_another_folder_and_the_same_ones_do_not(tmp_path: Path) -> None:
    first, second = pairs.bert(tmp_path / "a"), pairs.bert(tmp_path / "b")
    folder = warm_start(first, second, where="models.base")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm_start(second, first, where="models.experts.x") == folder  # the same content
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert warm_start(first, second, where="models.base", token_ids={"eos_token_id": 4}) != folder
    pairs.bert(second, 7)
    assert warm_start(first, second, where="models.base") != folder


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from transformers import EncoderDecoderModel

    first, second = pairs.bert(tmp_path / "a"), pairs.bert(tmp_path / "b")

    def full(_model: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(EncoderDecoderModel, "save_pretrained", full)
        with pytest.raises(ModelError, match=r"cannot be written: .*No space left"):
            warm_start(first, second, where="models.base")
    assert [path for path in (cache_dir() / "encoder-decoders").iterdir() if path.is_dir()] == []
    assert opened(warm_start(first, second, where="models.base"))
