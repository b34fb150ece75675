"""Parameters that differ between tensors: by depth, by name, and what is said of those that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergelab.engine.per_tensor import on_curve
from mergelab.engine.registry import check_parameters, get_method
from mergelab.errors import ConfigError, MergeWarning
from mergelab.weights.naming import depths
from tests.methods.toy import aligned, merged

SHAPE = (3, 4)
NAMES = [
    "embed.weight",
    *(f"encoder.layer.{i}.{part}.weight" for i in range(5) for part in ("attention", "mlp")),
    "norm",
]


def models(count: int = 2, shape: tuple[int, ...] = SHAPE) -> Any:
    generator = torch.Generator().manual_seed(0)
    base, *experts = ({n: torch.randn(shape, generator=generator) for n in NAMES} for _ in range(count + 1))
    return aligned(base, experts)


def at(method: str, name: str, **parameters: Any) -> torch.Tensor:
    """One tensor merged with plain parameters."""
    return merged(method, models(), **parameters)[name]


def test_depth_runs_from_the_first_layer_to_the_last_of_each_stack() -> None:
    names = [
        "shared.weight",
        "encoder.block.0.a",
        "encoder.block.2.a",
        "decoder.block.1.a",
        "decoder.block.4.a",
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    ]
    assert list(depths(names).values()) == [0.0, 0.0, 1.0, 0.25, 1.0, 1.0, 1.0]
    assert depths(["bert.embeddings.word_embeddings.weight", "transformer.wpe.weight"]) == {
        "bert.embeddings.word_embeddings.weight": 0.0,
        "transformer.wpe.weight": 0.0,
    }
    assert depths(["h.0.weight", "ln_f.weight"]) == {"h.0.weight": 0.0, "ln_f.weight": 1.0}


def test_between_numbers_lie_straight_lines() -> None:
    assert [on_curve([0.2, 0.6], depth) for depth in (0, 0.5, 1)] == [0.2, 0.4, 0.6]
    assert [on_curve([1, 3, 2], depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 3, 2.5, 2]
    assert on_curve([0.7], 0.3) == 0.7


@pytest.mark.parametrize(
    ("method", "key", "curve"),
    [("task_arithmetic", "lambda", [0.2, 0.6]), ("ties", "density", [0.1, 0.5]), ("slerp", "t", [0.0, 1.0, 0.5])],
)
def test_a_list_is_a_value_for_each_layer(method: str, key: str, curve: list[float]) -> None:
    result = merged(method, models(), **{key: curve})
    for name in NAMES:
        value = on_curve(curve, depths(NAMES)[name])
        assert torch.equal(result[name], at(method, name, **{key: value})), name


def test_a_rule_holds_where_its_pattern_fits_and_the_later_one_counts() -> None:
    rules = [
        {"match": "*.attention.*", "lambda": 0.9, "density": 0.6},
        {"match": "*.layer.2.*", "lambda": [0.1, 0.5]},
    ]
    with pytest.warns(MergeWarning, match="both set lambda of some tensors; the later rule counts"):
        result = merged("ties", models(), rules=rules)
    expected = {
        "encoder.layer.0.attention.weight": {"lambda": 0.9, "density": 0.6},
        "encoder.layer.0.mlp.weight": {},
        "encoder.layer.2.attention.weight": {"lambda": 0.3, "density": 0.6},
        "encoder.layer.2.mlp.weight": {"lambda": 0.3},
    }
    for name, own in expected.items():
        assert torch.equal(result[name], at("ties", name, **own)), name


def test_weights_may_differ_between_tensors() -> None:
    result = merged("soup", models(), rules=[{"match": "norm", "weights": [1, 0]}])
    assert torch.equal(result["norm"], models().experts[0].get("norm"))
    assert torch.equal(result["embed.weight"], at("soup", "embed.weight"))


def test_whatever_can_be_one_number_can_be_a_list_for_every_method() -> None:
    curve = {"density": [0.2, 0.5], "lambda": [0.1, 0.9], "t": [0.2, 0.4]}
    tried = 0
    for name in ("ties", "dare", "dare_ties", "breadcrumbs", "della", "slerp", "magmax", "pcb"):
        method = get_method(name)
        for key in curve.keys() & {field.removesuffix("_") for field in method.parameters.model_fields}:
            merged(name, models(), **{key: curve[key]})
            tried += 1
    assert tried >= 10


def test_the_configuration_is_shown_as_it_was_given() -> None:
    rules = [{"match": "norm", "lambda": 1.0}]
    parameters = check_parameters(get_method("ties"), {"density": [0.1, 0.2], "rules": rules})
    shown = parameters.by_key()
    assert shown["density"] == [0.1, 0.2]
    assert shown["rules"] == rules


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"density": [0.1, 1.2]}, r"method\.density=1\.2: must be greater than 0 and at most 1"),
        ({"density": []}, r"method\.density=\[\]: must be a number"),
        ({"scope": ["model", "tensor"]}, r"method\.scope="),
        ({"rules": [{"match": "norm", "density": 2}]}, r"method\.rules\[0\]\.density=2: must be"),
        ({"rules": [{"match": "norm", "densty": 0.2}]}, r"method\.rules\[0\]\.densty: ties has no such .*'density'"),
        ({"rules": [{"match": "norm"}]}, r"method\.rules\[0\]: sets no parameter of ties"),
        ({"rules": [{"density": 0.2}]}, r"method\.rules\[0\]=.*must be \{match: PATTERN, PARAMETER: VALUE\}"),
        ({"rules": "norm"}, r"method\.rules='norm': must be a list"),
    ],
)
def test_what_cannot_be_is_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_parameters(get_method("ties"), values)


def test_a_rule_that_fits_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"method\.rules\[0\]\.match='nrm': fits no tensor.*did you mean 'norm'"):
        merged("ties", models(), rules=[{"match": "nrm", "density": 0.5}])


def test_a_rule_may_hold_for_some_layers_and_its_list_runs_over_them() -> None:
    rules = [{"layers": [1, 4], "lambda": [0.2, 0.8]}, {"layers": [None, 1], "match": "*", "lambda": 0.1}]
    result = merged("task_arithmetic", models(), rules=rules)
    expected = dict.fromkeys(NAMES[:3], 0.1)
    expected |= {f"encoder.layer.{i}.mlp.weight": value for i, value in ((1, 0.2), (2, 0.5), (3, 0.8), (4, 0.3))}
    for name, value in {**expected, "norm": 0.3}.items():
        assert torch.equal(result[name], at("task_arithmetic", name, **{"lambda": value})), name


def test_experts_may_have_weights_that_run_over_the_layers() -> None:
    weights = {"pear": [0.0, 1.0], "apple": 0.5}
    result = merged("soup", models(), weights=weights, normalize=False)
    for name, depth in depths(NAMES).items():
        assert torch.equal(result[name], at("soup", name, weights=[depth, 0.5], normalize=False)), name
    densities = merged("ties", models(), density={"pear": [0.2, 0.6], "apple": 0.4}, scope="tensor")
    for name, depth in depths(NAMES).items():
        own = {"pear": on_curve([0.2, 0.6], depth), "apple": 0.4}
        assert torch.equal(densities[name], at("ties", name, density=own, scope="tensor")), name


def test_a_rule_for_one_expert_leaves_the_others_their_values() -> None:
    rules = [{"match": "norm", "weights": {"pear": 0.25}}]
    result = merged("soup", models(), weights={"pear": 1, "apple": 3}, rules=rules, normalize=False)
    assert torch.equal(result["norm"], at("soup", "norm", weights=[0.25, 3], normalize=False))
    assert torch.equal(result["embed.weight"], at("soup", "embed.weight", weights=[1, 3], normalize=False))


def test_as_mergekit_the_first_rule_counts_and_lists_are_for_the_layers_alone() -> None:
    rules = [{"match": "*mlp*", "t": [0.2, 1.0]}, {"match": "*", "t": [0.5, 0.9]}]
    result = merged("slerp", models(), rules=rules, rules_as="mergekit", required=["t"])
    expected = {
        "embed.weight": 0.5,
        "encoder.layer.0.mlp.weight": 0.2,
        "encoder.layer.2.attention.weight": 0.7,
        "encoder.layer.4.mlp.weight": 1.0,
        "norm": 0.5,
    }
    for name, t in expected.items():
        assert torch.equal(result[name], at("slerp", name, t=t)), name
    alone = merged("slerp", models(), t=[0.1, 0.8], rules_as="mergekit", rules=[{"layers": [2, 3], "t": [0.3, 0.6]}])
    assert torch.equal(alone["encoder.layer.2.mlp.weight"], at("slerp", "encoder.layer.2.mlp.weight", t=0.6))
    assert torch.equal(alone["norm"], at("slerp", "norm", t=0.1))


def test_a_value_that_no_rule_gives_is_an_error_where_rules_have_to() -> None:
    rules = [{"match": "*mlp*", "t": 0.2}, {"match": "*attention*", "t": 0.2}]
    with pytest.raises(ConfigError, match=r"method\.t: needs a value for embed\.weight, and no rule gives one"):
        merged("slerp", models(), rules=rules, required=["t"])
    rules = [{"match": "*", "weights": {"pear": 0.2}}]
    with pytest.raises(ConfigError, match=r"method\.weights\.apple: needs a value for embed\.weight"):
        merged("soup", models(), rules=rules, required=["weights.apple"])
    with pytest.warns(MergeWarning, match=r"method\.rules\[0\]\.match='nrm': fits no tensor"):
        merged("slerp", models(), rules=[{"match": "nrm", "t": 0.2}], rules_as="mergekit")


def test_what_is_said_of_rules_is_shown_as_it_was_given() -> None:
    given = {
        "weights": {"pear": [0.1, 0.2], "apple": 1.0},
        "rules": [{"match": "*", "layers": [None, 2], "weights": {"pear": [1.0, 2.0]}}],
        "rules_as": "mergekit",
        "required": ["weights.pear"],
    }
    shown = check_parameters(get_method("soup"), given).by_key()
    assert {key: shown[key] for key in given} == given


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rules": [{"layers": [2, 2], "density": 0.2}]}, r"method\.rules\[0\]\.layers=\[2, 2\]: holds no layer"),
        ({"rules": [{"layers": 3, "density": 0.2}]}, r"method\.rules\[0\]\.layers=3: must be \[FIRST, AFTER_LAST\]"),
        ({"rules_as": "mrgekit"}, r"method\.rules_as=mrgekit: must be mergekit or null"),
        ({"required": ["densty"]}, r"method\.required: ties has no parameter 'densty'; did you mean 'density'"),
        ({"required": "density"}, r"method\.required='density': must be a list"),
        ({"weights": {"a": [1, "x"]}}, r"method\.weights="),
        ({"density": {"a": [0.1, 7]}}, r"method\.density\.a=7: must be greater than 0"),
    ],
)
def test_what_cannot_be_said_of_rules_is_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_parameters(get_method("ties"), values)
