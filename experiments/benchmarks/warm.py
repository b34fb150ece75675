"""Time the steps of a sweep in a warm session: λ alone, and density with λ, beside what memory allows.

Usage:
    python experiments/benchmarks/warm.py --folder outputs/benchmarks/bert-base --rounds 5

"add" is one torch.add for each parameter, into the parameters; "add, flat" one over as many entries in one piece;
"read" a sum over the experts' task vectors, each in one piece. All in this process, in turn with the steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from model_sets import build

from mergelab.methods.registry import get_method
from mergelab.methods.warm import Warm
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Load, step, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/bert-base"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    base, *experts = build("bert-base", args.folder)
    models = align(open_checkpoint(base, "base"), [open_checkpoint(folder) for folder in experts])
    targets = {name: torch.empty(models.experts[0].shape(name)) for name in models.names}
    loading = time.perf_counter()
    warm = Warm(models, targets)
    print(f"loading the session: {time.perf_counter() - loading:.2f} s")
    start, *ends = (
        torch.cat([source.get(name).reshape(-1) for name in models.names])
        for source in (warm.models.base, *warm.models.experts)
        if source is not None
    )
    vectors = [end - start for end in ends]
    total = torch.empty_like(start)
    ties = get_method("ties")
    print(f"first merge: {seconds(lambda: warm.merge(ties, {})):.2f} s")
    second = {"density": 0.05}
    print(f"second density, task vectors sorted: {seconds(lambda: warm.merge(ties, second)):.2f} s")
    parts = [(start[:0], start[:0], start[:0])]
    for name in models.names:
        assert warm.models.base is not None
        parts.append((warm.models.base.get(name), warm.models.experts[0].get(name), targets[name]))
    kinds = ("add", "add, flat", "lambda alone", "read", "density and lambda")
    figures: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(args.rounds):
        density, scale = 0.1 + 0.05 * index, 0.5 + 0.1 * index
        figures["add"].append(seconds(lambda: [torch.add(left, right, out=into) for left, right, into in parts]))
        figures["add, flat"].append(seconds(lambda: torch.add(start, vectors[0], out=total)))
        figures["read"].append(seconds(lambda: [vector.sum() for vector in vectors]))
        step = {"density": density, "lambda": scale}
        figures["density and lambda"].append(seconds(lambda step=step: warm.merge(ties, step)))
        step = {"density": density, "lambda": scale + 0.01}
        figures["lambda alone"].append(seconds(lambda step=step: warm.merge(ties, step)))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    for name, beside in (("lambda alone", "add"), ("lambda alone", "add, flat"), ("density and lambda", "read")):
        ratio = medians[name] / medians[beside]
        print(f"{name}: {medians[name]:.3f} s, {ratio:.2f} times {beside} ({medians[beside]:.3f} s)")


if __name__ == "__main__":
    main()
