"""What a task is: its data, what a model sees of them, how it answers, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mergelab.errors import ConfigError
from mergelab.tasks.metric import Direction, ScoredKind, get_metric
from mergelab.tasks.prompting import AnswerKind

Kind = ScoredKind | Literal["prompts", "lm_eval"]


@dataclass(frozen=True)
class Decoding:
    """How texts are generated.

    Greedily; with ``num_beams`` > 1 by beam search (scores divided by length ** ``length_penalty``); with ``do_sample``
    by sampling at ``temperature`` from the smallest set of tokens that has ``top_p`` of the probability, each example
    from its own stream of random numbers. A text ends with the model's end token, after ``max_new_tokens``, or before
    the first of the ``stop`` texts.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSpec:
    """A task, as ``conf/task/<name>.yaml`` describes it.

    Attributes:
        kind: ``classification`` and ``regression`` ask a classifier; ``generation`` scores texts that a model generates
            from prompts; ``language_modelling`` how likely given text is to it; ``prompts`` shows generations without
            scoring them; ``lm_eval`` leaves data and scores to the package of that name.
        path, config, revision: the hub dataset's.
        slices: what of the hub's dataset a split is, in the words of ``datasets``, where it is not the split so named.
        splits: with several, every metric is computed on all their examples, and on those of each split.
        columns: what a model gets of a row.
        label_column, labels: the column of labels and their names in the dataset's order; ``None``: scores.
        metrics, primary: in order; the one that models are ranked by.
        prompt: of generation: a template over the columns (``"summarize: {dialogue}"``).
        fewshot_examples: what goes before each prompt.
        references: columns with a reference text or a list of them; none: the answer is the label, said in words.
        answer: how the answer is found in texts and references, as `mergelab.tasks.prompting.answer` does it.
        group_by: rows that have the same value there are one example with all their references.
        verbalizer: what to answer for each label, in the order of ``labels``; ``None``: the labels themselves.
        max_prompt_tokens: longer prompts are cut; ``None``: one that is too long for the model is an error.
        window, stride: of language modelling, in tokens: how many a model sees at once, and how many of them are new;
            ``None``: as many as the model allows, and all of them.
        join: what stands between rows that are read as one text; ``None``: each row is a separate text.
        prompts, file: of the kind ``prompts``: the texts, or the file that has one on each line and is read instead.
        lm_eval_tasks, lm_eval_num_fewshot, lm_eval_limit, include_path: what lm-eval is asked for.
    """

    name: str
    version: int
    kind: Kind
    path: str = ""
    config: str | None = None
    revision: str | None = None
    slices: Mapping[str, str] = field(default_factory=dict, hash=False)
    splits: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    label_column: str = "label"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    primary: str = ""
    prompt: str = ""
    fewshot_examples: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    answer: AnswerKind = "text"
    group_by: str | None = None
    verbalizer: tuple[str, ...] | None = None
    max_prompt_tokens: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    window: int | None = None
    stride: int | None = None
    join: str | None = None
    prompts: tuple[str, ...] = ()
    file: str | None = None
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval_num_fewshot: int | None = None
    lm_eval_limit: int | None = None
    include_path: str | None = None

    @property
    def is_regression(self) -> bool:
        """Whether a classifier's one output is a score."""
        return self.kind == "regression"

    @property
    def outputs(self) -> int:
        """How many outputs a classifier for this task has; 0 where the task asks no classifier."""
        if self.kind not in ("classification", "regression"):
            return 0
        return 1 if self.labels is None else len(self.labels)

    @property
    def direction(self) -> Direction:
        """Whether models are better when their primary metric is greater, or when it is less.

        Raises:
            ConfigError: the task has no metrics.
        """
        if not self.metrics:
            raise ConfigError(f"task={self.name}: has no metrics, so that no model is better than another")
        return get_metric(self.primary).direction


@dataclass(frozen=True)
class Suite:
    """The tasks that an experiment is measured on (one, for a plain task), and where and how much of their data."""

    name: str
    tasks: tuple[TaskSpec, ...]
    data_dir: str | None = None
    limit: int | None = None
