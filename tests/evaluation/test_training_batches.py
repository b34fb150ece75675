"""Texts as models that write are taught them: what they are given is what transformers makes of a text with labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.evaluation.training_batches import NONE, TeacherForced, teacher_forced
from mergelab.models.encoder_decoder import warm_start
from mergelab.models.tokens import decoder_tokenizer, load_tokenizer
from mergelab.tasks.data import TaskData, load_data
from mergelab.tasks.loading import load_task
from tests.models import pairs

CHATS = [
    "the cat sat on the mat .",
    "the dog",
    "this is really a long text and it was long .",
    "a mat was on the mat .",
]
SUMMARIES = ["the cat sat .", "dog", "this is long", "it was a mat"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def summaries(tmp_path: Path) -> TaskData:
    (tmp_path / "data").mkdir()
    table = pa.table({"id": ["1", "2", "3", "4"], "dialogue": CHATS, "summary": SUMMARIES})
    pq.write_table(table, tmp_path / "data" / "validation.parquet")
    return load_data(load_task("samsum"), data_dir=tmp_path / "data")


@pytest.fixture
def text(tmp_path: Path) -> TaskData:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": ["", *CHATS]}), tmp_path / "data" / "test.parquet")
    return load_data(replace(load_task("wikitext"), join=None), data_dir=tmp_path / "data")


def losses(model: Any, texts: TeacherForced, batch_tokens: int) -> dict[int, float]:
    """−log p of each text's tokens, added up, by its position."""
    found = {}
    for members, batch in texts.batches(batch_tokens):
        labels = batch["labels"]
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        nll = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=NONE, reduction="none").sum(1)
        found |= dict(zip(members.tolist(), nll.tolist(), strict=True))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 100])
@pytest.mark.parametrize("kind", ["bert2bert", "bert2gpt2", "t5", "bart"])
def test_an_answer_behind_an_encoder_has_the_loss_that_transformers_gives_it(
    tmp_path: Path, summaries: TaskData, kind: str, batch_tokens: int
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    if kind == "bert2gpt2":
        folder = warm_start(pairs.bert(tmp_path / "a"), pairs.gpt2(tmp_path / "b"), where="models.base")
    else:
        folder = getattr(pairs, kind)(tmp_path / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    reads, writes = load_tokenizer([folder], "m"), load_tokenizer([decoder_tokenizer(folder)], "m")
    texts = teacher_forced(summaries, model.config, reads, writes_with=writes)
    assert len(texts) == 4
    found = losses(model, texts, batch_tokens)
    end = model.config.eos_token_id
    for at, (chat, summary) in enumerate(zip(CHATS, SUMMARIES, strict=True)):
        ids = writes(summary).input_ids
        labels = torch.tensor([ids if ids[-1] == end else [*ids, end]])
        inputs = {"input_ids": torch.tensor([reads(chat).input_ids]), "labels": labels}
        if kind == "bert2gpt2":  # transformers masks the first token, as it is the one that it pads with
            inputs["decoder_attention_mask"] = torch.ones_like(labels)
        with torch.no_grad():
            own = model(**inputs).loss.item() * labels.shape[1]
        assert found[at] == pytest.approx(own, rel=1e-4)


def test_behind_a_prompt_only_the_answer_and_the_end_are_taught(tmp_path: Path, summaries: TaskData) -> None:
    from transformers import AutoModelForCausalLM

    folder = pairs.gpt2(tmp_path / "gpt2", n_positions=100)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer([folder], "m")
    found = losses(model, teacher_forced(summaries, model.config, tokenizer), 1000)
    for at, (chat, summary) in enumerate(zip(CHATS, SUMMARIES, strict=True)):
        prompt, answer = tokenizer(chat).input_ids, [*tokenizer(summary).input_ids, 256]
        labels = torch.tensor([[NONE] * len(prompt) + answer])
        with torch.no_grad():
            own = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        assert found[at] == pytest.approx(own, rel=1e-4)


def test_of_running_text_every_token_but_the_first_is_taught(tmp_path: Path, text: TaskData) -> None:
    from transformers import AutoModelForCausalLM

    folder = pairs.gpt2(tmp_path / "gpt2", n_positions=30)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer([folder], "m")
    texts = teacher_forced(text, model.config, tokenizer)
    assert len(texts) == 4  # nothing follows in an empty one
    found = losses(model, texts, 1000)
    for at, chat in enumerate(CHATS):
        ids = torch.tensor([tokenizer(chat).input_ids[:30]])
        with torch.no_grad():
            own = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        assert found[at] == pytest.approx(own, rel=1e-4)


def test_what_is_too_long_is_cut_on_each_side(summaries: TaskData, tmp_path: Path) -> None:
    folder = pairs.bert2bert(tmp_path / "model")
    config, tokenizer = pairs.bert_config(), load_tokenizer([folder], "m")
    config.is_encoder_decoder, config.decoder_start_token_id = True, 2
    rows = teacher_forced(summaries, config, tokenizer, max_length=4).rows
    assert max(len(row["input_ids"]) for row in rows) == max(len(row["decoder_input_ids"]) for row in rows) == 4
    alone = pairs.gpt2_config(n_positions=10)
    bytes_of = load_tokenizer([pairs.gpt2(tmp_path / "gpt2")], "m")
    (kept,) = teacher_forced(summaries, alone, bytes_of).rows  # of the others the prompt fills all positions
    assert len(kept["input_ids"]) == 10
    assert np.count_nonzero(kept["labels"] != NONE) == 10 - len("the dog")


def test_examples_without_answers_teach_nothing(summaries: TaskData, tmp_path: Path) -> None:
    tokenizer = load_tokenizer([pairs.gpt2(tmp_path / "gpt2")], "m")
    with pytest.raises(ConfigError, match="samsum: its examples have no answers"):
        teacher_forced(replace(summaries, references=None), pairs.gpt2_config(), tokenizer)


def test_rows_are_padded_with_tokens_that_each_side_has(tmp_path: Path, summaries: TaskData) -> None:
    folder = warm_start(pairs.bert(tmp_path / "a"), pairs.gpt2(tmp_path / "b"), where="models.base")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    reads, writes = load_tokenizer([folder], "m"), load_tokenizer([decoder_tokenizer(folder)], "m")
    ((_, batch),) = teacher_forced(summaries, config, reads, writes_with=writes).batches(10_000)

    def padding(name: str) -> Tensor:
        mask = "decoder_attention_mask" if name != "input_ids" else "attention_mask"
        return batch[name][batch[mask] == 0].unique()

    assert padding("input_ids").tolist() == [0]
    assert padding("decoder_input_ids").tolist() == [256]
    assert padding("labels").tolist() == [NONE]
