"""Rows that models lack, and padding, as ``models.vocab`` sets them: beside what the stored embeddings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergelab.config import VocabConfig
from mergelab.errors import ModelError
from mergelab.models.vocabulary import MergedVocabulary, merged_vocabulary
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint
from tests.vocabularies import FIM, IM_END, IM_START, llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = ("base", "chat", "code")
START, END, HOLE = 257, 258, 257  # rows: of chat's two tokens, and of code's own


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with seven rows that are no tokens', and experts that have tokens in addition."""
    folder = tmp_path_factory.mktemp("rows")
    llama(folder / "base", 0)
    llama(folder / "chat", 1, [IM_START, IM_END], rows=259)
    llama(folder / "code", 2, [FIM, IM_END])
    return folder


def planned(home: Path, **settings: Any) -> MergedVocabulary:
    models = [open_checkpoint(home / name, name) for name in NAMES]
    return merged_vocabulary(VocabConfig.model_validate(settings), models, NAMES)


def read(vocabulary: MergedVocabulary, key: str = EMBEDDING) -> dict[str, Tensor]:
    base, *experts = vocabulary.models
    models = align(base, experts, adapt=vocabulary.adapt)
    assert models.base is not None
    return {name: source.get(key) for name, source in zip(NAMES, [models.base, *models.experts], strict=True)}


def stored(home: Path, name: str, key: str = EMBEDDING) -> Tensor:
    return load_file(home / name / "model.safetensors")[key]


@pytest.mark.parametrize("key", [EMBEDDING, HEAD])
def test_rows_without_token_are_dropped_and_the_multiple_is_filled_with_the_mean(home: Path, key: str) -> None:
    vocabulary = planned(home, source="base", padding="drop", pad_to_multiple_of=100)
    assert (vocabulary.size, vocabulary.count) == (300, 257)
    for name, rows in read(vocabulary, key).items():
        own = stored(home, name, key)[:257]
        assert torch.equal(rows[:257], own)
        torch.testing.assert_close(rows[257:], own.double().mean(0).float().expand(43, -1), rtol=0, atol=1e-7)


def test_kept_rows_are_counted_before_the_multiple(home: Path) -> None:
    vocabulary = planned(home, source="base", pad_to_multiple_of=132)
    assert (vocabulary.size, vocabulary.count) == (264, 264)
    rows = read(planned(home, source="base", pad_to_multiple_of=10))
    assert torch.equal(rows["chat"][257:264], stored(home, "base")[257:264])
    torch.testing.assert_close(rows["chat"][264:], rows["chat"][:264].mean(0).expand(6, -1), rtol=0, atol=1e-7)


def test_an_experts_tokens_keep_their_rows_and_who_lacks_one_has_the_firsts_or_the_mean(home: Path) -> None:
    chat, code = stored(home, "chat"), stored(home, "code")
    vocabulary = planned(home, source="code", first="chat", padding="drop")
    assert vocabulary.tokens[FIM] == HOLE
    assert vocabulary.own.folder == home / "code"
    rows = read(vocabulary)
    assert torch.equal(rows["code"], code[:259])
    assert torch.equal(rows["base"][END], chat[END])
    assert torch.equal(rows["base"][HOLE], code[HOLE])  # the first lacks it
    rows = read(planned(home, source="code", first="chat", lacking="mean", padding="drop"))
    assert torch.equal(rows["base"][END], (chat[END] + code[END]) / 2)


def test_the_first_models_tokens_come_first_in_a_union(home: Path) -> None:
    assert planned(home, source="union").tokens[IM_START] == 257
    vocabulary = planned(home, source="union", first="code", padding="drop")
    assert [vocabulary.tokens[token] for token in (FIM, IM_END, IM_START)] == [257, 258, 259]
    assert vocabulary.tokenizer().get_vocab() == vocabulary.tokens


def test_a_token_that_no_model_has_a_row_for_is_zero_or_the_mean(home: Path) -> None:
    vocabulary = planned(home, source="base", padding="drop", tokens=[{"token": "<|new|>"}])
    new = vocabulary.tokens["<|new|>"]
    assert new == 257
    assert all(torch.equal(rows[new], torch.zeros(24)) for rows in read(vocabulary).values())
    chosen = [{"token": "<|new|>", "model": "chat", "like": IM_START}]
    rows = read(planned(home, source="base", padding="drop", tokens=chosen))
    assert all(torch.equal(each[new], stored(home, "chat")[START]) for each in rows.values())


@pytest.mark.parametrize("unknown", ["zero", "mean"])
def test_an_experts_token_without_a_row_is_zero_or_the_mean(home: Path, tmp_path: Path, unknown: Any) -> None:
    llama(tmp_path / "base", 0, rows=257)
    llama(tmp_path / "one", 3, [IM_END], rows=258)
    models = [open_checkpoint(tmp_path / name, name) for name in ("base", "one")]
    tokens = [{"token": "<|a|>", "model": "one", "like": IM_END}]
    policy = VocabConfig.model_validate({"source": "base", "unknown": unknown, "padding": "drop", "tokens": tokens})
    vocabulary = merged_vocabulary(policy, models, ("base", "one"))
    unset = MergedVocabulary(**{**vars(vocabulary), "chosen": {}})
    base, *experts = unset.models
    found = align(base, experts, adapt=unset.adapt).experts[0].get(EMBEDDING)[257]
    expected = stored(tmp_path, "base").mean(0) if unknown == "mean" else torch.zeros(24)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_row_that_is_set_everywhere_takes_the_place_of_what_models_have(home: Path) -> None:
    chosen = [
        {"token": IM_END, "model": "chat", "row": 5, "everywhere": True},
        {"token": FIM, "everywhere": True},
        {"token": IM_START, "model": "code", "like": FIM},
    ]
    vocabulary = planned(home, source="union", padding="drop", tokens=chosen)
    at = vocabulary.tokens
    for name, rows in read(vocabulary).items():
        assert torch.equal(rows[at[IM_END]], stored(home, "chat")[5])
        assert torch.equal(rows[at[FIM]], torch.zeros(24))
        of = stored(home, "chat")[START] if name == "chat" else stored(home, "code")[HOLE]
        assert torch.equal(rows[at[IM_START]], of)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ({"token": "x", "model": "base", "like": IM_END}, "'x': base has no token '<|im_end|>'"),
        ({"token": "x", "model": "chat", "row": 259}, "'x': row=259: chat has 259 rows"),
    ],
)
def test_rows_that_are_not_there_are_refused(home: Path, token: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        planned(home, source="base", tokens=[token])
    assert said in str(caught.value)


def test_what_rows_are_made_of_is_part_of_the_hash(home: Path) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"lacking": "mean"},
        {"unknown": "zero"},
        {"tokens": [{"token": IM_END}]},
        {"tokens": [{"token": IM_END, "model": "chat"}]},
    ]
    assert len({planned(home, source="union", **each).digest for each in settings}) == len(settings)
