from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch
from mergelab.weights.mapper import ModelTensorMapper
from mergelab.weights.state_dict import StateDict


@pytest.fixture
def pipe(gpt2, tokenizer):
    from transformers import pipeline

    return pipeline("text-generation", model=gpt2(), tokenizer=tokenizer, device="cpu")


def test_a_model_is_its_parameters_in_a_row_tied_ones_once(gpt2, t5):
    for make in (gpt2, t5):
        model = make()
        flat = ModelTensorMapper(model).to_tensor(model)
        assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert flat.dim() == 1
        assert not flat.requires_grad
        assert len(ModelTensorMapper(model)) == len(flat) == model.num_parameters()


def test_the_seeds_walkthrough(gpt2, folder, tokenizer, pipe):
    """Task vectors of a legal and a recipes model on one flat tensor, back into a pipeline."""
    mapper = ModelTensorMapper(pipe.model)
    base = mapper.to_tensor(pipe.model)
    legal = mapper.from_hf(folder(gpt2(seed=1), "legal"), "text-generation")
    recipe = mapper.from_hf(str(folder(gpt2(seed=2), "recipe")), "text-generation")
    before = copy.deepcopy(pipe.model.state_dict())
    merged = base + 0.5 * ((legal - base) + (recipe - base)) / 2
    result = mapper.to_pipeline(merged, base_pipeline=pipe)
    assert (type(result), result.task, result.tokenizer) == (type(pipe), "text-generation", pipe.tokenizer)
    assert torch.equal(mapper.to_tensor(result.model), merged)
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    assert all(torch.equal(value, before[key]) for key, value in pipe.model.state_dict().items())
    generated = result("the cat", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    expected = mapper.to_model(merged).generate(
        **tokenizer("the cat", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert generated == "the cat" + tokenizer.decode(expected[0], skip_special_tokens=True).removeprefix("the cat")


def test_a_pipelines_own_settings_go_with_it_and_stay_apart(bert, tokenizer):
    from transformers import pipeline

    pipe = pipeline("text-classification", model=bert(), tokenizer=tokenizer, device="cpu", top_k=None)
    mapper = ModelTensorMapper(pipe)
    result = mapper.to_pipeline(mapper.to_tensor(bert(seed=1)), base_pipeline=pipe)
    assert len(result("the cat")[0]) == 2
    assert result("the cat") != pipe("the cat")
    same = pipeline("text-classification", model=bert(seed=1), tokenizer=tokenizer, device="cpu", top_k=None)
    assert result("the cat") == same("the cat")
    result._postprocess_params["top_k"] = 1
    assert pipe._postprocess_params["top_k"] is None


def test_there_and_back_again(bert):
    model = bert()
    mapper = ModelTensorMapper(model)
    other = mapper.to_tensor(bert(seed=1))
    result = mapper.to_model(other)
    assert result is not model
    assert StateDict.from_model(result) == StateDict.from_model(bert(seed=1))
    assert StateDict.from_model(model) == StateDict.from_model(bert())
    result.classifier.bias.data.zero_()
    assert torch.equal(other, mapper.to_tensor(bert(seed=1)))


def test_state_dicts_are_taken_in_any_order_and_with_every_name(gpt2):
    model = gpt2()
    mapper = ModelTensorMapper(model)
    flat = mapper.to_tensor(model)
    assert torch.equal(mapper.to_tensor(model.state_dict()), flat)
    assert torch.equal(mapper.to_tensor(StateDict.from_model(model)), flat)
    assert torch.equal(mapper.to_tensor(dict(reversed(model.state_dict().items()))), flat)


def test_buffers_and_integers_are_the_templates():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[1].running_mean.fill_(5)
    mapper = ModelTensorMapper(net)
    assert len(mapper) == 15
    assert len(mapper.to_tensor(net.state_dict())) == 15
    result = mapper.to_model(torch.zeros(15))
    assert torch.equal(result[1].running_mean, torch.full((3,), 5.0))
    assert not result[0].weight.any()


def test_dtypes(bert):
    half = bert().to(torch.bfloat16)
    mapper = ModelTensorMapper(half)
    assert mapper.to_tensor(half).dtype == torch.bfloat16
    assert mapper.to_tensor(bert()).dtype == torch.float32
    assert mapper.to_model(mapper.to_tensor(bert())).classifier.weight.dtype == torch.bfloat16
    half.classifier.float()
    assert mapper.to_tensor(half).dtype == torch.float32


def test_a_tensor_of_another_length_is_an_error(bert):
    mapper = ModelTensorMapper(bert())
    n = len(mapper)
    with pytest.raises(ShapeMismatch, match=rf"shape \[{n}\] is needed for BertForSeq.*, not float32\[{n - 1}\]"):
        mapper.to_model(torch.zeros(n - 1))
    for wrong in (torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ShapeMismatch):
            mapper.to_model(wrong)
    with pytest.raises(ModelError, match="not list"):
        mapper.to_model([0.0] * n)


def test_a_model_of_another_architecture_is_an_error(bert, bert_base, gpt2, pipe):
    mapper = ModelTensorMapper(bert())
    with pytest.raises(KeyMismatch, match=r"BertForPreTraining lacks classifier\.weight"):
        mapper.to_tensor(bert_base())
    with pytest.raises(ShapeMismatch, match=r"classifier\.weight is float32\[2, 8\] in .* float32\[3, 8\]"):
        mapper.to_tensor(bert(num_labels=3))
    with pytest.raises(KeyMismatch):
        mapper.to_tensor({"x": torch.ones(2)})
    with pytest.raises(KeyMismatch):
        mapper.to_pipeline(torch.zeros(len(mapper)), base_pipeline=pipe)
    with pytest.raises(ModelError, match="not str"):
        mapper.to_tensor("gpt2")
    with pytest.raises(ModelError, match="must be a transformers pipeline"):
        mapper.to_pipeline(torch.zeros(len(mapper)), base_pipeline=bert())
    with pytest.raises(ModelError, match="not dict"):
        ModelTensorMapper({})
    with pytest.raises(ModelError, match="no floating-point parameters"):
        ModelTensorMapper(nn.ReLU())
