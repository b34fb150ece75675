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
    """The dataset's id on the hub."""
    name: str | None = None
    """Its configuration, where it has several."""
    revision: str | None = None
    """A commit, branch or tag; None: the newest."""
    slices: dict[Name, str] = Field(default={})
    """What of the hub's dataset a split is, where it has no such split: ``{validation: "train[:2000]"}``."""


class DecodingSchema(Schema):
    """How texts are generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Most tokens of a generated text."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Fewest tokens before the end."""
    num_beams: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Beams of a beam search; 1: greedy, or sampling."""
    length_penalty: float = 1.0
    """Of a beam search: above 0 favours longer texts."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No n-gram of this size occurs twice; 0: any may."""
    do_sample: bool = False
    """Whether tokens are drawn, with ``temperature`` and ``top_p``."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it before a token is drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the fewest that together have this probability."""
    seed: Seed = 0
    """Of the draws, which are seeded for each example."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Texts at which a generated text ends."""


class CommonTask(Schema):
    """What every task may say."""

    name: Name
    """The task's name, in tables, tags and run names."""
    version: int
    """Raised when the task changes, so that old scores are not taken from the cache."""
    limit: Count | None = None
    """Examples of each split that are measured; None: all."""
    data_dir: str | None = None
    """A folder with a Parquet file for each split, in place of the hub."""


class ScoredTask(CommonTask):
    """A task on a dataset, with metrics."""

    dataset: DatasetSchema
    """Where its rows are on the hub."""
    splits: Annotated[list[Name], Field(min_length=1)] = Field(default=["validation"])
    """The splits that are measured."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """What is computed of the predictions."""
    primary: str
    """The metric that selects and ranks."""


class LabelledTask(ScoredTask):
    """What a classifier is asked: labels, or scores."""

    kind: Literal["classification", "regression"] | None = None
    """None: classification with labels, regression without."""
    columns: Annotated[list[str], Field(min_length=1, max_length=2)]
    """The columns that a model is given."""
    label_column: str = "label"
    """The column of the labels or scores."""
    labels: Annotated[list[str], Field(min_length=2)] | None
    """The labels' names in the dataset's order; None: scores."""


class GenerationTask(ScoredTask):
    """Texts to be generated, with references or labels."""

    kind: Literal["generation"]
    """The kind of task."""
    prompt: str
    """What a model is given, with columns in braces: ``"{question}"``."""
    fewshot_examples: str | None = None
    """Worked examples before the prompt: a ready set, or a text file with an empty line between two examples."""
    num_fewshot: Count | None = None
    """How many of these; None: all."""
    references: list[str] = Field(default=[])
    """The columns of the texts that are right."""
    answer: AnswerKind | None = None
    """How the answer is found in a generated text; None: it is the whole text."""
    group_by: str | None = None
    """The column whose equal values make rows one example with several references."""
    label_column: str = "label"
    """The column of the labels, where the answers are labels."""
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    """The labels' names in the dataset's order."""
    verbalizer: Annotated[list[str], Field(min_length=2)] | None = None
    """The word of each label."""
    max_prompt_tokens: Count | None = None
    """Longer prompts lose their beginning; None: one that is too long for the model is an error."""
    decoding: DecodingSchema = DecodingSchema()
    """How texts are generated."""


class LanguageModellingTask(ScoredTask):
    """Text whose likelihood is measured."""

    kind: Literal["language_modelling"]
    """The kind of task."""
    columns: Annotated[list[str], Field(min_length=1, max_length=1)]
    """The column of the text."""
    join: str | None = None
    """What is put between the rows to make one text of them; None: each row is a text."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens that a model is given at once; None: as many as it takes."""
    stride: Count | None = None
    """Tokens of a window that are new and count; None: all."""


class PromptsTask(CommonTask):
    """Prompts to be continued; there is no score."""

    kind: Literal["prompts"]
    """The kind of task."""
    prompts: list[str] = Field(default=[])
    """What the models go on from."""
    file: str | None = None
    """A text file with a prompt on each line; it takes the place of the list."""
    max_prompt_tokens: Count | None = None
    """Longer prompts lose their beginning; None: one that is too long for the model is an error."""
    decoding: DecodingSchema = DecodingSchema()
    """How texts are generated."""


class LmEvalTask(CommonTask):
    """Tasks of lm-eval."""

    kind: Literal["lm_eval"]
    """The kind of task."""
    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of lm-eval's tasks."""
    primary: str | None = None
    """What selects and ranks, such as ``hellaswag/acc_norm``; None: the first task's first metric."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each prompt; None: the task's own number."""
    include_path: str | None = None
    """A folder with lm-eval tasks of your own."""


class SuiteSchema(Schema):
    """Several ready tasks."""

    name: Name
    version: int
    members: Annotated[list[str], Field(min_length=1)]
    """The tasks' names."""
    splits: dict[str, list[Name]] = Field(default={})
    """The splits of members that are measured on others than their own say."""
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
