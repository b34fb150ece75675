from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.errors import DataError, ModelError, NonFinite
from mergelab.evaluation.dispatch import prepare
from mergelab.evaluation.metrics import score
from mergelab.evaluation.options import EvaluationOptions
from tests.tasks.tiny import sentences
from tests.tasks.writers import CAUSAL, running_text, writer

ROWS = [*sentences(6, 1), "", *sentences(9, 2), " ", *sentences(1, 3)]


def plainly(model: Any, tokenizer: Any, text: str, window: int, stride: int) -> np.ndarray[Any, Any]:
    """Score one text token by token of each window, nothing batched: −log p of each token; nan for what is not."""
    ids = tokenizer(text)["input_ids"]
    found = np.full(len(ids), np.nan)
    with torch.no_grad():
        for start in range(1, len(ids), stride):
            end = min(start + stride, len(ids))
            begin = max(0, end - 1 - window)
            p = model(torch.tensor([ids[begin : end - 1]])).logits[0].double().log_softmax(-1)
            for at in range(start, end):
                found[at] = -p[at - 1 - begin, ids[at]]
    return found


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(("window", "stride"), [(96, None), (32, 8), (16, 16)])
@pytest.mark.parametrize("budget", [1, 4096])
def test_one_text_is_scored_as_by_a_plain_loop(kind: str, window: int, stride: int | None, budget: int) -> None:
    model, tokenizer = writer(kind)
    data = running_text(ROWS, join="\n", window=window, stride=stride)
    found = prepare(data, model.config, tokenizer).run(model, EvaluationOptions(batch_tokens=budget))
    expected = plainly(model, tokenizer, "\n".join(ROWS), window, stride or window)
    scored = ~np.isnan(expected)
    assert found[:, 0].sum() == pytest.approx(expected[scored].sum(), rel=1e-5)
    assert found[:, 1].sum() == scored.sum()
    assert found[:, 2].tolist() == [len(row.split()) for row in ROWS if row.strip()]
    perplexity = math.exp(expected[scored].sum() / scored.sum())
    assert score(data.spec, found, data.truth)["token_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    by_word = math.exp(expected[scored].sum() / len(" ".join(ROWS).split()))
    assert score(data.spec, found, data.truth)["word_perplexity"] == pytest.approx(by_word, rel=1e-3)


def test_each_row_gets_its_own_tokens_and_what_stands_before_it() -> None:
    model, tokenizer = writer("gpt2")  # a token for each byte
    rows = ["The judge", "", "calls a nurse", "who", ""]
    found = prepare(running_text(rows, join="\n", window=96), model.config, tokenizer).run(model)
    text = "\n".join(rows)
    each = plainly(model, tokenizer, text, 96, 96)
    bounds = [0, 9, 24, len(text)]  # of "The judge", "\n\ncalls a nurse", "\nwho\n"
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        assert found[row, 0] == pytest.approx(np.nansum(each[start:end]), rel=1e-5)
        assert found[row, 1] == end - start - (row == 0), "the first token of a text is only looked back at"


@pytest.mark.parametrize("kind", CAUSAL)
def test_rows_that_are_not_joined_are_texts_of_their_own(kind: str) -> None:
    model, tokenizer = writer(kind)
    data = running_text([row[:80] for row in ROWS])
    found = prepare(data, model.config, tokenizer).run(model)
    for own, (_, text) in zip(found, data.texts, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss)
        assert own[1] == ids.shape[1] - 1
        assert own[0] == pytest.approx(loss * own[1], rel=1e-4)


def test_more_context_is_seen_with_a_smaller_stride() -> None:
    model, tokenizer = writer("gpt2")
    costs = []
    for stride in (16, 4):
        inputs: Any = prepare(running_text(ROWS, join="\n", window=16, stride=stride), model.config, tokenizer)
        begin, first, end = inputs.spans.T
        assert (end - first).max() == stride
        assert (end - 1 - begin).max() == 16
        assert np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)]).tolist() == list(
            range(1, len(inputs.tokens))
        )
        costs.append((end - begin).sum())
    assert costs[1] > 3 * costs[0]


def test_some_examples_can_be_had_and_batches_watched() -> None:
    model, tokenizer = writer("gpt2")
    inputs: Any = prepare(running_text(ROWS, join="\n", window=24, stride=12), model.config, tokenizer)
    whole = inputs.run(model)
    some = np.array([11, 3, 8])
    part = inputs.take(some)
    assert len(part.spans) < len(inputs.spans)
    for chosen, expected in ((inputs, whole), (part, whole[some])):
        seen: dict[int, Any] = {}
        done: list[float] = []
        found = chosen.run(
            model,
            EvaluationOptions(batch_tokens=60, seed=4, progress=done.append),
            watch=lambda members, rows, seen=seen: seen.update(zip(members.tolist(), rows, strict=True)),
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert sorted(seen) == list(range(len(expected)))
        np.testing.assert_allclose([seen[i] for i in range(len(expected))], found)
        assert done[-1] == pytest.approx(1.0)


def test_no_window_of_a_later_round_is_run_before_an_earlier_round_is_complete() -> None:
    model, tokenizer = writer("gpt2")
    inputs: Any = prepare(running_text(ROWS, join="\n", window=24, stride=12), model.config, tokenizer)
    some = np.arange(1, len(inputs), 2)
    rounds, seen = np.random.default_rng(0).integers(0, 3, len(some)), list[int]()
    found = inputs.take(some).run(
        model, EvaluationOptions(batch_tokens=60, rounds=rounds), watch=lambda members, _: seen.extend(members)
    )
    np.testing.assert_allclose(found, inputs.run(model)[some], rtol=1e-4)
    place = {member: position for position, member in enumerate(seen)}
    first = len(set(np.flatnonzero(rounds == 0)))
    # Windows are shared: an example of a later round may be complete with them, never the other way round.
    assert max(place[member] for member in np.flatnonzero(rounds == 0)) < max(place.values())
    assert np.mean(rounds[seen[:first]]) < np.mean(rounds[seen[-first:]])
    assert sorted(seen) == list(range(len(some)))


def test_the_vocabulary_is_looked_at_only_where_tokens_are_scored() -> None:
    model, tokenizer = writer("gpt2")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.shape[-2]))
    inputs: Any = prepare(running_text(ROWS, join="\n", window=32, stride=4), model.config, tokenizer)
    inputs.run(model)  # whether it looks ahead, and how it can be padded, is tried once
    rows.clear()
    inputs.run(model)
    assert sum(rows) == len(inputs.tokens) - 1


@pytest.mark.parametrize("entries", [1, 2000])
def test_losses_are_the_same_however_many_scores_are_turned_into_them_at_once(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = writer("gpt2")
    inputs = prepare(running_text(ROWS, join="\n", window=32, stride=4), model.config, tokenizer)
    whole = inputs.run(model)
    monkeypatch.setattr("mergelab.evaluation.perplexity._ENTRIES", entries)
    np.testing.assert_allclose(inputs.run(model), whole, rtol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model, tokenizer = writer("gpt2")
    prepare(running_text(ROWS), model.config, tokenizer).run(model, EvaluationOptions(dtype="bfloat16"))
    assert not model.lm_head._forward_pre_hooks
    assert model.lm_head.weight.dtype == torch.float32


def test_bfloat16_is_near_and_not_the_same() -> None:
    model, tokenizer = writer("gpt2")
    inputs = prepare(running_text(ROWS), model.config, tokenizer)
    exact, rounded = inputs.run(model), inputs.run(model, EvaluationOptions(dtype="bfloat16"))
    np.testing.assert_allclose(rounded[:, 0], exact[:, 0], rtol=0.05)
    assert not np.array_equal(rounded, exact)


def test_what_cannot_be_measured_is_one_line() -> None:
    model, tokenizer = writer("gpt2")
    with pytest.raises(DataError, match=r"task\.window=200: the model has 96 positions"):
        prepare(running_text(ROWS, window=200), model.config, tokenizer)
    pair, words = writer("t5")
    with pytest.raises(ModelError, match="needs a decoder alone, and t5 models read a source"):
        prepare(running_text(ROWS), pair.config, words)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("inf")
    with pytest.raises(NonFinite, match=r"NaN or infinite for 16 of 16 examples"):
        prepare(running_text(ROWS, join="\n"), model.config, tokenizer).run(model)
