"""Tensors that skip the merge: layers that are left out, and weights that no checkpoint had."""

from __future__ import annotations

import pytest
import torch

from mergelab.config import LayersConfig
from mergelab.errors import ConfigError, NonFinite
from mergelab.models.skipping import left_out, set_aside
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource

STACKS = {
    "bert": ("bert.encoder.layer.{}.output.dense.weight", "encoder"),
    "gpt2": ("transformer.h.{}.attn.c_attn.weight", ""),
    "llama": ("model.layers.{}.mlp.up_proj.weight", ""),
    "t5": ("decoder.block.{}.layer.2.DenseReluDense.wo.weight", "decoder"),
    "bart": ("model.decoder.layers.{}.fc1.weight", "decoder"),
    "bert2bert": ("decoder.bert.encoder.layer.{}.output.dense.weight", "decoder"),
    "bert2gpt2": ("decoder.transformer.h.{}.attn.c_attn.weight", "decoder"),
    "encoder": ("encoder.encoder.layer.{}.output.dense.weight", "encoder"),
}
PAIR = [
    *(STACKS["encoder"][0].format(number) for number in range(3)),
    *(STACKS["bert2bert"][0].format(number) for number in range(2)),
    *("encoder.embeddings.word_embeddings.weight", "decoder.cls.predictions.bias", "enc_to_dec_proj.weight"),
]


@pytest.mark.parametrize("kind", STACKS)
def test_layers_are_counted_from_0_whatever_the_architecture_calls_them(kind: str) -> None:
    pattern, part = STACKS[kind]
    names = [pattern.format(number) for number in (0, 1, 10)] + ["embeddings.weight"]
    assert left_out(names, [1, 10], key="leave_out") == names[1:3]
    if part:
        assert left_out(names, LayersConfig(**{part: [0]}), key="leave_out") == names[:1]


def test_encoder_and_decoder_are_counted_each_on_its_own() -> None:
    assert left_out(PAIR, [0, 1], key="leave_out") == [*PAIR[:2], *PAIR[3:5]]
    assert left_out(PAIR, [2], key="leave_out") == [PAIR[2]]
    assert left_out(PAIR, LayersConfig(encoder=[1], decoder=[0]), key="leave_out") == [PAIR[1], PAIR[3]]
    assert left_out(PAIR, [], key="leave_out") == []


@pytest.mark.parametrize(
    ("names", "layers", "said"),
    [
        (PAIR, [0, 3], r"leave_out=\[0, 3\]: there is no layer 3; the models have layers 0 to 2"),
        (PAIR, LayersConfig(decoder=[2]), r"leave_out\.decoder=\[2\]: there is no layer 2; .* layers 0 to 1"),
        (["h.0.a"], LayersConfig(decoder=[0]), r"leave_out\.decoder=\[0\]: .* not those of a decoder; leave_out=\[…\]"),
        (["h.0.a"], LayersConfig(encoder=[0]), r"leave_out\.encoder=\[0\]: .* not those of an encoder"),
        (["a.weight"], [0], "there is no layer 0; the models have no numbered layers"),
    ],
)
def test_a_layer_that_is_not_there_is_named(names: list[str], layers: list[int] | LayersConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        left_out(names, layers, key="leave_out")


def models(base: float | None, *experts: float) -> AlignedModels:
    def made(name: str, value: float) -> DictSource:
        held = {name: torch.full((2,), value) for name in ("x", "cross", "layer.0.w")}
        return DictSource(name, held | {"tied": held["cross"]})

    start = None if base is None else made("base", base)
    return align(start, [made(f"e{i}", value) for i, value in enumerate(experts)], backbone_prefix="")


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ([{"cross"}, set(), {"cross"}, set()], 3.0),  # the mean of the experts that have learnt it
        ([{"cross"}, {"cross"}, {"cross"}, {"cross"}], 1.0),  # nobody has: the base's
        ([set(), {"cross"}, {"cross"}, {"cross"}], 1.0),  # the base alone has
        ([set(), {"cross"}, set(), set()], 3.5),
    ],
)
def test_what_is_new_in_a_model_comes_from_those_in_which_it_is_not(new: list[set[str]], expected: float) -> None:
    aligned, kept = set_aside(models(1.0, 2.0, 3.0, 4.0), (), new)
    assert aligned.names == ("x", "layer.0.w")
    assert aligned.aliases == {}
    assert {name: value.tolist() for name, value in kept.items()} == dict.fromkeys(("cross", "tied"), [expected] * 2)


def test_without_a_base_what_is_new_everywhere_is_the_first_experts() -> None:
    _, kept = set_aside(models(None, 2.0, 3.0), (), [{"cross"}, {"cross"}])
    assert kept["cross"].tolist() == [2.0, 2.0]


def test_layers_that_are_left_out_are_the_bases() -> None:
    aligned, kept = set_aside(models(1.0, 2.0, 3.0), ["layer.0.w"])
    assert aligned.names == ("x", "cross")
    assert aligned.aliases == {"tied": "cross"}
    assert kept["layer.0.w"].tolist() == [1.0, 1.0]


def test_the_mean_of_what_is_new_elsewhere_is_rounded_once_to_the_dtype_that_is_saved() -> None:
    values = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0078125])]  # neighbours in bfloat16
    sources = [DictSource(f"m{at}", {"cross": value.bfloat16()}) for at, value in enumerate(values)]
    aligned = align(sources[0], sources[1:], backbone_prefix="")
    new = [{"cross"}, set(), set()]
    assert set_aside(aligned, (), new, torch.float32)[1]["cross"].item() == 1.00390625
    assert set_aside(aligned, (), new)[1]["cross"].dtype == torch.bfloat16


def test_what_stays_the_bases_must_be_finite() -> None:
    with pytest.raises(NonFinite, match=r"base: layer\.0\.w holds NaN"):
        set_aside(models(float("nan"), 2.0), ["layer.0.w"])
