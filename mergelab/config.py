"""The typed configuration: where its files live, what each key may hold, and one clear line when it does not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mergelab.errors import ConfigError, did_you_mean, listed

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the configs inside the package; in a checkout they stand beside it.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

HEAD_POLICIES = ("average", "base", "per_task", "expert:<name>")


def cache_dir() -> Path:
    """Answer the folder for what can be made again: ``MERGELAB_CACHE``, else ``mergelab`` in the user's cache."""
    if folder := os.environ.get("MERGELAB_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mergelab"


# What a pattern asks for, in words.
PATTERNS = {
    "device": "must be auto, cpu, cuda, cuda:<number> or mps",
    "max_shard_size": "must be a number with kB, MB, GB or TB, such as 5GB",
}


class Schema(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent conversion (``"0.3"`` is not a number)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True, protected_namespaces=()
    )


class ExpertConfig(Schema):
    """One expert: where it is, its weight in the merge, and what it was made for."""

    reference: str
    weight: float = 1.0
    task: str | None = None
    """The task that its head serves; by default the expert's name where that is a task's name."""
    labels: list[str] | None = None
    """The task's label names in the order of the model's outputs, where its own ``id2label`` does not tell."""


class ModelsConfig(Schema):
    """What is merged."""

    name: str
    base: str | None = None
    experts: dict[str, ExpertConfig] = Field(min_length=1)
    head: str = "average"
    passthrough: list[str] = []
    vocab: Literal["base", "union"] | None = None
    """Whose tokens the merged model has, where the models' differ: the base's, or those of all; None: they do not."""

    @field_validator("experts", mode="before")
    @classmethod
    def _named(cls, experts: object) -> object:
        if isinstance(experts, Sequence) and not isinstance(experts, str):
            experts = _names(experts)
        if isinstance(experts, Mapping):
            return {
                str(name): {"reference": value} if isinstance(value, str) else value
                for name, value in experts.items()
                if value is not None  # `models.experts.NAME=null` leaves an expert of a ready set out
            }
        return experts

    @field_validator("head")
    @classmethod
    def _known_policy(cls, head: str, info: ValidationInfo) -> str:
        experts = info.data.get("experts", {})
        if head.startswith("expert:") and (name := head.removeprefix("expert:")) not in experts:
            raise ValueError(f"no expert {name!r}{did_you_mean(name, experts)} (there are {listed(experts)})")
        if head not in HEAD_POLICIES[:3] and not head.startswith("expert:"):
            raise ValueError(f"must be one of {', '.join(HEAD_POLICIES)}")
        return head

    @field_validator("vocab")
    @classmethod
    def _has_base(cls, vocab: str | None, info: ValidationInfo) -> str | None:
        if vocab == "base" and info.data.get("base", "") is None:
            raise ValueError("there is no base model (models.base is null); vocab=union starts from the first expert")
        return vocab


def _names(references: Sequence[object]) -> dict[str, object]:
    """Name the experts of a plain list after the last part of their references, numbered where that repeats."""
    named: dict[str, object] = {}
    for entry in references:
        text = entry.get("reference", "") if isinstance(entry, Mapping) else entry
        stem = re.sub(r"@.*$", "", str(text)).rstrip("/").rsplit("/", 1)[-1] or "expert"
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = entry
    return named


class EvalConfig(Schema):
    """How scores are obtained."""

    protocol: Literal["full", "holdout", "oracle"] = "full"
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: Annotated[int, Field(ge=8)] | None = None
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    bootstrap: Annotated[int, Field(ge=1)] = 1000
    preflight: bool = True
    cache: bool = True


class SaveConfig(Schema):
    """How a merged model is written."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s?[kMGT]B$")] = "5GB"
    tokenizer: str | None = None
    """Whose tokenizer, generation config and chat template are copied: ``base``, or an expert's name.

    With ``models.vocab`` the tokenizer is the merged vocabulary's.
    """

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes; 1 kB is 1000 of them."""
        number, unit = self.max_shard_size[:-2], self.max_shard_size[-2]
        return int(float(number) * 1000 ** ("kMGT".index(unit) + 1))


class ExperimentConfig(Schema):
    """One experiment. ``method``, ``task`` and ``tracking`` are checked by the part of mergelab that owns each."""

    models: ModelsConfig
    method: dict[str, Any]
    task: dict[str, Any]
    eval: EvalConfig
    save: SaveConfig
    tracking: dict[str, Any]
    source: Literal["auto", "hub", "mini"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    evaluate: bool = True
    output: str | None = None


SchemaT = TypeVar("SchemaT", bound=BaseModel)


def check(schema: type[SchemaT], values: Mapping[str, Any], where: str = "") -> SchemaT:
    """Build ``schema`` from ``values``, whose place in the whole configuration is ``where`` (such as ``"method"``).

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type or out of range. One line, all problems in it.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_line(schema, where, problem) for problem in error.errors())) from None


def _line(schema: type[BaseModel], where: str, problem: Any) -> str:
    """Say one of pydantic's problems as ``method.density=0: must be greater than 0``."""
    path = ".".join(str(part) for part in (*filter(None, [where]), *problem["loc"]) if part != "[key]")
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in _schema_at(schema, problem["loc"][:-1]).model_fields.items()]
        return f"{path}: no such key{did_you_mean(problem['loc'][-1], known)} (there are {listed(known, 20)})"
    if kind == "missing":
        return f"{path}: needs a value"
    value = problem["input"]
    said = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be one of {expected}",
        "float_type": "must be a number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "finite_number": "must be a finite number",
        "string_pattern_mismatch": PATTERNS.get(str(problem["loc"][-1]), "must match {pattern}"),
        "value_error": "{error}",
    }.get(kind, problem["msg"])
    return f"{path}={value!r}: {said.format(**context)}"


def _schema_at(schema: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """Find the schema of the node at ``path`` below ``schema``."""
    for part in path:
        field = schema.model_fields.get(str(part))
        inner = getattr(field, "annotation", None)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            schema = inner
        elif field is not None and field.annotation == dict[str, ExpertConfig]:
            schema = ExpertConfig
    return schema
