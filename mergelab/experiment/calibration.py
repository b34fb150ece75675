"""The examples that data-driven methods learn from: of the training split of each expert's own task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.cache import cache_dir
from mergelab.errors import ConfigError, DataError
from mergelab.estimation.examples import LABELS, Batch, Padding
from mergelab.evaluation.spread import check_whole
from mergelab.weights.conversion import load_weights

if TYPE_CHECKING:
    from torch import nn

    from mergelab.evaluation.classification import Encoded, Layout
    from mergelab.evaluation.training_batches import TeacherForced
    from mergelab.experiment.description import Description
    from mergelab.experiment.session import Session
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.spec import TaskSpec

Progress = Callable[[str, float], None]
TRAINING_SPLIT = "train"
# A batch's inputs and gradients are held for several batches at once; longer ones make a CPU no faster.
_CPU_BATCH_TOKENS = 256
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class TrainingExamples:
    """One expert of a session, and examples of the training split that were drawn for it."""

    session: Session
    index: int
    data: TaskData
    labelled: bool
    progress: Progress

    @property
    def label(self) -> str:
        """What tables call the expert."""
        return self.session.located.experts[self.index].label

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self.data.texts) if self.data.spec.outputs else len(self._texts)

    @property
    def key(self) -> str:
        """A name for the expert's content, the examples, and how they become inputs."""
        expert = self.session.located.experts[self.index]
        head = self.session.heads.of_expert(self.index, self.data.spec)
        content = [self.session.opened.content(expert.name), head.digest, self.data.spec.name, self.digest]
        return self.session.data_key(self.data, [*content, str(self._batch_tokens)], self._described)

    @property
    def digest(self) -> str:
        """Hash which examples these are, by their numbers in the split."""
        return hashlib.sha256(self.data.idx.astype("<i8").tobytes()).hexdigest()

    @property
    def parameter_names(self) -> Mapping[str, str]:
        """The common name of each parameter that is merged."""
        aligned = self.session.opened.aligned
        return {**{name: name for name in aligned.names}, **aligned.aliases}

    def module(self) -> nn.Module:
        """Load the expert's weights and its own head into the session's module."""
        head = self.session.heads.of_expert(self.index, self.data.spec)
        opened, module = self.session.opened, self.session.module(head.outputs, self._described)
        check_whole(module, self.label)
        backbone = opened.expert_backbone(self.index, in_merged_rows=True)
        return load_weights(module, {**backbone, **head.tensors}, untied=opened.untied)

    def batches(self) -> Iterator[Batch]:
        """Yield all examples as inputs, those of like length together."""
        import torch

        from mergelab.evaluation.classification import input_batches
        from mergelab.evaluation.padding import set_padding_token

        module = self.session.module(self.data.spec.outputs, self._described)
        if self.data.spec.outputs:
            layout = self._layout
            set_padding_token(module, layout.pad_id)
            lengths = self._encoded.lengths
            batches = input_batches(module, self._encoded, layout, self._batch_tokens)
        else:
            lengths, batches = self._texts.lengths, self._texts.batches(self._batch_tokens, self.padding_side)
        done = 0
        for members, inputs in batches:
            yield {**inputs, LABELS: torch.from_numpy(self.data.labels[members])} if self.labelled else inputs
            done += int(lengths[members].sum())
            message = f"running {self.label} on {self.count} training examples of {self.data.spec.name}"
            self.progress(message, done / int(lengths.sum()))

    @property
    def padding_side(self) -> Padding:
        """How examples of different lengths can share a batch of the expert."""
        return self._layout.padding if self.data.spec.outputs else self._texts_padding

    @cached_property
    def _layout(self) -> Layout:
        from mergelab.evaluation.classification import layout_for

        return layout_for(self.session.module(self.data.spec.outputs, self._described), self._encoded)

    @cached_property
    def _texts_padding(self) -> Padding:
        return self._texts.padding_for(self.session.module(self.data.spec.outputs, self._described))

    @cached_property
    def _encoded(self) -> Encoded:
        from mergelab.evaluation.classification import encode
        from mergelab.evaluation.lengths import max_input_length

        tokenizer, _ = self.session.tokenizers(self._described)
        config = self.session.module(self.data.spec.outputs, self._described).config
        return encode(self.data, tokenizer, max_input_length(config, tokenizer, self.session.options.max_length))

    @cached_property
    def _texts(self) -> TeacherForced:
        from mergelab.evaluation.training_batches import teacher_forced

        reads, writes = self.session.tokenizers(self._described)
        found = teacher_forced(
            self.data,
            self.session.module(self.data.spec.outputs, self._described).config,
            reads,
            writes_with=writes,
            max_length=self.session.options.max_length,
        )
        if not len(found):
            raise DataError(
                f"the training split of {self.data.spec.name} has no example that is long enough to learn from"
            )
        return found

    @property
    def _described(self) -> Description:
        """What the expert is run with: its own config and tokenizer, over the tokens that the merged model has."""
        return self.session.described(self.index, in_merged_rows=True)

    @property
    def _batch_tokens(self) -> int:
        return _CPU_BATCH_TOKENS if self.session.device.type == "cpu" else _BATCH_TOKENS


@dataclass(frozen=True)
class Calibration:
    """Draw training examples for the experts of a session, for the method of that name.

    Attributes:
        data_dir: a folder of Parquet files; None: the miniature's data, or the hub's.
        drawn: which examples each expert got so far.
        learnt: each expert's coefficient for each tensor, where the method learns such.
    """

    session: Session
    method: str
    data_dir: str | None = None
    progress: Progress = lambda _message, _done: None
    drawn: dict[str, TrainingExamples] = field(default_factory=dict)
    learnt: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where statistics are cached between runs."""
        return cache_dir() / "statistics"

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> TrainingExamples:
        """Draw up to ``samples`` of the training examples of the expert's task, every label in its share.

        Raises:
            ConfigError: that task is not known, or it is reported on the training split.
            DataError: there is no training split, or it has no labels where they are needed.
        """
        from mergelab.tasks.data import load_data

        index = [each.name for each in self.session.located.experts].index(expert)
        task = self._task(index)
        if task.kind in ("prompts", "lm_eval"):
            raise ConfigError(f"method={self.method}: learns from training examples, and {task.name} has none")
        if TRAINING_SPLIT in task.splits:
            raise ConfigError(
                f"method={self.method}: learns from the training split of {task.name}, "
                f"so that it cannot report on it (task.splits={list(task.splits)})"
            )
        mini = self.session.located.mini_data.get(task.name)
        try:
            data = load_data(
                task,
                data_dir=mini or self.data_dir,
                origin="mini" if mini else None,
                limit=samples,
                split=TRAINING_SPLIT,
                seed=seed,
            )
        except DataError as error:
            raise DataError(f"method={self.method}: needs the training split of {task.name}: {error}") from error
        if not task.outputs:  # what is to be written is the examples' own
            labelled = False
        if labelled and not data.labelled:
            raise DataError(f"method={self.method}: needs labels, and the training split of {task.name} has none")
        self.drawn[expert] = TrainingExamples(self.session, index, data, labelled, self.progress)
        return self.drawn[expert]

    def settle(self, coefficients: Mapping[str, Mapping[str, float]], /) -> None:
        """Record which coefficients the method has learnt."""
        self.learnt.update(coefficients)

    def _task(self, index: int) -> TaskSpec:
        """Find the task that an expert's own head is for."""
        from mergelab.tasks.loading import task_of_expert

        expert = self.session.located.experts[index]
        if (task := task_of_expert(expert.task or expert.name, self.session.tasks)) is None:
            raise ConfigError(
                f"method={self.method}: which task's training examples are those of {expert.name}? "
                f"set models.experts.{expert.name}.task"
            )
        return task
