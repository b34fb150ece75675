"""Stored tensors become a model's as transformers loads them, whatever names and layout they are stored in."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergelab.errors import KeyMismatch, ModelError
from mergelab.models.architecture import open_generator
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.conversion import as_in, check_readable, load_weights, tied_parameters
from mergelab.weights.module import named_tensors
from tests import layouts

LAYOUTS = [layouts.in_files, layouts.in_memory]


def _stored(checkpoint):
    return {name: checkpoint.get(name) for name in [*checkpoint.keys(), *checkpoint.aliases()]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", layouts.MODELS)
def test_every_tensor_has_the_name_the_shape_and_the_values_of_the_module(name, layout, tmp_path) -> None:
    model = layouts.build(name, 0)
    layout(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    converted = as_in(checkpoint.skeleton, checkpoint)
    own, ties = model.state_dict(), tied_parameters(model)
    assert {*converted.keys(), *converted.aliases()} - ties.keys() == own.keys() - ties.keys()
    for key in converted.keys():  # noqa: SIM118
        assert converted.shape(key) == own[key].shape
        assert converted.dtype(key) == own[key].dtype
        assert torch.equal(converted.get(key), own[key])
        converted.prefetch(key)
    check_readable(checkpoint.skeleton, converted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", layouts.MODELS)
def test_a_module_computes_what_transformers_computes(name, layout, tmp_path) -> None:
    model = layouts.build(name, 1)
    layout(model, tmp_path)
    module = load_weights(open_generator(tmp_path, name), _stored(open_checkpoint(tmp_path)))
    reference = type(model).from_pretrained(tmp_path)
    ours, theirs = named_tensors(module), named_tensors(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():  # the order of sums depends on where the tensors lie in memory
        torch.testing.assert_close(module(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", layouts.MODELS)
def test_no_parameter_keeps_a_value_that_no_checkpoint_has(name, tmp_path) -> None:
    layouts.build(name, 0).save_pretrained(tmp_path)
    tensors = _stored(open_checkpoint(tmp_path))
    module = open_generator(tmp_path, name)
    for key in list(tensors)[:: max(1, len(tensors) // 7)]:
        with pytest.raises((KeyMismatch, ModelError)):
            load_weights(module, {name: value for name, value in tensors.items() if name != key})
    with pytest.raises(KeyMismatch, match="other"):
        load_weights(module, {**tensors, "other.weight": torch.ones(2)})


def test_an_expert_that_is_stored_whole_and_in_parts_is_an_error(tmp_path) -> None:
    model = layouts.build("mixtral", 0)
    layouts.in_files(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    converted = as_in(checkpoint.skeleton, checkpoint)
    if converted is checkpoint:
        pytest.skip("this version of transformers stores the experts as it computes with them")
    both = {**_stored(checkpoint), **{key: converted.get(key) for key in converted.keys()}}  # noqa: SIM118
    with pytest.raises(KeyMismatch):
        load_weights(model, both)


def test_tied_parameters_come_apart_for_different_values_and_together_again() -> None:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=12, tie_word_embeddings=True))
    tied = {name: value.detach().clone() for name, value in model.named_parameters()}
    apart = {**tied, "lm_head.weight": torch.randn(12, 8)}
    with pytest.raises(ModelError, match="one tied tensor"):
        load_weights(model, apart)
    load_weights(model, apart, untied=True)
    assert torch.equal(model.lm_head.weight, apart["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tied["model.embed_tokens.weight"])
    load_weights(model, tied, untied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied["model.embed_tokens.weight"])
