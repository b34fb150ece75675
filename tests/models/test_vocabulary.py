"""Rows by token: which tokens a merged model has, at which ids, and what each model is read as there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergelab.config import VocabConfig
from mergelab.errors import ModelError
from mergelab.models.tokens import read_tokens
from mergelab.models.vocabulary import LoadedTokens, MergedVocabulary, check_vocabularies, merged_vocabulary
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.checkpoint import open_checkpoint
from tests.vocabularies import FIM, IM_END, IM_START, WORDS, bert, llama, without_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def opened(*folders: Path) -> list[Any]:
    return [open_checkpoint(folder, folder.name) for folder in folders]


def aligned(vocabulary: MergedVocabulary) -> AlignedModels:
    base, *experts = vocabulary.models
    return align(base, experts, adapt=vocabulary.adapt)


def stored(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name]


@pytest.fixture
def llamas(tmp_path: Path) -> list[Path]:
    """A padded base; a chat model with two tokens and no padding; a code model with one of these and one of its own."""
    return [
        llama(tmp_path / "base", 0),
        llama(tmp_path / "chat", 1, [IM_START, IM_END], rows=259),
        llama(tmp_path / "code", 2, [FIM, IM_END]),
    ]


def test_the_bases_tokens_are_matched_by_token_not_by_row(tmp_path: Path) -> None:
    base, other = bert(tmp_path / "base", 0), bert(tmp_path / "other", 1, ["dog"], reverse=True)
    vocabulary = merged_vocabulary(VocabConfig(source="base"), opened(base, other))
    assert vocabulary.size == len(WORDS)
    name = "bert.embeddings.word_embeddings.weight"
    read = aligned(vocabulary).experts[0].get(name)
    own = stored(other, name)
    order = [*range(5), *reversed(range(5, len(WORDS)))]
    torch.testing.assert_close(read, torch.stack([own[row] for row in order]), rtol=0, atol=0)


def test_what_a_model_lacks_of_the_bases_tokens_is_the_bases_row_exactly(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", 0, ["dog", "bird"])
    other = bert(tmp_path / "other", 1, ["bird"])
    half = {name: tensor.bfloat16() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(half, other / "model.safetensors", metadata={"format": "pt"})
    models = aligned(merged_vocabulary(VocabConfig(source="base"), opened(base, other)))
    name = "bert.embeddings.word_embeddings.weight"
    assert models.experts[0].dtype(name) == models.experts[0].get(name).dtype == torch.float32
    dog, bird = len(WORDS), len(WORDS) + 1
    assert torch.equal(models.experts[0].get(name)[dog], stored(base, name)[dog])
    assert torch.equal(models.experts[0].get(name)[bird], half[name][len(WORDS)].float())
    position = "bert.embeddings.position_embeddings.weight"  # has as many rows as there are words
    assert torch.equal(models.experts[0].get(position), half[position])


def test_what_one_expert_has_of_the_bases_tokens_is_not_read_into_the_other(tmp_path: Path) -> None:
    base, has = bert(tmp_path / "base", 0, ["dog"]), bert(tmp_path / "has", 1, ["dog"])
    lacks = bert(tmp_path / "lacks", 2)
    name = "bert.embeddings.word_embeddings.weight"
    for policy in ("base", "union"):
        models = aligned(merged_vocabulary(VocabConfig(source=policy), opened(base, has, lacks)))  # type: ignore[arg-type]
        assert torch.equal(models.experts[1].get(name)[-1], stored(base, name)[-1])
        assert torch.equal(models.experts[0].get(name)[-1], stored(has, name)[-1])


def test_padding_rows_are_the_bases_under_either_policy(llamas: list[Path]) -> None:
    base, chat, code = llamas
    for policy, first in (("base", 257), ("union", 260)):
        models = aligned(merged_vocabulary(VocabConfig(source=policy), opened(base, chat, code)))  # type: ignore[arg-type]
        for name in (EMBEDDING, HEAD):
            for source in (models.base, *models.experts):
                assert source is not None
                assert source.shape(name) == tuple(source.get(name).shape) == (264, 24)
                assert torch.equal(source.get(name)[first:], stored(base, name)[first:])
            assert torch.equal(models.experts[0].get(name)[:257], stored(chat, name)[:257])


def test_a_union_has_the_tokens_of_experts_in_order_at_the_ids_that_transformers_gives(llamas: list[Path]) -> None:
    from transformers import AutoTokenizer

    base, chat, code = llamas
    vocabulary = merged_vocabulary(VocabConfig(source="union"), opened(base, chat, code))
    new = {IM_START: 257, IM_END: 258, FIM: 259}
    assert {token: row for token, row in vocabulary.tokens.items() if row > 256} == new
    reference = AutoTokenizer.from_pretrained(base)
    reference.add_tokens([IM_START, IM_END, FIM], special_tokens=True)
    assert reference.get_vocab() == vocabulary.tokens == vocabulary.tokenizer().get_vocab()
    assert merged_vocabulary(VocabConfig(source="union"), opened(base, code, chat)).tokens[FIM] == 257


def test_a_token_that_models_lack_is_the_mean_of_those_that_have_it(llamas: list[Path]) -> None:
    base, chat, code = llamas
    models = aligned(merged_vocabulary(VocabConfig(source="union"), opened(base, chat, code)))
    assert models.base is not None
    for name in (EMBEDDING, HEAD):
        of_chat, of_code = stored(chat, name), stored(code, name)
        im_start, im_end, fim = of_chat[257], (of_chat[258] + of_code[258]) / 2, of_code[257]
        expected = {
            "base": [im_start, im_end, fim],
            "chat": [im_start, of_chat[258], fim],
            "code": [im_start, of_code[258], fim],
        }
        for source in (models.base, *models.experts):
            read = source.get(name)[257:260]
            assert torch.equal(read, torch.stack(expected[source.name])), (source.name, name)


def test_a_union_grows_where_there_is_no_padding_and_rounds_the_mean_once(tmp_path: Path) -> None:
    folders = [
        llama(tmp_path / name, seed, added, rows=257 + len(added), dtype=torch.bfloat16, tied=True)
        for seed, (name, added) in enumerate({"base": [], "a": [FIM], "b": [FIM], "c": [FIM]}.items())
    ]
    vocabulary = merged_vocabulary(VocabConfig(source="union"), opened(*folders))
    assert vocabulary.size == 258
    models = aligned(vocabulary)
    rows = [stored(folder, EMBEDDING)[257].float() for folder in folders[1:]]
    assert models.base is not None
    assert torch.equal(models.base.get(EMBEDDING)[257], ((rows[0] + rows[1] + rows[2]) / 3).bfloat16())
    assert HEAD not in models.names


def test_a_mean_has_the_same_bits_for_any_order_of_the_experts(tmp_path: Path) -> None:
    base, *experts = [llama(tmp_path / name, seed, [FIM] if seed else [], rows=258) for seed, name in enumerate("xabc")]
    rows = []
    for order in (experts, experts[::-1], [experts[1], experts[0], experts[2]]):
        models = aligned(merged_vocabulary(VocabConfig(source="union"), opened(base, *order)))
        assert models.base is not None
        rows.append(models.base.get(EMBEDDING)[257])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_an_output_bias_has_rows_by_token_too_and_pretraining_heads_stay_out(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", 0, masked=True)
    other = bert(tmp_path / "other", 1, ["dog"], masked=True)
    models = aligned(merged_vocabulary(VocabConfig(source="union"), opened(base, other)))
    name = "cls.predictions.bias"
    assert name in models.names
    assert models.base is not None
    assert models.base.get(name)[-1] == stored(other, name)[-1]
    assert torch.equal(models.experts[0].get(name), stored(other, name))
    classifier = bert(tmp_path / "classifier", 2, ["dog"])
    vocabulary = merged_vocabulary(VocabConfig(source="union"), opened(base, classifier))
    models = align(vocabulary.models[0], vocabulary.models[1:], backbone_prefix="bert.", adapt=vocabulary.adapt)
    assert not [key for key in models.names if key.startswith("cls.")]
    name = "bert.embeddings.word_embeddings.weight"
    assert models.base is not None
    assert torch.equal(models.base.get(name)[-1], stored(classifier, name)[-1])


def test_a_row_of_the_base_that_no_model_has_is_the_mean_of_its_rows(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", 0, [IM_START], rows=257)  # a token without a row, as an unresized model has
    other = llama(tmp_path / "other", 1, [FIM], rows=258)
    vocabulary = merged_vocabulary(VocabConfig(source="union"), opened(base, other))
    assert vocabulary.tokens[FIM] == 258
    models = aligned(vocabulary)
    assert models.base is not None
    torch.testing.assert_close(models.base.get(EMBEDDING)[257], stored(base, EMBEDDING).mean(0))
    assert torch.equal(models.base.get(EMBEDDING)[258], stored(other, EMBEDDING)[257])


def test_a_model_without_a_tokenizer_has_the_tokens_of_one_with_as_many_rows(llamas: list[Path]) -> None:
    base, chat, code = llamas
    expected = merged_vocabulary(VocabConfig(source="union"), opened(base, chat, code)).tokens
    plain = shutil.copytree(base, base.parent / "plain")
    without_tokenizer(plain)
    vocabulary = merged_vocabulary(VocabConfig(source="union"), opened(base, chat, code, plain))
    assert vocabulary.tokens == expected
    assert torch.equal(vocabulary.rows[3][:257], torch.arange(257))
    without_tokenizer(chat)
    with pytest.raises(ModelError, match="chat has no tokenizer, and no other model with 259 rows has one"):
        merged_vocabulary(VocabConfig(source="union"), opened(base, chat, code))


def test_tokenizers_are_read_from_whichever_files_there_are(tmp_path: Path) -> None:
    folder = bert(tmp_path / "fast", 0, ["dog"])
    tokens = {word: row for row, word in enumerate([*WORDS, "dog"])}
    assert read_tokens(folder) == tokens
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (slow / "added_tokens.json").write_text('{"dog": 11}')
    assert read_tokens(slow) == tokens
    (slow / "vocab.txt").unlink()
    (slow / "vocab.json").write_text('{"a": 0, "b": 1}')
    (slow / "added_tokens.json").unlink()
    (slow / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"2": {"content": "c", "special": true}}}')
    assert read_tokens(slow) == {"a": 0, "b": 1, "c": 2}
    (slow / "vocab.json").unlink()
    assert read_tokens(slow) is None
    (slow / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .*slow cannot be read"):
        read_tokens(slow)


def test_what_only_happens_to_have_as_many_rows_as_there_are_tokens_is_left_alone(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", 0, masked=True, hidden=len(WORDS))
    other = bert(tmp_path / "other", 1, masked=True, hidden=len(WORDS), reverse=True)
    models = aligned(merged_vocabulary(VocabConfig(source="union"), opened(base, other)))
    tensors = load_file(other / "model.safetensors")
    changed = {name for name in models.names if not torch.equal(models.experts[0].get(name), tensors[name])}
    assert changed == {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}


def test_a_module_gets_the_rows_and_the_ids_of_the_merged_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", 0)
    one, other = llama(tmp_path / "one", 1, [FIM]), llama(tmp_path / "other", 2, [IM_END], rows=258, eos=IM_END)
    vocabulary = merged_vocabulary(VocabConfig(source="union"), opened(base, one, other))
    module: Any = vocabulary.fit(AutoModelForCausalLM.from_pretrained(other), other)
    assert module.get_input_embeddings().weight.shape[0] == module.config.vocab_size == 264
    assert module.config.eos_token_id == vocabulary.tokens[IM_END] == 258
    with vocabulary.companions(other) as folder:
        assert '"eos_token_id": 258' in (folder / "generation_config.json").read_text()
    vocabulary = merged_vocabulary(VocabConfig(source="base"), opened(base, one, other))
    assert vocabulary.fit(AutoModelForCausalLM.from_pretrained(other), other).config.eos_token_id == 256


def test_sizes_that_differ_are_one_line_with_the_ways_out(llamas: list[Path]) -> None:
    with pytest.raises(ModelError) as error:
        check_vocabularies(opened(*llamas), has_base=True)
    assert str(error.value).startswith("the models' vocabularies differ in size (base 264, chat 259, code 264): ")
    assert "models.vocab=base merges by token" in str(error.value)
    assert "models.vocab=union merges by token" in str(error.value)
    with pytest.raises(ModelError) as error:
        check_vocabularies(opened(*llamas[1:]), has_base=False)
    assert "models.vocab=base" not in str(error.value)


def test_other_tokens_in_the_same_rows_are_an_error_and_further_ones_are_not(llamas: list[Path]) -> None:
    base, _, code = llamas
    check_vocabularies(opened(base, code), has_base=True)  # code's tokens are in padding rows of the base
    third = llama(base.parent / "third", 3, [IM_START, IM_END])
    message = r"the models' tokens differ in 1 row: 257 is '<\|fim\|>' in code but '<\|im_start\|>' in third: models"
    with pytest.raises(ModelError, match=message):
        check_vocabularies(opened(base, code, third), has_base=True)
    check_vocabularies(opened(base, code, without_tokenizer(third)), has_base=True)
    (code / "tokenizer.json").write_text("{}")  # a merge alone does not need it
    check_vocabularies(opened(base, code), has_base=True)


def test_tokens_are_compared_only_where_the_files_differ(llamas: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = llamas[0], llama(llamas[0].parent / "other", 3)

    def fail(_folder: Path) -> None:
        raise AssertionError

    monkeypatch.setattr("mergelab.models.vocabulary.read_tokens", fail)
    check_vocabularies(opened(base, other), has_base=True)


def test_a_tensor_is_read_in_other_rows_once_for_all_its_parts(llamas: list[Path]) -> None:
    source: Any = aligned(merged_vocabulary(VocabConfig(source="union"), opened(*llamas))).experts[0]
    assert source.get(EMBEDDING).data_ptr() == source.get(EMBEDDING).data_ptr()


@pytest.mark.parametrize(("added", "kept"), [([IM_START, IM_END], "base"), ([], "union")])
def test_rows_that_stay_in_place_are_not_copied(tmp_path: Path, added: Sequence[str], kept: str) -> None:
    base = llama(tmp_path / "base", 0, rows=257)
    other = llama(tmp_path / "other", 1, added, rows=257 + len(added))
    (checkpoint,) = opened(other)
    models = aligned(merged_vocabulary(VocabConfig(source=kept), [*opened(base), checkpoint]))  # type: ignore[arg-type]
    assert models.experts[0].get(EMBEDDING).data_ptr() == checkpoint.get(EMBEDDING).data_ptr()
    assert models.experts[0].shape(EMBEDDING) == (257, 24)


def test_tokens_of_a_pipeline_are_compared_with_those_of_a_folder(llamas: list[Path]) -> None:
    from transformers import AutoTokenizer

    base, _, code = llamas
    third = llama(base.parent / "third", 3, [IM_START, IM_END])
    config = {"vocab_size": 264}
    loaded = LoadedTokens("pipeline", config, AutoTokenizer.from_pretrained(third))
    check_vocabularies([*opened(base, third), loaded], has_base=True)
    with pytest.raises(ModelError, match=r"257 is '<\|fim\|>' in code but '<\|im_start\|>' in pipeline: vocab=union"):
        check_vocabularies([*opened(code), loaded], has_base=False, key="vocab")
    with pytest.raises(ModelError, match=r"differ in size \(base 264, module 300\)"):
        check_vocabularies([*opened(base), LoadedTokens("module", {"vocab_size": 300})], has_base=True)
    check_vocabularies([*opened(base), LoadedTokens("vision", {})], has_base=True)
