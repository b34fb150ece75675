from __future__ import annotations

import pytest
import torch

from mergelab.errors import KeyMismatch, ModelError
from mergelab.weights.source import DictSource, TensorInfo, layout_of, tied_names


def test_a_module_lists_a_tied_tensor_once_and_reads_it_under_each_name(gpt2):
    source = DictSource("tiny", gpt2().state_dict())
    assert source.aliases() == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in source.keys()  # noqa: SIM118 - a source is no mapping
    assert torch.equal(source.get("lm_head.weight"), source.get("transformer.wte.weight"))


def test_all_names_of_a_t5_embedding_are_one(t5):
    ties = tied_names(t5().state_dict())
    assert set(ties.values()) == {"shared.weight"}
    assert set(ties) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


def test_tensors_that_share_a_buffer_without_being_the_same_are_not_tied():
    buffer = torch.arange(6.0)
    tensors = {
        "all": buffer,
        "head": buffer[:3],
        "tail": buffer[3:],
        "matrix": buffer.view(2, 3),
        "turned": buffer.view(3, 2),
    }
    assert tied_names(tensors) == {}


def test_tensors_without_memory_are_not_tied():
    assert tied_names({"a": torch.empty(0), "b": torch.empty(0)}) == {}
    assert tied_names({"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}) == {}


def test_reading_gives_the_memory_itself_without_a_gradient():
    weight = torch.nn.Parameter(torch.ones(2))
    read = DictSource("m", {"w": weight}).get("w")
    assert read.data_ptr() == weight.data_ptr()
    assert not read.requires_grad


def test_unknown_keys_and_values_that_are_no_tensors_are_named():
    with pytest.raises(KeyMismatch, match="mine: has no tensor 'v'"):
        DictSource("mine", {"w": torch.ones(1)}).get("v")
    with pytest.raises(ModelError, match="mine: not a tensor: scale"):
        DictSource("mine", {"scale": 2.0})


def test_a_layout_is_known_without_the_data():
    source = DictSource("m", {"b": torch.ones(2, 3), "a": torch.ones((), dtype=torch.int64)})
    assert layout_of(source) == [TensorInfo("b", (2, 3), torch.float32), TensorInfo("a", (), torch.int64)]
    assert layout_of(source, ["a"]) == [TensorInfo("a", (), torch.int64)]
