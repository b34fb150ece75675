"""A method's parameters: their types, the checked models made from signatures, and the messages they give."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    PydanticSchemaGenerationError,
    ValidationError,
    create_model,
)

from mergelab.config import renamed
from mergelab.engine import per_tensor
from mergelab.engine.per_tensor import Varied
from mergelab.engine.value_ranges import allowed_values, mark_of_experts, ranges
from mergelab.errors import ConfigError, did_you_mean, listed
from mergelab.ops.expert_values import MeanWeights as MeanWeights
from mergelab.ops.expert_values import NormalizedWeights as NormalizedWeights
from mergelab.ops.expert_values import OfExperts as OfExperts
from mergelab.ops.expert_values import SumWeights as SumWeights
from mergelab.ops.expert_values import Weights as Weights

# Arguments that the engine supplies; no parameter of a method can have these names.
INJECTED = ("base", "experts", "vectors", "adapters", "site", "prepared", "output")


Density = Annotated[float, Field(gt=0, le=1)]
Densities = Annotated[float | Sequence[float], OfExperts(Density)]
# Fractions of entries that are ranked, with a parameter ``scope`` that says among which others.
TrimDensities = Annotated[float | Sequence[float], OfExperts(Density, one_where=("scope", "pooled"))]
OptionalTrimDensities = Annotated[
    float | Sequence[float] | None, OfExperts(Density | None, one_where=("scope", "pooled"))
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Fractions = Annotated[float | Sequence[float], OfExperts(Fraction)]
Lambda = Annotated[float, Field()]
Positive = Annotated[float, Field(gt=0)]
Samples = Annotated[int, Field(ge=1)]


class Parameters(BaseModel):
    """The checked, frozen parameters of one method; fields are made from its signature.

    Attributes:
        groups: the dataclasses that the function takes, by the argument's name; their fields are parameters as well.
    """

    groups: ClassVar[Mapping[str, type[Any]]] = {}

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=False,
        populate_by_name=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
    )
    _varied: Varied | None = PrivateAttr(None)
    _each: Mapping[str, Mapping[str, float]] = PrivateAttr({})  # by config key and expert
    _method: str = PrivateAttr("")

    def arguments(self) -> dict[str, Any]:
        """Return the values by the names that the function's signature uses (``lambda_``)."""
        return {name: getattr(self, name) for name in type(self).model_fields} | dict(self.model_extra or {})

    @classmethod
    def grouped(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values as the function takes them: those of a dataclass's fields as one object of it."""
        grouped, own = dict(values), {}
        for name, group in cls.groups.items():
            own[name] = group(**{field.name: grouped.pop(field.name) for field in fields(group)})
        return grouped | own

    def of_rules(self) -> list[dict[str, Any]]:
        """Return, for each rule by tensor name, the values that hold where it fits, by the function's names."""
        rules = () if self._varied is None else self._varied.rules
        plain = {name: self._each.get(key_of(name), value) for name, value in self.arguments().items()}
        first = [{key: per_tensor.value_at(value, 0.0) for key, value in rule.values.items()} for rule in rules]
        return [
            {name: per_tensor.joined(value, own.get(key_of(name), value)) for name, value in plain.items()}
            for own in first
        ]

    def by_key(self) -> dict[str, Any]:
        """Return the values by the names that configs use (``lambda``), as they were given."""
        values = {key_of(name): value for name, value in self.arguments().items()} | {
            key: dict(numbers) for key, numbers in self._each.items()
        }
        return values if self._varied is None else values | self._varied.by_key()

    def of_experts(self, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Return the values that were given for each expert, in the order of ``names``, by the function's names.

        Raises:
            ConfigError: an expert is unknown, or one has no value.
        """
        check_experts(self._each, names)
        found = {key: tuple(float(numbers[name]) for name in names) for key, numbers in self._each.items()}
        return {name: found[key_of(name)] for name in type(self).model_fields if key_of(name) in found}

    def check_experts(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` where values for each expert, those of rules among them, do not fit the experts."""
        check_experts(self._each, names)
        plain = {key_of(name): value for name, value in self.arguments().items()}
        for index, rule in enumerate(self._varied.rules if self._varied is not None else ()):
            mappings = {key: value for key, value in rule.values.items() if isinstance(value, Mapping)}
            for key in mappings:
                if isinstance(plain.get(key), tuple):
                    raise ConfigError(
                        f"method.rules[{index}].{key}: names experts, and method.{key} is a list; write "
                        f"method.{key}={{NAME: NUMBER, ...}} too"
                    )
            own = {key: {**self._each.get(key, {}), **value} for key, value in mappings.items()}
            check_experts({key: value for key, value in own.items() if self._is_of_experts(key)}, names, index)

    @classmethod
    def _is_of_experts(cls, key: str) -> bool:
        return any(key_of(name) == key and mark_of_experts(field.metadata) for name, field in cls.model_fields.items())

    def by_tensor(self, names: Sequence[str]) -> list[tuple[Parameters, list[str]]]:
        """Return the parameters that hold for tensors, each with the names of those that they hold for.

        Raises:
            ConfigError: a rule fits none of ``names``, or a value between two of a list's is not allowed.
        """
        if self._varied is None:
            return [(self, list(names))]
        self._varied.check_names(names)
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        plain = {key_of(name): value for name, value in self.arguments().items()}
        for name, own in self._varied.at(names, {**plain, **self._each}):
            groups.setdefault(repr(own), (own, []))[1].append(name)
        return [(self._with(plain, {**self._each, **own}), tensors) for own, tensors in groups.values()]

    def _with(self, plain: Mapping[str, Any], own: Mapping[str, Any]) -> Parameters:
        """Return these parameters with other values of some, by key."""
        each = {key: value for key, value in own.items() if isinstance(value, Mapping) and self._is_of_experts(key)}
        changed = validated(type(self), {**plain, **own, **{key: plain[key] for key in each}}, self._method)
        changed._each = each
        return changed


class OpenParameters(Parameters):
    """Parameters of a function with ``**kwargs``: further ones pass as they are."""

    model_config = ConfigDict(extra="allow")


def key_of(name: str) -> str:
    """Return the config key of a Python parameter: ``lambda_`` → ``lambda``."""
    return name.removesuffix("_")


def check_experts(each: Mapping[str, Mapping[str, float]], names: Sequence[str], rule: int | None = None) -> None:
    """Raise `ConfigError` where a value is for an expert that there is not, or an expert has none."""
    where = "method" if rule is None else f"method.rules[{rule}]"
    for key, numbers in each.items():
        if unknown := [name for name in numbers if name not in names]:
            hint = did_you_mean(unknown[0], names) or f"; there are {listed(names)}"
            raise ConfigError(f"{where}.{key}: no expert is called {unknown[0]!r}{hint}")
        if missing := [name for name in names if name not in numbers]:
            raise ConfigError(
                f"{where}.{key}={dict(numbers)}: must have a number for every expert, also {listed(missing)}"
            )


def parameters_of(
    function: Callable[..., Any], skip: Sequence[str] = INJECTED, *, lambda_: float | None = None
) -> type[Parameters]:
    """Make the parameter model of ``function`` from its signature, leaving out the parameters named in ``skip``.

    A parameter without default that is annotated with a dataclass stands for the dataclass's fields. An annotation that
    cannot be resolved or checked counts as "anything". With ``lambda_`` there is a parameter of that default in
    addition, which the engine applies and the function does not see.

    Raises:
        TypeError: a field has the name of another parameter.
    """
    made: dict[str, Any] = {}
    if lambda_ is not None:
        made["lambda_"] = (Lambda, Field(lambda_, alias=key_of("lambda_")))
    extra, groups = False, {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = True
        elif parameter.name not in skip and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            annotation = _resolved(parameter.annotation, function)
            own = [(parameter.name, annotation, ... if parameter.default is parameter.empty else parameter.default)]
            if isinstance(annotation, type) and is_dataclass(annotation) and parameter.default is parameter.empty:
                groups[parameter.name] = annotation
                own = list(_fields_of(annotation))
            for name, one, default in own:
                if name in made:
                    raise TypeError(f"{getattr(function, '__name__', 'custom')} takes two parameters called {name}")
                made[name] = (_checkable(_of_one(one)), Field(default, alias=key_of(name)))
    title = "".join(word.title() for word in getattr(function, "__name__", "custom").split("_"))
    model = create_model(f"{title}Parameters", __base__=OpenParameters if extra else Parameters, **made)
    model.groups = groups
    return model


def _fields_of(group: type[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Return the name, the annotation and the default of each field of a dataclass."""
    hints = typing.get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield field.name, hints[field.name], ... if field.default is MISSING else field.default


def _resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    try:  # what typing.get_type_hints does, one annotation at a time, of a function that is called anyway
        return eval(annotation, scope)  # nosec B307
    except Exception:  # names that only a type checker imports
        return Any


def _of_one(annotation: Any) -> Any:
    """Return what is checked of one number, where a parameter may be given for each expert."""
    mark = mark_of_experts(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else None
    return annotation if mark is None else Annotated[mark.number, *get_args(annotation)[1:]]


def _checkable(annotation: Any) -> Any:
    try:
        create_model("Trial", __base__=Parameters, value=(annotation, ...))
    except (PydanticSchemaGenerationError, TypeError):
        return Any
    return annotation


def parameters_from(model: type[Parameters], values: Mapping[str, Any], method: str) -> Parameters:
    """Check ``values``, among them lists that run over the depth and ``rules`` by tensor name.

    Raises:
        ConfigError: one line with the key, the value and what is allowed.
    """
    plain = {str(name): value for name, value in values.items()}
    numbers = {key_of(name) for name, field in model.model_fields.items() if takes_numbers(field.annotation)}
    own = {key_of(name) for name in model.model_fields}
    options = {key: plain.pop(key, None) for key in (per_tensor.KEY, *_RULE_OPTIONS) if key not in own}
    stated = options.pop(per_tensor.KEY, None)
    curves = {key: per_tensor.as_curves(value) for key, value in plain.items() if _varies(key, value, numbers)}
    first = {key: per_tensor.value_at(curve, 0.0) for key, curve in curves.items()}
    each = {key: first.get(key, value) for key, value in plain.items() if _is_of_each(model, key, value)}
    start = plain | first | {key: _first(value) for key, value in each.items()}
    for key in {**curves, **each}:
        for value in _alternatives(plain[key]):
            _check_value(model, start, key, value, method)
    checked = validated(model, start, method)
    if curves or stated or any(options.values()):
        by_name = _checked_rules(model, stated or [], checked.by_key(), numbers, method)
        checked._varied = per_tensor.Varied(
            {key_of(key): curve for key, curve in curves.items()}, by_name, **_rule_options(model, options, method)
        )
        checked._method = method
    checked._each = {key_of(key): {str(name): number for name, number in own.items()} for key, own in each.items()}
    return checked


_RULE_OPTIONS = (per_tensor.RULES_AS, per_tensor.REQUIRED)


def _rule_options(model: type[Parameters], options: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Check what else is said of rules: how they are read, and which parameters have no value but theirs."""
    known = [key_of(name) for name in model.model_fields]
    read_as, required = options.get(per_tensor.RULES_AS), options.get(per_tensor.REQUIRED) or ()
    if read_as not in (None, per_tensor.MERGEKIT):
        raise ConfigError(f"method.{per_tensor.RULES_AS}={read_as}: must be {per_tensor.MERGEKIT} or null")
    if isinstance(required, str) or not isinstance(required, Sequence):
        raise ConfigError(f"method.{per_tensor.REQUIRED}={required!r}: must be a list of parameters")
    for key in map(str, required):
        if key.partition(".")[0] not in known:
            raise ConfigError(
                f"method.{per_tensor.REQUIRED}: {method} has no parameter {key!r}{did_you_mean(key, known)}"
            )
    return {"as_mergekit": read_as is not None, "required": tuple(map(str, required))}


def _varies(key: str, value: object, numbers: Collection[str]) -> bool:
    """Tell a list over the layers, or experts by name of which one has such a list."""
    return (key_of(key) in numbers and per_tensor.is_curve(value)) or per_tensor.runs_over_layers(value)


def _alternatives(value: Any) -> Iterator[Any]:
    """Yield plain values that together have every number of ``value``."""
    if per_tensor.runs_over_layers(value):
        first = per_tensor.value_at(per_tensor.as_curves(value), 0.0)
        for name, one in value.items():
            for number in one if per_tensor.is_curve(one) else [one]:
                yield {**first, str(name): number}
        return
    yield from value if per_tensor.is_curve(value) else [value]


def _check_value(model: type[Parameters], values: Mapping[str, Any], key: str, value: Any, method: str) -> None:
    """Check a plain value among ``values`` of the others; of experts by name each."""
    if _is_of_each(model, key, value):
        _check_each(model, values, key, value, method)
    else:
        validated(model, {**values, key: value}, method)


def _is_of_each(model: type[Parameters], key: str, value: object) -> bool:
    """Tell a value that is given for each expert."""
    return isinstance(value, Mapping) and len(value) > 0 and model._is_of_experts(key_of(key))


def _first(value: Mapping[str, Any]) -> Any:
    return next(iter(value.values()))


def _check_each(
    model: type[Parameters], values: Mapping[str, Any], key: str, each: Mapping[str, Any], method: str
) -> None:
    """Check every number of a parameter that is given for each expert, among ``values`` of the others."""
    for name, number in each.items():
        try:
            validated(model, {**values, key: number}, method)
        except ConfigError as error:
            said = f"method.{key_of(key)}="
            raise ConfigError(str(error).replace(said, f"{said[:-1]}.{name}=", 1)) from None


def _checked_rules(
    model: type[Parameters], stated: Any, given: Mapping[str, Any], numbers: Collection[str], method: str
) -> tuple[per_tensor.Rule, ...]:
    """Check rules by tensor name: each a mapping with ``match`` and the parameters that it sets."""
    if isinstance(stated, str) or not isinstance(stated, Sequence):
        raise ConfigError(f"method.rules={stated!r}: must be a list of {{match: PATTERN, PARAMETER: VALUE}}")
    checked = []
    for index, entry in enumerate(stated):
        where = f"method.rules[{index}]"
        layers = _checked_layers(where, entry) if isinstance(entry, Mapping) else (None, None)
        everywhere = None if layers == (None, None) else "*"
        pattern = entry.get(per_tensor.MATCH, everywhere) if isinstance(entry, Mapping) else None
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}={entry!r}: must be {{match: PATTERN, PARAMETER: VALUE}}")
        named = (per_tensor.MATCH, per_tensor.LAYERS)
        values = {key_of(str(key)): value for key, value in entry.items() if key not in named}
        if not values:
            raise ConfigError(f"{where}: sets no parameter of {method}")
        for key, value in values.items():
            try:
                for one in _alternatives(value) if _varies(key, value, numbers) else [value]:
                    _check_value(model, given, key, one, method)
            except ConfigError as error:
                raise ConfigError(str(error).replace("method.", f"{where}.", 1)) from None
        own = {k: per_tensor.as_curves(v) if _varies(k, v, numbers) else v for k, v in values.items()}
        checked.append(per_tensor.Rule(pattern, own, layers))
    return tuple(checked)


def _checked_layers(where: str, entry: Mapping[str, Any]) -> per_tensor.Layers:
    """Check a rule's range of layers: the first and the one after the last, each a number or null."""
    layers = entry.get(per_tensor.LAYERS, (None, None))
    if not isinstance(layers, Sequence) or len(layers) != 2 or not all(n is None or type(n) is int for n in layers):
        raise ConfigError(f"{where}.layers={layers!r}: must be [FIRST, AFTER_LAST], each a number of a layer or null")
    start, stop = layers
    if (start or 0) < 0 or (stop is not None and stop <= (start or 0)):
        raise ConfigError(f"{where}.layers={list(layers)}: holds no layer")
    return start, stop


def takes_numbers(annotation: Any) -> bool:
    """Tell a parameter that is one number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return not any(isinstance(mark, PlainValidator) for mark in arguments[1:]) and takes_numbers(arguments[0])
    if origin in (Union, types.UnionType):
        return any(takes_numbers(each) for each in arguments)
    return annotation in (float, int)


def validated(model: type[Parameters], values: Mapping[str, Any], method: str) -> Parameters:
    """Check ``values`` (by config key or Python name) against a parameter model.

    Raises:
        ConfigError: one line with the key, the value and what is allowed, or the nearest name for an unknown key.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        if key_of(str(name)) in given:
            raise ConfigError(f"method.{key_of(str(name))}: given twice, also as {name!r}")
        given[key_of(str(name))] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        raise ConfigError(_message(model, given, first["type"], str(first["loc"][0]), method)) from None


def _message(model: type[Parameters], given: Mapping[str, Any], problem: str, key: str, method: str) -> str:
    fields = {key_of(name): field for name, field in model.model_fields.items()}
    if (line := renamed(f"method.{key}", given.get(key), fields)) is not None:
        return line
    if problem == "extra_forbidden":
        hint = did_you_mean(key, fields) or f"; it has {listed(fields)}"
        return f"method.{key}: {method} has no such parameter{hint if fields else '; it has none'}"
    field = fields[key]
    allowed = allowed_values(field.annotation, field.metadata)
    if problem == "missing":
        return f"method.{key}: {method} needs it" + (f"; {allowed}" if allowed else "")
    if problem.startswith(("greater_than", "less_than")):
        allowed = ranges(field.metadata) or allowed
    alike = isinstance(given[key], Mapping) and given[key] and takes_numbers(field.annotation)
    same = ", the same for all experts" if alike and mark_of_experts(field.metadata) is None else ""
    return f"method.{key}={given[key]!r}: must be {allowed or 'another value'}{same}"
