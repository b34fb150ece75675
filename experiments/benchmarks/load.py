"""Speed of an evaluation on a machine that others use: batches side by side, beside operations over all threads.

Usage:
    python experiments/benchmarks/load.py                      # beside 8 busy processes; RTE-like texts
    python experiments/benchmarks/load.py --busy 16 --rounds 5 --data-dir DATA

Busy are `stress-ng --cpu N` where it is installed, else N Python processes that count. They belong to this process's
session, so that a system which shares the cores among sessions does not favour either.

Two ways of evaluating the same model on the same examples take turns: mergelab's, where each batch has one core, and
the same code with one batch at a time and PyTorch's operations divided over as many threads. Both run idle first, then
beside the busy processes. The fair share is what the scheduler gives to as many threads among the busy ones: the
processor time of the idle run, times (threads + busy) / (cores · threads). Reported are medians of the clock's time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from evaluation import load_texts, load_tokenizer

from mergelab.evaluation import side_by_side
from mergelab.evaluation.classification import encode, predict
from mergelab.ops.threads import thread_count

# Layers, width and examples: MiniLM's shape, BERT-base's shape.
MODELS = {"small (6 x 384)": (6, 384, 96), "BERT-base (12 x 768)": (12, 768, 32)}
Evaluate = Callable[[], np.ndarray[Any, Any]]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Parquet files with rte/validation.parquet")
    parser.add_argument("--busy", type=int, default=8, help="number of busy processes")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    threads, cores = thread_count(), len(os.sched_getaffinity(0))
    tool = "stress-ng" if shutil.which("stress-ng") else "counting Python processes"
    print(f"{cores} cores, {threads} threads, {options.busy} busy ({tool}), torch {torch.__version__}, "
          f"load before {os.getloadavg()[0]:.1f}; medians of {options.rounds} rounds")  # fmt: skip
    print("| model | way | idle s | CPU s | beside busy s | fair share s | ratio |\n|" + " --- |" * 7)
    for name, (layers, width, examples) in MODELS.items():
        options.examples = examples
        ways = evaluations(options, layers, width)
        idle = measured(ways, options.rounds)
        with busy(options.busy):
            beside = measured(ways, options.rounds)
        for way in ways:
            (seconds, processor), (slow, _) = idle[way], beside[way]
            fair = processor * (threads + options.busy) / (cores * threads)
            print(f"| {name} | {way} | {seconds:.2f} | {processor:.2f} | {slow:.2f} | {fair:.2f} | {slow / fair:.2f} |")


def evaluations(options: argparse.Namespace, layers: int, width: int) -> dict[str, Evaluate]:
    """Return both ways of evaluating one classifier with random weights; they predict the same."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = load_tokenizer(None)
    data, _ = load_texts(options)
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**shape, num_attention_heads=12)).eval()
    encoded = encode(data, tokenizer)

    def whole() -> np.ndarray[Any, Any]:
        with (
            mock.patch.object(side_by_side, "thread_count", return_value=1),
            mock.patch.object(side_by_side, "on_one_thread", contextlib.nullcontext),
        ):
            return predict(model, encoded)

    ways: dict[str, Evaluate] = {
        "side by side": lambda: predict(model, encoded),
        "operations over all threads": whole,
    }
    apart, together = (evaluate() for evaluate in ways.values())
    np.testing.assert_allclose(apart, together, atol=1e-4)
    return ways


def measured(ways: dict[str, Evaluate], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the medians of the clock's and the processor's seconds of each way, which take turns."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, evaluate in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            evaluate()
            found[way].append((time.perf_counter() - wall, time.process_time() - processor))
    return {way: (statistics.median(w for w, _ in each), statistics.median(p for _, p in each))
            for way, each in found.items()}  # fmt: skip


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep processors busy with ``count`` processes."""
    if stress := shutil.which("stress-ng"):
        started = [subprocess.Popen([stress, "--quiet", "--cpu", str(count)])]
    else:
        started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(1)
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
