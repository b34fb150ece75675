"""The typed configuration: where its files live, what each key may hold, and one clear line when it does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mergelab.errors import ConfigError, did_you_mean, listed, shortened

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the configs inside the package; in a checkout they are next to it.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# Earlier names of keys, and of their values, with the names of today.
RENAMED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "method.election": ("majority_sign", {"mass": "total", "count": "frequency"}),
    "method.zero_sign": ("tie_break", {}),
    "method.weights_at": ("weights_stage", {"after": "reduce", "before": "elect"}),
    "sweep.first": ("enqueue", {}),
    "task.shots": ("num_fewshot", {}),
    "task.examples": ("fewshot_examples", {}),
    "task.worked_examples": ("fewshot_examples", {}),
    "task.label_words": ("verbalizer", {}),
}

HEAD_POLICIES = ("average", "base", "per_task", "expert:<name>")


def local_path(text: str, where: str) -> Path:
    """Return the path that ``text`` names; ``~`` is the user's home, ``~name`` that of another.

    Args:
        text: as given by the user.
        where: what gives it, such as ``output``.

    Raises:
        ConfigError: that user has no home, or no path can be so.
    """
    if "\0" in text:
        raise ConfigError(f"{where}={text!r}: a path has no NUL characters")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{where}={text}: there is no user of that name, whose home ~ is") from None


def renamed(key: str, value: object, known: Iterable[str]) -> str | None:
    """Return one line that gives today's name of an old ``key``, or of an old ``value`` of a key; None without one.

    Args:
        key: with its group, as in ``method.election``.
        value: what it was given.
        known: the keys that exist there, with or without their group; a new name that is not among them is no help.
    """
    group = key.partition(".")[0]
    if key in RENAMED:
        name, values = RENAMED[key]
        if not {name, f"{group}.{name}"}.isdisjoint(known):
            example = f"; write {name}={values[value]}" if isinstance(value, str) and value in values else ""
            return f"{key}: is called {name} now{example}"
        return None
    for old, (name, values) in RENAMED.items():
        if key == f"{old.partition('.')[0]}.{name}" and isinstance(value, str) and value in values:
            return f"{key}={value!r}: is called {values[value]} now"
    return None


def says_what_it_is(key: str) -> str | None:
    """Return one line about a ``key`` that is no setting but says which method or task the others are of; else None."""
    group = key.partition(".")[0]
    if key not in ("method.name", "task.name"):
        return None
    return f"{key}: says which {group} the other settings are of and cannot be changed; {group}=NAME chooses another"


# What a pattern asks for, in words.
PATTERNS = {
    "device": "must be auto, cpu, cuda, cuda:<number> or mps",
    "push_to_hub": "must be a repository of the hub, org/name",
    "register": "must be a name without / and :",
    "max_shard_size": "must be a number of at most 9 digits with kB, MB, GB or TB, such as 5GB",
    "max_memory": "must be a number with kB, MB, GB or TB for each device, such as 20GB",
}


class Schema(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent conversion (``"0.3"`` is not a number)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True, protected_namespaces=()
    )


# What every random generator takes.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class PairConfig(Schema):
    """An encoder and a decoder that are joined, as ``EncoderDecoderModel.from_encoder_decoder_pretrained`` does it."""

    encoder: str
    """A hub id or a folder."""
    decoder: str
    """A hub id or a folder."""
    seed: Seed = 0
    """Of the weights that neither of the two has: the cross-attention."""
    decoder_start_token_id: Annotated[int, Field(ge=0)] | None = None
    """The token that generation begins with; None: the decoder's own."""
    pad_token_id: Annotated[int, Field(ge=0)] | None = None
    """None: the decoder's own."""
    eos_token_id: Annotated[int, Field(ge=0)] | None = None
    """The token that generation ends with; None: the decoder's own."""


class LayersOfModel(Schema):
    """Some layers of a model, from ``layers[0]`` up to but not including ``layers[1]``."""

    model: str
    """A hub id or a folder."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    """The first layer and the one after the last, counted from 0."""

    @field_validator("layers")
    @classmethod
    def _hold_one(cls, layers: list[int]) -> list[int]:
        if layers[0] >= layers[1]:
            raise ValueError("holds no layer; it is [FIRST, AFTER_LAST]")
        return layers


class StackConfig(Schema):
    """A model that is made of layers of others: the first gives what comes before them, the last what comes after."""

    stack: Annotated[list[LayersOfModel], Field(min_length=1)]
    """The parts, from the first layer on: each a ``model`` and its ``layers``."""


def _kind_of_reference(value: object) -> str:
    if isinstance(value, StackConfig) or (isinstance(value, Mapping) and "stack" in value):
        return _STACK
    return _PAIR if isinstance(value, Mapping | PairConfig) else _NAME


# Steps of pydantic's paths that are no keys of the configuration are in brackets.
_NAME, _PAIR, _STACK = "[name]", "[pair]", "[stack]"
ReferenceConfig = Annotated[
    Annotated[str, Tag(_NAME)] | Annotated[PairConfig, Tag(_PAIR)] | Annotated[StackConfig, Tag(_STACK)],
    Discriminator(_kind_of_reference),
]
_Layers = list[Annotated[int, Field(ge=0)]]


class LayersConfig(Schema):
    """Numbers of layers, from 0, of an encoder and of a decoder."""

    encoder: _Layers = []
    decoder: _Layers = []


_BOTH, _EACH = "[both]", "[each]"
LeaveOut = Annotated[
    Annotated[_Layers, Tag(_BOTH)] | Annotated[LayersConfig, Tag(_EACH)],
    Discriminator(lambda value: _EACH if isinstance(value, Mapping | LayersConfig) else _BOTH),
]


class ExpertConfig(Schema):
    """One expert: where it is, its weight in the merge, and what it was made for."""

    reference: ReferenceConfig
    """A hub id (``org/name@revision``), a folder of a model or of an adapter, a pair, or a stack of layers."""
    part: Literal["encoder", "decoder"] | None = None
    """Which part of an encoder-decoder base it takes the place of; the other part is the base's."""
    weight: float = 1.0
    """Its weight in the merge, where ``method.weights`` says nothing."""
    task: str | None = None
    """The task that its head serves; by default the expert's name where that is a task's name."""
    labels: list[str] | None = None
    """The task's label names in the order of the model's outputs, where its own ``id2label`` does not tell."""


class SliceConfig(Schema):
    """Layers of the merged model: which layers of which models they are merged from, and how."""

    sources: Annotated[dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    """By name, ``base`` or an expert's: its first layer and the one after its last; all have equally many."""
    method: dict[str, Any] = {}
    """Parameters of the method that hold for these layers; lists of numbers run over them."""

    @field_validator("sources")
    @classmethod
    def _equally_many(cls, sources: dict[str, list[int]]) -> dict[str, list[int]]:
        lengths = {name: stop - start for name, (start, stop) in sources.items()}
        if any(start < 0 for start, _ in sources.values()) or min(lengths.values()) < 1:
            raise ValueError("each must be [FIRST, AFTER_LAST], with a layer between them")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all must have equally many layers, and have {lengths}")
        return sources


class TokenConfig(Schema):
    """The row of one token that some models lack."""

    token: str
    """The token; one that no tokenizer has is added."""
    model: str | None = None
    """The model that it is taken of, ``base`` or an expert's name; None: zeros."""
    like: str | None = None
    """The token whose row it is there; None: the same."""
    row: Annotated[int, Field(ge=0)] | None = None
    """The row there, in the place of a token."""
    everywhere: bool = False
    """Whether it is read for models too that have the token."""

    @field_validator("row")
    @classmethod
    def _is_the_only_place(cls, row: int | None, info: ValidationInfo) -> int | None:
        if row is not None and info.data.get("like") is not None:
            raise ValueError("one of like and row says where it is, not both")
        return row


class VocabConfig(Schema):
    """Whose tokens the merged model has, and what a model has for a token that it lacks."""

    source: str
    """``base``, ``union`` (those of all), or an expert's name."""
    first: str | None = None
    """Whose tokens come first in a union and whose rows serve first; None: the base's, or the first expert's."""
    lacking: Literal["first", "mean"] = "first"
    """What a model has for a token that it lacks: the row of ``first``, or the mean of the models that have it."""
    unknown: Literal["mean", "zero"] = "mean"
    """What all have for a token that none has: the mean of the first model's rows, or zeros."""
    padding: Literal["keep", "drop"] = "keep"
    """Whether the first model's rows that stand for no token are there in the merged model."""
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    """What the number of rows is a multiple of; the further rows are the mean of the others."""
    tokens: list[TokenConfig] = []
    """Rows of single tokens; those that the tokenizer lacks are added to it."""


class ModelsConfig(Schema):
    """What is merged."""

    name: str
    """The set's name, in tables and run names."""
    base: ReferenceConfig | None = None
    """The model that the experts were fine-tuned from, as a reference; None: there is no base."""
    experts: dict[str, ExpertConfig] = Field(min_length=1)
    """By name, or a list: references, or mappings as below; null leaves an expert of a ready set out."""
    slices: dict[str, SliceConfig] | None = None
    """What the merged model's layers are made of, from the first on, by any names; None: all layers of all models."""
    stages: dict[str, str | dict[str, Any]] | None = None
    """Merges that come first, whose results the others' models may be; or the folders that hold them."""
    head: str = "average"
    """``average`` of the experts' heads, ``base``, ``expert:<name>``; ``per_task``: each task has its own expert's."""
    passthrough: list[str] = []
    """Name patterns of tensors that skip the merge; the experts' mean is taken."""
    leave_out: LeaveOut = []
    """Layers that skip the merge and stay the base's; a plain list counts in the encoder and in the decoder."""
    merge_new: bool = False
    """Whether weights that no checkpoint had, such as a warm start's cross-attention, are merged like any other."""
    vocab: VocabConfig | None = None
    """Whose tokens the merged model has, where the models' differ: ``base``, ``union``, an expert's; None: they do not.

    In place of the mapping its ``source`` alone may be given.
    """
    config: str | None = None
    """Whose config the merged model has, ``base`` or an expert's name, where the models' differ; None: they do not."""
    untie: bool = False
    """Whether tensors that some models tie and others do not, as input and output embedding, are merged apart."""
    mini: Literal["law_recipes", "summaries"] | None = None
    """The embedded miniature that takes the models' place without a hub; None: that of the measured GLUE tasks."""

    @field_validator("experts", mode="before")
    @classmethod
    def _named(cls, experts: object) -> object:
        if isinstance(experts, Sequence) and not isinstance(experts, str):
            experts = _names(experts)
        if isinstance(experts, Mapping):
            return {
                str(name): _with_reference(value)
                for name, value in experts.items()
                if value is not None  # `models.experts.NAME=null` leaves an expert of a ready set out
            }
        return experts

    @field_validator("slices", mode="before")
    @classmethod
    def _numbered(cls, slices: object) -> object:
        if isinstance(slices, Sequence) and not isinstance(slices, str):
            return {f"s{at}": each for at, each in enumerate(slices, 1)}
        return slices or None

    @field_validator("stages", mode="before")
    @classmethod
    def _none_without(cls, stages: object) -> object:
        return stages or None

    @field_validator("leave_out", mode="before")
    @classmethod
    def _none_left_out(cls, leave_out: object) -> object:
        return [] if leave_out is None else leave_out

    @field_validator("experts")
    @classmethod
    def _parts_have_a_base(cls, experts: dict[str, ExpertConfig], info: ValidationInfo) -> dict[str, ExpertConfig]:
        for name, expert in experts.items():
            if expert.part and info.data.get("base", "") is None:
                raise ValueError(f"{name} has part={expert.part}, and there is no base model for the other part")
        return experts

    @field_validator("leave_out")
    @classmethod
    def _leaves_the_bases(cls, leave_out: LeaveOut, info: ValidationInfo) -> LeaveOut:
        if leave_out and info.data.get("base", "") is None:
            raise ValueError("there is no base model (models.base is null) whose layers would stay")
        return leave_out

    @field_validator("head")
    @classmethod
    def _known_policy(cls, head: str, info: ValidationInfo) -> str:
        experts = info.data.get("experts", {})
        if head.startswith("expert:") and (name := head.removeprefix("expert:")) not in experts:
            raise ValueError(f"no expert {name!r}{did_you_mean(name, experts)} (there are {listed(experts)})")
        if head not in HEAD_POLICIES[:3] and not head.startswith("expert:"):
            raise ValueError(f"must be one of {', '.join(HEAD_POLICIES)}")
        return head

    @field_validator("config")
    @classmethod
    def _is_a_models(cls, config: str | None, info: ValidationInfo) -> str | None:
        names = [*(["base"] if info.data.get("base", "") is not None else []), *info.data.get("experts", {})]
        if config is not None and config not in names:
            raise ValueError(f"must be one of {listed(names)}{did_you_mean(config, names)}")
        return config

    @field_validator("vocab", mode="before")
    @classmethod
    def _by_source(cls, vocab: object) -> object:
        return {"source": vocab} if isinstance(vocab, str) else vocab

    @field_validator("vocab")
    @classmethod
    def _is_of_the_models(cls, vocab: VocabConfig | None, info: ValidationInfo) -> VocabConfig | None:
        if vocab is None or "experts" not in info.data:
            return vocab
        has_base = info.data.get("base", "") is not None
        names = [*(["base"] if has_base else []), *info.data["experts"]]
        if "base" in (vocab.source, vocab.first) and not has_base:
            raise ValueError("there is no base model (models.base is null); vocab=union starts from the first expert")
        if vocab.source not in ("union", *names):
            raise ValueError(f"must be one of {listed(['union', *names])}{did_you_mean(vocab.source, names)}")
        others = {"first": vocab.first, **{f"tokens.{at}.model": each.model for at, each in enumerate(vocab.tokens)}}
        if odd := [(key, name) for key, name in others.items() if name not in (None, *names)]:
            (key, name), *_ = odd
            raise ValueError(f"{key}={name} must be one of {listed(names)}{did_you_mean(str(name), names)}")
        return vocab


def _with_reference(expert: object) -> object:
    """Bring the short forms of an expert, a reference or a pair alone, to the long one."""
    if isinstance(expert, str):
        return {"reference": expert}
    if isinstance(expert, Mapping) and "reference" not in expert and "stack" in expert:
        rest = {key: value for key, value in expert.items() if key != "stack"}
        return {"reference": {"stack": expert["stack"]}, **rest}
    if isinstance(expert, Mapping) and "reference" not in expert and expert.keys() & {"encoder", "decoder"}:
        pair = {key: value for key, value in expert.items() if key in PairConfig.model_fields}
        return {"reference": pair, **{key: value for key, value in expert.items() if key not in pair}}
    return expert


def _names(references: Sequence[object]) -> dict[str, object]:
    """Name the experts of a plain list after the last part of their references, numbered where that repeats."""
    named: dict[str, object] = {}
    for entry in references:
        expert = _with_reference(entry)
        reference = expert.get("reference", "") if isinstance(expert, Mapping) else expert
        pair = [reference.get("encoder", ""), reference.get("decoder", "")] if isinstance(reference, Mapping) else None
        stem = "-".join(_stem(text) for text in pair or [reference])
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = entry
    return named


def _stem(reference: object) -> str:
    return re.sub(r"@.*$", "", str(reference)).rstrip("/").rsplit("/", 1)[-1] or "expert"


_Size = Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?\s?[kMGT]B$")]


def _bytes(size: str) -> int:
    """Return a size in bytes; 1 kB is 1000 of them."""
    return int(float(size[:-2]) * 1000 ** ("kMGT".index(size[-2]) + 1))


class EvalConfig(Schema):
    """How scores are obtained."""

    protocol: Literal["full", "holdout", "oracle"] = "full"
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates texts: transformers, or vLLM on a GPU (the extra ``vllm``)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: Annotated[int, Field(ge=8)] | None = None
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    max_memory: dict[str, _Size] | None = None
    """How much of a model's weights each device may hold, by the number of a GPU or ``cpu``; the disk has the rest.

    None: a model that does not fit on one GPU is divided among all, and the CPU's memory.
    """
    bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    preflight: bool = True
    cache: bool = True

    @field_validator("max_memory", mode="before")
    @classmethod
    def _named_by_texts(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        for device in map(str, given):
            if device != "cpu" and not re.fullmatch("[0-9]{1,3}", device):
                raise ValueError(f"{device!r} is no device: cpu is one, and 0, 1, ... are the GPUs")
        return {str(device): size if isinstance(size, str) else repr(size) for device, size in given.items()}

    @property
    def max_bytes(self) -> dict[int | str, int] | None:
        """``max_memory`` in bytes, by the number of a GPU or ``cpu``."""
        if self.max_memory is None:
            return None
        return {int(key) if key.isdigit() else key: _bytes(size) for key, size in self.max_memory.items()}


class SaveConfig(Schema):
    """How a merged model is written."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: _Size = "5GB"
    tokenizer: str | None = None
    """Whose tokenizer, generation config and chat template the merged model has: ``base``, or an expert's name.

    It is measured with them too. With ``models.vocab`` the tokenizer is the merged vocabulary's.
    """

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_byte_at_least(cls, size: str) -> str:
        if not any(digit in size for digit in "123456789"):
            raise ValueError("must be above 0")
        return size

    chat_template: str | None = None
    """The chat template of the merged model: a text, a known format's name, or ``auto``; None: its tokenizer's own.

    ``auto`` is the one that most of the models have. Formats: chatml, llama3, mistral, alpaca, exaone.
    """
    form: Literal["dense", "lora", "lora_cat", "lora_svd", "ia3", "module_average"] | None = None
    """As a model, or as an adapter on the base.

    ``lora``: the factors that a method combines; ``lora_cat``: LoRA adapters joined exactly; ``lora_svd``: any merge at
    a rank or an energy; ``ia3``: IA³ adapters added up; ``module_average``: bottleneck and prefix adapters averaged.
    None: ``lora`` for methods that combine factors, else ``dense``.
    """
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """For ``lora_svd`` one of these two: the rank of each layer, or the share of its squared change to keep."""
    library: Literal["peft", "adapters"] | None = None
    """Which library an adapter is written for; None: PEFT."""
    push_to_hub: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")] | None = None
    """The repository of the hub that what is written is uploaded to; None: none."""
    private: bool = True
    """Whether that repository is private."""
    stages: str = "outputs/stages"
    """The folder for the results of ``models.stages``, each in a folder of its own."""

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes; 1 kB is 1000 of them."""
        return _bytes(self.max_shard_size)


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
    seed: Seed = 0
    evaluate: bool = True
    output: str | None = None


SchemaT = TypeVar("SchemaT", bound=BaseModel)
_SHOWN = 3  # problems in one line


def check(schema: type[SchemaT], values: Mapping[str, Any], where: str = "") -> SchemaT:
    """Build ``schema`` from ``values``, whose place in the whole configuration is ``where`` (such as ``"method"``).

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type or out of range. One line, all problems in it.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        lines = [_line(schema, where, problem) for problem in error.errors()]
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ConfigError("; ".join(lines[:_SHOWN]) + more) from None


def _line(schema: type[BaseModel], where: str, problem: Any) -> str:
    """Say one of pydantic's problems as ``method.density=0: must be greater than 0``."""
    path = ".".join(str(part) for part in (*filter(None, [where]), *problem["loc"]) if not str(part).startswith("["))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in _schema_at(schema, problem["loc"][:-1]).model_fields.items()]
        unknown = f"{path}: no such key{did_you_mean(problem['loc'][-1], known)} (there are {listed(known, 20)})"
        return renamed(path, problem["input"], known) or unknown
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
        "list_type": "must be a list",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "dict_type": "must be a mapping",
        "finite_number": "must be a finite number",
        "string_pattern_mismatch": next(
            (PATTERNS[str(part)] for part in reversed(problem["loc"]) if str(part) in PATTERNS), "must match {pattern}"
        ),
        "value_error": "{error}",
    }.get(kind, problem["msg"])
    return f"{path}={shortened(repr(value))}: {said.format(**context)}"


# What is in mappings and in optional groups.
_INSIDE: Mapping[str, type[BaseModel]] = {
    str(annotation): schema
    for annotation, schema in (
        (dict[str, ExpertConfig], ExpertConfig),
        (dict[str, SliceConfig] | None, SliceConfig),
        (VocabConfig | None, VocabConfig),
        (list[TokenConfig], TokenConfig),
    )
}


def _schema_at(schema: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """Find the schema of the node at ``path`` below ``schema``."""
    for part in path:
        tagged: dict[Any, type[BaseModel]] = {_PAIR: PairConfig, _STACK: StackConfig, _EACH: LayersConfig}
        schema = tagged.get(part, schema)
        field = schema.model_fields.get(str(part))
        inner = getattr(field, "annotation", None)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            schema = inner
        elif field is not None:
            schema = _INSIDE.get(str(field.annotation), schema)
    return schema
