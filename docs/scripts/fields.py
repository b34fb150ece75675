"""The keys of the configuration: type, range, default and meaning, read from the schemas and the files in conf/."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mergelab.config import CONF_DIR, PATTERNS
from mergelab.engine.value_ranges import ranges

_COMMENTED = re.compile(r"^ *(?P<key>\w+): .*?(?<=\s)# (?P<meaning>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """A key as the page shows it.

    Attributes:
        name: without its group.
        kind: which values it takes, in words.
        default: as in a YAML file; None where a value is required.
        meaning: a sentence.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def keys_of(schema: type[BaseModel], file: str | None = None, node: str | None = None) -> list[Key]:
    """Return the keys of a part of the configuration, with the defaults and the comments of a file in conf/.

    Args:
        schema: the part.
        file: below conf/, whose values are the defaults; without one the schema's are.
        node: the key of that file under which they stand.
    """
    text = (CONF_DIR / file).read_text(encoding="utf-8") if file else ""
    values = yaml.safe_load(text) or {}
    values = values[node] if node else values
    comments = {found["key"]: found["meaning"] for found in _COMMENTED.finditer(text)}
    described = descriptions(schema)
    return [
        Key(
            name=(key := field.alias or name),
            kind=_of_pattern(key) or kind_of(field.annotation, field.metadata),
            default=shown(values[key]) if key in values else _default(field.get_default(call_default_factory=True)),
            meaning=re.sub(r"\bNone\b", "null", comments.get(key) or described.get(name, "")),
        )
        for name, field in schema.model_fields.items()
    ]


def _of_pattern(key: str) -> str:
    """Say what the pattern of a key asks for; nothing where it has none."""
    return PATTERNS.get(key, "").removeprefix("must be ").replace("cuda:<number>", "`cuda:<number>`")


@cache
def descriptions(schema: type[BaseModel]) -> dict[str, str]:
    """Return the texts below the fields of a schema and of those that it extends."""
    found: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        if each is BaseModel or not issubclass(each, BaseModel):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(described))):
                    found[name] = inspect.cleandoc(described)
    return found


def kind_of(annotation: Any, metadata: Any = ()) -> str:
    """Say in words which values a key takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        kinds = ["`null`" if each is type(None) else kind_of(each, metadata) for each in arguments]
        return " or ".join(dict.fromkeys(kinds))
    if origin is list:
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {kind_of(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    noun = {float: "number", int: "whole number", bool: "`true` or `false`", str: "text", Any: "anything"}[annotation]
    return " ".join(part for part in (noun, _range(metadata)) if part)


def _range(metadata: Any) -> str:
    text = ranges(metadata)
    for power in (32, 63):
        text = text.replace(f"{2**power:g}", f"2^{power}")
    return text


def _default(value: Any) -> str | None:
    if value is PydanticUndefined:
        return None
    return shown(value.model_dump() if isinstance(value, BaseModel) else value)


def shown(value: Any) -> str:
    """Return a value as a YAML file has it, on one line."""
    if isinstance(value, str) and not value.startswith("${"):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def conf_files(group: str) -> list[Path]:
    """Return the files of a config group."""
    return sorted((CONF_DIR / group).glob("*.yaml"))
