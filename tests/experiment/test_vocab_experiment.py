"""Whole merges of models whose tokens differ: what is written loads, its ids agree, and it scores what was reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Outcome
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table
from tests.vocabularies import FIM, IM_END, IM_START, bert, config_of, llama, without_tokenizer

Command = Callable[..., Outcome]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def llamas(workplace: Path) -> list[str]:
    """A padded base, a chat model whose answers end with its own token, and a code model; their merge to disk."""
    llama(workplace / "base", 0)
    llama(workplace / "chat", 1, [IM_START, IM_END], rows=259, eos=IM_END)
    llama(workplace / "code", 2, [FIM, IM_END])
    return ["models.base=./base", "models.experts=[./chat,./code]", "evaluate=false", "tracking=none"]


def row_of(folder: Path, name: str, token: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    row = AutoTokenizer.from_pretrained(folder).get_vocab()[token]
    return load_file(folder / "model.safetensors")[name][row]


def test_other_sizes_stop_a_merge_that_does_not_say_what_it_wants(
    mergelab_command: Command, llamas: list[str], workplace: Path
) -> None:
    outcome = mergelab_command(*llamas, "method=soup", "output=merged")
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.strip()]
    assert "the models' vocabularies differ in size (base 264, chat 259, code 264)" in line
    assert "models.vocab=base" in line
    assert "models.vocab=union" in line
    assert not (workplace / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["models.vocab=both"], "models.vocab='both': must be one of union, base, chat, code"),
        (["models.vocab=base", "models.base=null"], "models.vocab='base': there is no base model"),
        (["models.experts=[./code,./other]"], "257 is '<|fim|>' in code but '<|im_start|>' in other"),
        (["models.experts=[./code,./plain]", "models.vocab=union"], "plain has no tokenizer, and no other model with"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    mergelab_command: Command, llamas: list[str], workplace: Path, settings: list[str], said: str
) -> None:
    llama(workplace / "other", 3, [IM_START])
    without_tokenizer(llama(workplace / "plain", 4, rows=260))
    outcome = mergelab_command(*llamas, "method=soup", "output=merged", *settings)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_union_is_merged_by_token_and_loads_with_the_tokenizer_that_belongs_to_it(
    mergelab_command: Command, llamas: list[str], workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = mergelab_command(*llamas, "method=task_arithmetic", "models.vocab=union", "output=merged")
    assert outcome.code == 0, outcome.err
    model = AutoModelForCausalLM.from_pretrained(workplace / "merged")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "merged")
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 264
    assert tokenizer.convert_tokens_to_ids([IM_START, IM_END, FIM]) == [257, 258, 259]
    assert all(tokenizer.added_tokens_decoder[row].special for row in (256, 257, 258, 259))
    text = f"{IM_START}cat{IM_END}{FIM}"
    ids = tokenizer(text).input_ids
    assert [ids[0], *ids[-2:]] == [257, 258, 259]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat"
    # The config is the first expert's, and so are the roles of the special tokens.
    assert model.config.eos_token_id == tokenizer.eos_token_id == 258
    assert model.generation_config.eos_token_id == 258
    assert tokenizer.chat_template.startswith(IM_START)

    base, chat, code = (workplace / name for name in ("base", "chat", "code"))
    for name, weights in ((EMBEDDING, model.get_input_embeddings().weight), (HEAD, model.lm_head.weight)):
        a, b = (row_of(folder, name, "A") for folder in (chat, code))
        start = row_of(base, name, "A")
        shared = (row_of(chat, name, IM_END) + row_of(code, name, IM_END)) / 2
        expected = {
            "A": start + 0.3 * (a + b - 2 * start),
            IM_START: row_of(chat, name, IM_START),  # the base and code have it from chat: no task vector
            FIM: row_of(code, name, FIM),
            IM_END: shared + 0.3 * (row_of(chat, name, IM_END) + row_of(code, name, IM_END) - 2 * shared),
        }
        merged = {token: weights[tokenizer.convert_tokens_to_ids(token)].detach() for token in expected}
        torch.testing.assert_close(merged, expected)
        assert torch.equal(weights[260:].detach(), load_file(base / "model.safetensors")[name][260:])


def test_the_bases_tokens_keep_its_tokenizer_byte_for_byte_and_ids_of_lost_tokens_are_the_bases(
    mergelab_command: Command, llamas: list[str], workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (workplace / "chat" / "added_tokens.json").write_text(json.dumps({IM_START: 257, IM_END: 258}))
    outcome = mergelab_command(*llamas, "method=ties", "models.vocab=base", "output=merged")
    assert outcome.code == 0, outcome.err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (workplace / "merged" / name).read_bytes() == (workplace / "base" / name).read_bytes()
    assert not (workplace / "merged" / "chat_template.jinja").exists()
    assert not (workplace / "merged" / "added_tokens.json").exists()
    model = AutoModelForCausalLM.from_pretrained(workplace / "merged")
    assert model.config.vocab_size == 264
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 256
    original = load_file(workplace / "base" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(model.state_dict()[name][257:], original[name][257:])


def test_the_chat_template_is_the_chosen_models(mergelab_command: Command, llamas: list[str], workplace: Path) -> None:
    for vocab in ("base", "union"):
        settings = ["method=soup", f"models.vocab={vocab}", "save.tokenizer=code", f"output=in-{vocab}"]
        outcome = mergelab_command(*llamas, *settings)
        assert outcome.code == 0, outcome.err
        assert (workplace / f"in-{vocab}" / "chat_template.jinja").read_text().startswith(FIM)
        assert config_of(workplace / f"in-{vocab}")["eos_token_id"] == 256


def test_without_a_base_a_union_starts_from_the_first_expert(
    mergelab_command: Command, llamas: list[str], workplace: Path
) -> None:
    from transformers import AutoTokenizer

    outcome = mergelab_command(*llamas, "models.base=null", "models.vocab=union", "method=soup", "output=merged")
    assert outcome.code == 0, outcome.err
    chat, code, merged = (workplace / name for name in ("chat", "code", "merged"))
    assert AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids([IM_START, IM_END, FIM]) == [257, 258, 259]
    assert config_of(merged)["vocab_size"] == 260
    torch.testing.assert_close(
        row_of(merged, EMBEDDING, "A"), (row_of(chat, EMBEDDING, "A") + row_of(code, EMBEDDING, "A")) / 2
    )
    assert torch.equal(row_of(merged, EMBEDDING, IM_START), row_of(chat, EMBEDDING, IM_START))
    assert torch.equal(row_of(merged, EMBEDDING, FIM), row_of(code, EMBEDDING, FIM))


def test_tied_embeddings_in_shards_and_another_dtype(mergelab_command: Command, workplace: Path) -> None:
    from transformers import AutoModelForCausalLM

    for seed, (name, added) in enumerate({"base": [], "a": [FIM], "b": [IM_END, FIM]}.items()):
        llama(workplace / name, seed, added, rows=257 + len(added), tied=True, dtype=torch.bfloat16)
    settings = ["models.base=./base", "models.experts=[./a,./b]", "models.vocab=union", "evaluate=false"]
    settings += ["tracking=none", "save.max_shard_size=10kB", "save.dtype=float32", "output=merged", "method=soup"]
    outcome = mergelab_command(*settings)
    assert outcome.code == 0, outcome.err
    model = AutoModelForCausalLM.from_pretrained(workplace / "merged")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tuple(model.lm_head.weight.shape) == (259, 24)
    a, b = (row_of(workplace / name, EMBEDDING, FIM).float() for name in "ab")
    torch.testing.assert_close(model.lm_head.weight[257].detach(), (a + b) / 2)


def test_a_classifier_with_added_words_is_merged_by_token(mergelab_command: Command, workplace: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    bert(workplace / "base", 0, masked=True)
    bert(workplace / "a", 1)
    bert(workplace / "b", 2, ["dog"])
    settings = ["models.base=./base", "models.experts=[./a,./b]", "evaluate=false", "tracking=none"]
    for vocab, words in (("base", 11), ("union", 12)):
        outcome = mergelab_command(*settings, "method=soup", f"models.vocab={vocab}", f"output=in-{vocab}")
        assert outcome.code == 0, outcome.err
        model = AutoModelForSequenceClassification.from_pretrained(workplace / f"in-{vocab}")
        tokenizer = AutoTokenizer.from_pretrained(workplace / f"in-{vocab}")
        assert model.config.vocab_size == len(tokenizer) == words
        assert tokenizer.tokenize("the dog")[1] == ("dog" if vocab == "union" else "[UNK]")
        merged = model.get_input_embeddings().weight.detach()
        rows = [
            load_file(workplace / name / "model.safetensors")["bert.embeddings.word_embeddings.weight"] for name in "ab"
        ]
        torch.testing.assert_close(merged[:11], (rows[0] + rows[1][:11]) / 2)
        assert torch.equal(merged[11:], rows[1][11:words])
        assert model.config.architectures == ["BertForSequenceClassification"]


@pytest.fixture
def classifiers(bert_checkpoints: Mapping[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base, two experts, a copy ``c`` of the second with a token of its own, which is in the data, and the data."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    for name, repository in zip(("base", "a", "b"), (BERT_BASE, *BERT_RTE_EXPERTS[1:3]), strict=True):
        shutil.copytree(bert_checkpoints[repository], workplace / name)
    (workplace / "data").mkdir()
    table = glue_table("rte", 120, 1)
    longest = max(table["sentence1"].to_pylist()[0].lower().split(), key=len)
    pq.write_table(table, workplace / "data" / "validation.parquet")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "b")
    model = AutoModelForSequenceClassification.from_pretrained(workplace / "b")
    assert longest[:3] not in tokenizer.get_vocab()
    tokenizer.add_tokens([longest[:3]])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(workplace / "c")
    tokenizer.save_pretrained(workplace / "c")
    return ["models.base=./base", "task.data_dir=data", "method=soup", "tracking=none"]


def scores(folder: Path) -> list[float]:
    (file,) = folder.glob("outputs/runs/*/*/result.json")
    result = json.loads(file.read_text())
    shutil.rmtree(folder / "outputs")
    return [model["results"]["rte"]["report"]["accuracy"]["value"] for model in result["models"]]


def accuracy(folder: Path, data: Path) -> float:
    from transformers import pipeline

    pipe: Any = pipeline("text-classification", model=str(folder))
    table = pq.read_table(data / "validation.parquet")
    pairs = zip(table["sentence1"].to_pylist(), table["sentence2"].to_pylist(), strict=True)
    names = ["entailment", "not_entailment"]
    found = [names.index(pipe({"text": one, "text_pair": other})["label"]) for one, other in pairs]
    return sum(a == b for a, b in zip(found, table["label"].to_pylist(), strict=True)) / len(found)


def test_the_base_is_measured_with_its_own_tokens_whichever_expert_comes_first(
    mergelab_command: Command, classifiers: list[str], workplace: Path
) -> None:
    found = []
    for experts in ("{a: ./a, c: ./c}", "{c: ./c, a: ./a}"):
        outcome = mergelab_command(*classifiers, f"models.experts={experts}", "models.vocab=union", "eval.cache=false")
        assert outcome.code == 0, outcome.err
        found.append(scores(workplace)[0])
    assert found[0] == found[1]


@pytest.mark.parametrize("vocab", ["base", "union"])
def test_what_is_measured_in_the_merged_vocabulary_is_what_is_saved(
    mergelab_command: Command, classifiers: list[str], workplace: Path, vocab: str
) -> None:
    outcome = mergelab_command(*classifiers, "models.experts=[./a,./b]")
    assert outcome.code == 0, outcome.err
    before = scores(workplace)
    outcome = mergelab_command(*classifiers, "models.experts=[./a,./c]", f"models.vocab={vocab}", "output=merged")
    assert outcome.code == 0, outcome.err
    after = scores(workplace)
    assert accuracy(workplace / "merged", workplace / "data") == after[-1]
    assert accuracy(workplace / "c", workplace / "data") == after[2]
    if vocab == "base":  # the copy without its own token is the model that it was copied from
        assert after[-1] == before[-1]
    assert mergelab_command(*classifiers, "models.experts=[./a,./c]").code == 2
