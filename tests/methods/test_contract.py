"""What holds for every registered method (a new one joins by being registered)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine.catalogue import FAMILIES
from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import key_of
from mergelab.engine.registry import check_parameters, get_method, method_config, method_names, resolve_weights
from mergelab.engine.run import merge
from mergelab.errors import ConfigError, NonFinite
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import DictSource
from tests.methods.toy import OF_WEIGHTS, SHAPES, aligned, merged, output_of, streamed, tensors, toy_models

METHODS = OF_WEIGHTS
ELEMENTWISE = [name for name in METHODS if get_method(name).elementwise]
UNORDERED = [name for name in METHODS if not get_method(name).order_matters]
WITH_IDENTITY = [name for name in METHODS if get_method(name).identical_at is not None]


def count_for(method: MergeMethod, wanted: int = 3) -> int:
    """The number of experts, as near to ``wanted`` as the method allows."""
    return max(method.min_experts, min(wanted, method.max_experts or wanted))


def models_for(name: str, **options: Any) -> AlignedModels:
    return toy_models(count_for(get_method(name)), **options)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", method_names())
def test_the_config_file_states_the_functions_own_name_and_defaults(name: str) -> None:
    config = method_config(name)
    method = get_method(name)
    assert config.pop("name") == method.name == name
    function = config.pop("function")
    assert function == f"{method.function.__module__}.{method.function.__name__}"
    defaults = method.parameters().by_key()
    assert config == defaults
    assert all(type(config[key]) is type(default) for key, default in defaults.items())


@pytest.mark.parametrize("name", method_names())
def test_the_docstring_says_formula_arguments_and_result(name: str) -> None:
    method = get_method(name)
    text = method.function.__doc__ or ""
    assert "Args:" in text
    assert "Returns:" in text
    for parameter in method.parameters.model_fields:
        assert f"{parameter}:" in text or f"{parameter}," in text, parameter
    assert method.family in FAMILIES
    assert method.use
    assert method.paper == "" or method.paper.split(":")[-1] in text or "doi" in method.paper


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_experts_equal_to_the_base_give_the_base(name: str, dtype: torch.dtype) -> None:
    base = tensors(lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)), dtype)
    models = aligned(base, [dict(base) for _ in range(count_for(get_method(name)))])
    result = merged(name, models)
    for key in SHAPES:
        torch.testing.assert_close(result[key], base[key], rtol=3e-7 if dtype.itemsize >= 4 else 0, atol=0)


@pytest.mark.parametrize("name", WITH_IDENTITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identical_experts_give_that_expert(name: str, dtype: torch.dtype) -> None:
    method = get_method(name)
    base, expert = (toy_models(1, seed=seed, dtype=dtype).experts[0] for seed in (0, 1))
    start, twin = ({key: source.get(key) for key in SHAPES} for source in (base, expert))
    result = merged(name, aligned(start, [twin] * count_for(method)), **(method.identical_at or {}))
    for key in SHAPES:
        rounding = torch.finfo(torch.float32 if dtype == torch.float32 else dtype).eps
        torch.testing.assert_close(
            result[key], expert.get(key), rtol=2 * rounding, atol=8 * rounding
        )  # entries up to 4


@pytest.mark.parametrize("name", UNORDERED)
def test_permuting_experts_with_their_weights_changes_no_bit(name: str) -> None:
    method = get_method(name)
    models = models_for(name)
    count = len(models.experts)
    weights = [0.5 + i for i in range(count)] if method.takes_weights else [1.0] * count
    order = [*range(1, count), 0]
    turned = dataclasses.replace(models, experts=tuple(models.experts[i] for i in order))
    assert_same_bits(
        merged(name, models, model_weights=weights), merged(name, turned, model_weights=[weights[i] for i in order])
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_shape_order_and_ties_are_kept(name: str, dtype: torch.dtype) -> None:
    models = models_for(name, dtype=dtype)
    result = merged(name, models)
    assert list(result) == [*SHAPES, "ids", "tied"]
    assert result["tied"] is result["embed"]
    assert result["ids"].dtype == torch.int64
    assert result["ids"].tolist() == list(range(5))
    for key, shape in SHAPES.items():
        assert result[key].shape == shape
        assert result[key].dtype == dtype
        assert result[key].isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    method = get_method(name)
    sees_rounding = method.family == "spectral"
    # Task vectors that are large beside the rounding of the dtype, where directions that are rounding are left out.
    half = models_for(name, dtype=dtype, spread=1.0 if sees_rounding else 0.05)
    assert half.base is not None
    base, *experts = ({key: source.get(key).float() for key in SHAPES} for source in (half.base, *half.experts))
    wide = merged(name, aligned(base, experts))
    for key, value in merged(name, half).items():
        assert key not in SHAPES or torch.equal(value, wide[key].to(dtype)), key


@pytest.mark.parametrize("name", METHODS)
def test_the_result_takes_the_bases_dtype_where_dtypes_are_mixed(name: str) -> None:
    models, half = models_for(name), models_for(name, dtype=torch.bfloat16)
    mixed = dataclasses.replace(models, experts=half.experts)
    assert merged(name, mixed)["embed"].dtype == torch.float32
    if not get_method(name).needs_base:
        assert merged(name, dataclasses.replace(mixed, base=None))["embed"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_written_to_and_not_returned(name: str) -> None:
    models = models_for(name)
    sources = [models.base, *models.experts]
    before = [{key: s.get(key).clone() for key in (*SHAPES, "ids")} for s in sources if s is not None]
    result = merged(name, models)
    for tensor in result.values():
        tensor.zero_()
    for source, copies in zip(sources, before, strict=True):
        assert source is not None
        for key, copy in copies.items():
            assert torch.equal(source.get(key), copy), key


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_model_and_tensor(name: str, value: float) -> None:
    models = models_for(name)
    expert = models.experts[:2][-1]
    expert.get("layer.weight").view(-1)[40] = value
    with pytest.raises(NonFinite, match=rf"{expert.name}: layer\.weight"):
        merged(name, models)


@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).needs_base])
def test_a_value_of_the_base_that_is_not_finite_is_named(name: str) -> None:
    models = models_for(name)
    assert models.base is not None
    models.base.get("gate").fill_(float("nan"))
    with pytest.raises(NonFinite, match="base: gate"):
        merged(name, models)


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    models = models_for(name)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(merged(name, models))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_tensors_changes_no_bit(name: str) -> None:
    models = models_for(name)
    backwards = dataclasses.replace(models, names=models.names[::-1])
    assert_same_bits(merged(name, models), merged(name, backwards))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("block", [1001, 4096, 1 << 20])
def test_the_size_of_the_blocks_changes_no_bit(name: str, block: int) -> None:
    models = models_for(name)
    assert_same_bits(streamed(name, models), streamed(name, models, block=block))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_request_gives_the_same_bits_and_leaves_the_global_generator_alone(name: str) -> None:
    models = models_for(name)
    state = torch.random.get_rng_state()
    first = merged(name, models)
    torch.manual_seed(7)
    assert_same_bits(first, merged(name, models))
    torch.random.set_rng_state(state)
    merged(name, models)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", method_names())
def test_an_unknown_parameter_is_an_error_before_a_tensor_is_read(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.denisty: {name} has no such parameter"):
        merge(get_method(name), {"denisty": 0.1}, models_for(name))


def out_of_range() -> Iterator[tuple[str, str, Any]]:
    for name in method_names():
        for parameter, field in get_method(name).parameters.model_fields.items():
            yield name, key_of(parameter), "text that is no value"
            if field.annotation is float:
                yield name, key_of(parameter), float("nan")
                yield name, key_of(parameter), "0.5"
                yield name, key_of(parameter), True


@pytest.mark.parametrize(("name", "key", "value"), out_of_range())
def test_a_value_out_of_range_names_key_and_value(name: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        merge(get_method(name), {key: value}, models_for(name))
    message = str(error.value)
    assert message.startswith(f"method.{key}={value!r}: must be ")
    assert "\n" not in message
    assert len(message.split("must be ")[1]) > 5


@pytest.mark.parametrize("name", METHODS)
def test_capabilities_are_checked_before_a_tensor_is_read(name: str) -> None:
    method = get_method(name)
    models = models_for(name)
    with pytest.raises(ConfigError, match=rf"method={name}: merges .*{method.min_experts}.*0 are given"):
        merge(method, {}, dataclasses.replace(models, experts=()))
    if method.max_experts is not None:
        many = toy_models(method.max_experts + 1)
        with pytest.raises(ConfigError, match=rf"{name}.*{method.max_experts} .*{method.max_experts + 1} are given"):
            merge(method, {}, many)
    if method.needs_base:
        with pytest.raises(ConfigError, match=rf"method={name}: needs a base"):
            merge(method, {}, dataclasses.replace(models, base=None))


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_the_models_count_or_are_an_error(name: str) -> None:
    method = get_method(name)
    models = models_for(name)
    weights = [2.0, *[1.0] * (len(models.experts) - 1)]
    if method.takes_weights:
        weighted = merged(name, models, model_weights=weights)
        assert any(not torch.equal(weighted[key], value) for key, value in merged(name, models).items())
        assert_same_bits(weighted, merged(name, models, weights={models.experts[0].name: 2.0}))
    else:
        with pytest.raises(ConfigError, match=f"method={name}: takes no weights"):
            merge(method, {}, models, weights=weights, output=output_of(method, models))


@pytest.mark.parametrize("name", METHODS)
def test_chunks_that_several_threads_work_on_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = models_for(name)
    whole = merged(name, models)
    monkeypatch.setattr("mergelab.engine.run.CHUNK", 7001)
    monkeypatch.setattr("mergelab.ops.threads.CHUNK", 7001)
    torch.set_num_threads(3)
    assert_same_bits(whole, merged(name, models))


class Unreadable(DictSource):
    """A model of which no tensor may be read."""

    def get(self, key: str) -> Tensor:
        raise AssertionError(f"{self.name}: {key} is read")


def unreadable(models: AlignedModels) -> AlignedModels:
    def closed(source: Any) -> Any:
        return Unreadable(source.name, {key: source.get(key) for key in (*SHAPES, "ids", "tied")})

    experts = tuple(map(closed, models.experts))
    return dataclasses.replace(models, base=closed(models.base), experts=experts)


WEIGHTED = [name for name in METHODS if get_method(name).takes_weights]
WEIGHTS = [
    [1.0, -1.0, 0.5],
    [-1.0, -2.0, -0.5],
    [1.0, -0.999, 0.0],
    [0.0, 1.0, 1.0],
    [1.0, -1.0, 0.0],
    [0.1, 0.2, -0.3],  # 2.8e-17 in float64
    [0.1 + 2e-9, -0.1, 0.0],  # 0 in float32
    [0.0, 0.0, 0.0],
    [1e-40, 2e-40, 0.0],  # float32 has no such normal numbers
]


def for_count(weights: list[float], count: int) -> list[float]:
    return [math.fsum(weights[1:]), weights[0]] if count == 2 else weights


def routes(names: list[str], weights: list[float]) -> list[tuple[str, dict[str, Any], list[float] | None]]:
    """Ways to give weights: the key that an error names, parameters, and the models' own weights."""
    named = dict(zip(names, weights, strict=True))
    return [
        ("method.weights", {"weights": weights}, None),
        ("method.weights", {"weights": named}, None),
        ("models.experts.*.weight", {}, weights),
        ("method.rules[0].weights", {"rules": [{"match": "*", "weights": weights}]}, None),
    ]


def refused(ask: Callable[[], object]) -> str:
    """Return the message of the `ConfigError` that is raised, or nothing."""
    try:
        ask()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_give_a_result_of_the_formulas_scale_or_are_refused_before_a_tensor_is_read(
    name: str, weights: list[float]
) -> None:
    method, models = get_method(name), models_for(name)
    closed, names = unreadable(models), [expert.name for expert in models.experts]
    weights = for_count(weights, len(names))
    planned = refused(lambda: resolve_weights(method, check_parameters(method, {}), names, weights))
    for key, parameters, own in routes(names, weights):
        line = refused(lambda p=parameters, w=own: merge(method, p, closed, weights=w, examples=object()))  # type: ignore[misc]
        assert line == refused(
            lambda p=parameters, w=own: resolve_weights(method, check_parameters(method, p), names, w)  # type: ignore[misc]
        )
        assert bool(line) == bool(planned)
        assert not line or line.startswith(f"{key}: ")
        assert "\n" not in line
    if not planned:
        result = merged(name, models, weights=weights)
        largest = max(float(source.get(key).abs().max()) for source in models.experts for key in SHAPES)
        assert all(float(result[key].abs().max()) < 5000 * largest for key in SHAPES)


MEANS = ("ties", "dare_ties", "breadcrumbs_ties", "della", "knots", "fisher", "gradient_matching")
QUOTIENTS = ("soup", "nuslerp", "multislerp", "rebasin", "c2m3")  # the last two hand them on to soup
SUMS = ("task_arithmetic", "dare", "breadcrumbs", "della_linear", "consensus", "lines")


@pytest.mark.parametrize("name", [*MEANS, *QUOTIENTS, *SUMS])
@pytest.mark.parametrize(("index", "weights"), enumerate(WEIGHTS))
def test_a_mean_takes_no_negative_weights_and_a_quotient_none_that_cancel(
    name: str, index: int, weights: list[float]
) -> None:
    method = get_method(name)
    names = [f"expert {i}" for i in range(count_for(method))]
    numbers = for_count(weights, len(names))
    line = refused(lambda: resolve_weights(method, check_parameters(method, {"weights": numbers}), names, None))
    allowed = {3} if name in MEANS else {0, 1, 2, 3} if name in QUOTIENTS else set(range(len(WEIGHTS)))
    assert (line == "") == (index in allowed), line
