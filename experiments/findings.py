"""How much choosing on the examples that report flatters, on recorded sweeps: no model is run.

Usage:
    python experiments/findings.py        # all recorded sweeps of experiments/matrices

A recorded sweep has the score of every trial on every example (see ``recorded.py``); those are read whose metric is the
mean of these scores. The examples are divided at random into halves, many times. On one half the best trial is chosen.
Its score there is what an oracle reports; its score on the other half is what a hold-out reports.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.adaptive import MATRICES
from experiments.recorded import Recorded
from mergelab.sweep.targets import is_mean_of_scores, scores_for

Array = np.ndarray[Any, Any]


def flattery(trials: Array, count: int, halves: int = 1000, seed: int = 0) -> Array:
    """Return how far the oracle's score is above the hold-out's, in points, for each division into halves: (halves,).

    Args:
        trials: (t, n) scores of the trials on the examples.
        count: how many trials, drawn at random, are chosen among.
        halves: how many divisions.
        seed: of the divisions and of the trials.
    """
    random = np.random.default_rng(seed)
    found = []
    for _ in range(halves):
        order = random.permutation(trials.shape[1])
        one, other = np.array_split(order, 2)
        some = trials[random.choice(len(trials), min(count, len(trials)), replace=False)]
        best = int(some[:, one].mean(axis=1).argmax())
        found.append(100 * float(some[best, one].mean() - some[best, other].mean()))
    return np.array(found)


def main() -> None:
    """Print a table of all recorded sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halves", type=int, default=1000)
    options = parser.parse_args()
    print("| sweep | examples that select | trials | oracle above hold-out, points | 95 % of the divisions |")
    print("| --- | --- | --- | --- | --- |")
    for file in sorted(MATRICES.glob("*.parquet")):
        sweep = Recorded.read(file)
        task = sweep.tasks[0]
        if len(sweep.tasks) > 1 or not is_mean_of_scores(task, task.primary):
            continue
        trials = np.stack([scores_for(task, task.primary, rows) for rows in sweep.trials[task.name]])
        for count in (1, 5, 20, 50, len(trials)):
            gaps = flattery(trials, count, options.halves)
            low, high = np.quantile(gaps, [0.025, 0.975])
            cells = [file.stem, trials.shape[1] // 2, count, f"{gaps.mean():+.2f}", f"{low:+.1f} to {high:+.1f}"]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
