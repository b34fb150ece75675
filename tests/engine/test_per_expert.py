"""Parameters that are given for each expert, by name: the same as merging experts that were sparsified alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine.parameters import OfExperts, key_of
from mergelab.engine.registry import check_parameters, get_method, method_names, resolve_weights
from mergelab.engine.run import merge
from mergelab.engine.warm_session import MergeSession
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels
from tests.methods.toy import NAMES, SHAPES, aligned, merged, toy_models

THREE = NAMES[:3]
DENSITY = dict(zip(THREE, [0.5, 0.1, 0.9], strict=True))


def models_around_zero(count: int = 3) -> AlignedModels:
    """Experts that are their task vectors, in float64, so that sparsified ones can be given as experts exactly."""
    models = toy_models(count, dtype=torch.float64)
    assert models.base is not None
    zero = {name: torch.zeros_like(models.base.get(name)) for name in SHAPES}
    return aligned(zero, [{n: e.get(n) - models.base.get(n) for n in SHAPES} for e in models.experts])


def alone(models: AlignedModels, name: str) -> AlignedModels:
    """The base and one of the experts."""
    return dataclasses.replace(models, experts=tuple(e for e in models.experts if e.name == name))


def own(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Parameters for one expert."""
    return {key: value[name] if isinstance(value, Mapping) else value for key, value in parameters.items()}


def with_experts(models: AlignedModels, experts: list[dict[str, Tensor]]) -> AlignedModels:
    assert models.base is not None
    return aligned({name: models.base.get(name) for name in SHAPES}, experts)


SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("dare", {"density": DENSITY}),
    ("dare", {"density": DENSITY, "rescale": False}),
    ("breadcrumbs", {"density": DENSITY, "gamma": {"pear": 0.2, "apple": 0.01, "quince": 0.0}}),
    ("breadcrumbs", {"density": DENSITY, "scope": "tensor"}),
    ("della_linear", {"density": DENSITY, "epsilon": {"pear": 0.3, "apple": 0.05, "quince": 0.1}}),
    ("della_linear", {"density": {**DENSITY, "quince": 1.0}, "epsilon": 0.05}),
]


@pytest.mark.parametrize(("name", "parameters"), SPARSE, ids=str)
def test_a_sum_is_that_of_the_experts_sparsified_alone(name: str, parameters: dict[str, Any]) -> None:
    models = models_around_zero()
    result = merged(name, models, **parameters, **{"lambda": 1.0})
    single = [merged(name, alone(models, n), **own(parameters, n), **{"lambda": 1.0}) for n in THREE]
    for key in SHAPES:
        torch.testing.assert_close(result[key], torch.stack([each[key] for each in single]).sum(0), rtol=1e-14, atol=0)


ELECTED = {"dare_ties": "dare", "breadcrumbs_ties": "breadcrumbs", "della": "della_linear"}


@pytest.mark.parametrize("name", ELECTED)
@pytest.mark.parametrize(
    "options", [{}, {"weights": [1.0, 2.0, 0.5], "majority_sign": "frequency", "weights_stage": "elect"}]
)
def test_an_election_is_that_of_the_experts_sparsified_alone(name: str, options: dict[str, Any]) -> None:
    models = models_around_zero()
    parameters: dict[str, Any] = {"density": DENSITY} | ({"epsilon": 0.05} if name == "della" else {})
    sparse = [merged(ELECTED[name], alone(models, n), **own(parameters, n), **{"lambda": 1.0}) for n in THREE]
    expected = merged("ties", with_experts(models, sparse), density=1.0, **options)
    result = merged(name, models, **parameters, **options)
    assert all(torch.equal(result[key], expected[key]) for key in SHAPES)


def trimmed(tensors: Mapping[str, Tensor], density: float, scope: str) -> dict[str, Tensor]:
    """The largest entries alone, of the whole model or of each tensor."""

    def cut(flat: Tensor) -> Tensor:
        keep = torch.zeros_like(flat)
        keep[flat.abs().argsort(descending=True)[: max(1, int(density * len(flat)))]] = 1
        return flat * keep

    if scope == "tensor":
        return {name: cut(tensor.reshape(-1)).view(tensor.shape) for name, tensor in tensors.items()}
    whole = cut(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_trims_each_expert_to_its_own_density(scope: str) -> None:
    models = models_around_zero()
    sparse = [trimmed({n: e.get(n) for n in SHAPES}, DENSITY[e.name], scope) for e in models.experts]
    expected = merged("ties", with_experts(models, sparse), density=1.0)
    result = merged("ties", models, density=DENSITY, scope=scope)
    assert all(torch.equal(result[key], expected[key]) for key in SHAPES)


def test_dare_ties_trims_what_was_dropped_to_each_experts_own_density() -> None:
    models = models_around_zero()
    sparse = []
    for name in THREE:
        dropped = merged("dare", alone(models, name), density=DENSITY[name], **{"lambda": 1.0})
        sparse.append(trimmed({key: dropped[key] for key in SHAPES}, 0.05 if name == "apple" else 0.3, "model"))
    expected = merged("ties", with_experts(models, sparse), density=1.0)
    own_trim = {"pear": 0.3, "apple": 0.05, "quince": 0.3}
    result = merged("dare_ties", models, density=DENSITY, trim_density=own_trim)
    assert all(torch.equal(result[key], expected[key]) for key in SHAPES)


def test_consensus_has_a_threshold_for_each_task() -> None:
    models = models_around_zero()
    kappa = {"pear": 0.2, "apple": 1.0, "quince": 0.6}
    result = merged("consensus", models, mask_lambda=kappa)
    for key in SHAPES:
        vectors = {expert.name: expert.get(key) for expert in models.experts}
        total = torch.stack(list(vectors.values())).sum(0)
        used = torch.stack([v.abs() > kappa[n] * (total - v).abs() for n, v in vectors.items()]).sum(0) >= 2
        torch.testing.assert_close(result[key], 0.3 * total * used, rtol=1e-14, atol=0)


def marked() -> Iterator[tuple[str, str]]:
    """All parameters of all methods that can be given for each expert."""
    for name in method_names():
        for parameter, field in get_method(name).parameters.model_fields.items():
            if any(isinstance(mark, OfExperts) for mark in field.metadata):
                yield name, key_of(parameter)


def test_the_methods_whose_parameters_are_of_experts_are_known() -> None:
    densities = {"ties", "dare", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "knots"}
    assert {name for name, key in marked() if key == "density"} == densities
    others = {(name, key) for name, key in marked() if key != "density"}
    assert others == {
        ("dare_ties", "trim_density"),
        *((name, "gamma") for name in ("breadcrumbs", "breadcrumbs_ties")),
        *((name, "epsilon") for name in ("della", "della_linear")),
        *((name, "mask_lambda") for name in ("consensus", "tall_masks")),
        ("gradient_matching", "sizes"),
    }


@pytest.mark.parametrize(("name", "key"), marked())
def test_the_same_number_for_each_expert_is_one_number(name: str, key: str) -> None:
    models, number = toy_models(3), 0.3
    one, each = merged(name, models, **{key: number}), merged(name, models, **{key: dict.fromkeys(THREE, number)})
    assert all(torch.equal(one[tensor], each[tensor]) for tensor in SHAPES)


@pytest.mark.parametrize(("name", "key"), marked())
def test_a_number_belongs_to_its_expert_whatever_the_order(name: str, key: str) -> None:
    models = toy_models(3)
    numbers = dict(zip(THREE, [0.3, 0.2, 0.4], strict=True))
    result = merged(name, models, **{key: numbers})
    turned = dataclasses.replace(models, experts=(*models.experts[1:], models.experts[0]))
    same = merged(name, turned, **{key: dict(reversed(numbers.items()))})
    assert all(torch.equal(result[tensor], same[tensor]) for tensor in SHAPES)
    other = merged(name, models, **{key: {**numbers, "apple": 0.45}})
    assert any(not torch.equal(result[tensor], other[tensor]) for tensor in SHAPES)


def test_a_rule_that_names_experts_needs_the_other_weights_by_name_too() -> None:
    method = get_method("task_arithmetic")
    rules = [{"match": "head", "weights": {THREE[0]: 3.0}}]
    given = check_parameters(method, {"weights": [1.0, -0.5, 2.0], "rules": rules})
    with pytest.raises(ConfigError, match=r"^method\.rules\[0\]\.weights: names experts, and method\.weights is"):
        resolve_weights(method, given, THREE, None)
    by_name = dict(zip(THREE, [1.0, -0.5, 2.0], strict=True))
    given = check_parameters(method, {"weights": by_name, "rules": rules})
    assert resolve_weights(method, given, THREE, None) == (1.0, -0.5, 2.0)


def test_rules_may_set_them_and_numbers_and_lists_may_take_their_place() -> None:
    models = toy_models(3)
    rules: list[dict[str, Any]] = [
        {"match": "layer.*", "density": dict.fromkeys(THREE, 0.2) | {"pear": 0.7}},
        {"match": "head", "density": 0.4},
        {"match": "gate", "density": [0.3, 0.9]},
    ]
    result = merged("breadcrumbs", models, density=DENSITY, rules=rules)
    expected = {"embed": DENSITY, "layer.weight": rules[0]["density"], "head": 0.4, "gate": 0.9}
    for tensor, density in expected.items():
        assert torch.equal(result[tensor], merged("breadcrumbs", models, density=density)[tensor]), tensor
    with_lambda = merged("breadcrumbs", models, density=DENSITY, **{"lambda": [0.5, 0.5]})
    assert torch.equal(with_lambda["embed"], merged("breadcrumbs", models, density=DENSITY, **{"lambda": 0.5})["embed"])


@pytest.mark.parametrize("name", ["ties", "della", "dare_ties", "knots"])
def test_a_warm_session_has_the_bits_of_one_merge(name: str) -> None:
    models = toy_models(3)
    assert models.base is not None
    targets = {tensor: torch.empty(models.base.shape(tensor)) for tensor in models.names}
    session = MergeSession(models, targets)
    numbers = dict(zip(THREE, [0.3, 0.2, 0.4], strict=True))
    for density in (0.3, numbers, {**numbers, "pear": 0.35}, numbers):
        assert session.merge(get_method(name), {"density": density}) == "merged"
        expected = merged(name, models, density=density)
        assert all(torch.equal(targets[tensor], expected[tensor]) for tensor in models.names)
    session.merge(get_method(name), {"density": numbers, "lambda": 0.7})  # TIES keeps what is asked for twice
    assert session.merge(get_method(name), {"density": numbers, "lambda": 0.5}) == "scaled"


def test_the_configuration_is_shown_as_it_was_given() -> None:
    parameters = check_parameters(get_method("ties"), {"density": DENSITY, "lambda": [0.1, 0.2]})
    assert parameters.by_key()["density"] == DENSITY
    assert parameters.by_key()["lambda"] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (
            "ties",
            {"density": {**DENSITY, "apple": 1.2}},
            r"^method\.density\.apple=1\.2: must be greater than 0 and at",
        ),
        ("ties", {"density": {**DENSITY, "apple": "x"}}, r"^method\.density\.apple='x': must be a number .*by name$"),
        ("ties", {"density": {**DENSITY, "apple": [0.1, 2]}}, r"^method\.density\.apple=2: must be greater than 0"),
        ("ties", {"density": {}}, r"^method\.density=\{\}: must be a number .*, or one for each expert by name$"),
        ("ties", {"lambda": {"pear": 1.0}}, r"^method\.lambda=.*: must be a number, the same for all experts$"),
        ("magmax", {"density": {"pear": 1.0}}, r"^method\.density: magmax has no such parameter"),
        ("wudi", {"steps": {"pear": 3}}, r"^method\.steps=.*: must be a whole number.*, the same for all experts$"),
        ("ties", {"rules": [{"match": "head", "density": {"pear": 2}}]}, r"^method\.rules\[0\]\.density\.pear=2: must"),
    ],
)
def test_what_cannot_be_is_one_line(name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        check_parameters(get_method(name), values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("density", "said"),
    [
        ({**DENSITY, "appel": 0.1}, r"^method\.density: no expert is called 'appel'; did you mean 'apple'\?"),
        ({"pear": 0.1}, r"^method\.density=\{'pear': 0\.1\}: must have a number for every expert, also apple, quince"),
    ],
)
def test_numbers_must_be_those_of_the_experts_before_a_tensor_is_read(density: dict[str, float], said: str) -> None:
    method, models = get_method("ties"), toy_models(3)
    with pytest.raises(ConfigError, match=said):
        merge(method, {"density": density}, models)
    with pytest.raises(ConfigError, match=said):  # where a run is planned, before models are looked for
        resolve_weights(method, check_parameters(method, {"density": density}), THREE, None)
    ruled = check_parameters(method, {"rules": [{"match": "head", "density": density}]})
    with pytest.raises(ConfigError, match=said.replace("method", r"method\.rules\[0\]", 1)):
        resolve_weights(method, ruled, THREE, None)


@pytest.mark.parametrize(("name", "key"), [("ties", "density"), ("dare_ties", "trim_density")])
def test_what_is_ranked_together_has_one_number_wherever_it_is_given(name: str, key: str) -> None:
    method, models = get_method(name), toy_models(3)
    pooled: list[tuple[str, dict[str, Any]]] = [
        ("method", {key: DENSITY, "scope": "pooled"}),
        ("method.rules[0]", {key: DENSITY, "rules": [{"match": "head", "scope": "pooled"}]}),
        ("method.rules[0]", {"scope": "pooled", "rules": [{"match": "head", key: DENSITY}]}),
        ("method.rules[0]", {"rules": [{"match": "head", key: DENSITY, "scope": "pooled"}]}),
        ("method", {key: DENSITY, "scope": "pooled", "lambda": [0.2, 0.9]}),
    ]
    for where, values in pooled:
        said = rf"^{re.escape(where)}\.{key}: must be one number for all experts where scope=pooled"
        with pytest.raises(ConfigError, match=said):
            merge(method, values, models)
        with pytest.raises(ConfigError, match=said):  # where a run is planned
            resolve_weights(method, check_parameters(method, values), THREE, None)
    merge(method, {key: [0.2, 0.9], "scope": "pooled"}, models)  # over the layers: one number for all experts


def test_dellas_probabilities_are_checked_for_each_expert() -> None:
    with pytest.raises(ConfigError, match=r"^method\.epsilon=0\.15: must be less than density.*density=0\.1\)"):
        merge(get_method("della"), {"density": DENSITY}, toy_models(3))
