"""What a task's configuration may say, by kind of task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mergelab.config import Schema, Seed
from mergelab.tasks.prompting import AnswerKind

Name = Annotated[str, Field(pattern=r"^[\w.\-]+$")]
Count = Annotated[int, Field(ge=1)]


class DatasetSchema(Schema):
    """Where a task's rows are on the hub."""

    path: str
    name: str | None = None
    revision: str | None = None
    slices: dict[Name, str] = Field(default={})
    """What of the hub's dataset a split is, where it has no such split: ``{validation: "train[:2000]"}``."""


class DecodingSchema(Schema):
    """How texts are generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    num_beams: Annotated[int, Field(ge=1, le=1_000)] = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])


class CommonTask(Schema):
    """What every task may say."""

    name: Name
    version: int
    limit: Count | None = None
    data_dir: str | None = None


class ScoredTask(CommonTask):
    """A task on a dataset, with metrics."""

    dataset: DatasetSchema
    splits: Annotated[list[Name], Field(min_length=1)] = Field(default=["validation"])
    metrics: Annotated[list[str], Field(min_length=1)]
    primary: str


class LabelledTask(ScoredTask):
    """What a classifier is asked: labels, or scores."""

    kind: Literal["classification", "regression"] | None = None
    columns: Annotated[list[str], Field(min_length=1, max_length=2)]
    label_column: str = "label"
    labels: Annotated[list[str], Field(min_length=2)] | None


class GenerationTask(ScoredTask):
    """Texts to be generated, with references or labels."""

    kind: Literal["generation"]
    prompt: str
    fewshot_examples: str | None = None
    num_fewshot: Count | None = None
    references: list[str] = Field(default=[])
    answer: AnswerKind | None = None
    group_by: str | None = None
    label_column: str = "label"
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    verbalizer: Annotated[list[str], Field(min_length=2)] | None = None
    max_prompt_tokens: Count | None = None
    decoding: DecodingSchema = DecodingSchema()


class LanguageModellingTask(ScoredTask):
    """Text whose likelihood is measured."""

    kind: Literal["language_modelling"]
    columns: Annotated[list[str], Field(min_length=1, max_length=1)]
    join: str | None = None
    window: Annotated[int, Field(ge=2)] | None = None
    stride: Count | None = None


class PromptsTask(CommonTask):
    """Prompts to be continued; there is no score."""

    kind: Literal["prompts"]
    prompts: list[str] = Field(default=[])
    file: str | None = None
    max_prompt_tokens: Count | None = None
    decoding: DecodingSchema = DecodingSchema()


class LmEvalTask(CommonTask):
    """Tasks of lm-eval."""

    kind: Literal["lm_eval"]
    tasks: Annotated[list[str], Field(min_length=1)]
    primary: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    include_path: str | None = None


class SuiteSchema(Schema):
    """Several ready tasks."""

    name: Name
    version: int
    members: Annotated[list[str], Field(min_length=1)]
    splits: dict[str, list[Name]] = Field(default={})
    limit: Count | None = None
    data_dir: str | None = None


SCHEMAS: dict[str, type[CommonTask]] = {
    "classification": LabelledTask,
    "regression": LabelledTask,
    "generation": GenerationTask,
    "language_modelling": LanguageModellingTask,
    "prompts": PromptsTask,
    "lm_eval": LmEvalTask,
}
