"""Heads and means: read in an order of labels, averaged without a silent loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, NonFinite, ShapeMismatch
from mergelab.models.heads import Head, mean_head, mean_of, mean_tensor, read_head
from mergelab.weights.source import DictSource


def source(name: str, **tensors: Tensor) -> DictSource:
    return DictSource(name, tensors)


def test_a_head_is_read_in_the_given_order() -> None:
    model = source("a", weight=torch.arange(6.0).view(3, 2), bias=torch.arange(3.0), scale=torch.arange(5.0))
    head = read_head(model, ["weight", "bias", "scale"], (2, 0, 1))
    assert head.tensors["bias"].tolist() == [2.0, 0.0, 1.0]
    assert head.tensors["weight"].tolist() == [[4.0, 5.0], [0.0, 1.0], [2.0, 3.0]]
    assert head.tensors["scale"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert head.owner == "a"


def test_a_head_with_nan_is_refused() -> None:
    with pytest.raises(NonFinite, match="a: bias holds NaN or infinity"):
        read_head(source("a", bias=torch.tensor([0.0, float("nan")])), ["bias"], (0, 1))


def test_means_of_float64_lose_nothing_and_others_are_rounded_once() -> None:
    fine = torch.tensor([1.0 + 2**-40], dtype=torch.float64)
    assert mean_tensor([fine, fine]).item() == fine.item()
    assert mean_tensor([torch.ones(1), fine], torch.float64).item() == 1.0 + 2**-41
    half = [torch.tensor([1.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16()]
    assert mean_tensor(half, torch.float32).item() == 1.00390625
    assert half[0].item() == 1.0


def test_what_cannot_be_averaged_is_named() -> None:
    a = source("a", w=torch.zeros(1, 2), n=torch.tensor([3]))
    with pytest.raises(
        ShapeMismatch, match=r"w cannot be averaged: it is float32\[1, 2\] in a and float32\[2, 2\] in b"
    ):
        mean_of([a, source("b", w=torch.zeros(2, 2))], "w")
    with pytest.raises(ShapeMismatch, match="n cannot be averaged"):
        mean_of([a, source("b", n=torch.tensor([3.0]))], "n")
    with pytest.raises(NonFinite, match="b: w holds NaN or infinity"):
        mean_of([a, source("b", w=torch.full((1, 2), float("inf")))], "w")
    with pytest.raises(ModelError, match="n holds integers, which are copied, and those of a and b differ"):
        mean_of([a, source("b", n=torch.tensor([4]))], "n")
    with pytest.raises(KeyMismatch, match="b: has no tensor 'w'"):
        mean_of([a, source("b")], "w")
    assert mean_of([a, a], "n").tolist() == [3]


def test_heads_of_different_tasks_are_not_averaged() -> None:
    heads = [Head({"w": torch.zeros(rows, 2)}, name) for rows, name in ((2, "a"), (3, "b"))]
    with pytest.raises(ShapeMismatch, match=r"heads cannot be averaged: w is \(2, 2\) in a and \(3, 2\) in b"):
        mean_head(heads)
