"""What an expert is trained on: the training split, a part of it held out, the rest in parts, as a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mergelab.errors import DataError
from mergelab.finetune.plan import MAX_LENGTH, FinetunePlan
from mergelab.tasks.splits import holdout, shards

if TYPE_CHECKING:
    from mergelab.estimation.examples import Padding
    from mergelab.evaluation.classification import Encoded, Layout
    from mergelab.tasks.data import TaskData

Array = np.ndarray[Any, Any]
_GROUPED = 16  # batches


@dataclass(frozen=True)
class TrainingData:
    """The training split, divided.

    Attributes:
        data: all its examples.
        held_out: (h,) positions of those that choose the best epoch.
        parts: positions of those that are trained on, of each part.
    """

    data: TaskData
    held_out: Array
    parts: tuple[Array, ...]


class TokenisedExamples(Protocol):
    """Tokenised examples of one kind of task."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    @property
    def lengths(self) -> Array:
        """How many tokens each has: (n,)."""
        ...

    def padding_for(self, model: Any) -> Padding:
        """Return how examples of different lengths can share a batch of a model."""
        ...

    def batch(self, members: Array) -> dict[str, torch.Tensor]:
        """Return the inputs of the examples at the positions ``members`` (b,), and their ``labels``."""
        ...


def training_data(plan: FinetunePlan, mini: Path | None) -> TrainingData:
    """Read the training split and divide it.

    Args:
        plan: the fine-tuning.
        mini: the folder of the miniature's data, where that is used.

    Raises:
        DataError: there is no such split, its labels are hidden, or it has too few examples.
        HubError: the hub cannot be reached.
    """
    from mergelab.tasks.data import load_data

    config, task = plan.config, plan.task
    try:
        data = load_data(
            task,
            data_dir=mini or plan.data_dir,
            origin="mini" if mini else None,
            limit=config.train.examples,
            split=config.train.split,
            seed=config.seed,
        )
    except DataError as error:
        said = str(error).replace("task.splits=[...]", "train.split=...")  # the key that says what is trained on
        raise DataError(f"task={task.name}: fine-tuning needs its training split: {said}") from error
    if not data.labelled or (task.kind == "generation" and data.references is None):
        raise DataError(f"task={task.name}: the labels of its training split are hidden, so that nothing can be learnt")
    if len(data) < config.shards + 1:
        raise DataError(
            f"task={task.name}: {len(data)} training examples are too few for shards={config.shards} and a held-out one"
        )
    if task.join is None:
        held_out, rest = holdout(data.labels, config.train.holdout, config.seed)
        if len(rest) < config.shards:
            raise DataError(f"shards={config.shards}: {len(rest)} examples are left beside those that are held out")
        parts = shards(data.labels[rest], config.shards, config.seed)
        return TrainingData(data, held_out, tuple(rest[part] for part in parts))
    # Rows that are read as one text stay together.
    count = min(max(round(config.train.holdout * len(data)), 1), len(data) - config.shards)
    every = np.arange(len(data))
    return TrainingData(data, every[-count:], tuple(np.array_split(every[:-count], config.shards)))


@dataclass(frozen=True)
class LabelledExamples:
    """Examples of a classifier.

    Attributes:
        model: whose inputs are made.
        encoded: the tokens.
        layout: how they are padded.
        labels: (n,) classes, or scores.
    """

    model: Any
    encoded: Encoded
    layout: Layout
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Array:
        """How many tokens each has: (n,)."""
        return self.encoded.lengths

    def padding_for(self, model: Any) -> Padding:
        """Return how examples of different lengths can share a batch."""
        return self.layout.padding

    def batch(self, members: Array) -> dict[str, torch.Tensor]:
        """Return the inputs (b, l) of the examples at the positions ``members`` (b,), and their ``labels`` (b,)."""
        from mergelab.evaluation.classification import model_inputs

        inputs = model_inputs(self.model, self.encoded, members, self.layout)
        return {**inputs, "labels": torch.from_numpy(self.labels[members])}


def encoded_examples(
    model: Any, tokenizers: tuple[Any, Any], data: TaskData, max_length: int | None
) -> TokenisedExamples:
    """Tokenise examples for a model.

    Args:
        model: the module that is trained, without an adapter around it.
        tokenizers: of what it reads, and of what it writes.
        data: the examples.
        max_length: an upper bound in tokens.

    Raises:
        DataError: no example can be learnt from, or one does not fit the model.
    """
    from mergelab.evaluation.classification import encode, layout_for
    from mergelab.evaluation.lengths import check_tokens, max_input_length
    from mergelab.evaluation.padding import NO_TOKEN, set_padding_token
    from mergelab.evaluation.training_batches import teacher_forced

    reads, writes = tokenizers
    if data.spec.outputs:
        encoded = encode(data, reads, max_input_length(model.config, reads, max_length, MAX_LENGTH))
        layout = layout_for(model, encoded)
        if layout.pad_id != NO_TOKEN:
            set_padding_token(model, layout.pad_id)
        return LabelledExamples(model, encoded, layout, data.labels)
    if data.spec.kind == "language_modelling":
        found: Any = _windows(model, reads, data, max_length)
    else:
        found = teacher_forced(data, model.config, reads, writes_with=writes, max_length=max_length)
    if not len(found):
        raise DataError(f"task={data.spec.name}: no training example is long enough to learn from")
    check_tokens(model, max(int(row["input_ids"].max()) for row in found.rows if len(row["input_ids"])))
    return found  # type: ignore[no-any-return]


def _windows(model: Any, tokenizer: Any, data: TaskData, max_length: int | None) -> Any:
    """Divide running text into the windows that perplexity is measured on: every token follows once."""
    from mergelab.evaluation.perplexity import check_causal, encode_windows
    from mergelab.evaluation.training_batches import NONE, TeacherForced

    windows = encode_windows(data, model.config, tokenizer, max_length)
    rows = []
    for begin, first, end in windows.spans:
        following = windows.tokens[begin + 1 : end].copy()
        following[: first - 1 - begin] = NONE
        following[windows.owner[begin + 1 : end] < 0] = NONE
        if (following != NONE).any():
            ids = windows.tokens[begin : end - 1]
            rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": following})
    if rows:
        check_causal(model, max((row["input_ids"] for row in rows), key=len), data.spec.name)
    pads = [getattr(model.config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id]
    return TeacherForced(tuple(rows), next((token for token in pads if isinstance(token, int)), 0))


class EpochBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of an epoch in an order that the seed and the epoch's number alone say.

    Args:
        count: number of examples.
        size: of a batch; the last may be smaller.
        seed: of the orders.
        lengths: (count,) tokens of each example, where those of a batch are to have about equally many; None: any.
    """

    def __init__(self, count: int, size: int, seed: int, lengths: Array | None = None) -> None:
        self._count, self._size, self._seed, self._lengths, self._epoch = count, size, seed, lengths, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._count // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self._seed, self._epoch])
        order, size = random.permutation(self._count), self._size
        starts = np.arange(0, self._count, size)
        if self._lengths is not None:
            # Of this many examples in random order those of like length come together, so that batches vary.
            span = _GROUPED * size
            order = np.concatenate([
                part[np.argsort(-self._lengths[part], kind="stable")]
                for part in np.split(order, np.arange(span, self._count, span))
            ])  # fmt: skip
            starts = random.permutation(starts)
        yield from (order[start : start + size].tolist() for start in starts)
