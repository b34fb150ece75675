"""Let a model continue or answer prompts: batched, with a key-value cache, each text as it would be without a batch.

A decoder alone is padded on the left, so that what it writes follows its prompt; an encoder's input is padded on the
right. Sampling is done by adding Gumbel noise to the scores and taking the greatest (Gumbel 1954; Maddison et al. 2014,
arXiv:1411.0030): the noise of each example comes from a separate stream, so that its text does not depend on which
examples it shares a batch with, nor on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import DataError, ModelError, NonFinite
from mergelab.estimation.examples import Padding
from mergelab.evaluation.classification import plan_batches
from mergelab.evaluation.lengths import check_tokens, model_positions
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions
from mergelab.evaluation.packed_linear import inference_copy
from mergelab.evaluation.padding import choose_padding, resets, trial_copy
from mergelab.evaluation.side_by_side import side_by_side
from mergelab.evaluation.spread import device_of, is_spread

if TYPE_CHECKING:
    from mergelab.evaluation.classification import Watch
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.spec import Decoding

Array = np.ndarray[Any, Any]

# Steps of writing that are compared with and without padding.
_TRIED_STEPS = 3
# What belongs to a model and not to the way of decoding.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


@dataclass(frozen=True)
class EncodedPrompts:
    """Tokenised prompts, and how they are continued.

    Attributes:
        ids: the tokens of each prompt, int64.
        seeds: (n,) of each example's stream of random numbers.
        pad_id: the token to pad with.
        tokenizer: of what the model writes.
        decoding: how.
    """

    ids: tuple[Array, ...]
    seeds: Array
    pad_id: int
    tokenizer: Any
    decoding: Decoding

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, members: Array) -> EncodedPrompts:
        """Return some of the prompts: those at the positions ``members`` (m,), in that order."""
        return replace(self, ids=tuple(self.ids[i] for i in members), seeds=self.seeds[members])

    def run(
        self,
        model: nn.Module,
        options: EvaluationOptions = DEFAULTS,
        *,
        watch: Watch | None = None,
    ) -> Array:
        """Generate a text for each prompt.

        Args:
            model: a ``transformers`` model that can generate; it is left as it is.
            options: how to run it; new tokens and beams count in a batch's tokens.
            watch: called after each batch with its examples' positions and texts; what it raises ends the generation.

        Returns:
            (n,) texts, without prompts and special tokens.

        Raises:
            NonFinite: an output is NaN.
        """
        check_tokens(model, max((int(ids.max(initial=0)) for ids in self.ids), default=0))
        if options.engine is not None:
            return options.engine.generate(self, model, options, watch)
        device = options.device_for(model)
        padding = self._padding_for(model)
        copied: Any = inference_copy(model, device, options.torch_dtype)
        copied.generation_config = self.settings(copied)
        lengths, as_built = self.lengths, resets(copied)
        budget = max(options.batch_tokens // self.decoding.num_beams, 1)
        texts, done = np.empty(len(self), dtype=object), 0

        def generate(members: Array) -> tuple[Array, Array]:
            for reset in as_built:
                reset()
            return members, self._generate(copied, members, device, padding)

        batches = plan_batches(lengths, budget, options.seed, padding, options.rounds)
        for members, found in side_by_side(generate, batches, device, alone=bool(as_built) or is_spread(copied)):
            texts[members] = found
            done += int(lengths[members].sum())
            options.report(done / int(lengths.sum()))
            if watch is not None:
                watch(members, found)
        return texts

    @property
    def lengths(self) -> Array:
        """How many tokens each example may have in the end: (n,)."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64) + self.decoding.max_new_tokens

    def _padding_for(self, model: nn.Module) -> Padding:
        """Find out how prompts of different lengths can share a batch (`mergelab.evaluation.padding`)."""
        copies: list[Any] = []

        @torch.inference_mode()
        def run(members: Array, padding: Padding) -> Tensor:
            if not copies:
                copies.append(trial_copy(model))
            for reset in resets(copies[0]):
                reset()
            ids, mask = self._padded(copies[0], members, padding)
            return first_scores(copies[0], ids, mask, self.settings(copies[0]))

        # A decoder alone is padded before its prompts, so that what it writes follows them.
        is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
        sides: tuple[Padding, ...] = ("right", "left") if is_pair else ("left",)
        return choose_padding(model, "generation", self.lengths, run, sides)

    def _padded(self, model: Any, members: Array, padding: Padding) -> tuple[Tensor, Tensor]:
        """Return prompts and their mask, (b, l) both."""
        is_pair = bool(model.config.is_encoder_decoder)
        rows = [torch.from_numpy(self.ids[i]) for i in members]
        longest = max(len(row) for row in rows)
        # What is masked in an encoder's input can be any token; it may not have the one that the decoder pads with.
        ids = torch.full((len(rows), longest), 0 if is_pair else self.pad_id)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(rows):
            place = slice(longest - len(own), longest) if padding == "left" else slice(0, len(own))
            ids[row, place], mask[row, place] = own, 1
        return ids, mask

    @torch.inference_mode()
    def _generate(self, model: Any, members: Array, device: torch.device, padding: Padding) -> Array:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        is_pair, decoding = bool(model.config.is_encoder_decoder), self.decoding
        ids, mask = self._padded(model, members, padding)
        steps: list[Any] = [_check_finite]
        if decoding.do_sample:
            steps.append(_Sampling(self.seeds[members].tolist(), decoding.temperature, decoding.top_p))
        start = 1 if is_pair else ids.shape[1]
        stops = [_Stop(self.tokenizer, decoding.stop, start)] if decoding.stop else []
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList(steps),
            stopping_criteria=StoppingCriteriaList(stops),
        )
        return self.decode(written[:, start:].tolist(), self.ends(model))

    def settings(self, model: Any) -> Any:
        """Return the generation config: tokens are the model's own, all else is the task's."""
        return _settings(model, self.decoding, self.pad_id)

    def ends(self, model: Any) -> frozenset[int]:
        """Return the tokens that end a text of a model."""
        ends = self.settings(model).eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def decode(self, rows: Sequence[Sequence[int]], ends: frozenset[int], *, cut: bool = True) -> Array:
        """Return the texts (m,) of tokens that a model has written, up to its ends; ``cut``: and to the stop texts."""
        until_end = [[*takewhile(lambda token: token not in ends, row)] for row in rows]
        found = np.empty(len(rows), dtype=object)
        decoded = self.tokenizer.batch_decode(until_end, skip_special_tokens=True)
        found[:] = [_cut(text, self.decoding.stop) for text in decoded] if cut else decoded
        return found


def encode_prompts(
    data: TaskData, config: Any, tokenizer: Any, *, writes_with: Any = None, max_length: int | None = None
) -> EncodedPrompts:
    """Tokenise a task's prompts, without padding.

    A prompt that is longer than ``max_length`` or ``task.max_prompt_tokens`` is cut: before an encoder its end is left
    out, before a decoder alone its beginning.

    Args:
        data: the examples, one text each.
        config: the model's configuration.
        tokenizer: of the prompts.
        writes_with: the tokenizer of what the model writes, where it is another.
        max_length: a bound in tokens besides the task's own.

    Raises:
        DataError: a prompt and what is to be written do not fit into the model's positions.
        ModelError: a token that is needed to start or to pad is not known.
    """
    spec, is_pair = data.spec, bool(config.is_encoder_decoder)
    _check_new_tokens(data, config)
    limit = min((n for n in (max_length, spec.max_prompt_tokens) if n is not None), default=None)
    rows = _token_ids(data, tokenizer, limit, is_pair)
    if not is_pair and not all(rows):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ModelError(f"{spec.name}: an empty prompt needs a token to start with, and the tokenizer has none")
        rows = [row or [start] for row in rows]
    _check_lengths(data, config, rows)
    written = writes_with or tokenizer
    if is_pair and _own_id(config, "decoder_start_token_id") is None and _own_id(config, "bos_token_id") is None:
        raise ModelError(
            f"{spec.name}: the model has no decoder_start_token_id (nor bos_token_id), so that its decoder cannot "
            "start; give it in the model's config.json"
        )
    pads = [_own_id(config, "pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id]
    pad_id = next((token for token in pads if isinstance(token, int)), None)
    if pad_id is None:
        raise ModelError(f"{spec.name}: neither model nor tokenizer has a pad_token_id or eos_token_id to pad with")
    seeds = [
        np.random.SeedSequence([spec.decoding.seed, int(part), int(number)]).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
        for part, number in zip(data.parts, data.idx, strict=True)
    ]
    ids = tuple(np.asarray(row, dtype=np.int64) for row in rows)
    return EncodedPrompts(ids, np.array(seeds, dtype=np.int64), pad_id, written, spec.decoding)


# ------------------------------------------------------------------------------------------------------------- encoding


def _token_ids(data: TaskData, tokenizer: Any, limit: int | None, is_pair: bool) -> list[list[int]]:
    texts = [text for (text,) in data.texts]
    options: dict[str, Any] = {"padding": False, "return_attention_mask": False, "verbose": False}
    if is_pair:
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        found: list[list[int]] = tokenizer(texts, **options, **cut)["input_ids"]
        return found
    encoded = tokenizer(texts, return_special_tokens_mask=True, **options)
    rows = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        # Some tokenizers end every text with a token that says so; a prompt goes on.
        end = next((i for i in range(len(ids), 0, -1) if not special[i - 1]), 0)
        leading = next((i for i in range(end) if not special[i]), end)
        if limit is not None and end > limit:
            rows.append([*ids[:leading], *ids[end - limit + leading : end]])
        else:
            rows.append(ids[: end or leading])
    return rows


def _sides(config: Any) -> tuple[Any, Any]:
    """Return the configurations of what reads the prompt and of what writes."""
    return getattr(config, "encoder", None) or config, getattr(config, "decoder", None) or config


def _check_new_tokens(data: TaskData, config: Any) -> None:
    """Check that what is to be written fits into the positions of the model."""
    allowed = model_positions(_sides(config)[1], "decoder")
    wanted = data.spec.decoding.max_new_tokens + 1
    if allowed is not None and wanted > allowed:
        raise DataError(
            f"{data.spec.name}: task.decoding.max_new_tokens={wanted - 1}: the model has {allowed} positions, one of "
            "which is for the first token"
        )


def _check_lengths(data: TaskData, config: Any, rows: Sequence[Sequence[int]]) -> None:
    """Check that every prompt, and behind it what a decoder alone writes, fits into the positions of the model."""
    allowed = model_positions(_sides(config)[0])
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    new = 0 if config.is_encoder_decoder else data.spec.decoding.max_new_tokens
    if allowed is not None and (length := len(rows[longest])) + new > allowed:
        behind = f", and {new} new ones (task.decoding.max_new_tokens) go behind it" if new else ""
        raise DataError(
            f"{data.spec.name}: the prompt of example {int(data.idx[longest])} has {length} tokens{behind}; the model "
            f"has {allowed} positions. task.max_prompt_tokens={max(allowed - new, 1)} cuts longer prompts"
        )


def _own_id(config: Any, name: str) -> Any:
    """Return a token's id as the model's configuration, or that of the part that writes, says it."""
    found = getattr(config, name, None)
    return getattr(getattr(config, "decoder", None), name, None) if found is None else found


# ------------------------------------------------------------------------------------------------------------- decoding


def _settings(model: Any, decoding: Decoding, pad_id: int) -> Any:
    """Make the generation config: tokens are the model's own, all else is the task's, the same for every model."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ids = {name: getattr(own, name, None) for name in _TOKEN_IDS}
    ids |= {name: _own_id(model.config, name) for name, value in ids.items() if value is None}
    beams = (
        {"num_beams": decoding.num_beams, "length_penalty": decoding.length_penalty} if decoding.num_beams > 1 else {}
    )
    return GenerationConfig(
        **{name: value for name, value in ids.items() if value is not None},
        **beams,
        pad_token_id=pad_id,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        do_sample=False,
        use_cache=True,
    )


def first_scores(model: Any, ids: Tensor, mask: Tensor, settings: Any) -> Tensor:
    """Return a model's scores for the first tokens behind each prompt, (b, s·V), whatever it would write.

    Args:
        model: it can generate.
        ids: (b, l) prompts.
        mask: (b, l) 0 at padding.
        settings: its generation config.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    named = {name: getattr(settings, name) for name in (*_TOKEN_IDS, "pad_token_id")}
    ends = {*np.hstack([value for value in named.values() if value is not None]).tolist()}
    written = next(token for token in range(len(ends) + 1) if token not in ends)
    device = device_of(model)
    found = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            **named,
            max_new_tokens=_TRIED_STEPS,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        ),
        logits_processor=LogitsProcessorList([_Always(written)]),
    )
    return torch.cat([step.float() for step in found.logits], dim=1).cpu()


class _Always:
    """Turn scores so that the same token is always the greatest."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._token] = 0
        return forced


def _check_finite(_ids: Tensor, scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise NonFinite("the model's outputs are NaN while it generates")
    return scores


class _Sampling:
    """Turn scores so that the greatest is a sample: temperature, nucleus (Holtzman et al. 2020), Gumbel noise."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        from transformers import TopPLogitsWarper

        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores / self._temperature
        if self._nucleus is not None:
            scores = self._nucleus(ids, scores)
        noise = [torch.empty(scores.shape[1]).exponential_(generator=stream).log_() for stream in self._streams]
        return scores - torch.stack(noise).to(scores.device)


class _Stop:
    """Say of each text whether one of the given texts is in what was written."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(ids[:, self._start :].cpu(), skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=ids.device)


def _cut(text: str, stop: Sequence[str]) -> str:
    """End a text before the first of ``stop``."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]
