"""A user's own function, from any importable module, is a method."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergelab.engine.custom import custom_method
from mergelab.engine.registry import check_parameters, get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError, NonFinite
from tests.methods.toy import SHAPES, merged, one_tensor, toy_models

MODULE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Literal
import torch
from mergelab.engine.method import merge_method
from mergelab.weights.state_dict import StateDict, dict_map
if TYPE_CHECKING:
    from torch import Tensor
    from nowhere import Strange

not_a_function = 3

def median(models: list[Tensor], share: float = 0.5, strange: Strange = None) -> Tensor:
    return torch.stack(models).quantile(share, dim=0)

def anything(models, **kw):
    return models[0] * kw.get("factor", 1.0)

def needs(models, factor: float):
    return models[0] * factor

def largest(models, base_index: int = 0, kind: Literal["plain", "odd"] = "plain"):
    base = models.pop(base_index)
    vectors = torch.stack([model - base for model in models])
    return base + vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]

def by_name(base, experts, *, site, weights=None, lambda_: float = 1.0):
    assert site.experts and site.shape == tuple(base.shape)
    return base + lambda_ * sum(w * (e - base) for w, e in zip(weights, experts))

def no_base(experts, base=None):
    return experts[0] if base is None else base

@merge_method(needs_base=True, elementwise=True, prepare=lambda models, seed: len(models.names) + seed)
def declared(base, experts, *, prepared):
    return base + prepared

@dict_map
def mapped(models, factor: float = 1.0):
    return factor * torch.stack(models).mean(0)

def whole(models: list[StateDict], factor: float = 1.0, **kw) -> StateDict:
    return factor * sum(models[1:], models[0]) / len(models)

def lifted(models, **kw): ...
lifted.model_function = whole

def lossy(models):
    return {name: value for name, value in models[0].items() if name != "head"}
lossy.model_function = lossy

def raises(models):
    raise ValueError("too odd\\nsecond line")

def wrong_shape(models):
    return models[0].reshape(-1)[:1]

def wrong_kind(models):
    return 3

def integers(models):
    return models[0].round().long()

def not_finite(models):
    return models[0] / 0

def writes(models):
    models[0].zero_()
    models[0] += 1
    return models[0]

def nothing(*, factor=1.0):
    return factor

def of_vectors(base, vectors):
    return sum(vectors)

def of_prepared(base, prepared):
    return base

def of_workspace(base, experts, workspace=2):
    return base + workspace

@merge_method(elementwise=True)
def halves(vectors, *, workspace):
    workspace.whole.mul_(0.5)
    return sum(vectors[1:], vectors[0])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    return "users_own"


def test_a_function_of_a_list_gets_the_experts_and_its_keywords_are_parameters(module: str) -> None:
    method = get_method(f"{module}.median")
    models = toy_models(3)
    result = merged(method, models)
    for key, value in merged("median", models).items():
        torch.testing.assert_close(result[key], value)
    lowest = merged(method, models, share=0.0)["head"]
    assert torch.equal(lowest, torch.stack([expert.get("head") for expert in models.experts]).amin(0))
    with pytest.raises(ConfigError, match=r"method\.share='x': must be a number"):
        check_parameters(method, {"share": "x"})
    with pytest.raises(
        ConfigError, match=r"method\.shore: users_own\.median has no such parameter; did you mean 'share'"
    ):
        check_parameters(method, {"shore": 0.1})


def test_a_function_with_open_keywords_takes_any_parameter(module: str) -> None:
    models = toy_models(2)
    doubled = merged(get_method(f"{module}.anything"), models, factor=2.0, other="thing")
    torch.testing.assert_close(doubled["head"], 2 * models.experts[0].get("head"))


def test_a_parameter_without_default_must_be_given(module: str) -> None:
    method = get_method(f"{module}.needs")
    with pytest.raises(ConfigError, match=r"method\.factor: users_own\.needs needs it; a number"):
        check_parameters(method, {})
    assert check_parameters(method, {"factor": 2}).by_key() == {"factor": 2}


def test_a_function_that_names_base_index_gets_the_base_first(module: str) -> None:
    models = toy_models(3)
    method = get_method(f"{module}.largest")
    assert method.needs_base
    result, expected = merged(method, models), merged("magmax", models, lambda_=1.0)
    for key in SHAPES:
        torch.testing.assert_close(result[key], expected[key])


def test_a_function_of_base_and_experts_is_called_by_name(module: str) -> None:
    models = toy_models(2)
    result = merged(get_method(f"{module}.by_name"), models, model_weights=[2.0, 1.0], **{"lambda": 0.5})
    expected = merged("task_arithmetic", models, weights=[2.0, 1.0], lambda_=0.5)
    for key in SHAPES:
        torch.testing.assert_close(result[key], expected[key])


def test_a_base_with_a_default_is_not_needed(module: str) -> None:
    method = get_method(f"{module}.no_base")
    assert not method.needs_base
    assert merged(method, one_tensor(None, [3.0]))["x"].tolist() == [3.0]
    assert merged(method, one_tensor([5.0], [3.0]))["x"].tolist() == [5.0]


def test_a_declared_function_is_what_it_was_declared_to_be(module: str) -> None:
    method = get_method(f"{module}.declared")
    assert method.elementwise
    assert merged(method, one_tensor([5.0], [3.0]), seed=10)["x"].tolist() == [16.0]


def test_functions_of_dictionaries_are_used_tensor_by_tensor_or_whole(module: str) -> None:
    models = toy_models(3)
    expected = merged("soup", models)
    for name, kind in (("mapped", "list"), ("lifted", "model")):
        method = get_method(f"{module}.{name}")
        assert method.kind == kind
        result = merged(method, models, factor=2.0)
        assert list(result) == list(expected)
        assert result["tied"] is result["embed"]
        for key in SHAPES:
            torch.testing.assert_close(result[key], 2 * expected[key])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"method\.function=users_own\.raises: failed on tensor x: ValueError: too odd$"),
        ("wrong_shape", r"users_own\.wrong_shape: returned shape \[1\] for tensor x, not \[2\]"),
        ("wrong_kind", r"users_own\.wrong_kind: returned a int for tensor x, not a tensor"),
        ("integers", r"users_own\.integers: returned int64 for tensor x, not floating-point numbers"),
    ],
)
def test_a_function_that_fails_is_named_with_the_tensor(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        merged(get_method(f"{module}.{name}"), one_tensor(None, [1.0, 2.0], [1.0, 3.0]))
    assert name != "raises" or isinstance(error.value.__cause__, ValueError)


def test_a_result_that_is_not_finite_is_named(module: str) -> None:
    with pytest.raises(NonFinite, match=r"users_own\.not_finite: merging tensor x gives NaN or infinity in float32"):
        merged(get_method(f"{module}.not_finite"), one_tensor(None, [1.0, 2.0]))


def test_a_whole_model_that_lacks_a_tensor_is_named(module: str) -> None:
    with pytest.raises(ConfigError, match=r"users_own\.lossy: its result lacks head"):
        merged(get_method(f"{module}.lossy"), toy_models(2))


def test_a_function_that_writes_into_its_arguments_does_no_harm(module: str) -> None:
    models = one_tensor(None, [1.5, 2.0])
    assert merged(get_method(f"{module}.writes"), models)["x"].tolist() == [1.0, 1.0]
    assert models.experts[0].get("x").tolist() == [1.5, 2.0]


def test_half_precision_is_given_in_float32_and_rounded_once(module: str) -> None:
    models = one_tensor(None, [40000.0], [60000.0], dtype=torch.float16)
    assert merged(get_method(f"{module}.mapped"), models)["x"].item() == 49984.0
    assert merged(get_method(f"{module}.mapped"), models)["x"].dtype == torch.float16


def test_model_weights_are_an_error_where_the_function_takes_none(module: str) -> None:
    method = get_method(f"{module}.anything")
    with pytest.raises(ConfigError, match=r"users_own\.anything: takes no weights"):
        merge(method, {}, toy_models(2), weights=[1, 2])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("users_own", "must be the dotted path of a function, such as my_module.median"),
        ("users_own.", "must be the dotted path of a function"),
        ("users own.median", "must be the dotted path of a function"),
        ("users_own.medain", r"users_own has no 'medain'; did you mean 'median'\?"),
        ("users_owned.median", "there is no module 'users_owned' here"),
        ("users_own.sub.median", "there is no module|fails"),
        ("users_own.not_a_function", "is a int, not a function"),
        ("users_own.of_vectors", "task vectors need @merge_method"),
        ("users_own.of_prepared", r"a preparing pass needs @merge_method\(prepare=...\)"),
        ("users_own.nothing", "must take the list of tensors as its first argument"),
        ("broken.median", "importing broken fails: SyntaxError"),
        ("hungry.median", "importing hungry fails: No module named 'nowhere_at_all'"),
    ],
)
def test_a_path_that_is_no_function_is_explained(module: str, tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("def median(:\n")
    (tmp_path / "hungry.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ConfigError, match=message) as error:
        custom_method(path)
    assert str(error.value).startswith(f"method.function={path}: ")
    assert "\n" not in str(error.value)


def test_modules_in_the_working_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_here.py").write_text("def first(models):\n    return models[0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    method = custom_method("lying_here.first")
    assert callable(method.function)
    monkeypatch.delitem(sys.modules, "lying_here")


def test_workspace_is_the_vectors_memory_for_a_declared_function_and_else_a_parameter_like_others(
    module: str,
) -> None:
    models = one_tensor([1.0, 2.0], [2.0, 2.0], [3.0, -2.0])
    assert merged(get_method(f"{module}.of_workspace"), models, workspace=3.0)["x"].tolist() == [4.0, 5.0]
    assert merged(get_method(f"{module}.halves"), models)["x"].tolist() == [2.5, 0.0]


def test_errors_of_the_users_function_keep_their_cause(module: str) -> None:
    call: Callable[[], object] = lambda: merged(get_method(f"{module}.raises"), toy_models(1))  # noqa: E731
    with pytest.raises(ConfigError) as error:
        call()
    assert "second line" in str(error.value.__cause__)
