"""The README.md of a merged model: metadata for the Hugging Face hub, and what it takes to judge and repeat it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergelab.console.formats import for_a_page
from mergelab.console.scores import columns
from mergelab.report.provenance import Merge, plain
from mergelab.weights.companions import README

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult, ModelResult

Library = Literal["transformers", "peft", "adapter-transformers"]
_LICENSE = ("license", "license_name", "license_link")
_SNIPPETS: Mapping[str, str] = {
    "transformers": 'pipeline("{tag}", model="{model}")',
    "peft": 'PeftModel.from_pretrained(base, "{model}")',
    "adapter-transformers": 'model.load_adapter("{model}")',
}
_MINIATURE = (
    "> **Miniature.** The models of this merge are mergelab's embedded miniatures: small transformers trained on "
    "generated text. The scores below are of generated examples and say nothing about the real task."
)


@dataclass(frozen=True)
class MeasuredOn:
    """The examples of a task that scores are of.

    Attributes:
        name: what tables call the task.
        dataset, config, split, revision: the hub's dataset; of other examples a name that is none of the hub's.
        protocol: how selecting and reporting examples are told apart.
    """

    name: str
    dataset: str
    config: str | None
    split: str
    revision: str | None
    protocol: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: the model's.
        merge: what was merged, and how.
        paper: of the method.
        library: whose format the folder has.
        pipeline_tag: what the model does, in the hub's words.
        base_models: hub ids.
        license: the inputs' license with its name and link, where all have the same; else empty.
        command, settings: what makes the model again, and its configuration as YAML.
        result: the scores, if it was measured.
        measured_on: the examples, by the task's name.
        experiment: of the run.
        miniature: whether the models are the embedded ones.
    """

    name: str
    merge: Merge
    paper: str
    library: Library
    pipeline_tag: str | None
    base_models: Sequence[str]
    license: Mapping[str, Any]
    command: str
    settings: str
    result: ExperimentResult | None = None
    measured_on: Mapping[str, MeasuredOn] = field(default_factory=dict)
    experiment: str = ""
    miniature: bool = False


def model_card(facts: CardFacts) -> str:
    """Return the text of the card."""
    from huggingface_hub import ModelCard, ModelCardData

    results = _eval_results(facts)
    further: dict[str, Any] = {key: facts.license[key] for key in _LICENSE if key in facts.license}
    if facts.base_models:
        further["base_model_relation"] = "merge" if facts.library == "transformers" else "adapter"
    data = ModelCardData(
        base_model=list(facts.base_models) or None,
        library_name=facts.library,
        pipeline_tag=facts.pipeline_tag,
        tags=_tags(facts),
        model_name=facts.name if results else None,
        eval_results=results or None,
        **further,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts)}"))


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a model's card; nothing where there is no card, or none that can be read."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / README) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def common_license(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the license that all of some cards' metadata name, with its name and link; empty where they do not."""
    licenses = [{key: card[key] for key in _LICENSE if card.get(key)} for card in cards]
    agree = bool(licenses) and "license" in licenses[0] and all(one == licenses[0] for one in licenses)
    return licenses[0] if agree else {}


def _tags(facts: CardFacts) -> list[str]:
    tags = ["mergelab", "merge", facts.merge.method]
    if facts.library == "peft":
        tags += ["transformers", *(f"base_model:adapter:{base}" for base in facts.base_models)]
    return [*tags, "miniature"] if facts.miniature else tags


def _eval_results(facts: CardFacts) -> list[Any]:
    """Return the merged model's scores, each with its interval, the number of examples and the protocol."""
    from huggingface_hub import EvalResult

    found = []
    for task, result in facts.result.merged.scored.items() if facts.result is not None else ():
        on = facts.measured_on[task]
        for metric, score in result.report.items():
            if not math.isfinite(score.value):
                continue  # the hub's metadata has no such numbers
            args: dict[str, Any] = {"protocol": on.protocol, "examples": result.report_examples}
            if math.isfinite(score.low) and math.isfinite(score.high):
                args["interval_95"] = [float(score.low), float(score.high)]
            found.append(
                EvalResult(
                    task_type=facts.pipeline_tag or "other",
                    task_name=on.name,
                    dataset_type=on.dataset,
                    dataset_name=on.name,
                    dataset_config=on.config,
                    dataset_split=on.split,
                    dataset_revision=on.revision,
                    metric_type=metric,
                    metric_name=metric,
                    metric_value=float(score.value),
                    metric_args=args,
                )
            )
    return found


def _text(facts: CardFacts) -> str:
    merge, kind = facts.merge, "a model" if facts.library == "transformers" else "an adapter"
    paper = f" ({facts.paper})" if facts.paper else ""
    parts = [
        f"# {plain(facts.name)}",
        *([_MINIATURE] if facts.miniature else []),
        f"This is {kind} that mergelab merged in weight space, without training, "
        f"with the method `{plain(merge.method)}`{paper}.",
        *_usage(facts),
        *_scores(facts),
        "## What was merged",
        block("text", "\n".join(merge.tree())),
        "Where all of them declare the same license, this model has it."
        if facts.license
        else "**License:** the models above do not all declare the same license; theirs hold.",
        "## How to make it again",
        block("bash", facts.command),
        "Folders are given by their names, without where they lay.",
        "<details><summary>All settings</summary>",
        block("yaml", facts.settings.rstrip()),
        "</details>",
        *_run(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(facts: CardFacts) -> list[str]:
    if facts.library == "transformers" and facts.pipeline_tag not in _PIPELINES:
        return []
    call = _SNIPPETS[facts.library].format(tag=facts.pipeline_tag, model=plain(facts.name))
    imports = {"transformers": "from transformers import pipeline\n\n", "peft": "from peft import PeftModel\n\n"}
    return [block("python", imports.get(facts.library, "") + call)]


# The tags for which every version of transformers that is supported has a pipeline.
_PIPELINES = ("text-classification", "token-classification", "fill-mask", "text-generation", "feature-extraction")


def _scores(facts: CardFacts) -> list[str]:
    result = facts.result
    if result is None or not any(model.scored for model in result.models):
        return ["## Scores", "This model has not been measured."]
    read = columns(result)
    rows = [[plain(model.label), *_cells(model, read)] for model in result.models]
    note = "\n".join([result.note, "[95 % bootstrap interval]"])
    return ["## Scores", for_a_page("markdown", ["model", *(one.title for one in read)], rows, note).rstrip()]


def _cells(model: ModelResult, read: Sequence[Any]) -> list[str]:
    cells = (one.read(model) for one in read)
    return ["" if cell is None else f"{cell.text} {cell.interval}".rstrip() for cell in cells]


def _run(facts: CardFacts) -> list[str]:
    merge = facts.merge
    if merge.run is None:
        return [f"Made with mergelab {merge.mergelab}; the run was not tracked."]
    return [
        f"Made with mergelab {merge.mergelab}, in MLflow run `{merge.run}` of experiment `{plain(facts.experiment)}` "
        f"({plain(merge.tracking or '')})."
    ]


def block(language: str, text: str) -> str:
    """Return a text as a block of code, behind a fence that it does not contain."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
