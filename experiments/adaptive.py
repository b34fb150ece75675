"""Compare how much of a sweep's trials is measured, on recorded sweeps: no model is run.

Usage:
    python experiments/adaptive.py                     # all recorded sweeps of experiments/matrices, 20 orders each
    python experiments/adaptive.py --orders 2 --page look.md experiments/matrices/mini_rte_ties.parquet
    python experiments/adaptive.py --record rte.parquet task=rte source=mini sweep=ties sweep.n_trials=150

A simulated sweep takes the trials of a recorded one (`recorded.py`) in a random order. It is judged by the score of the
trial that it chooses, below that of the best of its trials (the regret), and by the share of the examples that it
measures. `simulated.py` has the ways.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import figures  # noqa: E402
from experiments.recorded import Recorded, record  # noqa: E402
from experiments.simulated import WAYS, Simulated, takes_answers  # noqa: E402

MATRICES = ROOT / "experiments" / "matrices"
PAGE = ROOT / "experiments" / "SWEEPS.md"
FIGURE = ROOT / "docs" / "images" / "evaluations.png"
HEADING = "## Evaluations compared on recorded sweeps"
TRIALS = (50, 100)
SECTION = """\
{heading}

Written by `python experiments/adaptive.py{given}`, which runs no model: the sweeps of `experiments/matrices` were
measured whole once, at random points, and their trials are taken in {orders} random orders.

![Regret over the share of the examples that is measured, for each recorded sweep]({figure})

| sweep | trials × examples | evaluation | measured | regret, points | worst | 95 % intervals that hold |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{verdict}
- "measured" is the share of all examples of all trials, whole trials and finalists included.
- The regret is the best trial's selection score minus that of the trial chosen, with a 95 % interval over the orders.
- "random subset": all trials on the same random examples, and the best of them whole. Its choice is that one.
- "MERGE³'s estimate": the same subset, and the best by an item response model whose ability of a merge is combined from
  the experts' (Mencattini et al. 2025, arXiv:2502.10436; `irt.py` says what the paper leaves open). It is of right and
  wrong answers. Its evolution of merges is no part of this.
{about}
- The settings of adaptive evaluation were chosen on `mini_rte_ties`, `sst2_minilm_ties` and `mrpc_minilm_ties`, how
  correlations are estimated and how wide their intervals are on `stsb_minilm_ties`. Nothing was changed for the others.
- Trials at random points are an easy case for `pruned`: those of a sampler come near the best one, and stop later.
"""
ABOUT = {
    "mini_rte_ties": "the miniature's RTE, accuracy: TIES merges of its five experts. It is generated text.",
    "mini_samsum_ties": "the miniature's summaries, ROUGE-L: TIES merges of three experts. It is generated text.",
    "sst2_minilm_ties": "SST-2, likewise, on all sentences.",
    "mrpc_minilm_ties": "MRPC, accuracy: TIES merges of three MiniLM experts of other seeds.",
    "rte_minilm_ties": "RTE, likewise; its experts are hardly above chance.",
    "stsb_minilm_ties": "STS-B, likewise, Pearson's correlation, of 1,000 pairs.",
    "suite_minilm_ties": "a suite of six GLUE tasks, an expert and 150 examples of each: the mean of metrics.",
}


@dataclass(frozen=True)
class Row:
    """How one way did on one sweep: a value for each order."""

    sweep: str
    size: tuple[int, int]
    way: str
    shares: tuple[float, ...]
    regrets: tuple[float, ...]
    held: tuple[bool, ...]

    @property
    def half(self) -> float:
        """Half the width of the regret's 95 % interval."""
        return float(1.96 * np.std(self.regrets) / np.sqrt(len(self.regrets)))

    def written(self) -> str:
        """Return the table's row."""
        held = f"{fmean(self.held):.1%} of {len(self.held)}" if self.held else ""
        trials, examples = self.size
        return (
            f"| {self.sweep} | {trials} × {examples} | {self.way} | {fmean(self.shares):.1%} | "
            f"{100 * fmean(self.regrets):.2f} ± {100 * self.half:.2f} | {100 * max(self.regrets):.2f} | {held} |"
        )


def compare(recorded: Recorded, trials: int, orders: int) -> list[Row]:
    """Return how all ways do on a sweep of so many of its trials."""
    rows = []
    for name, way in WAYS.items():
        if name.startswith("MERGE³") and not takes_answers(recorded):
            continue
        found: list[tuple[Recorded, Simulated]] = []
        for seed in range(orders):
            own = recorded.ordered(np.random.default_rng(seed).permutation(len(recorded.points))[:trials])
            found.append((own, way(own, seed)))
        shares = tuple(one.used / (trials * own.size) for own, one in found)
        regrets = tuple(float(own.values.max()) - max(one.whole.values()) for own, one in found)
        held = tuple(abs(value - truth) <= half for _, one in found for value, half, truth in one.estimates)
        rows.append(Row(recorded.name, (trials, recorded.size), name, shares, regrets, held))
        print(rows[-1].written(), flush=True)
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """Say what adaptive and pruned evaluation measure and lose on average over the sweeps of each length."""
    lines = []
    for trials in sorted({row.size[0] for row in rows}):
        told = []
        for way in ("pruned", "adaptive"):
            own = [row for row in rows if row.way == way and row.size[0] == trials]
            share, regret = (fmean(fmean(values) for values in each) for each in zip(
                *((row.shares, row.regrets) for row in own), strict=True))  # fmt: skip
            told.append(f"{way} {share:.1%} of the examples, {100 * regret:.2f} points")
        lines.append(f"- Mean share and mean regret over the sweeps of {trials} trials: {'; '.join(told)}.")
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw a panel for each sweep, of its greatest number of trials: regret over the share that is measured."""
    longest = {row.sweep: max(other.size[0] for other in rows if other.sweep == row.sweep) for row in rows}
    columns = min(len(longest), 4)
    figure, axes = figures.panels(-(-len(longest) // columns), columns)
    for axis in axes.flat[len(longest) :]:
        axis.axis("off")
    for axis, (sweep, trials) in zip(axes.flat, longest.items(), strict=False):
        own = [row for row in rows if row.sweep == sweep and row.size[0] == trials]
        for prefix, style in (("random subset", "C0o-"), ("MERGE³'s estimate", "C1s-")):
            _draw(axis, prefix, [row for row in own if row.way.startswith(prefix)], style, size=3)
        for way, style in (("full", "k*"), ("pruned", "C2D"), ("adaptive", "C3P")):
            _draw(axis, way, [row for row in own if row.way == way], style, size=7)
        axis.set_xscale("log")
        axis.set_xticks([0.05, 0.1, 0.2, 0.4, 1], ["5 %", "10 %", "20 %", "40 %", "100 %"])
        axis.minorticks_off()
        figures.describe(axis, f"{sweep}, {trials} × {own[0].size[1]}", "examples measured", "regret, points")
    figures.save(figure, file)


def _draw(axis: Any, label: str, rows: Sequence[Row], style: str, size: float) -> None:
    if rows:
        shares, regrets = ([fmean(getattr(row, name)) for row in rows] for name in ("shares", "regrets"))
        errors = [100 * row.half for row in rows]
        points = [100 * regret for regret in regrets]
        axis.errorbar(shares, points, yerr=errors, fmt=style, label=label, markersize=size, linewidth=1, capsize=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, help="the file to write a recorded sweep to; the rest are its overrides")
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--page", type=Path, default=PAGE, help="writes elsewhere, and the figure beside it")
    parser.add_argument("given", nargs="*")
    options = parser.parse_args(arguments)
    if options.record:
        record(options.record, options.given)
        return
    files = [Path(one) for one in options.given] or sorted(MATRICES.glob("*.parquet"))
    rows: list[Row] = []
    for file in files:
        recorded = Recorded.read(file)
        for trials in sorted({min(each, len(recorded.points)) for each in TRIALS}):
            rows += compare(recorded, trials, options.orders)
    own = options.page == PAGE
    picture = FIGURE if own else options.page.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, picture)
    names = list(dict.fromkeys(row.sweep for row in rows))
    about = "\n".join(f"- `{name}` is {ABOUT[name]}" for name in names if name in ABOUT)
    told = SECTION.format(
        heading=HEADING, orders=options.orders, rows="\n".join(row.written() for row in rows), verdict=verdict(rows),
        about=about, figure="../docs/images/evaluations.png" if own else picture.name,
        given="" if options.orders == parser.get_default("orders") else f" --orders {options.orders}",
    )  # fmt: skip
    above = options.page.read_text().partition(HEADING)[0] if options.page.is_file() else ""
    options.page.write_text(f"{above.rstrip()}\n\n{told}".lstrip())


if __name__ == "__main__":
    main()
