"""No output depends on which examples share a batch: what transformers gives each example alone is the yardstick."""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from mergelab.errors import DataError, ModelError
from mergelab.evaluation import classification
from mergelab.evaluation.classification import Encoded, encode, layout_for, model_inputs, plan_batches, predict
from mergelab.evaluation.dispatch import prepare
from mergelab.evaluation.lengths import max_input_length, model_positions
from mergelab.evaluation.options import EvaluationOptions
from mergelab.tasks.data import TaskData
from tests.evaluation.test_perplexity import plainly
from tests.evaluation.zoo import CLASSIFIERS, GENERATORS, LLAMA, architecture, randomised, tokenizer
from tests.tasks.tiny import sentences
from tests.tasks.writers import given, running_text

Array = np.ndarray[Any, Any]
CAUSAL = [name for name in GENERATORS if name not in (
    "t5", "bart", "mbart", "marian", "pegasus", "led", "longt5", "prophetnet", "xlnet",
)]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    from transformers import logging

    logging.set_verbosity_error()


@pytest.fixture
def texts(pairs: TaskData) -> TaskData:
    """Pairs of texts of many lengths."""
    found = zip(sentences(24, 0), sentences(24, 1), strict=True)
    return replace(pairs, texts=tuple(found), labels=pairs.labels[:24], idx=pairs.idx[:24], parts=pairs.parts[:24])


def classifier(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    config, words = architecture(name, CLASSIFIERS)
    torch.manual_seed(0)
    return randomised(AutoModelForSequenceClassification.from_config(config)), words


def alone(model: Any, words: Any, data: TaskData, length: int = 96) -> Array:
    """What transformers gives each example by itself; a copy for each, as some models change with what they read."""
    rows = []
    for text in data.texts:
        inputs = words(*text, truncation=True, max_length=length, return_tensors="pt")
        known = inspect.signature(model.forward).parameters
        with torch.no_grad():
            found = copy.deepcopy(model)(**{key: value for key, value in inputs.items() if key in known})
        rows.append(found.logits[0].float().numpy())
    return np.stack(rows)


def check(found: Array, expected: Array) -> None:
    assert np.ptp(expected, axis=0).max() > 0.3, "the model must tell examples apart"
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, float(np.abs(expected).max())), rtol=0)


# ------------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_an_example_the_logits_that_it_gets_alone(name: str, texts: TaskData) -> None:
    model, words = classifier(name)
    encoded, expected = encode(texts, words, 96), alone(model, words, texts)
    check(predict(model, encoded, EvaluationOptions(batch_tokens=400)), expected)
    check(predict(model, encoded, EvaluationOptions(batch_tokens=400, seed=5)), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "mistral", "t5"])
def test_usual_models_are_still_padded_on_the_right(name: str, texts: TaskData) -> None:
    model, words = classifier(name)
    assert layout_for(model, encode(texts, words, 96)).padding == "right"


@pytest.mark.parametrize(("name", "padding"), [("xlnet", "left"), ("fnet", "equal"), ("convbert", "equal")])
def test_models_that_see_padding_are_padded_elsewhere_or_not_at_all(name: str, padding: str, texts: TaskData) -> None:
    model, words = classifier(name)
    assert layout_for(model, encode(texts, words, 96)).padding == padding


@pytest.mark.parametrize("name", ["xlnet", "fnet", "llama without padding", "gpt2"])
def test_what_is_learnt_from_is_padded_as_what_is_measured(name: str, texts: TaskData) -> None:
    model, words = classifier(name)
    encoded, expected = encode(texts, words, 96), alone(model, words, texts)
    layout = layout_for(model, encoded)
    classification.set_padding_token(model, layout.pad_id)
    found, sizes = np.zeros_like(expected), []
    for members, inputs in classification.input_batches(model, encoded, layout, 256):
        with torch.no_grad():
            found[members] = model(**inputs).logits.numpy()
        sizes.append(len(members))
    check(found, expected)
    assert max(sizes) > 1
    check(predict(model, encoded), expected)


def test_an_example_that_has_the_padding_token_in_it_keeps_its_end(texts: TaskData) -> None:
    data = replace(texts, texts=tuple((first, f"{second} </s>") for first, second in texts.texts))
    for name in ("llama without padding", "llama that pads with its end", "gpt2", "llama with padding -1"):
        model, words = classifier(name)
        check(predict(model, encode(data, words, 96)), alone(model, words, data))


def test_without_any_token_left_to_pad_with_only_equal_lengths_share_a_batch() -> None:
    model, _ = classifier("gpt2")
    lengths = np.array([12, 9, 12, 15, 9, 9, 20, 12])
    ids = np.random.default_rng(0).permutation(np.arange(lengths.sum()) % 40)  # each of the model's tokens occurs
    encoded = Encoded({"input_ids": ids}, lengths, 0)
    assert layout_for(model, encoded).padding == "equal"
    with torch.no_grad():
        expected = [
            model(torch.from_numpy(row)[None]).logits[0].numpy() for row in np.split(ids, lengths.cumsum()[:-1])
        ]
    check(predict(model, encoded), np.stack(expected))


def test_hooks_see_nothing_of_the_trial() -> None:
    """Statistics are taken by hooks that cannot be copied."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model: Any = BertForSequenceClassification(config).eval()
    lock, seen = threading.Lock(), []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        with lock:
            seen.append(module)

    model.bert.encoder.register_forward_hook(hook)
    lengths = np.array([3, 9, 5, 7])
    encoded = Encoded({"input_ids": np.arange(24) % 25 + 5}, lengths, 0)
    assert layout_for(model, encoded).padding == "right"
    assert not seen


def test_texts_with_more_ends_than_others_are_run_by_themselves(texts: TaskData) -> None:
    data = replace(texts, texts=tuple((f"a </s> {first}" if at % 3 else first, second)
                                      for at, (first, second) in enumerate(texts.texts)))  # fmt: skip
    for name in ("t5", "bart"):
        model, words = classifier(name)
        check(predict(model, encode(data, words, 96)), alone(model, words, data))


def test_weights_that_do_not_tell_examples_apart_say_nothing_about_later_ones(texts: TaskData) -> None:
    model, words = classifier("xlnet")
    encoded, head = encode(texts, words, 96), copy.deepcopy(model.logits_proj.weight)
    with torch.no_grad():
        model.logits_proj.weight.zero_()
    assert np.ptp(predict(model, encoded), axis=0).max() == 0
    with torch.no_grad():
        model.logits_proj.weight.copy_(head)
    check(predict(model, encoded), alone(model, words, texts))
    assert layout_for(model, encoded).padding == "left"


@pytest.mark.parametrize("longest", [60, 90])
def test_a_model_that_changes_from_some_length_on_does_not_mix_the_two(longest: int) -> None:
    from transformers import AutoModelForSequenceClassification, Phi3Config

    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(**LLAMA, original_max_position_embeddings=70, rope_scaling=rope)
    model = randomised(AutoModelForSequenceClassification.from_config(config))
    lengths = np.array([10, 11, 12, 13, 40, 45, 50, longest])
    ids = np.random.default_rng(0).integers(4, 40, lengths.sum())
    encoded = Encoded({"input_ids": ids}, lengths, 0)
    with torch.no_grad():
        expected = [
            model(torch.from_numpy(row)[None]).logits[0].numpy() for row in np.split(ids, lengths.cumsum()[:-1])
        ]
    check(predict(model, encoded, EvaluationOptions(batch_tokens=10**4)), np.stack(expected))
    assert layout_for(model, encoded).padding == ("right" if longest < 70 else "equal")


@pytest.mark.parametrize("name", ["bert", "xlnet", "convbert", "llama"])
@pytest.mark.parametrize("given_in", ["float32", "bfloat16"])
def test_in_bfloat16_the_same_padding_is_found(name: str, given_in: str, texts: TaskData) -> None:
    model, words = classifier(name)
    model = model.to(getattr(torch, given_in))
    encoded, expected = encode(texts, words, 96), alone(copy.deepcopy(model).float(), words, texts)
    found = predict(model, encoded, EvaluationOptions(dtype="bfloat16"))
    assert np.abs(found - expected).mean() < 0.1 * expected.std()
    usual = {"xlnet": "left", "convbert": "equal"}
    assert layout_for(model, encoded).padding == usual.get(name, "right")


def test_a_model_that_cannot_run_on_an_example_is_one_line(texts: TaskData) -> None:
    model, words = classifier("t5")
    words.backend_tokenizer.post_processor = tokenizer("plain").backend_tokenizer.post_processor  # no end token
    with pytest.raises(ModelError, match=r"^T5ForSequenceClassification: transformers cannot run it on an example of"):
        predict(model, encode(texts, words, 96))


def test_tokens_that_the_model_does_not_know_are_one_line(texts: TaskData) -> None:
    model, words = classifier("bert")
    words.add_tokens(["zebra"])
    data = replace(texts, texts=(("the judge", "zebra"), *texts.texts[1:]))
    with pytest.raises(DataError, match=r"writes token 40, and the model has embeddings for 40 tokens"):
        predict(model, encode(data, words, 96))


@pytest.mark.parametrize("padding", ["right", "left", "equal", "alone"])
def test_every_example_is_in_one_batch_however_they_are_padded(padding: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 20, size=300)
    batches = plan_batches(lengths, 64, padding=padding)
    assert sorted(np.concatenate(batches)) == list(range(300))
    for members in batches:
        assert len(members) == 1 or len(members) * lengths[members].max() <= 64
        assert padding != "alone" or len(members) == 1
        assert padding != "equal" or np.ptp(lengths[members]) == 0


def test_types_of_padding_are_the_tokenizers(texts: TaskData) -> None:
    model, words = classifier("xlnet")
    words._pad_token_type_id = 3
    encoded = encode(texts, words, 96)
    inputs = model_inputs(model, encoded, np.array([0, 1, 2]), layout_for(model, encoded))
    assert set(inputs["token_type_ids"][inputs["attention_mask"] == 0].tolist()) == {3}
    assert set(inputs["input_ids"][inputs["attention_mask"] == 0].tolist()) == {5}
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]


# -------------------------------------------------------------------------------------------------------------- lengths

WITH_POSITIONS = ["bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod", "esm",
                  "ibert", "distilbert", "albert", "deberta-v2 with convolution", "electra", "mpnet", "longformer",
                  "gpt2", "gpt_neo", "openai-gpt", "opt", "bart", "mbart", "mpt", "llama"]  # fmt: skip
WITHOUT_POSITIONS = ["xlnet", "deberta", "deberta-v2", "funnel", "bloom", "t5"]


@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_an_input_can_be_as_long_as_the_model_has_positions_and_no_longer(name: str, texts: TaskData) -> None:
    model, words = classifier(name)
    words.model_max_length = 10**30
    long = replace(texts, texts=(("the judge " * 100, "never"), *texts.texts[1:]))
    assert max_input_length(model.config, words) == 96
    check(predict(model, encode(long, words, 96)), alone(model, words, long))
    with pytest.raises(DataError, match=r"has 97 tokens, the model allows 96: .*eval\.max_length=96"):
        predict(model, encode(long, words, 97))
    with pytest.raises(DataError, match=r"eval\.max_length=97: the model allows 96 tokens"):
        max_input_length(model.config, words, 97)


@pytest.mark.parametrize("name", WITHOUT_POSITIONS)
def test_models_without_a_limit_take_what_is_asked_for(name: str, texts: TaskData) -> None:
    model, words = classifier(name)
    words.model_max_length = 10**30
    assert model_positions(model.config) is None
    assert max_input_length(model.config, words) == 512
    assert max_input_length(model.config, words, 700) == 700
    long = replace(texts, texts=(("the judge " * 100, "never"), *texts.texts[1:]))
    check(predict(model, encode(long, words, 150)), alone(model, words, long, 150))


def test_the_text_part_of_a_model_says_how_long_its_inputs_may_be() -> None:
    from transformers import LlamaConfig, LlavaConfig

    config = LlavaConfig(text_config=LlamaConfig(**LLAMA))
    assert model_positions(config) == 96


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", GENERATORS)
def test_a_batch_writes_what_each_prompt_gets_alone(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config, words = architecture(name, GENERATORS)
    is_pair = config.is_encoder_decoder
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    model = randomised(kind.from_config(config), scale=0.7 if is_pair else 0.25)
    starts = [" ".join(text.split()[: 3 + 2 * at]) for at, text in enumerate(sentences(10, 0))]
    inputs: Any = prepare(given(starts, decoding={"max_new_tokens": 8, "min_new_tokens": 8}), config, words)
    expected = []
    for ids in inputs.ids:
        prompt = torch.from_numpy(ids)[None]
        written = copy.deepcopy(model).generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8, min_new_tokens=8,
            pad_token_id=inputs.pad_id,
        )  # fmt: skip
        expected.append(words.decode(written[0, 1 if is_pair else len(ids) :], skip_special_tokens=True))
    assert len(set(expected)) > 3, "the model must tell prompts apart"
    assert inputs.run(model, EvaluationOptions(batch_tokens=200)).tolist() == expected
    assert inputs.run(model, EvaluationOptions(batch_tokens=10**4, seed=1)).tolist() == expected


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "bloom", "t5", "pegasus"])
def test_prompts_of_many_lengths_still_share_a_batch(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config, words = architecture(name, GENERATORS)
    model = randomised(
        (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    )
    sizes: list[int] = []
    inputs = prepare(given(sentences(10, 0), decoding={"max_new_tokens": 2}), config, words)
    inputs.run(model, EvaluationOptions(batch_tokens=10**4), watch=lambda members, _texts: sizes.append(len(members)))
    assert sizes == [10]


# ----------------------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(("window", "stride"), [(96, None), (16, 5)])
def test_windows_that_share_a_batch_are_scored_as_each_alone(name: str, window: int, stride: int | None) -> None:
    from transformers import AutoModelForCausalLM

    config, words = architecture(name, GENERATORS)
    torch.manual_seed(0)
    model = randomised(AutoModelForCausalLM.from_config(config))
    rows = sentences(8, 0)
    expected = [np.nansum(plainly(copy.deepcopy(model), words, row, window, stride or window)) for row in rows]
    found = prepare(running_text(rows, window=window, stride=stride), config, words).run(model)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)


def test_a_model_that_looks_ahead_has_no_perplexity() -> None:
    from transformers import AutoModelForCausalLM

    config, words = architecture("xlnet", GENERATORS)
    inputs = prepare(running_text(sentences(3, 0)), config, words)
    model = randomised(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match="XLNetLMHeadModel looks ahead"):
        inputs.run(model)
