"""Train the miniature's models: the base on masked, swapped and consecutive text, experts on labelled examples.

The same recipe gives the same bytes on one platform, for any number of cores and threads: every random number comes
from a seeded generator, each of our threads runs torch on one thread, and the division of a batch among them is fixed.
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
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mergelab.miniature.recipe import Expert, Recipe
from mergelab.miniature.tokenizer import MASK, MAX_LENGTH, PAD

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

IGNORED = -100
# Gradients are summed over this many parts of each pretraining batch; results depend on it.
SHARDS = 2
StepProgress = Callable[[float], None]  # receives the fraction done


@contextmanager
def quiet_torch(seed: int) -> Iterator[None]:
    """Run on one thread, with gradients and a seeded global generator; restore all three at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _pool(workers: int) -> ThreadPoolExecutor:
    # The default of a new thread would be OpenMP's: all cores.
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


@dataclass(frozen=True)
class EncodedTexts:
    """Tokenised texts: padded ids and segment ids, (n, longest) int64, and the length of each row."""

    ids: Tensor
    segments: Tensor
    lengths: tuple[int, ...]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ids and segment ids of ``rows``, truncated to the longest of them."""
        longest = max(self.lengths[row] for row in rows)
        at = torch.tensor(rows)
        return self.ids[at, :longest], self.segments[at, :longest]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]]) -> EncodedTexts:
    """Tokenise sentences and pairs of sentences."""
    encodings = tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
    lengths = tuple(len(encoding.ids) for encoding in encodings)
    ids = torch.full((len(texts), max(lengths)), PAD)
    segments = torch.zeros_like(ids)
    for row, (encoding, length) in enumerate(zip(encodings, lengths, strict=True)):
        ids[row, :length] = torch.tensor(encoding.ids)
        segments[row, :length] = torch.tensor(encoding.type_ids)
    return EncodedTexts(ids, segments, lengths)


def batches(lengths: Sequence[int], size: int, generator: torch.Generator, pool: int = 32) -> list[list[int]]:
    """Divide a shuffled pass over the rows into batches of ``size`` rows of similar length."""
    permutation = torch.randperm(len(lengths), generator=generator).tolist()
    batched: list[list[int]] = []
    for start in range(0, len(permutation), size * pool):
        similar = sorted(permutation[start : start + size * pool], key=lambda row: lengths[row])
        batched += [similar[at : at + size] for at in range(0, len(similar), size)]
    return [batched[at] for at in torch.randperm(len(batched), generator=generator).tolist()]


def fit(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    gradients: Callable[[list[int]], None],
    plan: Sequence[list[int]],
    *,
    progress: StepProgress,
) -> None:
    """Take one AdamW step per batch.

    The learning rates rise to their peak over a tenth of the steps, then fall to zero.

    Args:
        groups: parameters, with their peak learning rate.
        gradients: computes the parameters' gradients for the rows of a batch.
        plan: the rows of each batch, in order.
        progress: called after each step.
    """
    parameters = [parameter for group, _ in groups for parameter in group]
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": peak} for group, peak in groups], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, math.ceil(0.1 * len(plan)))
    for step, rows in enumerate(plan):
        factor = min((step + 1) / warmup, (len(plan) - step) / max(1, len(plan) - warmup))
        for group, (_, peak) in zip(optimiser.param_groups, groups, strict=True):
            group["lr"] = peak * factor
        gradients(rows)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        progress((step + 1) / len(plan))


def initialise_attention(model: BertForPreTraining, recipe: Recipe) -> None:
    """Initialise the heads of a new ``model`` to attend to equal words and to neighbours.

    Each layer's first head starts with equal queries and keys, so that a word of the second sentence attends to the
    same word in the first. The other heads start as "the word before" and "the word after", by sinusoidal position
    embeddings, which a rotation shifts by one. Learning this from a random start would take longer than the whole
    training. (After mimetic initialisation, Trockman & Kolter 2023, arXiv:2305.09828.)
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
class Bigrams:
    """A corpus' bigrams: the model that proposes replacements for swapped words.

    Attributes:
        words: the second words of all bigrams, grouped by first word.
        start, count: by first word, the position and the size of its group.
    """

    words: Tensor
    start: Tensor
    count: Tensor

    def draw(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for each position of ``ids`` (n, s) a word that follows the word on its left; `PAD` if there is none."""
        left = ids.roll(1, dims=1)
        number = (torch.rand(ids.shape, generator=generator) * self.count[left]).long()
        drawn = self.words[(self.start[left] + number).clamp(max=len(self.words) - 1)]
        return torch.where(self.count[left] > 0, drawn, PAD)


def count_bigrams(encoded: EncodedTexts, vocabulary: int) -> Bigrams:
    """Collect the bigrams of ``encoded``."""
    left, right = encoded.ids[:, :-1].reshape(-1), encoded.ids[:, 1:].reshape(-1)
    left, right = left[right > MASK], right[right > MASK]
    by_left = left.argsort(stable=True)
    count = torch.bincount(left, minlength=vocabulary)
    return Bigrams(right[by_left], count.cumsum(0) - count, count)


@dataclass(frozen=True)
class Corpus:
    """Unlabelled text; ``unrelated`` (n,) is 1 where the second sentence does not follow, `IGNORED` without one."""

    encoded: EncodedTexts
    unrelated: Tensor


def make_config(recipe: Recipe, vocabulary: int, **more: Any) -> BertConfig:
    """Return the config of the miniature's BERT."""
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
    """The base with its three pretraining losses, on a part of each batch."""

    def __init__(self, model: BertForPreTraining, text: Corpus, bigrams: Bigrams, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.swapped = torch.nn.Linear(recipe.hidden, 1)
        self.text, self.bigrams, self.recipe = text, bigrams, recipe

    def loss(self, rows: list[int], generator: torch.Generator) -> Tensor:
        """Return the sum of the losses on ``rows``, with masked and swapped words drawn from ``generator``."""
        ids, segments = self.text.encoded.batch(rows)
        dice = torch.rand(ids.shape, generator=generator)
        word = ids > MASK
        masked = word & (dice < self.recipe.masked)
        proposed = self.bigrams.draw(ids, generator)
        swap = word & (dice > 1 - self.recipe.swapped) & (proposed != PAD)
        seen = torch.where(masked, MASK, torch.where(swap, proposed, ids))
        hidden, pooled = self.model.bert(seen, attention_mask=(ids != PAD).long(), token_type_ids=segments)[:2]
        unmasked = word & ~masked
        unrelated = self.text.unrelated[torch.tensor(rows)]
        return (
            functional.cross_entropy(self.model.cls.predictions(hidden[masked]), ids[masked])
            + functional.cross_entropy(self.model.cls.seq_relationship(pooled), unrelated, ignore_index=IGNORED)
            + self.recipe.swapped_weight
            * functional.binary_cross_entropy_with_logits(
                self.swapped(hidden[unmasked])[:, 0], (seen != ids)[unmasked].to(hidden.dtype)
            )
        )


def pretrain(text: Corpus, vocabulary: int, recipe: Recipe, progress: StepProgress) -> BertForPreTraining:
    """Train the base on unlabelled text.

    The loss is the sum of BERT's two (masked words, next sentence) and of replaced-token detection, after ELECTRA
    (Clark et al. 2020, arXiv:2003.10555): a bigram model proposes replacements for some words, and a head classifies
    each word as original or replaced. That loss trains on every word, not only on the masked ones. Its head is
    discarded.
    """
    from transformers import BertForPreTraining

    model = BertForPreTraining(make_config(recipe, vocabulary))
    initialise_attention(model, recipe)
    first = _Pretraining(model, text, count_bigrams(text.encoded, vocabulary), recipe)
    parameters = list(first.parameters())
    replicas = [first, *(copy.deepcopy(first) for _ in range(SHARDS - 1))]
    for replica in replicas[1:]:
        for own, shared in zip(replica.parameters(), parameters, strict=True):
            own.data = shared.data
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


class Trainable(Protocol):
    """A training that can run."""

    def run(self, progress: StepProgress) -> None:
        """Train the model in place."""
        ...


@dataclass(frozen=True)
class Finetuning:
    """The training of one expert: a model with an untrained head, its examples, and the settings."""

    model: BertForSequenceClassification
    encoded: EncodedTexts
    labels: Tensor
    expert: Expert

    def run(self, progress: StepProgress) -> None:
        """Train a classifier; for a single output, a regression."""
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
    """Return a copy of ``base`` with a new classification head, initialised with ``seed``."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(base.bert.state_dict())
    return model.train()


class _Interrupted(Exception):
    """The build was stopped during this training."""


def train_all(jobs: Sequence[Trainable], progress: StepProgress) -> None:
    """Run all ``jobs``, in parallel on as many cores as there are; ``progress`` is called from this thread only."""
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
