"""Run a classifier over a task's examples: tokenised once, batched by length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mergelab.errors import DataError, NonFinite
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions
from mergelab.evaluation.packed_linear import inference_copy

if TYPE_CHECKING:
    from mergelab.tasks.data import TaskData

Array = np.ndarray[Any, Any]
Watch = Callable[[Array, Array], None]

# Batches in a random order are at least this many, so that an evaluation can stop early.
_RANDOM_BATCHES = 24
# Models without a limit on positions still get inputs of at most this many tokens.
_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, for any number of models that share the tokenizer.

    ``columns`` holds each model input (``input_ids``, ``token_type_ids``) of all examples end to end (tokens,) int64;
    ``lengths`` (n,) says where each example ends. ``pad_id`` is the token to pad with.
    """

    columns: Mapping[str, Array]
    lengths: Array
    pad_id: int

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
        return Encoded({name: values[positions] for name, values in self.columns.items()}, lengths, self.pad_id)


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
    return Encoded(columns, lengths, int(pad_id))


def max_input_length(config: Any, tokenizer: Any, wanted: int | None = None) -> int:
    """Return the longest input in tokens that model and tokenizer allow (512 where neither says), or ``wanted``.

    Args:
        config: the model's configuration, or ``None`` to ask the tokenizer alone.

    Raises:
        DataError: ``wanted`` is more than they allow.
    """
    allowed = int(min(getattr(tokenizer, "model_max_length", None) or 10**9, 10**9))
    if (positions := model_positions(config)) is not None:
        allowed = min(allowed, positions)
    if wanted is None:
        return min(allowed, _DEFAULT_LENGTH)
    if wanted > allowed:
        raise DataError(f"eval.max_length={wanted}: the model allows {allowed} tokens")
    return wanted


def model_positions(config: Any) -> int | None:
    """Return how many tokens a model of this configuration can take; ``None`` where nothing limits it."""
    if not (positions := getattr(config, "max_position_embeddings", None)):
        return None
    # RoBERTa-like models count positions from the padding index on.
    offset = config.pad_token_id + 1 if "roberta" in str(getattr(config, "model_type", "")) else 0
    return int(positions) - offset


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


@torch.inference_mode()
def predict_batches(
    model: nn.Module, encoded: Encoded, options: EvaluationOptions = DEFAULTS
) -> Iterator[tuple[Array, Array]]:
    """Run a sequence classifier batch by batch, long examples first unless ``options.seed`` draws an order.

    Yields:
        Positions (b,) of a batch's examples, and their logits (b, C) float32.
    """
    device = options.device_for(model)
    check_lengths(model, encoded)
    copied = inference_copy(model, device, options.torch_dtype)
    pad_id = agree_on_padding(copied, encoded.pad_id)
    for members, inputs in input_batches(copied, encoded, pad_id, options.batch_budget(device), options.seed):
        found = copied(**{name: values.to(device) for name, values in inputs.items()}).logits
        yield members, found.float().cpu().numpy()


def input_batches(
    model: nn.Module, encoded: Encoded, pad_id: int, batch_tokens: int, seed: int | None = None
) -> Iterator[tuple[Array, dict[str, torch.Tensor]]]:
    """Make the padded inputs that a model takes, long examples first, or in an order that ``seed`` draws.

    Yields:
        Positions (b,) of a batch's examples, and its inputs (b, l) on the CPU, the attention mask among them.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    columns = {name: values for name, values in encoded.columns.items() if name in accepted}
    starts = encoded.starts
    if seed is not None:
        batch_tokens = min(batch_tokens, int(encoded.lengths.sum()) // _RANDOM_BATCHES)
    for members in plan_batches(encoded.lengths, batch_tokens, seed):
        lengths = encoded.lengths[members]
        filled = np.arange(lengths.max()) < lengths[:, None]
        positions = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts[members], lengths, strict=True)]
        )
        inputs = {"attention_mask": torch.from_numpy(filled.astype(np.int64))}
        for name, values in columns.items():
            padded = np.full(filled.shape, pad_id if name == "input_ids" else 0, dtype=np.int64)
            padded[filled] = values[positions]
            inputs[name] = torch.from_numpy(padded)
        yield members, inputs


def plan_batches(lengths: Array, batch_tokens: int, seed: int | None = None) -> list[Array]:
    """Group examples of like length: positions of each batch, none padded to over ``batch_tokens``.

    The batches come longest first, or in an order that ``seed`` draws.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    if seed is None:
        return batches
    return [batches[index] for index in np.random.default_rng(seed).permutation(len(batches))]


def check_lengths(model: nn.Module, encoded: Encoded) -> None:
    """Raise `DataError` for examples longer than the model allows."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = int(encoded.lengths.max(initial=0))
    if positions and longest > positions:
        raise DataError(f"an example has {longest} tokens, the model allows {positions}: encode with that max_length")


def agree_on_padding(copied: nn.Module, pad_id: int) -> int:
    """Settle the padding token, for the model too: GPT-2-like classifiers look for the last token that is another."""
    config = getattr(copied, "config", None)
    if config is None:
        return pad_id
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_id
    return int(config.pad_token_id)
