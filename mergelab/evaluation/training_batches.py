"""Teacher forcing for models that write: inputs, and the token that should follow each position.

For a task with references the text is the prompt followed by its first reference and the end of text; running text is
taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mergelab.errors import ConfigError
from mergelab.estimation.examples import Padding
from mergelab.evaluation.classification import plan_batches
from mergelab.evaluation.lengths import model_positions
from mergelab.evaluation.padding import choose_padding, trial_copy

if TYPE_CHECKING:
    from torch import nn

    from mergelab.tasks.data import TaskData

Array = np.ndarray[Any, Any]

NONE = -100  # no token has to follow
_DEFAULT_LENGTH = 512
_FOLLOWING = "labels"


@dataclass(frozen=True)
class TeacherForced:
    """Tokenised texts.

    Attributes:
        rows: of each text the module's inputs and ``labels``, int64, by name. A side's inputs are as long as each
            other; the labels are as long as what is written.
        pad_id: the token to pad what is written with.
    """

    rows: tuple[Mapping[str, Array], ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Array:
        """How many tokens are read and written: (n,)."""
        return np.array([sum(len(row[name]) for name in row if name.endswith("input_ids")) for row in self.rows])

    def batches(self, batch_tokens: int, padding: Padding = "right") -> Iterator[tuple[Array, dict[str, torch.Tensor]]]:
        """Yield the texts' positions and their inputs, those of like length together.

        Args:
            batch_tokens: upper bound of a batch.
            padding: as `padding_for` says; on the right, or none.
        """
        reads_and_writes = "decoder_input_ids" in self.rows[0]
        # Texts whose sides are as long together need not be as long on each side.
        padding = "alone" if padding == "equal" and reads_and_writes else padding
        for members in plan_batches(self.lengths, batch_tokens, padding=padding):
            yield members, self.batch(members)

    def padding_for(self, model: nn.Module) -> Padding:
        """Find out how texts of different lengths can share a batch of this model (`mergelab.evaluation.padding`)."""
        copies: list[Any] = []

        @torch.inference_mode()
        def run(members: Array, _padding: Padding) -> torch.Tensor:
            if not copies:
                copies.append(trial_copy(model))
            device = next(model.parameters()).device
            inputs = {name: values.to(device) for name, values in self.batch(members).items()}
            last = [int(np.flatnonzero(self.rows[at][_FOLLOWING] != NONE)[-1]) for at in members]
            inputs.pop(_FOLLOWING)
            logits = copies[0](**inputs).logits
            return logits[torch.arange(len(last)), torch.tensor(last)].float().cpu()  # type: ignore[no-any-return]

        return choose_padding(model, "teacher forcing", self.lengths, run, ("right",))

    def batch(self, members: Array) -> dict[str, torch.Tensor]:
        """Return some of the texts, those at the positions ``members`` (b,), as one batch padded on the right."""
        rows = [self.rows[at] for at in members]
        return {name: self._padded(name, [row[name] for row in rows]) for name in rows[0]}

    def _padded(self, name: str, values: list[Array]) -> torch.Tensor:
        # What an encoder's mask hides can be any token; it may not have the one that the decoder pads with.
        behind = "decoder_input_ids" in self.rows[0]
        fills = {_FOLLOWING: NONE, "decoder_input_ids": self.pad_id, "input_ids": 0 if behind else self.pad_id}
        fill = fills.get(name, 0)
        tensors = [torch.from_numpy(value) for value in values]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=float(fill))


def teacher_forced(
    data: TaskData, config: Any, tokenizer: Any, *, writes_with: Any = None, max_length: int | None = None
) -> TeacherForced:
    """Tokenise examples with their answers. What is longer than the model allows is cut at its end.

    Args:
        data: examples of a task of the kind ``generation`` or ``language_modelling``.
        config: the model's configuration.
        tokenizer: of what the model reads.
        writes_with: the tokenizer of what it writes, where that is another.
        max_length: an upper bound in tokens, besides the model's positions.

    Raises:
        ConfigError: the examples have no answers.
    """
    written = writes_with or tokenizer
    pads = [config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    pad_id = next((token for token in pads if isinstance(token, int)), 0)
    reads, writes = (
        min(length for length in (positions, max_length, _DEFAULT_LENGTH) if length is not None)
        for positions in (
            model_positions(getattr(config, "encoder", None) or config, "encoder"),
            model_positions(getattr(config, "decoder", None) or config, "decoder"),
        )
    )
    if data.spec.kind == "language_modelling":
        texts = ["".join(text) for text in data.texts]
        found = [ids[:writes] for ids in _ids(tokenizer, texts)]
        return TeacherForced(tuple(_decoder_only(ids, 0) for ids in found if len(ids) > 1), pad_id)
    if data.references is None:
        raise ConfigError(f"{data.spec.name}: its examples have no answers that a method could learn from")
    prompts = _ids(tokenizer, [text for (text,) in data.texts])
    answers = _ids(written, [references[0] for references in data.references])
    end = _end(config, written)
    answers = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in answers]
    pairs = list(zip(prompts, answers, strict=True))
    if not config.is_encoder_decoder:
        rows = (((*prompt, *answer)[:writes], len(prompt)) for prompt, answer in pairs)
        return TeacherForced(
            tuple(_decoder_only(ids, prompt) for ids, prompt in rows if len(ids) > max(prompt, 1)), pad_id
        )
    start = config.decoder_start_token_id
    return TeacherForced(
        tuple(
            _sequence_to_sequence(prompt[:reads], answer[:writes], pad_id if start is None else start)
            for prompt, answer in pairs
        ),
        pad_id,
    )


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, padding=False, return_attention_mask=False, verbose=False)["input_ids"]
    return found


def _end(config: Any, tokenizer: Any) -> int | None:
    own = config.eos_token_id
    ids = [*own, None] if isinstance(own, list) else [own]
    return next((token for token in (*ids, tokenizer.eos_token_id) if isinstance(token, int)), None)


def _decoder_only(ids: Any, prompt: int) -> dict[str, Array]:
    """Describe a text that a decoder alone goes on with: every token behind the prompt should follow."""
    tokens = np.asarray(ids, dtype=np.int64)
    following = np.append(tokens[1:], NONE)
    following[: max(prompt - 1, 0)] = NONE
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), _FOLLOWING: following}


def _sequence_to_sequence(prompt: list[int], answer: list[int], start: int) -> dict[str, Array]:
    """Describe a text that a decoder writes with an encoder's output."""
    read, labels = np.asarray(prompt, dtype=np.int64), np.asarray(answer, dtype=np.int64)
    return {
        "input_ids": read,
        "attention_mask": np.ones_like(read),
        "decoder_input_ids": np.append(np.int64(start), labels[:-1]),
        "decoder_attention_mask": np.ones_like(labels),
        _FOLLOWING: labels,
    }
