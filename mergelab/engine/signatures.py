"""The keywords of a method's function in Python, with their types as text, read from the method's parameters."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import takes_numbers
from mergelab.engine.per_tensor import KEY
from mergelab.engine.value_ranges import mark_of_experts

_NAMES = {float: "float", int: "int", bool: "bool", str: "str", type(None): "None"}


def keywords(method: MergeMethod) -> list[inspect.Parameter]:
    """Return a keyword for each parameter of a method, and one for rules by tensor name; defaults are the method's."""
    fields = method.parameters.model_fields
    found = [
        _keyword(name, _type_of(field), ... if field.is_required() else field.get_default())
        for name, field in fields.items()
    ]
    if KEY not in fields:
        found.append(_keyword(KEY, "Sequence[Mapping[str, Any]]", ()))
    return found


def _keyword(name: str, annotation: str, default: Any) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=empty if default is ... else default, annotation=annotation
    )


def _type_of(field: Any) -> str:
    """Write the type of what a parameter takes: its own values, a list over the depth, a mapping by expert."""
    parts = _parts(field.annotation)
    annotated = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    if takes_numbers(annotated):
        parts += ["Sequence[float]"]
    if mark_of_experts(field.metadata) is not None:
        parts += ["Mapping[str, float]"]
    parts = list(dict.fromkeys(parts))
    if "Any" in parts:
        return "Any"
    return " | ".join([*(part for part in parts if part != "None"), *(["None"] if "None" in parts else [])])


def _parts(annotation: Any) -> list[str]:
    """List the members of a type, each as text; what a stub cannot say is Any."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _parts(arguments[0])
    if origin in (Union, types.UnionType):
        return [part for each in arguments for part in _parts(each)]
    if origin is Literal:
        return [f"Literal[{', '.join(_quoted(each) for each in arguments)}]"]
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence | Mapping):
        name = "Mapping" if issubclass(origin, Mapping) else "Sequence"
        return [f"{name}[{', '.join(' | '.join(_parts(each)) for each in arguments if each is not ...)}]"]
    return [_NAMES.get(annotation, "Any")]


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
