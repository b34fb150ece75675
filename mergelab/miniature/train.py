"""Train the miniature's models: masked, swapped and following text for the base, labelled examples for the experts.

The same recipe gives the same bytes on one platform, however many cores and threads there are: every random number
comes from a generator with a seed, each thread of ours runs torch on one thread, and how a batch is shared out among
them is fixed.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mergelab.miniature.recipe import Expert, Recipe
from mergelab.miniature.tokenizer import MASK, MAX_LENGTH, PAD

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

IGNORED = -100
# A part of the recipe, not of the machine: gradients are summed over this many parts of each pretraining batch.
SHARDS = 2
Progress = Callable[[float], None]


@contextmanager
def quiet_torch(seed: int) -> Iterator[None]:
    """Run on one thread, with gradients and a freshly seeded global generator; put everything back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _pool(workers: int) -> ThreadPoolExecutor:
    # A new thread would otherwise take OpenMP's default, all cores.
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts: (n, longest) int64 ids, padded, and segment numbers, and the length of each row."""

    ids: Tensor
    segments: Tensor
    lengths: tuple[int, ...]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the ids and segments of ``rows``, cut to the longest of them."""
        longest = max(self.lengths[row] for row in rows)
        at = torch.tensor(rows)
        return self.ids[at, :longest], self.segments[at, :longest]


def encode(tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]]) -> Encoded:
    """Tokenise sentences and pairs of sentences."""
    encodings = tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
    lengths = tuple(len(encoding.ids) for encoding in encodings)
    ids = torch.full((len(texts), max(lengths)), PAD)
    segments = torch.zeros_like(ids)
    for row, (encoding, length) in enumerate(zip(encodings, lengths, strict=True)):
        ids[row, :length] = torch.tensor(encoding.ids)
        segments[row, :length] = torch.tensor(encoding.type_ids)
    return Encoded(ids, segments, lengths)


def batches(lengths: Sequence[int], size: int, generator: torch.Generator, pool: int = 32) -> list[list[int]]:
    """Cut a shuffled pass over the rows into batches of ``size`` rows whose lengths are close to each other."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    cut: list[list[int]] = []
    for start in range(0, len(order), size * pool):
        near = sorted(order[start : start + size * pool], key=lambda row: lengths[row])
        cut += [near[at : at + size] for at in range(0, len(near), size)]
    return [cut[at] for at in torch.randperm(len(cut), generator=generator).tolist()]


def fit(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    gradients: Callable[[list[int]], None],
    plan: Sequence[list[int]],
    *,
    progress: Progress,
) -> None:
    """Take one AdamW step per batch of ``plan``; each of ``groups`` has parameters and its peak learning rate.

    The rates rise to their peak over a tenth of the steps, then fall to zero.
    """
    parameters = [parameter for group, _ in groups for parameter in group]
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": peak} for group, peak in groups], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    rise = max(1, math.ceil(0.1 * len(plan)))
    for step, rows in enumerate(plan):
        height = min((step + 1) / rise, (len(plan) - step) / max(1, len(plan) - rise))
        for group, (_, peak) in zip(optimiser.param_groups, groups, strict=True):
            group["lr"] = peak * height
        gradients(rows)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        progress((step + 1) / len(plan))


def give_start(model: BertForPreTraining, recipe: Recipe) -> None:
    """Let the heads of a fresh ``model`` look where it is useful to look: at like words, and at neighbours.

    Each layer's first head starts with equal queries and keys, so that a word of the second sentence finds its twin in
    the first; its other heads start as "the word before" and "the word after", by sinusoids for positions, which a
    rotation shifts by one. To learn that from nothing would take longer than the whole training here. (After mimetic
    initialisation, Trockman & Kolter 2023, arXiv:2305.09828.)
    """
    width, spread = recipe.position_width, recipe.spread
    embeddings = model.bert.embeddings
    turn = torch.arange(1, width // 2 + 1) * math.pi / (width // 2 + 1)
    angle = torch.arange(MAX_LENGTH)[:, None] * turn
    size = recipe.hidden // recipe.heads
    with torch.no_grad():
        for table in (embeddings.word_embeddings, embeddings.token_type_embeddings):
            table.weight.mul_(recipe.word_spread / spread)
        embeddings.position_embeddings.weight.zero_()
        embeddings.position_embeddings.weight[:, :width] = (
            recipe.position_spread * math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)
        )
        cosine, sine = turn.cos().diag(), turn.sin().diag()
        back = torch.cat(
            [torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)]
        )  # takes position p's sinusoids to p - 1's
        for number, layer in enumerate(model.bert.encoder.layer):
            query, key = layer.attention.self.query.weight, layer.attention.self.key.weight
            query.mul_(recipe.match_spread / spread)
            query[:size, :width] = 0
            query[size:, width:] = 0
            key.copy_(query)
            for head in range(1, recipe.heads):
                rows = slice(head * size, (head + 1) * size)
                query[rows, :width] = query[rows, :width] @ (back if (head + number) % 2 else back.T)


@dataclass(frozen=True)
class Followers:
    """Which words follow which in a corpus: the bigram model that proposes the swaps."""

    words: Tensor
    start: Tensor
    count: Tensor

    def draw(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for each place of ``ids`` (n, s) a word that the corpus has after the word on its left; 0 if none."""
        left = ids.roll(1, dims=1)
        number = (torch.rand(ids.shape, generator=generator) * self.count[left]).long()
        drawn = self.words[(self.start[left] + number).clamp(max=len(self.words) - 1)]
        return torch.where(self.count[left] > 0, drawn, PAD)


def followers(encoded: Encoded, vocabulary: int) -> Followers:
    """Count which words follow which in ``encoded``."""
    left, right = encoded.ids[:, :-1].reshape(-1), encoded.ids[:, 1:].reshape(-1)
    left, right = left[right > MASK], right[right > MASK]
    order = left.argsort(stable=True)
    count = torch.bincount(left, minlength=vocabulary)
    return Followers(right[order], count.cumsum(0) - count, count)


@dataclass(frozen=True)
class Corpus:
    """Unlabelled text: (n,) ``stranger`` is 1 where the second sentence does not follow, `IGNORED` without one."""

    encoded: Encoded
    stranger: Tensor


def make_config(recipe: Recipe, vocabulary: int, **more: Any) -> BertConfig:
    """Describe the miniature's BERT."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.feed_forward,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=recipe.spread,
        pad_token_id=PAD,
        **more,
    )


class _Pretraining(torch.nn.Module):
    """The base with its three losses, over a share of each batch."""

    def __init__(self, model: BertForPreTraining, text: Corpus, bigrams: Followers, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.swapped = torch.nn.Linear(recipe.hidden, 1)
        self.text, self.bigrams, self.recipe = text, bigrams, recipe

    def loss(self, rows: list[int], generator: torch.Generator) -> Tensor:
        """Return the summed losses of ``rows``, with words hidden and swapped as ``generator`` says."""
        ids, segments = self.text.encoded.batch(rows)
        dice = torch.rand(ids.shape, generator=generator)
        word = ids > MASK
        masked = word & (dice < self.recipe.masked)
        proposed = self.bigrams.draw(ids, generator)
        swap = word & (dice > 1 - self.recipe.swapped) & (proposed != PAD)
        seen = torch.where(masked, MASK, torch.where(swap, proposed, ids))
        hidden, pooled = self.model.bert(seen, attention_mask=(ids != PAD).long(), token_type_ids=segments)[:2]
        asked = word & ~masked
        follows = self.text.stranger[torch.tensor(rows)]
        return (
            functional.cross_entropy(self.model.cls.predictions(hidden[masked]), ids[masked])
            + functional.cross_entropy(self.model.cls.seq_relationship(pooled), follows, ignore_index=IGNORED)
            + self.recipe.swapped_weight
            * functional.binary_cross_entropy_with_logits(
                self.swapped(hidden[asked])[:, 0], (seen != ids)[asked].to(hidden.dtype)
            )
        )


def pretrain(text: Corpus, vocabulary: int, recipe: Recipe, progress: Progress) -> BertForPreTraining:
    """Train the base on unlabelled text.

    The loss is the sum of BERT's two (masked words; whether the second sentence follows) and of a third, after ELECTRA
    (Clark et al. 2020, arXiv:2003.10555): some words are swapped for others that a bigram model proposes, and each word
    is asked whether it was. The third teaches from every word instead of the masked few; its head is thrown away.
    """
    from transformers import BertForPreTraining

    model = BertForPreTraining(make_config(recipe, vocabulary))
    give_start(model, recipe)
    first = _Pretraining(model, text, followers(text.encoded, vocabulary), recipe)
    parameters = list(first.parameters())
    replicas = [first, *(copy.deepcopy(first) for _ in range(SHARDS - 1))]
    for replica in replicas[1:]:
        for mine, shared in zip(replica.parameters(), parameters, strict=True):
            mine.data = shared.data
    generators = [torch.Generator().manual_seed(recipe.seed + number) for number in range(SHARDS)]

    def backward(number: int, rows: list[int]) -> None:
        replicas[number].zero_grad()
        share = rows[number::SHARDS]
        if share:
            loss = replicas[number].loss(share, generators[number]) * (len(share) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]

    with _pool(SHARDS) as pool:

        def gradients(rows: list[int]) -> None:
            list(pool.map(backward, range(SHARDS), [rows] * SHARDS))
            for replica in replicas[1:]:
                for total, part in zip(parameters, replica.parameters(), strict=True):
                    if total.grad is not None and part.grad is not None:
                        total.grad.add_(part.grad)

        plan = batches(text.encoded.lengths, recipe.pretrain_batch, generators[0])
        fit([(parameters, recipe.pretrain_rate)], gradients, plan, progress=progress)
    return model.eval()


@dataclass(frozen=True)
class Finetuning:
    """What one expert is made from: an untrained head on the base, its examples, and how to train."""

    model: BertForSequenceClassification
    encoded: Encoded
    labels: Tensor
    expert: Expert

    def run(self, progress: Progress) -> None:
        """Train a classifier, or for one output a regression."""
        generator = torch.Generator().manual_seed(self.expert.seed)

        def gradients(rows: list[int]) -> None:
            ids, segments = self.encoded.batch(rows)
            logits = self.model(ids, attention_mask=(ids != PAD).long(), token_type_ids=segments).logits
            wanted = self.labels[torch.tensor(rows)]
            if logits.shape[1] == 1:
                functional.mse_loss(logits[:, 0], wanted).backward()  # type: ignore[no-untyped-call]
            else:
                functional.cross_entropy(logits, wanted).backward()  # type: ignore[no-untyped-call]

        plan = [
            rows
            for _ in range(self.expert.epochs)
            for rows in batches(self.encoded.lengths, self.expert.batch, generator)
        ]
        body, head = list(self.model.bert.parameters()), list(self.model.classifier.parameters())
        groups = [(body, self.expert.rate), (head, self.expert.rate * self.expert.head_speed)]
        fit(groups, gradients, plan, progress=progress)
        self.model.eval()


def with_head(base: BertForPreTraining, config: BertConfig, seed: int) -> BertForSequenceClassification:
    """Put a fresh classification head, drawn with ``seed``, on a copy of ``base``."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(base.bert.state_dict())
    return model.train()


class _Interrupted(Exception):
    """The build was stopped while this expert was in training."""


def finetune_all(jobs: Sequence[Finetuning], progress: Progress) -> None:
    """Train every one of ``jobs``, side by side where there are cores; ``progress`` is called from this thread only."""
    done = [0.0] * len(jobs)
    stop = threading.Event()

    def run(number: int) -> None:
        def note(fraction: float) -> None:
            if stop.is_set():
                raise _Interrupted
            done[number] = fraction

        jobs[number].run(note)

    with _pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        futures = [pool.submit(run, number) for number in range(len(jobs))]
        try:
            while wait(futures, timeout=0.2).not_done:
                progress(sum(done) / len(jobs))
            for future in futures:
                future.result()
        finally:
            stop.set()
