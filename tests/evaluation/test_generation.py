from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.errors import DataError, ModelError, NonFinite
from mergelab.evaluation.dispatch import prepare
from mergelab.evaluation.options import EvaluationOptions
from mergelab.tasks.data import TaskData
from tests.tasks.writers import KINDS, given, prompts, writer


def plainly(model: Any, tokenizer: Any, data: TaskData, **settings: Any) -> list[str]:
    """Do what a plain loop does: one prompt at a time, nothing padded, transformers' own generation."""
    found = []
    is_pair = model.config.is_encoder_decoder
    for (text,) in data.texts:
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=12,
            pad_token_id=256 if not is_pair else 0, **settings,
        )  # fmt: skip
        start = 1 if is_pair else inputs["input_ids"].shape[1]
        found.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "length_penalty": 0.5}, {"no_repeat_ngram_size": 2}])
def test_texts_are_those_of_a_plain_loop(kind: str, settings: dict[str, Any]) -> None:
    model, tokenizer = writer(kind)
    data = prompts(8, decoding=settings)
    found = prepare(data, model.config, tokenizer).run(model, EvaluationOptions(batch_tokens=150))
    assert found.tolist() == plainly(model, tokenizer, data, **settings)
    assert len(set(found)) > (1 if model.config.is_encoder_decoder else 4), "the model must tell prompts apart"


@pytest.mark.parametrize("kind", ["gpt2", "bert2bert"])
@pytest.mark.parametrize("decoding", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}])
def test_a_text_does_not_depend_on_its_batch(kind: str, decoding: dict[str, Any]) -> None:
    model, tokenizer = writer(kind)
    inputs = prepare(prompts(10, decoding=decoding), model.config, tokenizer)
    whole = inputs.run(model).tolist()
    assert inputs.run(model, EvaluationOptions(batch_tokens=1)).tolist() == whole
    some = np.array([7, 2, 5])
    assert inputs.take(some).run(model).tolist() == [whole[i] for i in some]
    assert inputs.run(model, EvaluationOptions(seed=3)).tolist() == whole, "the order of the batches does not matter"
    watched: list[int] = []
    rounds = EvaluationOptions(rounds=np.arange(10) % 2)
    assert inputs.run(model, rounds, watch=lambda members, _: watched.extend(members)).tolist() == whole
    assert (np.array(watched) % 2).tolist() == [0] * 5 + [1] * 5


def test_samples_change_with_the_seed_and_with_nothing_else() -> None:
    model, tokenizer = writer("gpt2")
    texts = [
        prepare(prompts(4, decoding={"do_sample": True, "seed": seed}), model.config, tokenizer).run(model).tolist()
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    same = given(["the judge"] * 6, decoding={"do_sample": True, "max_new_tokens": 12})
    assert len(set(prepare(same, model.config, tokenizer).run(model))) > 3, "each example has its own stream"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (3.0, 1.0), (2.0, 0.6)])
def test_samples_are_as_frequent_as_the_model_says(temperature: float, top_p: float) -> None:
    model, tokenizer = writer("gpt2")
    decoding = {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": 1}
    count = 1500
    found = prepare(given(["the judge"] * count, decoding=decoding), model.config, tokenizer).run(model)
    with torch.no_grad():
        p = (model(**tokenizer("the judge", return_tensors="pt")).logits[0, -1] / temperature).softmax(0).double()
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    nucleus = torch.zeros_like(p)
    nucleus[kept] = p[kept] / p[kept].sum()
    for token in order[:5].tolist():
        share = float(nucleus[token])
        error = (share * (1 - share) / count) ** 0.5
        said = np.mean([text == tokenizer.decode([token]) for text in found])
        assert abs(said - share) <= 4 * error + 1e-9
    allowed = {tokenizer.decode([token], skip_special_tokens=True) for token in kept.tolist()}
    assert set(found) <= allowed


def test_a_text_ends_before_the_first_of_the_given_texts() -> None:
    model, tokenizer = writer("gpt2")
    whole = prepare(prompts(6), model.config, tokenizer).run(model)
    stop = [whole[0][4], whole[3][7]]
    cut = prepare(prompts(6, decoding={"stop": stop}), model.config, tokenizer).run(model)
    for text, short in zip(whole, cut, strict=True):
        ends = [text.index(each) for each in stop if each in text]
        assert short == text[: min(ends, default=len(text))]
    assert len(cut[0]) <= 4


def test_bfloat16_is_used_where_it_is_asked_for() -> None:
    model, tokenizer = writer("gpt2")
    seen: list[torch.dtype] = []
    model.transformer.h[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].dtype))
    inputs = prepare(prompts(3), model.config, tokenizer)
    inputs.run(model)  # how prompts can be padded is tried once, in the model's own precision
    seen.clear()
    rounded = inputs.run(model, EvaluationOptions(dtype="bfloat16"))
    assert set(seen) == {torch.bfloat16}
    assert rounded.tolist() == inputs.run(model, EvaluationOptions(dtype="bfloat16")).tolist()


def test_the_models_own_way_of_decoding_does_not_count_and_stays_as_it_is() -> None:
    model, tokenizer = writer("t5")
    data = prompts(5)
    expected = prepare(data, model.config, tokenizer).run(model).tolist()
    model.generation_config.num_beams = 4
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.max_length = 4
    before = model.generation_config.to_dict()
    assert prepare(data, model.config, tokenizer).run(model).tolist() == expected
    assert model.generation_config.to_dict() == before


def test_finished_batches_can_be_watched_and_progress_rises_to_one() -> None:
    model, tokenizer = writer("gpt2")
    inputs = prepare(prompts(9), model.config, tokenizer)
    seen: dict[int, str] = {}
    done: list[float] = []
    whole = inputs.run(
        model,
        EvaluationOptions(batch_tokens=100, progress=done.append),
        watch=lambda members, texts: seen.update(zip(members.tolist(), texts, strict=True)),
    )
    assert [seen[i] for i in range(9)] == whole.tolist()
    assert done == sorted(done)
    assert len(done) > 2
    assert done[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "room"), [("gpt2", 84), ("bert2bert", 96)])
def test_a_prompt_that_does_not_fit_is_one_line_that_says_what_would(kind: str, room: int) -> None:
    model, tokenizer = writer(kind)
    long = "the judge who admires a nurse " * 20
    with pytest.raises(DataError, match=rf"prompts: the prompt of example 1 has \d+ tokens.*max_prompt_tokens={room} "):
        prepare(given(["the", long], decoding={"max_new_tokens": 12}), model.config, tokenizer)
    cut = given(["the", long], decoding={"max_new_tokens": 12}, max_prompt_tokens=room)
    inputs: Any = prepare(cut, model.config, tokenizer)
    assert [len(ids) for ids in inputs.ids][1] == room
    own = tokenizer(long)["input_ids"]
    expected = own[-room:] if kind == "gpt2" else [*own[: room - 1], own[-1]]
    assert inputs.ids[1].tolist() == expected
    assert all(isinstance(text, str) for text in inputs.run(model))


@pytest.mark.parametrize("kind", ["gpt2", "bert2bert"])
def test_more_new_tokens_than_the_model_has_positions_are_an_error(kind: str) -> None:
    model, tokenizer = writer(kind)
    with pytest.raises(DataError, match=r"max_new_tokens=96: the model has 96 positions"):
        prepare(prompts(2, decoding={"max_new_tokens": 96}), model.config, tokenizer)


def test_a_missing_start_token_is_one_line() -> None:
    model, tokenizer = writer("bert2bert")
    model.config.decoder_start_token_id = None
    model.config.decoder.bos_token_id = None
    with pytest.raises(ModelError, match="has no decoder_start_token_id"):
        prepare(prompts(2), model.config, tokenizer)


def test_a_missing_pad_token_is_one_line() -> None:
    model, tokenizer = writer("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither model nor tokenizer has a pad_token_id or eos_token_id"):
        prepare(prompts(2), model.config, tokenizer)


def test_a_prompt_goes_on_where_the_tokenizer_would_end_it() -> None:
    from tokenizers import processors

    model, tokenizer = writer("gpt2")
    expected = prepare(prompts(4), model.config, tokenizer).run(model).tolist()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
    )
    assert prepare(prompts(4), model.config, tokenizer).run(model).tolist() == expected


def test_a_model_that_starts_its_prompts_with_a_token_keeps_it_when_they_are_cut() -> None:
    model, tokenizer = writer("llama")
    inputs: Any = prepare(prompts(6, max_prompt_tokens=5), model.config, tokenizer)
    assert all(ids[0] == 257 for ids in inputs.ids)
    assert max(len(ids) for ids in inputs.ids) == 5


def test_outputs_that_are_not_finite_are_an_error() -> None:
    model, tokenizer = writer("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(NonFinite, match="NaN"):
        prepare(prompts(2), model.config, tokenizer).run(model)
