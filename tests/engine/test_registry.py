"""Methods are found by name, and what is asked of them is checked with messages that help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import MergeMethod, merge_method
from mergelab.engine.parameters import Density, Lambda, MeanWeights, Weights
from mergelab.engine.registry import (
    check_capabilities,
    check_parameters,
    get_method,
    method_from_config,
    method_names,
    resolve_weights,
)
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.toy import merged_x, one_tensor


@merge_method(needs_base=True, experts=(2, 4), paper="Someone 2020", family="tests")
def example(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Density = 0.5,
    lambda_: Lambda = 1.0,
    weights: Weights = None,
    steps: int = 3,
    rescale: bool = True,
    mode: Literal["a", "b", "c"] = "a",
    floor: Density | None = None,
) -> Tensor:
    """Return the base."""
    return base


METHOD: MergeMethod = example.merge_method  # type: ignore[attr-defined]


def test_every_method_of_the_main_job_is_there() -> None:
    assert set(method_names()) >= {
        "soup", "task_arithmetic", "ties", "dare", "dare_ties", "slerp", "model_stock", "median", "magmax"
    }  # fmt: skip
    assert "custom" not in method_names()
    for name in method_names():
        assert get_method(name).name == name


def test_a_dotted_path_names_a_method_too() -> None:
    assert get_method("mergelab.methods.ties.ties") is get_method("ties")
    assert get_method(f"{__name__}.example") is METHOD


@pytest.mark.parametrize(
    ("name", "said"), [("tise", "did you mean 'ties'"), ("xyzzy", r"there are adamerging, .* and \d+ more")]
)
def test_an_unknown_method_is_an_error_with_the_nearest_or_some(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"method={name}: no such method; {said}"):
        get_method(name)


def test_declaring_leaves_the_function_a_function() -> None:
    assert example("base", []) == "base"  # type: ignore[comparison-overlap,arg-type]
    assert (METHOD.name, METHOD.min_experts, METHOD.max_experts) == ("example", 2, 4)
    assert METHOD.injected == {"base", "experts"}
    with pytest.raises(TypeError, match="neither base nor experts nor vectors"):
        merge_method()(lambda tensors: tensors)


def test_lambda_is_spelled_with_an_underscore_in_python_only() -> None:
    for key in ("lambda", "lambda_"):
        parameters = check_parameters(METHOD, {key: 0.25})
        assert parameters.by_key()["lambda"] == 0.25
        assert parameters.arguments()["lambda_"] == 0.25
    with pytest.raises(ConfigError, match=r"method\.lambda: given twice"):
        check_parameters(METHOD, {"lambda": 1.0, "lambda_": 1.0})


def test_defaults_are_the_signatures_and_parameters_are_frozen() -> None:
    parameters = check_parameters(METHOD, {})
    assert parameters.by_key() == {
        "density": 0.5, "lambda": 1.0, "weights": None, "steps": 3, "rescale": True, "mode": "a", "floor": None
    }  # fmt: skip
    with pytest.raises(Exception, match="frozen"):
        parameters.density = 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0}, "method.density=0: must be greater than 0 and at most 1"),
        ({"density": 1.5}, "method.density=1.5: must be greater than 0 and at most 1"),
        ({"density": "0.3"}, "method.density='0.3': must be a number greater than 0 and at most 1"),
        ({"density": True}, "method.density=True: must be a number greater than 0 and at most 1"),
        ({"density": None}, "method.density=None: must be a number greater than 0 and at most 1"),
        ({"lambda": float("inf")}, "method.lambda=inf: must be a number"),
        ({"lambda_": "big"}, "method.lambda='big': must be a number"),
        ({"steps": 2.5}, "method.steps=2.5: must be a whole number"),
        ({"rescale": 1}, "method.rescale=1: must be true or false"),
        ({"mode": "d"}, "method.mode='d': must be 'a', 'b' or 'c'"),
        ({"floor": 2}, "method.floor=2: must be a number greater than 0 and at most 1 or null"),
        ({"weights": "1"}, "method.weights='1': must be one number per expert, as a list or by the expert's name"),
        ({"weights": [1, "2"]}, "method.weights=[1, '2']: must be one number per expert, as a list or by "),
        ({"weights": [1, True]}, "method.weights=[1, True]: must be one number per expert, as a list or by "),
        ({"weights": {"a": float("nan")}}, "method.weights={'a': nan}: must be one number per expert"),
        ({"denisty": 0.1}, "method.denisty: example has no such parameter; did you mean 'density'?"),
        ({"lamda": 0.1, "density": 0}, "method.lamda: example has no such parameter; did you mean 'lambda'?"),
        ({"zzz": 0.1}, "method.zzz: example has no such parameter; it has density, lambda, weights, steps, "),
        ({"base": 0.1}, "method.base: example has no such parameter"),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_parameters(METHOD, values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_a_number() -> None:
    assert check_parameters(METHOD, {"density": 1}).by_key()["density"] == 1


@pytest.mark.parametrize(
    ("has_base", "experts", "said"),
    [
        (False, 2, "needs a base model, and none is given"),
        (True, 1, "merges at least 2 experts, and 1 are given"),
        (True, 5, "merges at most 4 experts, and 5 are given"),
    ],
)
def test_what_a_method_needs_is_named_with_its_numbers(has_base: bool, experts: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"method=example: {said}"):
        check_capabilities(METHOD, has_base=has_base, experts=experts)
    check_capabilities(METHOD, has_base=True, experts=3)


NAMES = ("pear", "apple")


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        (None, None, (1.0, 1.0)),
        (None, (2, 3), (2.0, 3.0)),
        ([4, 5], (2, 3), (4.0, 5.0)),
        ({"apple": 0.5}, None, (1.0, 0.5)),
        ({"apple": 0.5}, (2, 3), (2.0, 0.5)),
    ],
)
def test_the_parameter_precedes_the_models_own_weights(given: Any, own: Any, expected: tuple[float, ...]) -> None:
    parameters = check_parameters(METHOD, {"weights": given})
    assert resolve_weights(METHOD, parameters, NAMES, own) == expected


@pytest.mark.parametrize(
    ("given", "own", "message"),
    [
        ([1, 2, 3], None, r"method\.weights=\[1\.0, 2\.0, 3\.0\]: must have one number per expert, 2, not 3"),
        ({"appel": 1}, None, r"method\.weights: no expert is called 'appel'; did you mean 'apple'\?"),
        ({"zzz": 1}, None, "no expert is called 'zzz'; there are pear, apple"),
        (None, (1,), "models: 1 weights are given for 2 experts"),
        (None, (1, float("nan")), "models: expert weights must be finite numbers: apple=nan"),
    ],
)
def test_weights_that_do_not_fit_are_named(given: Any, own: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_weights(METHOD, check_parameters(METHOD, {"weights": given}), NAMES, own)


def test_a_composed_config_group_is_a_method_with_parameters() -> None:
    node = {"name": "ties", "function": "mergelab.methods.ties.ties", "density": 0.3, "lambda": 0.5}
    method, parameters = method_from_config(node)
    assert method is get_method("ties")
    assert parameters.by_key()["density"] == 0.3
    with pytest.raises(ConfigError, match=r"method\.function: must be the dotted path"):
        method_from_config({"name": "custom", "function": "???"})


@dataclass(frozen=True)
class Grouped:
    """Parameters that several functions take."""

    weights: MeanWeights = None
    power: Annotated[float, Field(gt=0)] = 2.0


def seen_before(models: AlignedModels, grouped: Grouped) -> Grouped:
    return grouped


SEEN: list[Grouped] = []


@merge_method(prepare=seen_before, check=lambda grouped: SEEN.append(grouped))
def of_group(experts: Sequence[Tensor], *, steps: int = 1, prepared: Grouped, grouped: Grouped) -> Tensor:
    assert prepared == grouped
    assert isinstance(grouped.weights, tuple)
    return torch.tensor(grouped.weights) * grouped.power * steps


def test_a_dataclass_stands_for_its_fields_and_function_prepare_and_check_get_the_object() -> None:
    method: MergeMethod = of_group.merge_method  # type: ignore[attr-defined]
    assert check_parameters(method, {"power": 3}).by_key() == {"steps": 1, "weights": None, "power": 3}
    with pytest.raises(ConfigError, match=r"^method\.power=0: must be greater than 0$"):
        check_parameters(method, {"power": 0})
    with pytest.raises(ConfigError, match=r"^method\.grouped: of_group has no such parameter; .*steps, weights, power"):
        check_parameters(method, {"grouped": Grouped()})
    SEEN.clear()
    models = one_tensor(None, [0.0, 0.0], [0.0, 0.0])  # equal: the smaller weight is first
    assert merged_x(method, models, weights={"pear": 3, "apple": 0.5}, power=4.0).tolist() == [2.0, 12.0]  # type: ignore[arg-type]
    assert Grouped((3.0, 0.5), 4.0) in SEEN  # as given
    rules: list[Mapping[str, Any]] = [{"match": "x", "power": 10.0}]
    assert merged_x(method, models, rules=rules).tolist() == [10.0, 10.0]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^method\.weights: must be at least 0"):
        merge(method, {"weights": [1, -1]}, models)


def test_a_field_with_the_name_of_another_parameter_is_an_error_where_the_method_is_declared() -> None:
    def twice(experts: Sequence[Tensor], *, power: float = 1.0, grouped: Grouped) -> Tensor: ...

    with pytest.raises(TypeError, match="twice takes two parameters called power"):
        merge_method()(twice)
