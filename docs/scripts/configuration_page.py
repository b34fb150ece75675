"""The page *Configuration*: every key with its type, range, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator

from docs.scripts.fields import Key, conf_files, keys_of
from docs.scripts.method_pages import plain
from mergelab.analyze.plan import AnalyzeConfig
from mergelab.config import (
    EvalConfig,
    ExperimentConfig,
    ExpertConfig,
    LayersOfModel,
    ModelsConfig,
    PairConfig,
    SaveConfig,
    SliceConfig,
    StackConfig,
)
from mergelab.sweep.config import SweepConfig
from mergelab.tasks.schema import SCHEMAS, CommonTask, DatasetSchema, DecodingSchema, SuiteSchema
from mergelab.tracking.config import TrackingConfig

_HEAD = """\
# Configuration

<!-- Written by `make reference`; do not edit. -->

A configuration is composed of groups. `group=option` chooses a file of `conf/<group>/`, and `key=value` sets one key.
Everything is checked before a model is loaded. An unknown key, a wrong type or a value out of range is an error of one
line, with exit code 2. `python -m mergelab --cfg job` shows what was composed, `--help` lists the keys in a terminal,
and `--config-dir FOLDER` adds a folder of your own with the same groups.

- A whole number is a number too, but `"0.3"` in quotes is none. `null` stands for "not set".
- A value may refer to another: `${seed}`, and `${oc.env:NAME}` to an environment variable.
- In Python the same keys are the keywords of `ml.run` and `ml.sweep`: [Python API](python/index.md).
- [`config.schema.json`](config.schema.json) is a JSON Schema of all this. Editors complete and check a file with it
  whose first line is `# yaml-language-server: $schema=` and the schema's path.
"""
_METHOD = """
## method

`method=NAME` chooses a method; its parameters are keys of this group, and are on its page: [Methods](methods/index.md).

| key | values | meaning |
| --- | --- | --- |
| `method.<parameter>` | see the method | a number, also a list over the layers, or by expert |
| `method.rules` | list of mappings | parameters by tensor name (`match`) or by layers (`layers`) |
| `method.preset` | `authors` | the values of the authors' code |
| `method.function` | dotted path | with `method=custom`: a function of your own |
"""
_KINDS = {
    "classification": "Classification and regression",
    "generation": "Generation",
    "language_modelling": "Perplexity",
    "prompts": "Prompts",
    "lm_eval": "lm-eval",
}


def page() -> str:
    """Return the page's text."""
    return "\n".join([_HEAD, *_parts()]) + "\n"


def _parts() -> Iterator[str]:
    groups = ("models", "method", "task", "eval", "save", "tracking")
    top = [key for key in keys_of(ExperimentConfig, "config.yaml") if key.name not in groups]
    yield from _section("Top level", "", top)
    yield from _section("models", "models.", keys_of(ModelsConfig, "models/custom.yaml"), "models")
    yield from _section("An expert", "models.experts.<name>.", keys_of(ExpertConfig), level=3)
    yield from _section("An encoder and a decoder", "", keys_of(PairConfig), level=3)
    yield from _section("A stack of layers", "", [*keys_of(StackConfig), *keys_of(LayersOfModel)], level=3)
    yield from _section("Slices", "models.slices.<name>.", keys_of(SliceConfig), level=3)
    yield _METHOD
    yield from _tasks()
    yield from _section("eval", "eval.", keys_of(EvalConfig, "eval/standard.yaml"))
    yield from _section("save", "save.", keys_of(SaveConfig, "save/standard.yaml"))
    yield from _section("tracking", "tracking.", keys_of(TrackingConfig, "tracking/mlflow.yaml"))
    yield from _section("sweep", "sweep.", keys_of(SweepConfig, "sweep/_settings.yaml", "sweep"), "sweep")
    yield from _section("analyze", "analyze.", keys_of(AnalyzeConfig, "analyze.yaml", "analyze"))


def _tasks() -> Iterator[str]:
    yield from _section("task", "task.", keys_of(CommonTask), "task")
    common = set(CommonTask.model_fields)
    for kind, title in _KINDS.items():
        own = [key for key in keys_of(SCHEMAS[kind]) if key.name not in common]
        yield from _section(f"{title} (`kind: {kind}`)", "task.", own, level=3)
    yield from _section("A dataset", "task.dataset.", keys_of(DatasetSchema), level=3)
    yield from _section("Decoding", "task.decoding.", keys_of(DecodingSchema), level=3)
    yield from _section("A suite", "task.", [key for key in keys_of(SuiteSchema) if key.name not in common], level=3)


def _section(title: str, prefix: str, keys: list[Key], group: str | None = None, level: int = 2) -> Iterator[str]:
    yield f"\n{'#' * level} {title}\n"
    if group:
        options = ", ".join(f"`{path.stem}`" for path in conf_files(group) if not path.stem.startswith("_"))
        yield f"`{group}=`: {options}.\n"
    yield "| key | values | default | meaning |\n| --- | --- | --- | --- |"
    for key in keys:
        if not key.meaning:
            raise ValueError(f"{prefix}{key.name} has no description: write one below the field in its schema")
        default = "required" if key.default is None else f"`{key.default}`"
        cells = (f"`{prefix}{key.name}`", key.kind, default, " ".join(plain(key.meaning).split()))
        yield "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"
