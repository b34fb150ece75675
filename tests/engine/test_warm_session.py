"""Merging again and again into the same tensors gives the bits of merging once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine import warm_session
from mergelab.engine.method import MergeMethod
from mergelab.engine.registry import get_method
from mergelab.engine.warm_session import MergeSession, residence
from mergelab.errors import ConfigError, KeyMismatch, ModelError, ShapeMismatch
from mergelab.weights.align import AlignedModels
from tests.methods.test_contract import models_for
from tests.methods.toy import OF_WEIGHTS, SHAPES, few_steps, merged, one_tensor, output_of, toy_models
from tests.methods.toy_data import ToyExamples

METHODS = OF_WEIGHTS
SECOND: dict[str, Any] = {"density": 0.37, "t": 0.8, "gamma": 0.05, "weights": None}


def room(models: AlignedModels, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.full(models.experts[0].shape(name), 9.0, dtype=dtype) for name in models.names}


def needed(method: MergeMethod, models: AlignedModels) -> dict[str, Any]:
    return {"output": output_of(method, models), "examples": ToyExamples(models) if method.needs else None}


def same(targets: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(targets[name], expected[name].to(targets[name].dtype)) for name in targets)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_merge_has_the_bits_of_a_cold_one_whatever_came_before(name: str, dtype: torch.dtype) -> None:
    method, models = get_method(name), models_for(name, dtype=dtype)
    targets = room(models)
    session = MergeSession(models, targets)
    known = method.parameters.model_fields
    steps = few_steps(method)
    changed = steps | {key: value for key, value in SECOND.items() if key in known}
    for parameters in (steps, changed, steps):
        session.merge(method, parameters, **needed(method, models))
        assert same(targets, merged(name, models, **parameters)), parameters


@pytest.mark.parametrize("name", [name for name in METHODS if "lambda_" in get_method(name).parameters.model_fields])
def test_a_change_of_lambda_alone_is_one_scaled_addition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, models = get_method(name), models_for(name)
    if not method.returns_task_vector:
        pytest.skip("its lambda is not a factor of a merged task vector")
    targets = room(models)
    session = MergeSession(models, targets)
    extra, steps = needed(method, models), few_steps(method)
    assert session.merge(method, steps | {"lambda": 0.2}, **extra) == "merged"
    if method.session is not None:  # keeps the task vector when it is asked for twice
        assert session.merge(method, steps | {"lambda": 0.3}, **extra) == "merged"
    with monkeypatch.context() as patched:
        patched.setattr(warm_session, "merge_into", None)
        patched.setattr(warm_session, "prepared_job", None)
        for scale in (0.7, 1.0, -0.4):
            assert session.merge(method, steps | {"lambda": scale}, **extra) == "scaled"
            assert same(targets, merged(name, models, lambda_=scale))


def test_another_method_weights_or_density_is_merged_anew() -> None:
    models = toy_models(3)
    targets = room(models)
    session = MergeSession(models, targets)
    for name, parameters in (
        ("ties", {"lambda": 0.5}),
        ("dare", {"lambda": 0.5}),
        ("ties", {"lambda": 0.7}),
        ("ties", {"lambda": 0.7, "weights": [1, 2, 3]}),
        ("ties", {"lambda": 0.7, "density": 0.5, "weights": [1, 2, 3]}),
        ("soup", {}),
        ("ties", {"lambda": 0.7, "density": 0.5, "weights": [1, 2, 3]}),
    ):
        assert session.merge(get_method(name), parameters) == "merged"
        assert same(targets, merged(name, models, **parameters))


@pytest.mark.parametrize("scope", ["model", "tensor", "pooled"])
def test_thresholds_of_any_density_are_looked_up(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = toy_models(3)
    targets = room(models)
    session = MergeSession(models, targets)
    for density in (0.3, 0.4):
        session.merge(get_method("ties"), {"scope": scope, "density": density})
    monkeypatch.setattr("mergelab.ops.thresholds.rank_each", None)
    for density in (0.9, 0.01, 0.5):
        parameters = {"density": density, "scope": scope}
        session.merge(get_method("ties"), parameters)
        expected = {name: session._targets[name].clone() for name in SHAPES}
        monkeypatch.undo()
        assert same(expected, merged("ties", models, **parameters))
        monkeypatch.setattr("mergelab.ops.thresholds.rank_each", None)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_other_examples_are_learnt_from_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, models = get_method(name), toy_models(2)
    session = MergeSession(models, room(models))
    asked: list[object] = []
    found = ToyExamples.of

    def noted(self: ToyExamples, expert: str, **options: Any) -> Any:
        asked.append(self)
        return found(self, expert, **options)

    monkeypatch.setattr(ToyExamples, "of", noted)
    first, second = ToyExamples(models), ToyExamples(models)  # equal, but not the same
    for examples, learns in ((first, True), (first, False), (second, True), (first, False)):
        asked.clear()
        session.merge(method, {}, examples=examples)
        assert bool(asked) == learns
        assert all(one is examples for one in asked)


def test_the_models_weights_count() -> None:
    models = toy_models(2)
    targets = room(models)
    MergeSession(models, targets, weights=[3.0, 1.0]).merge(get_method("soup"), {})
    assert same(targets, merged("soup", models, model_weights=[3.0, 1.0]))


def test_the_models_are_copied_and_the_files_no_longer_needed() -> None:
    models = toy_models(2)
    expected = merged("soup", models)
    targets = room(models)
    session = MergeSession(models, targets)
    for expert in models.experts:
        for name in SHAPES:
            expert.get(name).zero_()
    session.merge(get_method("soup"), {})
    assert same(targets, expected)


def test_a_request_that_cannot_be_met_changes_nothing() -> None:
    models = toy_models(2)
    targets = room(models)
    session = MergeSession(models, targets)
    for scale in (1.0, 0.9):
        session.merge(get_method("ties"), {"density": 0.5, "lambda": scale})
    before = {name: target.clone() for name, target in targets.items()}
    with pytest.raises(ConfigError, match="density"):
        session.merge(get_method("ties"), {"density": 0})
    assert same(targets, before)
    assert session.merge(get_method("ties"), {"density": 0.5, "lambda": 0.1}) == "scaled"


def test_no_tensor_of_the_models_size_is_made_in_a_trial() -> None:
    from torch.profiler import ProfilerActivity, profile

    length = 8_000_000
    generator = torch.Generator().manual_seed(0)
    models = one_tensor(*(torch.randn(length, generator=generator) for _ in range(4)))
    session = MergeSession(models, room(models))
    for scale in (0.9, 1.0):  # makes room for the task vector when it is asked for twice
        session.merge(get_method("ties"), {"lambda": scale})
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for scale in (0.9, 1.0):
            session.merge(get_method("ties"), {"density": 0.3, "lambda": scale})
        assert session.merge(get_method("ties"), {"density": 0.3, "lambda": 0.5}) == "scaled"
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < largest < length  # bytes; a tensor of the models' has four times as many


def test_targets_must_fit() -> None:
    models = toy_models(2)
    targets = room(models)
    with pytest.raises(KeyMismatch, match="merge embed into"):
        MergeSession(models, {name: target for name, target in targets.items() if name != "embed"})
    with pytest.raises(ShapeMismatch, match=r"embed is \[300, 257\]"):
        MergeSession(models, targets | {"embed": torch.zeros(3)})
    with pytest.raises(ShapeMismatch, match="not contiguous"):
        MergeSession(models, targets | {"embed": torch.zeros(257, 300).T})


def test_too_little_memory_says_what_would_fit() -> None:
    models = toy_models(4)
    entries = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    MergeSession(models, room(models), memory=6 * 4 * entries)  # the base, the experts and the merged task vector
    with pytest.raises(ModelError, match=r"keeping 4 experts in memory takes .* 2 of them would fit"):
        MergeSession(models, room(models), memory=4 * 4 * entries)
    with pytest.raises(ModelError, match="not even one of them fits; a merge to disk"):
        MergeSession(models, room(models), memory=100)


def test_an_accelerator_holds_what_fits_and_the_rest_is_brought_there() -> None:
    models = toy_models(2)
    device = torch.device("meta")
    bytes_of = {name: 4 * 4 * torch.Size(shape).numel() for name, shape in SHAPES.items()}
    everything = residence(models, device, sum(bytes_of.values()))
    assert set(everything.values()) == {device}
    some = residence(models, device, sum(bytes_of.values()) - bytes_of["embed"])
    assert [name for name, place in some.items() if place.type == "cpu"] == ["embed"]
    assert set(residence(models, device, 0).values()) == {torch.device("cpu")}


def test_tied_names_are_merged_once() -> None:
    models = toy_models(2)
    assert "tied" not in models.names
    renamed = dataclasses.replace(models, names=models.names[::-1])
    targets = room(renamed)
    MergeSession(renamed, targets).merge(get_method("soup"), {})
    assert same(targets, merged("soup", models))
