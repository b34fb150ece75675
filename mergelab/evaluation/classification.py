"""Run a classifier over a task's examples: tokenised once, batched by length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mergelab.errors import DataError, NonFinite
from mergelab.estimation.examples import Padding
from mergelab.evaluation.lengths import check_inputs, max_input_length
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions
from mergelab.evaluation.packed_linear import inference_copy
from mergelab.evaluation.padding import (
    NO_TOKEN,
    choose_padding,
    resets,
    run_alone,
    set_padding_token,
    settle_padding_token,
    trial_copy,
)
from mergelab.evaluation.side_by_side import side_by_side
from mergelab.evaluation.spread import device_of, is_spread

if TYPE_CHECKING:
    from mergelab.tasks.data import TaskData

Array = np.ndarray[Any, Any]
Watch = Callable[[Array, Array], None]

# Batches in a random order are at least this many, so that an evaluation can stop early.
_RANDOM_BATCHES = 24


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, for any number of models that share the tokenizer.

    ``columns`` holds each model input (``input_ids``, ``token_type_ids``) of all examples end to end (tokens,) int64;
    ``lengths`` (n,) says where each example ends. ``pad_id`` is the token that the tokenizer pads with,
    ``pad_type_id`` the type of such tokens.
    """

    columns: Mapping[str, Array]
    lengths: Array
    pad_id: int
    pad_type_id: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Array:
        """Where each example begins: (n,)."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, members: Array) -> Encoded:
        """Return some of the examples: those at the positions ``members`` (m,), in that order."""
        lengths = self.lengths[members]
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(self.starts[members], lengths, strict=True)])
        columns = {name: values[positions] for name, values in self.columns.items()}
        return replace(self, columns=columns, lengths=lengths)


def encode(data: TaskData, tokenizer: Any, max_length: int | None = None) -> Encoded:
    """Tokenise a task's examples, without padding.

    Args:
        data: the examples; with two text columns a pair is one input.
        tokenizer: a ``transformers`` tokenizer. One without padding token (GPT-2's) pads with its end-of-text token.
        max_length: longer inputs are cut, the longer text of a pair first; by default what the tokenizer allows, and
            512 where it sets no limit.

    Raises:
        DataError: the tokenizer has no token to pad with.
    """
    longest = max_length or max_input_length(None, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise DataError(
            f"{data.spec.name}: the tokenizer {tokenizer.name_or_path} has neither pad nor end-of-text token"
        )
    found = tokenizer(
        *(list(column) for column in zip(*data.texts, strict=True)),
        truncation=True,
        max_length=longest,
        padding=False,
        return_attention_mask=False,
    )
    # A text without any token still needs one input position.
    rows = {name: [row or [pad_id if name == "input_ids" else 0] for row in found[name]] for name in found}
    lengths = np.array([len(row) for row in rows["input_ids"]], dtype=np.int64)
    columns = {name: np.concatenate([np.asarray(row, dtype=np.int64) for row in rows[name]]) for name in rows}
    return Encoded(columns, lengths, int(pad_id), int(getattr(tokenizer, "pad_token_type_id", 0) or 0))


def predict(
    model: nn.Module,
    encoded: Encoded,
    options: EvaluationOptions = DEFAULTS,
    *,
    watch: Watch | None = None,
) -> Array:
    """Run a sequence classifier over encoded examples.

    Args:
        model: a ``transformers`` model whose output has ``logits``; it is left as it is.
        encoded: the examples.
        options: how to run it.
        watch: called after each batch with its examples' positions and logits; what it raises ends the prediction.

    Returns:
        (n, C) float32 logits in the examples' order.

    Raises:
        DataError: an example is longer than the model allows. NonFinite: an output is NaN or infinite.
    """
    done, logits = 0, None
    for members, found in predict_batches(model, encoded, options):
        if logits is None:
            logits = np.empty((len(encoded), found.shape[1]), dtype=np.float32)
        logits[members] = found
        done += int(encoded.lengths[members].sum())
        options.report(done / int(encoded.lengths.sum()))
        if watch is not None:
            watch(members, found)
    if logits is None:
        raise DataError("there are no examples to predict")
    if bad := int((~np.isfinite(logits).all(axis=1)).sum()):
        raise NonFinite(f"the model's outputs are NaN or infinite for {bad} of {len(logits)} examples")
    return logits


def predict_batches(
    model: nn.Module, encoded: Encoded, options: EvaluationOptions = DEFAULTS
) -> Iterator[tuple[Array, Array]]:
    """Run a sequence classifier batch by batch, long examples first unless ``options.seed`` draws an order.

    Yields:
        Positions (b,) of a batch's examples, and their logits (b, C) float32.

    Raises:
        ModelError: the model cannot be run on an example.
    """
    device = options.device_for(model)
    layout = layout_for(model, encoded)
    copied = inference_copy(model, device, options.torch_dtype)
    set_padding_token(copied, layout.pad_id, model)
    runner = _Runner(copied, encoded, layout, device)

    def run(members: Array) -> tuple[Array, Array]:
        return members, runner.logits(members).float().cpu().numpy()

    batches = plan_batches(
        encoded.lengths, _budget(encoded, options, device), options.seed, layout.padding, options.rounds
    )
    yield from side_by_side(run, batches, device, alone=runner.keeps_state)


def _budget(encoded: Encoded, options: EvaluationOptions, device: torch.device) -> int:
    budget = options.batch_budget(device)
    if options.seed is None or options.rounds is not None:
        return budget
    return min(budget, int(encoded.lengths.sum()) // _RANDOM_BATCHES)


@dataclass(frozen=True)
class Layout:
    """How examples become a model's inputs: the token to pad with, and where."""

    pad_id: int
    padding: Padding


def layout_for(model: nn.Module, encoded: Encoded) -> Layout:
    """Find out how a classifier's examples can share a batch (`mergelab.evaluation.padding`).

    Raises:
        DataError: an example is longer than the model allows, or has a token that the model does not know.
        ModelError: the model cannot be run on an example.
    """
    ids = encoded.columns["input_ids"]
    check_inputs(model, int(encoded.lengths.max(initial=0)), int(ids.max(initial=0)))
    pad_id = settle_padding_token(model, ids, encoded.pad_id)
    sides: tuple[Padding, ...] = ("right", "left") if pad_id != NO_TOKEN else ("equal",)
    runners: list[_Runner] = []

    @torch.inference_mode()
    def run(members: Array, padding: Padding) -> torch.Tensor:
        if not runners:  # many modules and data sets never come here
            copied = trial_copy(model)
            set_padding_token(copied, pad_id, model)
            runners.append(_Runner(copied, encoded, Layout(pad_id, padding), device_of(model)))
        return runners[0].batch(members, padding).cpu()

    return Layout(pad_id, choose_padding(model, "classification", encoded.lengths, run, sides))


class _Runner:
    """A copy of a classifier that runs over some of the examples at a time."""

    def __init__(self, copied: nn.Module, encoded: Encoded, layout: Layout, device: torch.device) -> None:
        self._model, self._encoded, self._layout, self._device = copied, encoded, layout, device
        self._resets = resets(copied)

    @property
    def keeps_state(self) -> bool:
        """Whether a batch changes the model for others: by its length until it is reset, or as weights come and go."""
        return bool(self._resets) or is_spread(self._model)

    def batch(self, members: Array, padding: Padding) -> torch.Tensor:
        """Return the logits (b, C) of examples in one batch."""
        for reset in self._resets:
            reset()
        inputs = model_inputs(self._model, self._encoded, members, Layout(self._layout.pad_id, padding))
        found: torch.Tensor = self._model(**{name: values.to(self._device) for name, values in inputs.items()}).logits
        return found

    def logits(self, members: Array) -> torch.Tensor:
        """Return the logits (b, C) of examples; each is run alone where the model cannot take them together."""
        if len(members) > 1:
            try:
                return self.batch(members, self._layout.padding)
            except ValueError:  # T5 and BART want as many end tokens in all examples of a batch
                pass
        run = lambda one, padding: self.batch(one, padding)  # noqa: E731
        return torch.cat(
            [
                run_alone(self._model, run, members[at : at + 1], int(self._encoded.lengths[members[at]]))
                for at in range(len(members))
            ]
        )


def input_batches(
    model: nn.Module, encoded: Encoded, layout: Layout, batch_tokens: int
) -> Iterator[tuple[Array, dict[str, torch.Tensor]]]:
    """Make the padded inputs that a model takes, long examples first.

    Yields:
        Positions (b,) of a batch's examples, and its inputs (b, l) on the CPU, the attention mask among them.
    """
    for members in plan_batches(encoded.lengths, batch_tokens, padding=layout.padding):
        yield members, model_inputs(model, encoded, members, layout)


def model_inputs(model: nn.Module, encoded: Encoded, members: Array, layout: Layout) -> dict[str, torch.Tensor]:
    """Pad some of the examples to inputs (b, l) on the CPU, the attention mask among them where the model takes it."""
    parameters = inspect.signature(model.forward).parameters
    lengths = encoded.lengths[members]
    columns = np.arange(lengths.max())
    pads = lengths.max() - lengths
    filled = (columns >= pads[:, None]) if layout.padding == "left" else (columns < lengths[:, None])
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    inputs = {}
    if "attention_mask" in parameters or takes_any:
        inputs["attention_mask"] = torch.from_numpy(filled.astype(np.int64))
    positions = np.concatenate(
        [np.arange(start, start + n) for start, n in zip(encoded.starts[members], lengths, strict=True)]
    )
    fills = {"input_ids": layout.pad_id, "token_type_ids": encoded.pad_type_id}
    for name, values in encoded.columns.items():
        if name in parameters:
            padded = np.full(filled.shape, fills.get(name, 0), dtype=np.int64)
            padded[filled] = values[positions]
            inputs[name] = torch.from_numpy(padded)
    return inputs


def plan_batches(
    lengths: Array,
    batch_tokens: int,
    seed: int | None = None,
    padding: Padding = "right",
    rounds: Array | None = None,
) -> list[Array]:
    """Group examples of like length: positions of each batch, none padded to over ``batch_tokens``.

    The batches come longest first, in an order that ``seed`` draws, or by ``rounds`` (n,), and longest first in each.
    With the padding ``equal`` all examples of a batch have the same length, with ``alone`` there is one in each.
    """
    if rounds is not None:
        of_rounds = [np.flatnonzero(rounds == one) for one in np.unique(rounds)]
        return [own[batch] for own in of_rounds for batch in plan_batches(lengths[own], batch_tokens, None, padding)]
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        length = int(lengths[order[start]])
        size = max(1, batch_tokens // length) if padding != "alone" else 1
        if padding == "equal":
            size = min(size, int((lengths[order[start:]] == length).sum()))
        batches.append(order[start : start + size])
        start += size
    if seed is None:
        return batches
    return [batches[index] for index in np.random.default_rng(seed).permutation(len(batches))]
