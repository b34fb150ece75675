from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, HubError, KeyMismatch, ModelError, ShapeMismatch
from mergelab.weights.state_dict import StateDict


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 4, generator=generator).to(dtype), "b": torch.randn(4, generator=generator).to(dtype)}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


OPERATIONS = {
    "add": (torch.add, lambda a, b: a + b),
    "sub": (torch.sub, lambda a, b: a - b),
    "mul": (torch.mul, lambda a, b: a * b),
    "div": (torch.div, lambda a, b: a / b),
}
OPERANDS = {
    "number": lambda: (0.3, lambda key: 0.3),
    "integer": lambda: (2, lambda key: 2),
    "numpy number": lambda: (np.float64(0.3), lambda key: 0.3),
    "scalar tensor": lambda: (torch.tensor(0.3), lambda key: torch.tensor(0.3)),
    "row": lambda: (torch.arange(1.0, 5), lambda key: torch.arange(1.0, 5)),
    "dict": lambda: (tensors(1), tensors(1).__getitem__),
    "ordered dict": lambda: (OrderedDict(reversed(tensors(1).items())), tensors(1).__getitem__),
    "state dict": lambda: (StateDict(tensors(1)), tensors(1).__getitem__),
}


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic_is_torchs_on_either_side_and_in_place(name, operand):
    torch_operation, operation = OPERATIONS[name]
    other, value = OPERANDS[operand]()
    state = StateDict(tensors())
    assert equal(operation(state, other), {k: torch_operation(v, value(k)) for k, v in sorted(tensors().items())})
    reflected = {k: torch_operation(torch.as_tensor(value(k), dtype=v.dtype), v) for k, v in sorted(tensors().items())}
    assert equal(operation(other, state), reflected)
    expected = operation(state, other)
    before = state
    if name == "add":
        state += other
    elif name == "sub":
        state -= other
    elif name == "mul":
        state *= other
    else:
        state /= other
    assert state is before
    assert equal(state, expected)


def test_a_module_can_stand_on_either_side(bert):
    a, b = bert(), bert(seed=1)
    state = StateDict.from_model(a)
    expected = {key: dict(b.named_parameters())[key] - value for key, value in state.items()}
    assert equal(b - state, expected)
    assert equal(state - b, -(b - state))


def test_negation_sums_and_the_formula_of_a_merge():
    base, a, b = (StateDict(tensors(seed)) for seed in range(3))
    merged = base + 0.5 * ((a - base) + (b - base)) / 2
    for key in base:
        expected = base[key] + 0.5 * ((a[key] - base[key]) + (b[key] - base[key])) / 2
        assert torch.equal(merged[key], expected)
    assert equal(-base, base * -1)
    assert equal(sum([a, b]), a + b)
    assert equal(sum([a, b], start=StateDict.zeros_like(a)), a + b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    a, b = StateDict(tensors(0, dtype)), StateDict(tensors(1, dtype))
    for name, (torch_operation, operation) in OPERATIONS.items():
        for key, value in operation(a, b).items():
            assert value.dtype == dtype, name
            assert torch.equal(value, torch_operation(a[key].float(), b[key].float()).to(dtype))
        for key, value in operation(a, torch.tensor(0.3)).items():
            assert torch.equal(value, torch_operation(a[key].float(), 0.3).to(dtype))


def test_mixed_precision_gives_the_wider_dtype():
    assert (StateDict(tensors(0, torch.bfloat16)) + tensors(1))["w"].dtype == torch.float32
    assert (StateDict(tensors()) + tensors(1, torch.float64))["w"].dtype == torch.float64
    assert (StateDict(tensors()) * torch.tensor(2.0, dtype=torch.float64))["w"].dtype == torch.float32


def test_integer_tensors_are_carried():
    ids = torch.arange(4)
    a, b = StateDict({**tensors(), "ids": ids}), {**tensors(1), "ids": ids.clone()}
    for result in (a + b, a * 0.5, -a, 1 / a, a + torch.tensor(2.0), StateDict.zeros_like(a)):
        assert torch.equal(result["ids"], ids)
    with pytest.raises(ModelError, match="ids: integer tensors differ"):
        a + {**tensors(), "ids": ids + 1}


def test_keys_are_sorted_however_entries_come_in():
    state = StateDict({"b": torch.ones(1), "d": torch.ones(1)})
    state["c"] = torch.ones(1)
    state["a"] = torch.ones(1)
    state.update({"aa": torch.ones(1)}, z=torch.ones(1))
    state.setdefault("ab", torch.ones(1))
    state |= {"0": torch.ones(1)}
    assert list(state) == sorted(state) == list(state | {}) == list(state.copy())
    assert list(copy.deepcopy(state)) == list(pickle.loads(pickle.dumps(state))) == list(state)
    assert isinstance(state | {"y": torch.ones(1)}, StateDict)


def test_the_names_must_be_the_same_and_differences_are_listed():
    state = StateDict(tensors())
    with pytest.raises(KeyMismatch, match="the left operand lacks extra; the right operand lacks b"):
        state + {"w": torch.ones(3, 4), "extra": torch.ones(1)}
    with pytest.raises(KeyMismatch, match="the right operand lacks extra"):
        {**tensors(), "extra": torch.ones(1)} - state
    with pytest.raises(KeyMismatch):
        state += {}
    assert equal(state, StateDict(tensors()))


def test_the_shapes_must_be_the_same_and_differences_are_listed():
    state = StateDict(tensors())
    with pytest.raises(ShapeMismatch, match=r"w is float32\[3, 4\] in the left operand but float32\[4, 3\]"):
        state + {"w": torch.ones(4, 3), "b": torch.ones(4)}
    with pytest.raises(ShapeMismatch, match=r"w is float32\[3, 4\] in the left operand but int64\[3, 4\]"):
        state + {"w": torch.ones(3, 4, dtype=torch.int64), "b": torch.ones(4)}
    for wrong in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(1, 4)):  # the last would make b a matrix
        with pytest.raises(ShapeMismatch, match="does not fit"):
            state * wrong


def test_other_operands_are_type_errors():
    for other in ("text", None, np.ones(3), 1j):
        with pytest.raises(TypeError):
            StateDict(tensors()) + other


def test_only_tensors_are_taken():
    with pytest.raises(ModelError, match="w is a float"):
        StateDict({"w": 1.0})
    with pytest.raises(ModelError, match="w is a list"):
        StateDict()["w"] = [1]
    with pytest.raises(ModelError, match="not int"):
        StateDict.from_model(3)


def test_in_place_operations_leave_the_model_alone(bert):
    model = bert()
    before = copy.deepcopy(model.state_dict())
    state = StateDict.from_model(model)
    state *= 2
    state += 1
    state -= model
    assert equal(model.state_dict(), before)
    assert not any(value.requires_grad for value in state.values())


def test_a_model_is_taken_without_copying_and_tied_tensors_once(gpt2, t5):
    model = gpt2()
    state = StateDict.from_model(model)
    assert state["transformer.wte.weight"].data_ptr() == model.lm_head.weight.data_ptr()
    assert "lm_head.weight" not in state
    assert list(state) == sorted(dict(model.named_parameters()))
    assert StateDict.from_model(model.state_dict()).keys() == state.keys()
    assert len(StateDict.from_model(t5())) == len(list(t5().named_parameters()))


def test_a_pipeline_is_its_model(gpt2, tokenizer):
    from transformers import pipeline

    model = gpt2()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert equal(StateDict.from_model(pipe), StateDict.from_model(model))
    changed = (StateDict.from_model(pipe) * 2).to_model(pipe)
    assert (changed.task, changed.tokenizer) == (pipe.task, pipe.tokenizer)
    assert torch.equal(changed.model.lm_head.weight, model.lm_head.weight * 2)
    assert pipe.model is model
    assert changed("the cat", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("the cat")


def test_a_model_comes_back_changed_as_a_copy_with_its_ties(gpt2):
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    changed = (StateDict.from_model(model) + 1).to_model(model)
    assert type(changed) is type(model)
    assert equal(model.state_dict(), before)
    assert changed.lm_head.weight is changed.transformer.wte.weight
    assert torch.equal(changed.lm_head.weight, before["lm_head.weight"] + 1)
    assert equal(StateDict.from_model(changed), StateDict.from_model(model) + 1)
    assert not changed.training
    assert all(parameter.requires_grad for parameter in changed.parameters())


def test_a_model_keeps_its_own_dtype(bert):
    model = bert().to(torch.bfloat16)
    changed = StateDict({key: value.float() + 0.1 for key, value in model.named_parameters()}).to_model(model)
    assert changed.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(changed.classifier.weight, (model.classifier.weight.float() + 0.1).bfloat16())


def test_a_tied_tensor_may_be_given_under_any_of_its_names(gpt2):
    model = gpt2()
    state = StateDict.from_model(model)
    both = StateDict({**state, "lm_head.weight": state["transformer.wte.weight"].clone()})
    assert equal(StateDict.from_model(both.to_model(model)), state)
    only_other = both.copy().remove(["transformer.wte.weight"])
    assert equal(StateDict.from_model(only_other.to_model(model)), state)
    both["lm_head.weight"] = both["lm_head.weight"] + 1
    with pytest.raises(ModelError, match="one tied tensor in GPT2LMHeadModel, but are given different values"):
        both.to_model(model)


def test_what_does_not_fit_a_model_is_listed_and_nothing_is_written(bert):
    model, state = bert(), StateDict.from_model(bert(seed=1))
    with pytest.raises(KeyMismatch, match=r"BertForSequenceClassification has no tensor more\.weight"):
        (state | {"more.weight": torch.ones(1)}).to_model(model)
    with pytest.raises(KeyMismatch, match=r"lack classifier\.bias$"):
        state.copy().remove(["classifier.bias"]).to_model(model)
    with pytest.raises(ShapeMismatch, match=r"classifier\.bias is float32\[2\] in .* but float32\[3\] is given"):
        (state | {"classifier.bias": torch.ones(3)}).to_model(model)


def test_a_part_of_a_model_can_be_exchanged(bert):
    model = bert()
    changed = StateDict({"classifier.bias": torch.ones(2)}).to_model(model, strict=False)
    assert torch.equal(changed.classifier.bias, torch.ones(2))
    assert torch.equal(changed.classifier.weight, model.classifier.weight)


def test_a_dict_comes_back_as_one_with_each_name_of_a_tied_tensor(gpt2):
    like = gpt2().state_dict()
    state = StateDict.from_model(like) * 2
    changed = state.to_model(like)
    assert set(changed) == set(like)
    assert changed["lm_head.weight"] is changed["transformer.wte.weight"]
    assert torch.equal(changed["lm_head.weight"], like["lm_head.weight"] * 2)
    with pytest.raises(KeyMismatch):
        StateDict({"x": torch.ones(1)}).to_model(like)


def test_a_model_by_name_is_loaded_for_its_task(bert, gpt2, folder):
    path = folder(bert())
    assert equal(StateDict.from_hf(path, "text-classification"), StateDict.from_model(bert()))
    assert equal(StateDict.from_hf(str(path), task="text-classification", device="cpu"), StateDict.from_model(bert()))
    assert equal(StateDict.zeros_like(str(path), task="text-classification"), StateDict.from_model(bert()) * 0)
    pipe = StateDict.from_model(bert(seed=1)).to_model(str(path), task="text-classification")
    assert equal(StateDict.from_model(pipe), StateDict.from_model(bert(seed=1)))
    assert pipe("the cat")[0]["label"] in ("LABEL_0", "LABEL_1")
    with pytest.raises(ConfigError, match="task="):
        StateDict().to_model(str(path))


def test_a_head_that_a_base_lacks_is_made_the_same_way_each_time(bert_base, folder):
    path = folder(bert_base())
    torch.manual_seed(1)
    first = StateDict.from_hf(path, "text-classification")
    torch.manual_seed(2)
    assert equal(StateDict.from_hf(path, "text-classification"), first)


def test_a_stored_dtype_is_kept(bert, folder):
    path = folder(bert().to(torch.bfloat16))
    assert StateDict.from_hf(path, "text-classification")["classifier.weight"].dtype == torch.bfloat16


def test_what_cannot_be_loaded_says_so_in_one_line(bert, gpt2, folder, tmp_path):
    path = folder(bert())
    with pytest.raises(ConfigError, match="did you mean 'text-classification'"):
        StateDict.from_hf(path, "text-clasification")
    torn = folder(bert(), "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"torn/model\.safetensors is truncated"):
        StateDict.from_hf(torn.parent, "text-classification")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: cannot be loaded for text-classification") as caught:
        StateDict.from_hf(tmp_path / "empty", "text-classification")
    assert "\n" not in str(caught.value)
    with pytest.raises(HubError, match="no-one/nothing: cannot be loaded") as caught:
        StateDict.from_hf("no-one/nothing", "text-classification", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_subsets_removal_and_filters():
    state = StateDict(tensors())
    assert list(state.subset(["w"])) == ["w"]
    assert list(state) == ["b", "w"]
    for unknown in (state.subset, state.remove):
        with pytest.raises(KeyMismatch, match="'x', 'y'"):
            unknown(["w", "x", "y"])
    assert state.filter_values(lambda value: value.dim() == 2) is state
    assert list(state) == ["w"]
    assert state.remove(["w"]) is state
    assert not state


def test_parameters_can_be_told_from_the_rest(bert):
    model = bert()
    model.classifier.requires_grad_(False)
    state = StateDict.from_model(model).filter_values(lambda value: value.requires_grad)
    assert "classifier.bias" not in state
    assert "bert.pooler.dense.bias" in state


def test_copies_share_no_memory_and_equality_is_by_value():
    state = StateDict(tensors())
    other = state.copy()
    assert other == state == tensors()
    other["w"][0, 0] += 1
    assert other != state
    assert state != {"w": state["w"]}
    assert state != state.to(dtype=torch.float64)
    assert state != 3


def test_moving_changes_floats_only():
    moved = StateDict({**tensors(), "ids": torch.arange(3)}).to("cpu", torch.float16)
    assert (moved["w"].dtype, moved["ids"].dtype) == (torch.float16, torch.int64)
    assert StateDict(tensors()).to("meta")["w"].device.type == "meta"


def test_any_module_will_do():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = StateDict.from_model(net)
    assert list(state) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert equal(StateDict.from_model((state + state).to_model(net)), state * 2)
    from_dict = StateDict.from_model(net.state_dict())
    assert "1.num_batches_tracked" in from_dict
    assert equal(StateDict.from_model(from_dict.to_model(net)), state)
