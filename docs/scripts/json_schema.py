"""A JSON Schema of the configuration, by which editors complete and check YAML files."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from docs.scripts.fields import descriptions
from mergelab.analyze.plan import AnalyzeConfig
from mergelab.config import ExperimentConfig, ExpertConfig, ModelsConfig, PairConfig, StackConfig
from mergelab.engine.catalogue import Entry, entries
from mergelab.engine.parameters import key_of, takes_numbers
from mergelab.engine.value_ranges import allowed_values, mark_of_experts
from mergelab.sweep.config import SweepConfig
from mergelab.tasks.schema import SCHEMAS, SuiteSchema
from mergelab.tracking.config import TrackingConfig

Node = dict[str, Any]
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
# A value may refer to another one: ${seed}.
_REFERENCE: Node = {"type": "string", "pattern": r"\$\{"}
# Keys that Hydra reads, not mergelab.
_HYDRA: Node = {"defaults": {"type": "array"}, "hydra": {"type": "object"}}


def json_schema() -> Node:
    """Return the schema: of a whole configuration, of a file that sets a part of it, and of a file of each group."""
    groups = {
        "models": _models(),
        "method": _methods(entries()),
        "task": _tasks(),
        "tracking": _model(TrackingConfig),
        "sweep": _model(SweepConfig),
        "analyze": _model(AnalyzeConfig),
    }
    whole = _model(ExperimentConfig)
    groups |= {name: whole["properties"][name] for name in ("eval", "save")}
    for name in ("eval", "save", "tracking", "analyze"):
        groups[name]["properties"] |= _HYDRA
    groups["sweep"]["additionalProperties"] = {"type": "object"}  # of its own, which the search space refers to
    properties = whole["properties"] | {name: {"$ref": f"#/$defs/{name}"} for name in groups} | _HYDRA
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of mergelab",
        **whole,
        "properties": properties,
        "$defs": groups,
    }


def _model(schema: type[BaseModel]) -> Node:
    """Return the schema of a part of the configuration; a file may set any of its keys, so none is required."""
    described = descriptions(schema)
    properties = {}
    for name, field in schema.model_fields.items():
        text = described.get(name)
        found = _values(field.annotation, field.metadata)
        properties[field.alias or name] = {**found, "description": " ".join(text.split())} if text else found
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> Node:
    """Return the schema of a value, from its type and the limits beside it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_values(each, metadata) for each in arguments]}
    if origin is list:
        return {"type": "array", "items": _values(arguments[0]), **_sizes(metadata)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _values(arguments[1]), **_sizes(metadata, "Properties")}
    if annotation is type(None):
        return {"type": "null"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _model(annotation)
    name = {float: "number", int: "integer", bool: "boolean", str: "string"}.get(annotation)
    if name is None:
        return {}
    limits = dict(_limits(metadata))
    return {"type": name, **limits} if name == "string" else {"anyOf": [{"type": name, **limits}, _REFERENCE]}


def _limits(metadata: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    flat = [inner for mark in metadata for inner in (getattr(mark, "metadata", None) or [mark])]
    for mark in flat:
        for name, key in _BOUNDS.items():
            if (limit := getattr(mark, name, None)) is not None:
                yield key, limit
        if pattern := getattr(mark, "pattern", None):
            yield "pattern", rf"{pattern}|\$\{{"


def _sizes(metadata: Sequence[Any], what: str = "Items") -> Node:
    flat = [inner for mark in metadata for inner in (getattr(mark, "metadata", None) or [mark])]
    found = {f"min{what}": getattr(mark, "min_length", None) for mark in flat}
    found |= {f"max{what}": mark.max_length for mark in flat if getattr(mark, "max_length", None) is not None}
    return {name: size for name, size in found.items() if size is not None}


def _models() -> Node:
    """Return the schema of ``models``, with the short forms of experts."""
    reference: Node = {"anyOf": [{"type": "string"}, _model(PairConfig), _model(StackConfig)]}
    expert = _model(ExpertConfig)
    short = _model(PairConfig)["properties"] | _model(StackConfig)["properties"]
    expert["properties"] = expert["properties"] | {"reference": reference} | short
    one: Node = {"anyOf": [{"type": "string"}, expert, {"type": "null"}]}
    found = _model(ModelsConfig)
    experts = found["properties"]["experts"]
    many = [{"type": "object", "additionalProperties": one}, {"type": "array", "items": one}]
    slices = found["properties"]["slices"]
    slices["anyOf"] = [*slices["anyOf"], {"type": "array"}]
    found["properties"] |= {"experts": {"anyOf": many} | {k: v for k, v in experts.items() if k == "description"}}
    leave_out = found["properties"]["leave_out"]
    leave_out["anyOf"] = [*leave_out["anyOf"], {"type": "null"}]
    found["properties"] |= _HYDRA
    return found


def _tasks() -> Node:
    """Return the schema of a task: any key of any kind; ``kind`` decides which of them there are."""
    properties: dict[str, Any] = {}
    for schema in (*SCHEMAS.values(), SuiteSchema):
        for key, values in _model(schema)["properties"].items():
            before = properties.get(key)
            properties[key] = values if before in (None, values) else {"anyOf": [*_choices(before), *_choices(values)]}
    return {"type": "object", "properties": properties | _HYDRA, "additionalProperties": False}


def _choices(node: Node) -> list[Node]:
    return node["anyOf"] if set(node) == {"anyOf"} else [node]


def _methods(found: Sequence[Entry]) -> Node:
    """Return the schema of ``method``: the parameters of the method that ``name`` says; without it any."""
    branches = [
        {"if": {"properties": {"name": {"const": each.name}}, "required": ["name"]}, "then": _parameters(each)}
        for each in found
    ]
    names = [*(each.name for each in found), "custom"]
    return {"type": "object", "properties": {"name": {"type": "string", "examples": names}}, "allOf": branches}


def _parameters(each: Entry) -> Node:
    known = {"name": {}, "function": {"type": "string"}, "rules": {"type": "array"}, "rules_as": {}, "required": {}}
    known |= {"preset": {"enum": ["authors"]}, **_HYDRA}
    for name, field in each.method.parameters.model_fields.items():
        allowed = allowed_values(field.annotation, field.metadata)
        values = _values(field.annotation, field.metadata)
        if takes_numbers(field.annotation):
            forms: list[Node] = [values, {"type": "array"}]
            values = {"anyOf": [*forms, {"type": "object"}] if mark_of_experts(field.metadata) else forms}
        elif allowed.startswith("one number per expert"):
            values = {"anyOf": [{"type": "null"}, {"type": "array"}, {"type": "object"}]}
        known[key_of(name)] = {**values, "description": allowed} if allowed else values
    return {"properties": known, "additionalProperties": False}
