"""What the engine does around a method: order, casts, copies, blocks, checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine import request
from mergelab.engine.registry import get_method
from mergelab.engine.run import merge, merge_to_dict
from mergelab.engine.warm_session import MergeSession
from mergelab.errors import ConfigError, NonFinite
from mergelab.ops import workspace
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource
from tests.methods.toy import OF_WEIGHTS, SHAPES, aligned, merged, merged_x, one_tensor, toy_models


class Watched:
    """A source that notes what is read."""

    def __init__(self, source: TensorSource, log: list[str]) -> None:
        self.source, self.log, self.name = source, log, source.name

    def get(self, key: str) -> Tensor:
        self.log.append(key)
        return self.source.get(key)

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def watched(log: list[str]) -> AlignedModels:
    models = toy_models(2)
    assert models.base is not None
    return dataclasses.replace(
        models, base=Watched(models.base, log), experts=tuple(Watched(expert, log) for expert in models.experts)
    )


def test_tensors_come_one_by_one_then_integers_then_aliases(
    watched: AlignedModels, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergelab.engine.run.AHEAD", 1)
    steps: Iterator[tuple[str, Tensor]] = merge(get_method("task_arithmetic"), {}, watched)
    assert log == []
    assert next(steps)[0] == "embed"
    # One that is merged ahead, by another thread, and the smallest, by which the experts are ordered.
    assert set(log) <= {"embed", "layer.weight", "gate"}
    assert [name for name, _ in steps] == ["layer.weight", "layer.bias", "gate", "head", "ids", "tied"]


PLAIN = [
    name
    for name, method in ((name, get_method(name)) for name in OF_WEIGHTS)
    if method.prepare is None and method.kind == "tensor" and method.max_experts != 1
]


@pytest.mark.parametrize("method", PLAIN)
def test_methods_without_a_preparing_pass_read_each_tensor_once(
    method: str, watched: AlignedModels, log: list[str]
) -> None:
    list(merge(get_method(method), {}, watched))
    sources = 2 + bool(get_method(method).returns_task_vector or "base" in get_method(method).injected)
    # The smallest is read once more, of the experts, to order them.
    ordering = 0 if get_method(method).order_matters else 2
    assert {key: log.count(key) for key in SHAPES} == dict.fromkeys(SHAPES, sources) | {"gate": sources + ordering}


def test_only_the_wanted_tensors_are_returned_and_they_are_the_same() -> None:
    models = toy_models(3)
    whole = merged("ties", models)
    part = dict(merge(get_method("ties"), {}, models, only={"gate", "ids", "tied"}))
    assert list(part) == ["embed", "gate", "ids", "tied"]
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_the_result_can_be_had_in_another_dtype_rounded_once() -> None:
    half = toy_models(2, dtype=torch.bfloat16)
    wide = dict(merge(get_method("task_arithmetic"), {}, half, dtype=torch.float32))
    assert wide["embed"].dtype == torch.float32
    assert not torch.equal(wide["embed"], wide["embed"].bfloat16().float())
    assert torch.equal(merged("task_arithmetic", half)["embed"], wide["embed"].bfloat16())


def test_wrong_requests_are_refused_before_anything_is_read(watched: AlignedModels, log: list[str]) -> None:
    for parameters, weights in (
        ({"density": 0}, None),
        ({"weights": [1]}, None),
        ({}, [1, 2, 3]),
        ({"weights": [-1, 1]}, None),
    ):
        with pytest.raises(ConfigError):
            merge(get_method("ties"), parameters, watched, weights=weights)
    assert log == []


def test_progress_counts_the_merged_entries() -> None:
    models = toy_models(2)
    counted: list[int] = []
    list(merge(get_method("soup"), {}, models, progress=counted.append))
    assert counted == [torch.Size(shape).numel() for shape in SHAPES.values()]


def test_the_dictionary_is_in_the_order_of_the_base() -> None:
    models = toy_models(2)
    shuffled = dataclasses.replace(models, names=("head", "embed", "gate", "layer.bias", "layer.weight"))
    assert list(merge_to_dict(get_method("soup"), {}, shuffled)) == [*SHAPES, "ids", "tied"]


def test_gradients_are_neither_recorded_nor_left_switched_off() -> None:
    base = {"x": torch.ones(3, requires_grad=True)}
    models = aligned(base, [{"x": torch.zeros(3, requires_grad=True)}])
    for _, tensor in merge(get_method("ties"), {}, models):
        assert torch.is_grad_enabled()
        assert not tensor.requires_grad
        tensor.add_(1)


def test_experts_of_one_name_are_refused() -> None:
    vector = {"x": torch.ones(2)}
    models = aligned(None, [vector, vector], names=("pear", "pear"))
    with pytest.raises(ConfigError, match="pear stands for more than one expert"):
        merge(get_method("soup"), {}, models)


def test_the_order_of_experts_is_the_users_where_it_matters() -> None:
    models = aligned(None, [{"x": torch.zeros(2)}, {"x": torch.ones(2)}], names=("b", "a"))
    assert merged("slerp", models, t=0.25)["x"].tolist() == [0.25, 0.25]


def test_tensors_laid_out_in_other_ways_are_the_same_tensors() -> None:
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for method in ("soup", "median", "slerp"):
        straight = merged_x(method, one_tensor(None, matrix, matrix + 1))
        turned = merged_x(method, one_tensor(None, matrix.T.contiguous().T, matrix + 1))
        assert torch.equal(straight, turned)
        assert turned.is_contiguous()


def test_tensors_without_entries_stay_so() -> None:
    empty = {"x": torch.zeros(0, 4), "y": torch.ones(2)}
    for method in OF_WEIGHTS:
        models = aligned(empty, [dict(empty)] * (get_method(method).max_experts or 2))
        assert merged(method, models)["x"].shape == (0, 4)


def test_a_result_too_large_for_the_stored_dtype_is_named() -> None:
    models = one_tensor([60000.0], [65000.0], [65000.0], dtype=torch.float16)
    with pytest.raises(NonFinite, match="method=task_arithmetic: merging tensor x gives NaN or infinity in float16"):
        merged_x("task_arithmetic", models, lambda_=1.0)


def test_large_finite_entries_are_no_infinity() -> None:
    huge = torch.full((1000,), 3e38)
    assert torch.equal(merged_x("median", one_tensor(None, huge)), huge)


def test_eight_bit_floats_can_be_merged() -> None:
    models = one_tensor(None, [1.0, 2.0], [3.0, 2.0], dtype=torch.float8_e4m3fn)
    result = merged_x("soup", models)
    assert result.dtype == torch.float8_e4m3fn
    assert result.float().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_task_vectors_are_as_exact_as_the_more_exact_of_base_and_expert(dtype: torch.dtype) -> None:
    base = torch.tensor([0.1, 1 / 3, -7.0], dtype=torch.float64)
    expert = torch.tensor([1.0, 0.5, 2.0], dtype=dtype)
    models = aligned({"x": base}, [{"x": expert}])
    found = merged_x("task_arithmetic", models, lambda_=0.3)
    assert found.dtype == torch.float64
    assert torch.equal(found, base + 0.3 * (expert.double() - base))
    backwards = aligned({"x": expert}, [{"x": base}])
    assert torch.equal(
        merged_x("task_arithmetic", backwards, lambda_=0.3), (expert + 0.3 * (base - expert.double())).to(dtype)
    )
    assert torch.equal(models.experts[0].get("x"), expert)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_room_for_blocks_is_made_once_for_each_thread_in_a_warm_session_too(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []

    class Counted(workspace.WorkspaceMemory):
        def __init__(self, *shape: Any) -> None:
            super().__init__(*shape)
            made.append(shape)

    monkeypatch.setattr(workspace, "WorkspaceMemory", Counted)
    monkeypatch.setattr(request, "thread_count", lambda: 1)
    models = toy_models()
    merged(method, models)
    assert len(made) == 1
    targets = {name: torch.empty(models.experts[0].shape(name)) for name in models.names}
    session = MergeSession(models, targets)
    for scale in (0.3, 0.4, 0.5):
        session.merge(get_method(method), {"lambda": scale, "weights": [1.0, 1.0, scale]})
    assert len(made) == 2
