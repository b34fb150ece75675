"""Merging from Python: every kind of model in, the same kind out, with the mathematics of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, pipeline

import mergelab as ml
from mergelab.errors import ConfigError, KeyMismatch, ModelError
from mergelab.weights.state_dict import StateDict
from tests import layouts
from tests.standins import BERT_BASE, NAMED_LABELS, OTHER_LABEL_ORDER
from tests.vocabularies import FIM, IM_END, bert, llama

WEIGHT = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def named(bert_checkpoints: Mapping[str, Path]) -> str:
    return str(bert_checkpoints[NAMED_LABELS])


@pytest.fixture
def other(bert_checkpoints: Mapping[str, Path]) -> str:
    return str(bert_checkpoints[OTHER_LABEL_ORDER])


@pytest.fixture
def base(bert_checkpoints: Mapping[str, Path]) -> str:
    return str(bert_checkpoints[BERT_BASE])


def module(folder: str) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_answer_is_of_the_kind_of_the_last_model(named: str, other: str) -> None:
    a, b = module(named), module(other)
    merged = ml.soup([a, b])
    assert type(merged) is type(b)
    assert merged is not b
    expected = (a.state_dict()[WEIGHT] + b.state_dict()[WEIGHT]) / 2
    torch.testing.assert_close(merged.state_dict()[WEIGHT], expected)
    pipes = [pipeline("text-classification", model=model, tokenizer=named) for model in (a, b)]
    assert type(ml.soup(pipes)) is type(pipes[0])
    assert torch.equal(ml.soup(pipes).model.state_dict()[WEIGHT], merged.state_dict()[WEIGHT])
    dicts = [{WEIGHT: model.state_dict()[WEIGHT]} for model in (a, b)]
    assert isinstance(ml.soup(dicts), StateDict)
    assert torch.equal(ml.soup(dicts)[WEIGHT], merged.state_dict()[WEIGHT])
    folders = ml.soup([named, other], task="text-classification")
    assert torch.equal(folders.model.state_dict()[WEIGHT], merged.state_dict()[WEIGHT])


def test_heads_with_labels_in_another_order_are_brought_into_the_last_ones(named: str, other: str) -> None:
    a, b = module(named), module(other)
    assert a.config.id2label[0] == b.config.id2label[1]
    expected = (a.classifier.weight + b.classifier.weight.flip(0)) / 2
    torch.testing.assert_close(ml.soup([b, a]).classifier.weight, expected)
    torch.testing.assert_close(ml.soup([other, named], task="text-classification").model.classifier.weight, expected)
    torch.testing.assert_close(ml.soup([a, b]).classifier.weight, expected.flip(0))


def test_inputs_are_left_as_they_are(named: str, other: str) -> None:
    models = [module(named), module(other)]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    ml.slerp(models, t=0.3)
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())


def test_a_base_without_the_experts_head_gets_their_mean(base: str, named: str) -> None:
    merged = ml.task_arithmetic([base, named], task="text-classification", lambda_=1.0)
    torch.testing.assert_close(merged.model.classifier.weight, module(named).classifier.weight)
    torch.testing.assert_close(merged.model.state_dict()[WEIGHT], module(named).state_dict()[WEIGHT])


def test_passthrough_tensors_are_the_experts_mean_and_the_rest_is_merged() -> None:
    dicts = [{"body": torch.full((2,), float(i)), "head": torch.full((2,), 10.0 * i)} for i in range(3)]
    merged = ml.task_arithmetic(dicts, base_index=0, lambda_=1.0, passthrough=["he*"])
    assert merged["body"].tolist() == [3.0, 3.0]
    assert merged["head"].tolist() == [15.0, 15.0]


def test_the_base_may_stand_anywhere_in_the_list() -> None:
    dicts = [{"body": torch.tensor([float(i)])} for i in (5, 0, 1)]
    assert ml.task_arithmetic(dicts, base_index=1, lambda_=1.0)["body"].item() == 6.0
    assert ml.task_arithmetic(dicts, base_index=-1, lambda_=1.0)["body"].item() == 1.0 + 4.0 - 1.0


def test_old_names_and_spellings_mean_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    dicts = [{"w": torch.randn(40, generator=generator)} for _ in range(4)]
    assert torch.equal(ml.ties(dicts, k=0.3)["w"], ml.ties(dicts, density=0.3)["w"])
    assert torch.equal(ml.dare(dicts, p=0.75)["w"], ml.dare(dicts, density=0.25)["w"])
    assert torch.equal(ml.slerp(dicts[:2], tau=0.1)["w"], ml.slerp(dicts[:2], t=0.1)["w"])
    assert torch.equal(ml.stock(dicts)["w"], ml.model_stock(dicts)["w"])
    negated = ml.task(dicts, signs=[1, -1, 1])["w"]
    assert torch.equal(negated, ml.task_arithmetic(dicts, weights=[1, -1, 1])["w"])


def test_a_state_dict_function_gets_the_base_where_it_asks_for_it() -> None:
    @ml.model_merge
    def away(models: list[StateDict], base_index: int = 0) -> StateDict:
        base = models.pop(base_index)
        return base - (models[0] - base)

    dicts = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    assert away(dicts, base_index=0)["w"].item() == -1.0
    assert away(dicts, base_index=1)["w"].item() == 5.0


def test_a_layer_function_gets_its_parameters() -> None:
    @ml.layer_merge
    def power(models: list[Tensor], exponent: int = 1) -> Tensor:
        return sum(model**exponent for model in models)

    assert power([{"w": torch.tensor([2.0])}, {"w": torch.tensor([3.0])}], exponent=2)["w"].item() == 13.0


def test_models_whose_tokens_differ_are_merged_by_token_where_it_is_asked_for(tmp_path: Path) -> None:
    folders = [bert(tmp_path / "base", 0, masked=True), bert(tmp_path / "a", 1), bert(tmp_path / "b", 2, ["dog"])]
    rows = [module(str(folder)).get_input_embeddings().weight.detach() for folder in folders[1:]]
    models = [str(folder) for folder in folders]
    asked = {"task": "text-classification", "base_index": 0}
    with pytest.raises(ModelError, match=r"differ in size .* vocab=base merges by token .* vocab=union"):
        ml.soup(models, **asked)
    for vocab, words in (("base", 11), ("union", 12)):
        pipe = ml.soup(models, vocab=vocab, **asked)
        assert len(pipe.tokenizer) == pipe.model.config.vocab_size == words
        assert pipe.tokenizer.tokenize("the dog")[1] == ("dog" if vocab == "union" else "[UNK]")
        merged = pipe.model.get_input_embeddings().weight.detach()
        torch.testing.assert_close(merged[:11], (rows[0] + rows[1][:11]) / 2)
        assert torch.equal(merged[11:], rows[1][11:words])
        assert pipe("the dog")[0]["label"] in ("LABEL_0", "LABEL_1")
    with pytest.raises(ConfigError, match=r"vocab='base': there is no base model \(base_index\)"):
        ml.soup(models, task="text-classification", base_index=None, vocab="base")
    with pytest.raises(ConfigError, match=r"vocab='unoin': must be one of 'base', 'union', or None"):
        ml.soup(models, vocab="unoin", **asked)
    with pytest.raises(ConfigError, match=r"vocab='union': models\[1\] has no tokenizer"):
        ml.soup([models[0], module(models[1])], vocab="union", **asked)


def test_texts_end_at_the_merged_models_own_token(tmp_path: Path) -> None:
    base, a = llama(tmp_path / "base", 0), llama(tmp_path / "a", 1, [FIM, IM_END], eos=IM_END)
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    asked = {"task": "text-generation", "lambda_": 1.0}
    for vocab, end in (("union", IM_END), ("base", "<|endoftext|>")):
        pipe = ml.task_arithmetic([str(base), str(a)], vocab=vocab, **asked)
        assert pipe.model.generation_config.eos_token_id == pipe.tokenizer.convert_tokens_to_ids(end)
        assert pipe.model.config.eos_token_id == pipe.model.generation_config.eos_token_id


def test_bad_calls_are_named() -> None:
    dicts = [{"w": torch.zeros(3)}, {"w": torch.ones(3)}, {"w": torch.ones(3)}]
    with pytest.raises(ConfigError, match="no such parameter; did you mean 'density'"):
        ml.ties(dicts, densty=0.1)
    with pytest.raises(ConfigError, match="exactly 2 experts, and 3"):
        ml.slerp(dicts)
    with pytest.raises(ConfigError, match="base_index=7: there are 3 models"):
        ml.ties(dicts, base_index=7)
    with pytest.raises(ConfigError, match="no tensor matches 'v'"):
        ml.ties(dicts, passthrough=["v"])
    with pytest.raises(KeyMismatch, match="u"):
        ml.soup([*dicts, {"u": torch.ones(3)}])
    with pytest.raises(ModelError, match=r"models\[1\] is a int"):
        ml.soup([dicts[0], 3])
    with pytest.raises(AttributeError, match="no attribute 'tis'"):
        _ = ml.tis


@pytest.mark.parametrize("name", ["mixtral", "llava"])
def test_folders_and_modules_that_name_their_tensors_differently_are_merged(name: str, tmp_path: Path) -> None:
    models = [layouts.build(name, seed) for seed in range(2)]
    layouts.in_files(models[0], tmp_path)
    merged = ml.soup([str(tmp_path), models[1]])
    a, b = (model.state_dict() for model in models)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, (a[key] + b[key]) / 2, msg=key)
    if name == "mixtral":
        layouts.tokenizer().save_pretrained(tmp_path)
        pipe = ml.soup([models[1], str(tmp_path)], task="text-generation")
        assert all(torch.equal(value, pipe.model.state_dict()[key]) for key, value in merged.state_dict().items())


def test_a_module_around_the_model_is_one_line_that_says_what_to_give(named: str) -> None:
    model = module(named)
    for wrapped, inside in ((nn.DataParallel(model), "model.module"), (torch.compile(model), "model._orig_mod")):
        with pytest.raises(ModelError, match=rf"^models\[1\] is a \w+; give the model inside it: {inside}$"):
            ml.soup([model, wrapped])
