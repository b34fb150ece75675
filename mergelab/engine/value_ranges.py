"""Which values a parameter takes, in words and in short."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import PlainValidator

from mergelab.ops.expert_values import OfExperts, one_number_each


def mark_of_experts(metadata: Sequence[Any]) -> OfExperts | None:
    """Return the mark of a parameter that may be given for each expert, by name."""
    return next((mark for mark in metadata if isinstance(mark, OfExperts)), None)


def allowed_values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in words which values a parameter takes: ``a number greater than 0 and at most 1``."""
    if any(isinstance(mark, PlainValidator) and mark.func is one_number_each for mark in metadata):
        return ", ".join(filter(None, ("one number per expert, as a list or by the expert's name", ranges(metadata))))
    if mark_of_experts(metadata) is not None:
        others = [mark for mark in metadata if not isinstance(mark, OfExperts)]
        return f"{allowed_values(annotation, others)}, or one for each expert by name"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed_values(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        *others, last = (repr(choice) for choice in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (Union, types.UnionType):
        words = (("null" if each is type(None) else allowed_values(each, metadata)) for each in arguments)
        return " or ".join(word for word in words if word)
    noun = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(annotation, "")
    return " ".join(part for part in (noun, ranges(metadata)) if part)


def range_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in short which values a parameter takes: ``> 0, ≤ 1``, or its choices; nothing where any is taken."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return range_of(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return next((found for each in arguments if (found := range_of(each, metadata))), "")
    return ", ".join(f"{sign} {limit:g}" for sign, limit in _limits(metadata, (">", "≥", "<", "≤")))


def ranges(metadata: Sequence[Any]) -> str:
    """Say in words between which limits a number is: ``greater than 0 and at most 1``."""
    found = _limits(metadata, ("greater than", "at least", "less than", "at most"))
    return " and ".join(f"{words} {limit:g}" for words, limit in found)


def _limits(metadata: Sequence[Any], words: Sequence[str]) -> list[tuple[str, float]]:
    flat = [inner for mark in metadata for inner in (getattr(mark, "metadata", None) or [mark])]
    names = zip(("gt", "ge", "lt", "le"), words, strict=True)
    return [(word, getattr(mark, name)) for name, word in names for mark in flat if hasattr(mark, name)]
