"""TIES in one pass, in plain and in compiled operations, is TIES in two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine import ties_session
from mergelab.engine.registry import get_method
from mergelab.engine.ties_session import TiesSession
from mergelab.engine.warm_session import MergeSession
from mergelab.errors import ConfigError, MergeWarning, NonFinite
from mergelab.ops.ties_kernels import merge_whole
from mergelab.weights.align import AlignedModels
from tests.methods.test_ties import OPTIONS
from tests.methods.toy import SHAPES, aligned, merged, one_tensor, tensors, toy_models

TIES = get_method("ties")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The function that is compiled divides each operation among threads, which takes its time on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coarse_models(count: int = 4, dtype: torch.dtype = torch.float32) -> AlignedModels:
    """Models on a coarse grid: votes cancel at many entries."""
    generator = torch.Generator().manual_seed(3)
    base = tensors(lambda shape: torch.randn(shape, generator=generator).mul(8).round() / 8, dtype)
    steps = [tensors(lambda shape: torch.randn(shape, generator=generator).mul(2).round() / 8) for _ in range(count)]
    return aligned(
        base, [{k: (base[k] + v).to(dtype) if k in SHAPES else base[k] for k, v in s.items()} for s in steps]
    )


def room(models: AlignedModels) -> dict[str, Tensor]:
    return {name: torch.empty(models.experts[0].shape(name)) for name in models.names}


def same(targets: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(targets[name], expected[name].float()) for name in targets)


def uncompiled(majority_sign: Any, reduce: Any, weights_stage: Any, weighted: bool) -> Any:
    """The function that is compiled, as Python runs it."""
    return partial(
        merge_whole, majority_sign=majority_sign, reduce=reduce, weights_stage=weights_stage, weighted=weighted
    )


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_pass_gives_the_bits_of_two(
    options: dict[str, Any], dtype: torch.dtype, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties_session, "compiled", uncompiled)
    models = coarse_models(dtype=dtype)
    targets = {name: target.to(dtype) for name, target in room(models).items()}
    session = MergeSession(models, targets, compiling=compiling)
    for scope, density, scale in (("model", 0.2, 1.0), ("model", 0.7, 0.6), ("tensor", 0.4, 0.5), ("pooled", 1.0, 1.1)):
        parameters = {**options, "scope": scope, "density": density, "lambda": scale}
        assert session.merge(TIES, parameters) == "merged"
        assert session.path == ("compiled" if compiling else "plain")
        expected = merged("ties", models, **parameters)
        assert all(torch.equal(targets[name], expected[name]) for name in targets), parameters


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_majority_that_turns_out_to_be_another_is_put_right(
    scope: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sweep's densities some elect more positive entries and some more negative ones."""
    monkeypatch.setattr(ties_session, "compiled", uncompiled)
    large, small = torch.tensor([4.0, -4.0, 3.0, 3.0, 0.0, 0.0, 0.0]), torch.tensor([-1.0, -1.0, -1.0])
    first = torch.cat([large, small])
    second = torch.cat([-large[:2], large[2:], small])  # the votes of the first two entries cancel
    models = one_tensor(torch.zeros(10), first, second)
    targets = room(models)
    session = MergeSession(models, targets, compiling=compiling)
    signs = []
    for density in (0.4, 1.0, 0.7, 0.4):
        session.merge(TIES, {"density": density, "scope": scope})
        assert same(targets, merged("ties", models, density=density, scope=scope)), density
        signs.append(float(targets["x"][0].sign()))
    assert signs == [1.0, -1.0, -1.0, 1.0]


def test_only_tensors_whose_sign_turns_out_otherwise_are_merged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    models = aligned(
        {"a": torch.zeros(50), "b": torch.zeros(50)},
        [
            {"a": torch.arange(1.0, 51), "b": torch.cat([torch.tensor([60.0]), -torch.ones(49)])},
            {"a": torch.arange(2.0, 52), "b": torch.cat([torch.tensor([-60.0]), -torch.ones(49)])},
        ],
    )
    seen: list[tuple[str, float]] = []
    plain = TiesSession._plain

    def noted(self: TiesSession, asked: Any, part: Any, sign: float) -> int:
        seen.append((part.name, sign))
        return plain(self, asked, part, sign)

    monkeypatch.setattr(TiesSession, "_plain", noted)
    targets = room(models)
    session = MergeSession(models, targets, compiling=False)
    session.merge(TIES, {"density": 1.0, "scope": "tensor"})
    assert sorted(seen) == [("a", 1.0), ("b", -1.0), ("b", 1.0)]
    assert same(targets, merged("ties", models, density=1.0, scope="tensor"))
    seen.clear()
    session.merge(TIES, {"density": 0.9, "scope": "tensor"})
    assert sorted(seen) == [("a", 1.0), ("b", -1.0)]  # what the last merge found


def long_and_short_models(count: int = 3) -> AlignedModels:
    """Models with a tensor of several blocks and some that are joined."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"long": 300_001, "first": 10, "middle": 20_000, "last": 7}
    base, *experts = (
        {name: torch.randn(size, generator=generator).mul(8).round() / 8 for name, size in sizes.items()}
        for _ in range(count + 1)
    )
    return aligned(base, experts)


@pytest.mark.parametrize("compiling", [False, True])
def test_tensors_longer_than_a_block_are_merged_beside_short_ones(
    compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties_session, "compiled", uncompiled)
    models = long_and_short_models()
    targets = room(models)
    session = MergeSession(models, targets, compiling=compiling)
    for parameters in (
        {"density": 0.3, "lambda": 0.7},
        {"density": 0.8, "lambda": 0.4, "majority_sign": "frequency"},
        {"density": 0.8, "lambda": 0.4, "majority_sign": "frequency"},
        {"density": 0.8, "scope": "tensor", "lambda": 1.3},
        {"density": 0.4, "rules": [{"match": "last", "lambda": 0.6}]},
    ):
        session.merge(TIES, parameters)
        assert same(targets, merged("ties", models, **parameters)), parameters


@pytest.mark.parametrize("compiling", [False, True])
def test_a_short_tensor_that_becomes_too_large_is_named(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties_session, "compiled", uncompiled)
    models = long_and_short_models(1)
    models.experts[0].get("last")[3] = 1e38
    session = MergeSession(models, room(models), compiling=compiling)
    with pytest.raises(NonFinite, match="merging tensor last gives NaN or infinity"):
        session.merge(TIES, {"lambda": 5.0, "density": 1.0})


def test_float64_models_and_parameters_by_tensor_are_merged_as_by_other_methods() -> None:
    for models, parameters in (
        (toy_models(3, dtype=torch.float64), {"density": 0.3}),
        (toy_models(3), {"density": 0.3, "rules": [{"match": "embed", "density": 0.6}]}),
        (toy_models(3), {"density": 0.3, "rules": [{"match": "embed", "lambda": 0.6}]}),
    ):
        targets = room(models)
        session = MergeSession(models, targets, compiling=True)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ties_session, "compiled", uncompiled)
            session.merge(TIES, parameters)
        assert same(targets, merged("ties", models, **parameters))
        assert session.path == ("compiled" if "lambda" in str(parameters) else "plain")


def test_what_is_rounded_to_half_precision_before_a_float32_target_takes_it_is_not_compiled() -> None:
    models = toy_models(3, dtype=torch.bfloat16)
    targets = room(models)
    session = MergeSession(models, targets, compiling=True)
    session.merge(TIES, {"density": 0.3})
    assert session.path == "plain"
    assert same(targets, merged("ties", models, density=0.3))


def test_where_compiling_fails_the_merge_goes_on_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        def fails(*_: object) -> None:
            raise RuntimeError("no C++ compiler found\nand more")

        return fails

    monkeypatch.setattr(ties_session, "compiled", broken)
    models = toy_models(2)
    targets = room(models)
    session = MergeSession(models, targets, compiling=True)
    with pytest.warns(MergeWarning, match=r"plain torch operations.*RuntimeError: no C\+\+ compiler found$"):
        session.merge(TIES, {"density": 0.3})
    assert session.path == "plain"
    assert same(targets, merged("ties", models, density=0.3))
    session.merge(TIES, {"density": 0.4})  # said once
    assert session.path == "plain"


@pytest.mark.parametrize("compiling", [False, True])
def test_a_result_that_is_too_large_is_an_error(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties_session, "compiled", uncompiled)
    models = toy_models(2)
    session = MergeSession(models, room(models), compiling=compiling)
    with pytest.raises(NonFinite, match="merging tensor embed gives NaN or infinity"):
        session.merge(TIES, {"lambda": 1e39})


@pytest.mark.parametrize("compiling", [False, True])
def test_the_merged_task_vector_is_kept_when_it_is_asked_for_twice(
    compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties_session, "compiled", uncompiled)
    models = toy_models(3)
    targets = room(models)
    session = MergeSession(models, targets, compiling=compiling)
    ways = []
    for density, scale in ((0.3, 0.2), (0.5, 0.3), (0.5, 0.4), (0.5, 0.6), (0.4, 0.6), (0.4, 0.6)):
        ways.append(session.merge(TIES, {"density": density, "lambda": scale}))
        assert same(targets, merged("ties", models, density=density, lambda_=scale))
    assert ways == ["merged", "merged", "merged", "scaled", "merged", "merged"]


def test_what_cannot_be_merged_is_an_error_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties_session, "compiled", None)
    session = MergeSession(toy_models(2), room(toy_models(2)), compiling=True)
    with pytest.raises(ConfigError, match="weights"):
        session.merge(TIES, {"weights": [1, -1]})


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler")
def test_compiled_it_is_the_same_within_float32_rounding() -> None:
    models = toy_models(3)
    targets = room(models)
    session = MergeSession(models, targets, compiling=True)
    for density, scale in ((0.2, 1.0), (0.6, 0.3)):
        session.merge(TIES, {"density": density, "lambda": scale})
        assert session.path == "compiled"
        for name, expected in merged("ties", models, density=density, lambda_=scale).items():
            if name in targets:
                torch.testing.assert_close(targets[name], expected, rtol=1e-6, atol=1e-7)
