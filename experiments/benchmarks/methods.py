"""Time the costly methods on models of BERT-base's size: those that decompose matrices, Fisher and Gram matrices.

Usage:
    python experiments/benchmarks/methods.py                                     # all three parts, minutes each
    python experiments/benchmarks/methods.py --parts merges --methods tsv_m,iso_c
    python experiments/benchmarks/methods.py --parts fisher,gram --layers 1 --examples 8    # a trial

"merges" merges a base and experts (built once under --folder, see model_sets.py), and writes nothing. "fisher" computes
the expected Fisher information of a binary classifier beside a forward and a backward pass over the same examples;
"gram" the products of the inputs of its linear layers beside a forward pass. The examples are random tokens, as long as
RTE's (--tokens on average), in batches of like length. A pass takes either the same batches side by side on as many
threads, or batches of 32 one after the other on all threads; the faster of the two counts. Memory is the peak of what
the part adds to the process's anonymous memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from merging import anonymous_memory
from model_sets import build

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.estimation.examples import Batch
from mergelab.estimation.fisher import diagonal_fisher
from mergelab.estimation.input_gram import InputGram, run_for_gram
from mergelab.ops.threads import in_order, on_one_thread, thread_count
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.checkpoint import open_checkpoint

PARTS = ("merges", "fisher", "gram")
METHODS = ("tsv_m", "iso_c", "iso_cts", "wudi", "knots")
BATCH_TOKENS = 256  # what mergelab takes on a CPU
ENCODER = "bert.encoder.layer."
THREADS = thread_count()
Work = Callable[[nn.Module, Batch], None]


@dataclass
class Peak:
    """How long a block of code took, and by how many MB anonymous memory rose in it at most."""

    seconds: float = 0.0
    megabytes: float = 0.0


@contextmanager
def measured() -> Iterator[Peak]:
    """Measure a block of code."""
    found, done = Peak(), threading.Event()
    before = anonymous_memory("self")

    def watch() -> None:
        while not done.wait(0.01):
            found.megabytes = max(found.megabytes, anonymous_memory("self") - before)

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - started
        done.set()
        watching.join()


@dataclass(frozen=True)
class Drawn:
    """A classifier and random examples, as methods ask for them."""

    classifier: PreTrainedModel
    lengths: Sequence[int]
    batch_tokens: int = BATCH_TOKENS
    batch_size: int | None = None
    key: str = ""

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self.lengths)

    @property
    def parameter_names(self) -> Mapping[str, str]:
        """All parameters take part, under their own names."""
        return {name: name for name, _ in self.classifier.named_parameters()}

    def module(self) -> PreTrainedModel:
        """Return the classifier."""
        return self.classifier

    def batches(self) -> Iterator[Batch]:
        """Return the examples, those of like length together."""
        generator = torch.Generator().manual_seed(0)
        waiting: list[int] = []
        for length in sorted(self.lengths):
            full = self.batch_size == len(waiting) or (len(waiting) + 1) * length > self.batch_tokens
            if waiting and full:
                yield self._batch(waiting, generator)
                waiting = []
            waiting.append(length)
        yield self._batch(waiting, generator)

    def _batch(self, lengths: Sequence[int], generator: torch.Generator) -> Batch:
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        vocabulary = self.classifier.config.vocab_size
        return {
            "input_ids": torch.randint(1, vocabulary, mask.shape, generator=generator) * mask,
            "attention_mask": mask,
        }


def forward(module: nn.Module, batch: Batch) -> None:
    """Run a batch through the module without gradients."""
    with torch.no_grad():
        module(**batch)


def forward_and_backward(module: nn.Module, batch: Batch) -> None:
    """Compute the gradients of one score for each example, summed over the batch, as training does."""
    logits = module(**batch).logits
    torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), tuple(module.parameters()), allow_unused=True)


def side_by_side(examples: Drawn, work: Work) -> None:
    """Do the work on as many batches at once as there are threads."""
    with on_one_thread(torch.device("cpu")):
        for _ in in_order(partial(work, examples.module()), examples.batches(), threads=THREADS):
            pass


def one_by_one(examples: Drawn, work: Work) -> None:
    """Do the work on one batch of 32 after the other, each operation on all threads."""
    for batch in Drawn(examples.classifier, examples.lengths, batch_size=32, batch_tokens=32 * 512).batches():
        work(examples.module(), batch)


def compare(name: str, examples: Drawn, own: Callable[[], object], work: Work, rounds: int) -> None:
    """Time a statistic and a pass of either kind in turn and print medians; the first round warms up."""
    passes: dict[str, Callable[[], object]] = {
        f"{name}: a pass, the same batches": partial(side_by_side, examples, work),
        f"{name}: a pass, batches of 32": partial(one_by_one, examples, work),
    }
    found: dict[str, list[Peak]] = {}
    for number in range(rounds + 1):
        for label, run in {name: own, **passes}.items():
            with measured() as peak:
                run()
            if number:
                found.setdefault(label, []).append(peak)
    seconds = {label: statistics.median(each.seconds for each in peaks) for label, peaks in found.items()}
    for label, peaks in found.items():
        memory = max(each.megabytes for each in peaks)
        one = 1000 * seconds[label] / examples.count
        print(f"{label:44}{seconds[label]:9.2f} s{one:9.1f} ms each{memory:8.0f} MB", flush=True)
    fastest = min(seconds[label] for label in passes)
    print(f"{name}: {seconds[name] / fastest:.2f} times the faster pass", flush=True)


def merges(methods: Sequence[str], models: AlignedModels, layers: int) -> None:
    """Merge by each method and print seconds and memory."""
    names = [name for name in models.names if is_wanted(name, layers)]
    size = sum(int(np.prod(models.experts[0].shape(name))) for name in names)
    print(f"merging {size / 1e6:.0f} M parameters of {len(models.experts)} experts", flush=True)
    for method in methods:
        with measured() as peak:
            for _ in merge(get_method(method), {}, models, only=names):
                pass
        print(f"{method:44}{peak.seconds:9.2f} s{peak.megabytes:8.0f} MB", flush=True)


def is_wanted(name: str, layers: int) -> bool:
    """Return whether a tensor belongs to the first layers, or to none."""
    return not name.startswith(ENCODER) or int(name.removeprefix(ENCODER).split(".")[0]) < layers


def classifier_of(folder: Path, layers: int) -> PreTrainedModel:
    """Load a classifier, or its first layers."""
    logging.set_verbosity_error()  # the layers that are left out are no news
    logging.disable_progress_bar()
    classifier: PreTrainedModel = BertForSequenceClassification.from_pretrained(folder, num_hidden_layers=layers)
    return classifier.eval()


def lengths_like_rte(count: int, tokens: int) -> list[int]:
    """Draw lengths: most are short, a few are several times as long."""
    drawn = np.random.default_rng(0).lognormal(np.log(tokens) - 0.125, 0.5, count)
    return [int(length) for length in np.clip(drawn, 8, 512)]


def matrices_in_mb(found: InputGram) -> str:
    """Report the size of the Gram matrices, and the size with one matrix per linear layer."""
    stored = sum(matrix.nbytes for matrix in found.matrices.values())
    each = sum(found.matrices[at].nbytes for at in found.shared.values())
    return (
        f"{len(found.matrices)} matrices in float32: {stored / 1e6:.0f} MB; one per layer would be {each / 1e6:.0f} MB"
    )


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/bert-base"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--layers", type=int, default=12, help="take the first of the encoder's layers alone")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=68)
    parser.add_argument("--rounds", type=int, default=3, help="of Fisher and Gram matrices, after one that warms up")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: {', '.join(unknown)}: there are {', '.join(PARTS)}")
    folders = build("bert-base", args.folder)
    print(f"{THREADS} threads, torch {torch.__version__}, {args.layers} layers")
    if set(parts) & {"fisher", "gram"}:
        examples = Drawn(classifier_of(folders[1], args.layers), lengths_like_rte(args.examples, args.tokens))
        print(f"{args.examples} examples of {np.mean(examples.lengths):.0f} tokens on average, {args.rounds} rounds")
    if "fisher" in parts:
        own = partial(diagonal_fisher, examples)
        compare("Fisher", examples, own, forward_and_backward, args.rounds)
    if "gram" in parts:
        compare("Gram", examples, partial(run_for_gram, examples), forward, args.rounds)
        print(matrices_in_mb(run_for_gram(examples)))
    if "merges" in parts:
        models = align(open_checkpoint(folders[0], "base"), [open_checkpoint(folder) for folder in folders[1:]])
        merges(args.methods.split(","), models, args.layers)


if __name__ == "__main__":
    main()
