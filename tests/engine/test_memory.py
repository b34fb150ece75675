"""What methods hold at once, counted in copies of the largest tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.estimation.input_gram import InputGram, InputGramSums
from mergelab.methods import regmean as regmean_module
from mergelab.methods.regmean import regmean
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels
from tests.methods.toy import OF_WEIGHTS, aligned, output_of

ROWS, COLUMNS = 40_000, 48  # many blocks of any method's
LARGEST = 4 * ROWS * COLUMNS
BESIDES = 0.2  # copies: blocks that are in the making, and matrices of COLUMNS × COLUMNS


@pytest.fixture(scope="module")
def models() -> AlignedModels:
    """Five models with a tensor much larger than any block."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"large.weight": (ROWS, COLUMNS), "small.weight": (64, COLUMNS), "bias": (COLUMNS,)}
    base, *experts = (
        {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(6)
    )
    return aligned(base, experts)


def most_copies(work: Callable[[], object]) -> float:
    """The most bytes of tensors that the work holds at once beside its inputs, in copies of the largest tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees what its own thread does
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
    finally:
        torch.set_num_threads(threads)
    recorded: Any = seen.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / LARGEST


def test_copies_are_counted() -> None:
    def work() -> None:
        first = torch.zeros(ROWS, COLUMNS)
        second = first + 1
        del first
        (second * 2).add_(second)

    assert most_copies(work) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("name", [name for name in OF_WEIGHTS if not get_method(name).needs])
def test_no_method_holds_more_than_three_copies_of_the_largest_tensor_beside_one_for_each_expert(
    name: str, models: AlignedModels
) -> None:
    method = get_method(name)
    count = min(5, method.max_experts or 5)
    some = replace(models, experts=models.experts[:count])
    own = method.parameters.model_fields
    settings = ({"lambda": 0.7} if "lambda_" in own else {}) | ({"steps": 3} if "steps" in own else {})

    def work() -> None:
        for _ in merge(method, settings, some, output=output_of(method, some)):
            pass

    assert most_copies(work) <= count + 3 + BESIDES


def test_regmean_holds_little_more_than_the_result_of_a_layer_with_many_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regmean_module, "ENTRIES", ROWS * COLUMNS // 50)
    generator = torch.Generator().manual_seed(0)
    experts = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(3)]
    inputs = torch.randn(500, COLUMNS, generator=generator)
    known = [InputGram({"x": inputs.T @ inputs / 500}, {"x": "x"}, frozenset()) for _ in experts]
    site = Site("x", ("a", "b", "c"), (ROWS, COLUMNS))
    assert most_copies(lambda: regmean(experts, prepared=known, site=site)) < 2 + 2 * BESIDES


class Stack(nn.Module):
    """Square linear layers one after the other."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = torch.tanh(layer(features))
        return features


def test_input_gram_matrices_need_one_matrix_for_each_distinct_input() -> None:
    width, depth = 500, 8
    module = Stack(width, depth)
    names = {name: name for name, _ in module.named_parameters()}
    batches = [{"features": torch.randn(4, width)} for _ in range(5)]
    found: list[InputGram] = []

    def work() -> None:
        sums = InputGramSums(module, names)
        sums.add(batches)
        found.append(sums.mean())

    matrix = 8 * width * width  # the sums are in float64
    assert most_copies(work) * LARGEST <= (depth + 2) * matrix  # and a product that is being added, in both precisions
    assert len(found[0].matrices) == depth


def test_slerp_holds_no_whole_tensor_but_the_result(models: AlignedModels) -> None:
    two = replace(models, experts=models.experts[:2])
    method = get_method("slerp")
    # and two products of a block with their sum; a whole tensor would be 2 copies
    assert most_copies(lambda: [None for _ in merge(method, {"t": [0.1, 0.9]}, two)]) < 1.5
