"""How likely given text is to a causal language model: sliding windows over the tokens, scored in batches.

A text's tokens are scored from left to right, ``stride`` new ones at a time. Each is predicted from those before it, as
many as are in the model's view of ``window`` tokens; the first token of a text is only looked back at. With ``stride``
equal to ``window`` every window begins where the last one ended, which costs least and leaves the first tokens of each
with little to go by; a smaller stride costs more and gives lower perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import DataError, ModelError, NonFinite
from mergelab.estimation.examples import Padding
from mergelab.evaluation.classification import plan_batches
from mergelab.evaluation.lengths import check_tokens, model_positions
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions
from mergelab.evaluation.packed_linear import inference_copy
from mergelab.evaluation.padding import Comparison, changes_with_length, choose_padding, resets, trial_copy
from mergelab.evaluation.side_by_side import side_by_side
from mergelab.evaluation.spread import device_of, is_spread
from mergelab.models.architecture import quiet_transformers

if TYPE_CHECKING:
    from mergelab.evaluation.classification import Watch
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]

# Modules that were found not to look ahead, and the tokens that they were tried on.
_CAUSAL: WeakSet[nn.Module] = WeakSet()
_TRIED_LENGTH = 32
# What a model sees at once where neither it nor the task sets a limit.
_DEFAULT_WINDOW = 1024
# Entries of the scores over the vocabulary that are worked on in float32 at a time: they stay in a CPU's caches.
_ENTRIES, _ACCELERATOR_ENTRIES = 1 << 18, 1 << 27


@dataclass(frozen=True)
class Windows:
    """Tokenised text, and which tokens are scored in which window.

    Attributes:
        tokens: (t,) int64, of all texts end to end.
        owner: (t,) the position of the example that a token belongs to; -1 where it is not scored.
        words: (n,) how many words each example has.
        spans: (w, 3) for each window the first token that it sees, the first that it scores, and the end of these.
        members: the positions of the examples that are measured.
        name: the task's.
    """

    tokens: Array
    owner: Array
    words: Array
    spans: Array
    members: Array
    name: str

    def __len__(self) -> int:
        return len(self.members)

    def take(self, members: Array) -> Windows:
        """Return some of the examples: those at the positions ``members`` (m,), in that order."""
        chosen = self.members[members]
        wanted = np.append(np.isin(np.arange(len(self.words)), chosen), False)[self.owner]
        until = np.concatenate([[0], np.cumsum(wanted)])
        scoring = until[self.spans[:, 2]] > until[self.spans[:, 1]]
        return Windows(self.tokens, self.owner, self.words, self.spans[scoring], chosen, self.name)

    def run(
        self,
        model: nn.Module,
        options: EvaluationOptions = DEFAULTS,
        *,
        watch: Watch | None = None,
    ) -> Array:
        """Measure how likely the examples are.

        Args:
            model: a ``transformers`` model that predicts the next token; it is left as it is.
            options: how to run it.
            watch: called after each batch with the positions and outputs of the examples that it completes.

        Returns:
            (n, 3) float64: of each example the negative log likelihood in nats, its tokens, and its words.

        Raises:
            NonFinite: an output is NaN or infinite.
        """
        device = options.device_for(model)
        padding = self._padding_for(model)
        copied, budget = inference_copy(model, device, options.torch_dtype), options.batch_budget(device)
        begin, _, end = self.spans.T
        sums = np.zeros((len(self.words), 2))
        every = np.arange(len(self.spans)) if watch is not None else self.members[:0]
        open_windows = np.bincount(self._touched(every)[1], minlength=len(self.words))
        place = np.full(len(self.words), -1)
        place[self.members] = np.arange(len(self.members))
        done = 0
        scored, as_built = _ScoredPositions(copied), resets(copied)

        def losses_of(batch: Array) -> tuple[Array, Array, Array]:
            for reset in as_built:
                reset()
            return batch, *self._losses(scored, device, batch)

        rounds = None if options.rounds is None else self._window_rounds(options.rounds, place)
        batches = plan_batches(end - 1 - begin, budget, options.seed, padding, rounds)
        for batch, targets, losses in side_by_side(
            losses_of, batches, device, alone=bool(as_built) or is_spread(copied)
        ):
            own = self.owner[targets]
            np.add.at(sums, own[own >= 0], np.stack([losses, np.ones_like(losses)], axis=1)[own >= 0])
            done += int((end - begin)[batch].sum())
            options.report(done / int((end - begin).sum()))
            if watch is not None:
                owners, closing = np.unique(self._touched(batch)[1], return_counts=True)
                open_windows[owners] -= closing
                complete = owners[(open_windows[owners] == 0) & (place[owners] >= 0)]
                watch(place[complete], self._rows(sums, complete))
        return self._rows(sums, self.members)

    def _padding_for(self, model: nn.Module) -> Padding:
        """Find out whether windows of different lengths can share a batch; check that the model does not look ahead.

        Raises:
            ModelError: what the model predicts depends on what it should predict.
        """
        begin, _, end = self.spans.T
        lengths = end - 1 - begin
        if not len(lengths):
            return "right"
        check_tokens(model, int(self.tokens.max()))
        longest = int(np.argmax(lengths))
        check_causal(model, self.tokens[begin[longest] :][: lengths[longest]], self.name)
        copies: list[Any] = []

        @torch.inference_mode()
        def run(members: Array, _padding: Padding) -> Tensor:
            if not copies:
                copies.append(trial_copy(model))
            own, starts = lengths[members], begin[members]
            ids = self.tokens[np.minimum(starts[:, None] + np.arange(own.max()), (starts + own - 1)[:, None])]
            return last_scores(copies[0], ids, own - 1)

        return choose_padding(model, "perplexity", lengths, run, ("right",))

    def _rows(self, sums: Array, examples: Array) -> Array:
        rows = np.column_stack([sums[examples], self.words[examples]])
        if bad := int((~np.isfinite(rows).all(axis=1)).sum()):
            raise NonFinite(f"the model's outputs are NaN or infinite for {bad} of {len(rows)} examples")
        return rows

    def _touched(self, windows: Array) -> tuple[Array, Array]:
        """Pair windows with the examples that they score tokens of."""
        pairs = [
            (window, example)
            for window in windows
            for example in np.unique(self.owner[self.spans[window, 1] : self.spans[window, 2]])
            if example >= 0
        ]
        found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def _window_rounds(self, rounds: Array, place: Array) -> Array:
        """Return each window's round (w,), the first of its examples', from theirs (n,) and their places among them."""
        windows, examples = self._touched(np.arange(len(self.spans)))
        wanted = place[examples] >= 0
        found = np.full(len(self.spans), rounds.max(initial=0))
        np.minimum.at(found, windows[wanted], rounds[place[examples[wanted]]])
        return found

    def _losses(self, scored: _ScoredPositions, device: torch.device, batch: Array) -> tuple[Array, Array]:
        """Return the positions of the tokens that a batch of windows scores, and −log p of each."""
        begin, first, end = self.spans.T
        lengths = (end - 1 - begin)[batch]
        # Where windows are padded nothing looks ahead: what stands behind a window's end needs no mask.
        ids = np.minimum(begin[batch, None] + np.arange(lengths.max()), (end - 2)[batch, None])
        rows, columns = np.nonzero(
            (np.arange(lengths.max()) >= (first - 1 - begin)[batch, None])
            & (np.arange(lengths.max()) < lengths[:, None])
        )
        targets = begin[batch][rows] + columns + 1
        inputs = torch.from_numpy(self.tokens[ids]).to(device)
        wanted = torch.from_numpy(self.tokens[targets]).to(device)
        logits = scored.logits(inputs, torch.from_numpy(rows * lengths.max() + columns).to(device))
        rows_at_once = max((_ENTRIES if device.type == "cpu" else _ACCELERATOR_ENTRIES) // logits.shape[1], 1)
        losses = [
            nn.functional.cross_entropy(part.float(), own, reduction="none")
            for part, own in zip(torch.split(logits, rows_at_once), torch.split(wanted, rows_at_once), strict=True)
        ]
        return targets, torch.cat(losses).double().cpu().numpy()


@torch.inference_mode()
def check_causal(model: nn.Module, window: Array, name: str) -> None:
    """Check, once for each module, that what it predicts at a position does not depend on the tokens behind it.

    Args:
        model: a model that predicts the next token.
        window: (l,) tokens.
        name: the task's.

    Raises:
        ModelError: it does depend on them, as in XLNet without a permutation mask, so that there is no perplexity.
    """
    window = window[:_TRIED_LENGTH]
    if model in _CAUSAL or len(window) < 2 or changes_with_length(getattr(model, "config", None), len(window)):
        return
    copied, half = trial_copy(model), len(window) // 2
    part = last_scores(copied, window[None, :half], np.array([half - 1]))
    whole = last_scores(copied, np.stack([window, window]), np.array([half - 1, len(window) - 1]))
    same = Comparison(model, whole)
    if not same(whole[:1], part):
        raise ModelError(
            f"{name}: {type(model).__name__} looks ahead: what it predicts depends on the tokens behind, so that it "
            "has no perplexity"
        )
    if same.is_clear:  # else the next weights are tried as well
        _CAUSAL.add(model)


def last_scores(model: Any, ids: Array, last: Array) -> Tensor:
    """Return the scores over the vocabulary (b, V) at the positions ``last`` (b,) of the inputs (b, l)."""
    device = device_of(model)
    options = {"use_cache": False} if hasattr(model, "config") else {}
    logits = model(input_ids=torch.from_numpy(ids).to(device), **options).logits
    return logits[torch.arange(len(last)), torch.from_numpy(last)].float().cpu()  # type: ignore[no-any-return]


class _ScoredPositions:
    """A model whose scores over the vocabulary are computed only where they are needed."""

    def __init__(self, model: Any) -> None:
        self._model, self._threads = model, local()
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            head.register_forward_pre_hook(self._choose)

    def logits(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """Return the scores (m, V) at the positions ``chosen`` (m,) of the flattened inputs (b, l)."""
        self._threads.chosen = chosen
        options = {"use_cache": False} if hasattr(self._model, "config") else {}
        found: Tensor = self._model(input_ids=inputs, **options).logits
        whole = found.reshape(-1, found.shape[-1])
        return whole if len(whole) == len(chosen) else whole[chosen]

    def _choose(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = arguments
        return (hidden.reshape(-1, hidden.shape[-1])[self._threads.chosen][None], *others)


# ------------------------------------------------------------------------------------------------------------- encoding


def window_and_stride(spec: TaskSpec, config: Any, max_length: int | None = None) -> tuple[int, int]:
    """Return how many tokens a model sees at once, and how many of them are new in each window.

    Raises:
        DataError: the task's window is longer than the model allows.
    """
    allowed = model_positions(config)
    if allowed is not None and (spec.window or 0) > allowed:
        raise DataError(f"task.window={spec.window}: the model has {allowed} positions")
    window = min(n for n in (spec.window or allowed or _DEFAULT_WINDOW, max_length) if n is not None)
    return window, min(spec.stride or window, window)


def encode_windows(data: TaskData, config: Any, tokenizer: Any, max_length: int | None = None) -> Windows:
    """Tokenise running text and divide it into windows.

    Args:
        data: the examples; those that are read as one text follow one another.
        config: the model's configuration.
        tokenizer: a fast one. The tokens that it puts before a text are seen, those behind it are not scored.
        max_length: an upper bound of the window in tokens, besides the task's own and the model's positions.

    Raises:
        ModelError: the model reads a source besides, or the tokenizer does not say where its tokens are in a text.
        DataError: the task's window is longer than the model allows.
    """
    spec = data.spec
    if config.is_encoder_decoder:
        raise ModelError(
            f"{spec.name}: perplexity of running text needs a decoder alone, and {config.model_type} models read a "
            "source besides"
        )
    if not tokenizer.is_fast:
        raise ModelError(f"{spec.name}: the tokenizer {tokenizer.name_or_path} does not say where its tokens are")
    window, stride = window_and_stride(spec, config, max_length)
    numbers = np.arange(len(data))
    # A text begins with every example, or where rows are joined with every split.
    texts = np.split(numbers, np.flatnonzero(np.diff(data.parts)) + 1 if spec.join is not None else numbers[1:])
    with quiet_transformers():  # a whole text is longer than any model's input
        found = tokenizer(
            ["".join("".join(data.texts[i]) for i in members) for members in texts],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
        )
    owners, spans, total = [], [], 0
    for members, offsets, special in zip(texts, found["offset_mapping"], found["special_tokens_mask"], strict=True):
        ends = np.cumsum([sum(map(len, data.texts[i])) for i in members])
        last = np.array([end for _, end in offsets], dtype=np.int64).reshape(-1)
        owner = members[np.searchsorted(ends, np.maximum(last, 1)).clip(max=len(members) - 1)]
        owner[np.array(special, dtype=bool)] = -1
        owner[:1] = -1
        owners.append(owner)
        count = len(owner) - (next((i for i, mark in enumerate(reversed(special)) if not mark), 0))
        for start in range(1, count, stride):
            end = min(start + stride, count)
            spans.append((total + max(end - 1 - window, 0), total + start, total + end))
        total += len(owner)
    return Windows(
        tokens=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in found["input_ids"]]),
        owner=np.concatenate(owners),
        words=np.array([len("".join(text).split()) for text in data.texts], dtype=np.int64),
        spans=np.array(spans, dtype=np.int64).reshape(-1, 3),
        members=numbers,
        name=spec.name,
    )
