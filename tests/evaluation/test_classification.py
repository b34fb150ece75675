from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.errors import DataError, NonFinite
from mergelab.evaluation import packed_linear
from mergelab.evaluation.classification import (
    Encoded,
    encode,
    plan_batches,
    predict,
    predict_batches,
)
from mergelab.evaluation.lengths import max_input_length
from mergelab.evaluation.options import EvaluationOptions
from mergelab.tasks.data import TaskData
from tests.tasks.tiny import classifier, plain_logits, word_tokenizer

KINDS = ["bert", "distilbert", "roberta", "gpt2"]


@pytest.fixture(params=["packed", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply matrices: those of this machine, and those of one without packed kernels."""
    if request.param == "plain":
        monkeypatch.setattr(packed_linear, "_can_pack", lambda dtype: False)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_float32_is_a_plain_loop_whatever_the_batches(
    kind: str, batch_tokens: int, pairs: TaskData, kernels: str
) -> None:
    model, tokenizer = classifier(kind)
    expected = plain_logits(model, tokenizer, pairs)
    found = predict(model, encode(pairs, tokenizer), EvaluationOptions(batch_tokens=batch_tokens))
    assert found.dtype == np.float32
    assert np.ptp(expected[:, 0]) > 0.1, "the model must tell examples apart"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_single_texts_and_scores_work_as_pairs_do(kind: str, pairs: TaskData) -> None:
    model, tokenizer = classifier(kind, labels=1)
    single = replace(pairs, texts=tuple((first,) for first, _ in pairs.texts))
    expected = plain_logits(model, tokenizer, single)
    np.testing.assert_allclose(predict(model, encode(single, tokenizer)), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: str, pairs: TaskData) -> None:
    model, tokenizer = classifier(kind)
    model.train()
    config, weights = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    for dtype in ("float32", "bfloat16"):
        predict(model, encode(pairs, tokenizer), EvaluationOptions(dtype=dtype))
    assert model.config.to_dict() == config
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {module.forward.__func__ for module in model.modules()}, "methods, not functions put in their place"
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("without", ["float32", "bfloat16"])
def test_a_processor_without_the_kernels_of_a_dtype_computes_plain_layers(
    without: str, pairs: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    with monkeypatch.context() as plain:
        plain.setattr(packed_linear, "_can_pack", lambda dtype: False)
        expected = predict(model, encoded, EvaluationOptions(dtype=without))
    pack = packed_linear._pack

    def refused(weight: torch.Tensor) -> torch.Tensor:
        if str(weight.dtype) == f"torch.{without}":
            raise RuntimeError("needs the cpu support avx512bw")
        return pack(weight)

    monkeypatch.setattr(packed_linear, "_pack", refused)
    packed_linear._can_pack.cache_clear()
    try:
        found = predict(model, encoded, EvaluationOptions(dtype=without))
    finally:
        packed_linear._can_pack.cache_clear()
    np.testing.assert_array_equal(found, expected)


def test_a_model_in_training_is_evaluated_without_dropout(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    np.testing.assert_array_equal(predict(model.train(), encoded), predict(model.eval(), encoded))


def test_new_weights_in_the_same_model_count(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    before = predict(model, encoded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    np.testing.assert_allclose(predict(model, encoded), plain_logits(model, tokenizer, pairs), rtol=1e-4, atol=2e-5)
    assert np.abs(predict(model, encoded) - before).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_and_not_the_same(kind: str, pairs: TaskData, kernels: str) -> None:
    model, tokenizer = classifier(kind)
    encoded = encode(pairs, tokenizer)
    exact, rounded = predict(model, encoded), predict(model, encoded, EvaluationOptions(dtype="bfloat16"))
    assert rounded.dtype == np.float32
    spread = exact.std()
    assert 1e-4 * spread < np.abs(exact - rounded).mean() < 0.1 * spread
    np.testing.assert_array_equal(rounded, predict(model, encoded, EvaluationOptions(dtype=torch.bfloat16)))


def test_a_half_precision_model_is_computed_in_float32_where_asked(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    half = copy.deepcopy(model).half()
    widened = copy.deepcopy(half).float()
    np.testing.assert_array_equal(predict(half, encoded, EvaluationOptions(dtype="float32")), predict(widened, encoded))


def test_tied_weights_stay_tied_in_the_copy() -> None:
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    second.weight = first.weight
    copied = packed_linear.inference_copy(torch.nn.Sequential(first, second), torch.device("cpu"), torch.bfloat16)
    assert copied[0].weight is copied[1].weight  # type: ignore[index]
    assert copied[0].weight.dtype == torch.bfloat16  # type: ignore[index]


def test_a_copy_in_the_same_dtype_shares_the_weights() -> None:
    model, _ = classifier("bert")
    copied = packed_linear.inference_copy(model, torch.device("cpu"), torch.float32)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in model.parameters()]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_packed_kernels_are_used_where_pytorch_has_them() -> None:
    model, _ = classifier("gpt2")
    copied = packed_linear.inference_copy(model, torch.device("cpu"), None)
    packed = [name for name, own in copied.named_modules() if "forward" in vars(own) and hasattr(own, "weight")]
    assert len(packed) == 8, "four projections in each of two layers; the classifier is too small"


def test_predictions_are_in_the_order_of_the_data(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    found = predict(model, encode(pairs, tokenizer), EvaluationOptions(batch_tokens=128))
    order = np.random.default_rng(0).permutation(len(pairs.texts))
    shuffled = replace(pairs, texts=tuple(pairs.texts[i] for i in order))
    np.testing.assert_allclose(
        predict(model, encode(shuffled, tokenizer), EvaluationOptions(batch_tokens=128)),
        found[order],
        rtol=1e-4,
        atol=2e-5,
    )


def test_padding_is_told_from_whatever_a_text_ends_with(pairs: TaskData) -> None:
    model, tokenizer = classifier("gpt2")
    data = replace(pairs, texts=tuple(("judge" * (1 + i % 3) + chr(i),) for i in range(33, 127)))
    expected = plain_logits(model, tokenizer, data)
    np.testing.assert_allclose(predict(model, encode(data, tokenizer)), expected, rtol=1e-4, atol=2e-5)


def test_batches_can_be_had_one_by_one(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    batches = list(predict_batches(model, encoded, EvaluationOptions(batch_tokens=128)))
    assert len(batches) > 5
    assert sorted(np.concatenate([members for members, _ in batches])) == list(range(50))
    whole = predict(model, encoded, EvaluationOptions(batch_tokens=128))
    for members, logits in batches:
        np.testing.assert_array_equal(whole[members], logits)
    assert not torch.is_inference_mode_enabled()


def test_in_a_random_order_there_are_enough_batches_to_stop_early(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    batches = [list(members) for members, _ in predict_batches(model, encoded, EvaluationOptions(seed=3))]
    assert len(batches) >= 24
    assert sorted(np.concatenate(batches)) == list(range(50))
    assert batches == [list(members) for members, _ in predict_batches(model, encoded, EvaluationOptions(seed=3))]
    assert batches != [list(members) for members, _ in predict_batches(model, encoded, EvaluationOptions(seed=4))]


def test_rounds_come_one_after_another_and_in_each_like_lengths_together(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer)
    rounds = np.random.default_rng(0).integers(0, 4, 50)
    options = EvaluationOptions(batch_tokens=128, rounds=rounds, seed=3)
    batches = list(predict_batches(model, encoded, options))
    assert sorted(np.concatenate([members for members, _ in batches])) == list(range(50))
    assert all(len(set(rounds[members])) == 1 for members, _ in batches)
    of_batches = [int(rounds[members[0]]) for members, _ in batches]
    assert of_batches == sorted(of_batches)
    for one in range(4):
        longest = [encoded.lengths[members].max() for members, _ in batches if rounds[members[0]] == one]
        assert longest == sorted(longest, reverse=True)
    whole = predict(model, encoded)
    for members, logits in batches:
        np.testing.assert_allclose(logits, whole[members], rtol=1e-4, atol=2e-5)


def test_progress_rises_to_one(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    seen: list[float] = []
    predict(model, encode(pairs, tokenizer), EvaluationOptions(batch_tokens=128, progress=seen.append))
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert 0 < seen[0] < seen[-1] == 1.0


def test_nothing_is_printed(pairs: TaskData, capfd: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        model, tokenizer = classifier(kind)
        predict(model, encode(pairs, tokenizer))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("budget", [1, 100, 512, 10**6])
def test_a_batch_holds_what_its_budget_allows_and_every_example_once(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=300)
    batches = plan_batches(lengths, budget)
    assert sorted(np.concatenate(batches)) == list(range(300))
    for members in batches:
        assert len(members) == 1 or len(members) * lengths[members].max() <= budget
    assert [lengths[members].max() for members in batches] == sorted((lengths[m].max() for m in batches), reverse=True)


def test_batches_by_length_need_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, size=2000)
    batches = plan_batches(lengths, 512)
    assert sum(len(members) * lengths[members].max() for members in batches) < 1.01 * lengths.sum()


def test_long_inputs_are_cut_as_the_tokenizer_cuts_them(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    encoded = encode(pairs, tokenizer, max_length=16)
    assert encoded.lengths.max() == 16
    expected = plain_logits(model, tokenizer, pairs, max_length=16)
    np.testing.assert_allclose(predict(model, encoded), expected, rtol=1e-4, atol=2e-5)


def test_an_example_that_is_too_long_for_the_model_is_an_error(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    long = replace(pairs, texts=(("the " * 200, "judge"),))
    with pytest.raises(DataError, match="an example has 150 tokens, the model allows 96"):
        predict(model, encode(long, tokenizer, max_length=150))


def test_a_text_without_tokens_is_still_an_example(pairs: TaskData) -> None:
    model, tokenizer = classifier("gpt2")
    encoded = encode(replace(pairs, texts=(("",), ("the judge",))), tokenizer)
    assert encoded.lengths.tolist() == [1, 9]
    assert np.isfinite(predict(model, encoded)).all()


def test_a_tokenizer_that_cannot_pad_is_an_error(pairs: TaskData) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"rte: the tokenizer .* has neither pad nor end-of-text token"):
        encode(pairs, tokenizer)


def test_outputs_that_are_not_finite_are_an_error(pairs: TaskData) -> None:
    model, tokenizer = classifier("bert")
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(NonFinite, match="NaN or infinite for 50 of 50 examples"):
        predict(model, encode(pairs, tokenizer))


def test_no_examples_are_an_error() -> None:
    model, _ = classifier("bert")
    empty = np.zeros(0, dtype=np.int64)
    with pytest.raises(DataError, match="no examples"):
        predict(model, Encoded({"input_ids": empty}, empty, 0))


@pytest.mark.parametrize(("kind", "limit"), [("bert", 96), ("distilbert", 96), ("gpt2", 96), ("roberta", 96)])
def test_the_longest_input_is_what_model_and_tokenizer_allow(kind: str, limit: int) -> None:
    model, tokenizer = classifier(kind)
    tokenizer.model_max_length = 10**30
    assert max_input_length(model.config, tokenizer) == limit
    assert max_input_length(model.config, tokenizer, 50) == 50
    with pytest.raises(DataError, match=r"eval\.max_length=200: the model allows 96 tokens"):
        max_input_length(model.config, tokenizer, 200)
    tokenizer.model_max_length = 40
    assert max_input_length(model.config, tokenizer) == 40
    tokenizer.model_max_length = 10**30
    assert max_input_length(None, tokenizer) == 512


def test_roberta_can_be_filled_to_its_longest_input(pairs: TaskData) -> None:
    model, tokenizer = classifier("roberta")
    long = replace(pairs, texts=(("the judge " * 40, "a"),))
    encoded = encode(long, tokenizer, max_input_length(model.config, tokenizer))
    assert encoded.lengths.tolist() == [96]
    assert np.isfinite(predict(model, encoded)).all()


def test_a_model_without_configuration_can_be_run(pairs: TaskData) -> None:
    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(100, 2, padding_idx=0)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return type("Output", (), {"logits": self.bag(input_ids)})()

    assert predict(Bag(), encode(pairs, word_tokenizer())).shape == (50, 2)
