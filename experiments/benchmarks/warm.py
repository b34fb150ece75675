"""Time the steps of a sweep in a warm session: λ alone, and density with λ, beside what memory allows.

Usage:
    python experiments/benchmarks/warm.py --folder outputs/benchmarks/bert-base --rounds 5

First in plain torch operations, then compiled. "add" is one torch.add for each parameter, into the parameters; "read" a
sum over the experts' task vectors, each in one piece. All in this process, in turn with the steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from model_sets import build

from mergelab.engine.registry import get_method
from mergelab.engine.warm_session import MergeSession
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def steps(warm: MergeSession, targets: Mapping[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Time steps, and what memory allows, in turn; each density is a new one, and λ alone changes after it."""
    assert warm.models.base is not None
    base, expert = warm.models.base, warm.models.experts[0]
    parts = [(base.get(name), expert.get(name), into) for name, into in targets.items()]
    vectors = [
        torch.cat([(each.get(name) - base.get(name)).reshape(-1) for name in targets]) for each in warm.models.experts
    ]
    ties = get_method("ties")
    kinds = ("add", "lambda alone", "read", "density and lambda")
    figures: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(rounds):
        density, scale = 0.1 + 0.8 * index / rounds, 0.5 + 0.1 * index
        step = partial(warm.merge, ties, {"density": density, "lambda": scale})
        figures["read"].append(seconds(lambda: [vector.sum() for vector in vectors]))
        figures["density and lambda"].append(seconds(step))
        while warm.merge(ties, {"density": density, "lambda": scale + 0.01}) != "scaled":
            pass
        warm.merge(ties, {"density": density, "lambda": scale + 0.02})  # the first such step also looks for the largest
        figures["add"].append(seconds(lambda: [torch.add(left, right, out=into) for left, right, into in parts]))
        figures["lambda alone"].append(seconds(step))
    return figures


def session(folders: Sequence[Path], rounds: int, *, compiling: bool) -> None:
    """Time a session and print."""
    models = align(open_checkpoint(folders[0], "base"), [open_checkpoint(folder) for folder in folders[1:]])
    targets = {name: torch.empty(models.experts[0].shape(name)) for name in models.names}
    loading = time.perf_counter()
    warm = MergeSession(models, targets, compiling=compiling)
    print(f"loading the session: {time.perf_counter() - loading:.2f} s")
    ties = get_method("ties")
    first = seconds(lambda: warm.merge(ties, {}))
    print(f"first merge, {warm.path}: {first:.2f} s")
    second = seconds(lambda: warm.merge(ties, {"density": 0.05}))
    print(f"second density, magnitudes grouped: {second:.2f} s")
    medians = {name: statistics.median(found) for name, found in steps(warm, targets, rounds).items()}
    for name, beside in (("lambda alone", "add"), ("density and lambda", "read")):
        ratio = medians[name] / medians[beside]
        print(f"{name}: {medians[name]:.3f} s, {ratio:.2f} times {beside} ({medians[beside]:.3f} s)", flush=True)


def main() -> None:
    """Run a session of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/bert-base"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folders = build("bert-base", args.folder)
    for compiling in (False, True):
        session(folders, args.rounds, compiling=compiling)


if __name__ == "__main__":
    main()
