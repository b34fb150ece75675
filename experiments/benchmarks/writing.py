"""Speed of mergelab's generation and perplexity beside plain loops that take one example at a time.

Usage:
    python experiments/benchmarks/writing.py --data-dir ../shared/data/generation # SAMSum's chats and WikiText-2's rows
    python experiments/benchmarks/writing.py --data-dir DATA --examples 64 --layers 12 --width 768
    python experiments/benchmarks/writing.py --data-dir DATA --threads 1 --cpu-time # on a machine that others use

The model is a GPT-2 with random weights and a tokenizer of its own, trained on the texts. Both ways run one after the
other; the outputs are compared. Perplexity is measured with each sentence or each row a text of its own, and with rows
that are read as one text, in windows without and with context. For perplexity it also says how many times as fast any
program could be that computes in float32: if it did nothing but the model's matrix products, all of them as fast as the
fastest product found here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mergelab.evaluation.dispatch import prepare
from mergelab.evaluation.packed_linear import inference_copy
from mergelab.tasks.data import TaskData, load_data
from mergelab.tasks.loading import load_task


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    samsum, wikitext = load_task("samsum"), load_task("wikitext")
    chats = load_data(
        replace(samsum, max_prompt_tokens=200, decoding=replace(samsum.decoding, max_new_tokens=options.new_tokens)),
        data_dir=options.data_dir,
        limit=options.examples,
    )
    rows = load_data(replace(wikitext, join=None), data_dir=options.data_dir, limit=4 * options.examples)
    joined = load_data(wikitext, data_dir=options.data_dir, limit=4 * options.examples)
    tokenizer = make_tokenizer([text for (text,) in chats.texts] + [text for _, text in rows.texts])
    model = make_model(tokenizer, options.layers, options.width)
    prompts: Any = prepare(chats, model.config, tokenizer)
    tokens = options.examples * options.new_tokens
    compare("generation, greedy", clock, lambda: prompts.run(model), lambda: generate_plainly(model, prompts), tokens)
    for name, data in (
        ("perplexity, each sentence alone", sentences(rows)),
        ("perplexity, each row alone", rows),
        ("perplexity, windows of 512", replace(joined, spec=replace(wikitext, window=512, stride=512))),
        ("perplexity, windows of 512, 256 new", replace(joined, spec=replace(wikitext, window=512, stride=256))),
    ):
        windows: Any = prepare(data, model.config, tokenizer)
        count = int((windows.spans[:, 2] - windows.spans[:, 1]).sum())
        floor = operations(model, windows) / best_rate(clock)
        compare(
            name, clock, lambda w=windows: w.run(model)[:, 0], lambda w=windows: score_plainly(model, w), count, floor
        )


def sentences(data: TaskData) -> TaskData:
    """Let each sentence be an example."""
    texts = [("", part + ".") for _, text in data.texts for part in text.split(" . ") if part.strip()]
    numbers = np.arange(len(texts))
    return replace(data, texts=tuple(texts), labels=0 * numbers, idx=numbers, parts=0 * numbers)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    return parser.parse_args()


def make_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level tokenizer as GPT-2's, with 8000 tokens at most."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")


def make_model(tokenizer: Any, layers: int, width: int) -> Any:
    """Build a GPT-2 with random weights that are large enough to tell prompts apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    size = {"n_layer": layers, "n_embd": width, "n_head": max(width // 64, 1), "n_positions": 512}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, initializer_range=0.1, **size)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def generate_plainly(model: Any, prompts: Any) -> np.ndarray[Any, Any]:
    """Generate with transformers alone, one prompt at a time."""
    found = []
    for ids in prompts.ids:
        inputs = torch.from_numpy(ids)[None]
        written = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=prompts.pad_id,
            max_new_tokens=prompts.decoding.max_new_tokens,
        )  # fmt: skip
        found.append(prompts.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
    return np.array(found, dtype=object)


@torch.no_grad()
def score_plainly(model: Any, windows: Any) -> np.ndarray[Any, Any]:
    """Add up the losses that the model answers, one window at a time."""
    total = 0.0
    for begin, first, end in windows.spans:
        ids = torch.from_numpy(windows.tokens[begin:end])
        logits = model(ids[None, :-1]).logits[0, first - begin - 1 :]
        total += float(torch.nn.functional.cross_entropy(logits, ids[first - begin :], reduction="sum"))
    return np.array([total])


def operations(model: Any, windows: Any) -> float:
    """Count the additions and multiplications in the matrix products of the windows; half of attention's are masked."""
    with FlopCounterMode(display=False) as counter:
        score_plainly(model, windows)
    counts = counter.get_flop_counts()["Global"]
    return float(sum(n / 2 if "attention" in str(operation) else n for operation, n in counts.items()))


@torch.no_grad()
def best_rate(clock: Callable[[], float], tries: int = 30) -> float:
    """Return how many operations per second the fastest float32 product makes, of plain and of packed weights."""
    best = 0.0
    for rows, inputs, outputs in ((512, 768, 3072), (512, 768, 768), (2048, 1024, 1024)):
        layer = torch.nn.Linear(inputs, outputs)
        x = torch.randn(rows, inputs)
        for way in (layer, inference_copy(layer, x.device, None)):
            for _ in range(tries):
                started = clock()
                for _ in range(4):
                    way(x)
                best = max(best, 8 * rows * inputs * outputs / (clock() - started))
    return best


def compare(
    name: str,
    clock: Callable[[], float],
    own: Callable[[], Any],
    plain: Callable[[], Any],
    count: int,
    floor: float | None = None,
) -> None:
    """Run both ways and print tokens per second, their ratio, and whether the outputs agree.

    Args:
        floor: seconds that no program can do with less.
    """
    seconds, outputs = [], []
    for way in (own, plain):
        started = clock()
        outputs.append(way())
        seconds.append(clock() - started)
    first, second = outputs
    same = f"{(first == second).mean():.1%} of texts equal" if first.dtype == object else (
        f"negative log likelihood {first.sum():.6g} and {second.sum():.6g}"
    )  # fmt: skip
    most = "" if floor is None else f" (at most {seconds[1] / floor:.2f})"
    print(f"{name:38} {count / seconds[0]:8.0f} and {count / seconds[1]:8.0f} tokens/s, "
          f"{seconds[1] / seconds[0]:5.2f} times as fast{most}; {same}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
