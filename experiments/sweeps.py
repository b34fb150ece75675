"""Compare samplers, and pruning on with pruning off, on the miniature RTE; write experiments/SWEEPS.md.

Usage:
    python experiments/sweeps.py                            # five seeds, 50 trials each
    python experiments/sweeps.py --seeds 1 --trials 10      # a quick look
    python experiments/sweeps.py --work outputs/compared     # keeps what is done: started again, it goes on from there

Each row is the command ``python -m mergelab -m sweep=ties task=rte source=mini ...`` with the options that the page
shows, run in this one process so that models are loaded once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU seconds of one thread can be compared
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "experiments" / "SWEEPS.md"
RECORDED = "## Evaluations compared on recorded sweeps"
GRID = ("sweep.sampler=grid", "method.lambda=range(0.2,2.1,0.2)", "method.density=range(0.1,1.0,0.2)")
SWEEPS: Mapping[str, tuple[str, ...]] = {
    "grid": (*GRID, "sweep.pruner=none"),
    "gp": ("sweep.sampler=gp", "sweep.pruner=none"),
    "tpe": ("sweep.sampler=tpe", "sweep.pruner=none"),
    "tpe, wilcoxon": ("sweep.sampler=tpe", "sweep.pruner=wilcoxon"),
    "tpe, futility (default)": ("sweep.sampler=tpe", "sweep.pruner=futility"),
}
HEAD = """\
# Samplers and pruning compared

Written by a script; do not edit. Measured on {day} on the CPU, one thread, with {versions}:

```bash
{command}
```

TIES on the miniature RTE (five experts; 250 examples select, 250 others report), {trials} trials per sweep, means over
{seeds} seeds ± their standard deviation. A seed draws the hold-out, the order of the examples and the sampler's points.

| sweep | best selection score | its report score | examples measured | of all | CPU s |
| --- | --- | --- | --- | --- | --- |
{rows}

- Every sweep is `python -m mergelab -m sweep=ties task=rte source=mini sweep.n_trials={trials} seed=<seed>` with
{options}
- The other samplers start from the paper's λ = 1 and density 0.2, which is not among the grid's 50 points.
- "examples measured" counts those that trials select on, "of all" is their share of what {trials} whole trials measure.
- CPU seconds are of the whole sweep, its report included; the base and the experts come from the cache of scores.
{verdict}
"""


def run(name: str, seed: int, trials: int, work: Path) -> dict[str, float]:
    """Run one sweep, or read what it found when it was run before."""
    folder = work / f"{name.replace(', ', '-').partition(' ')[0]}-{seed}-{trials}"
    record = folder / "record.json"
    if record.exists():
        found: dict[str, float] = json.loads(record.read_text())
        return found
    started = time.process_time()
    _mergelab(
        "-m", "sweep=ties", "task=rte", "source=mini", f"sweep.n_trials={trials}", f"seed={seed}", "tracking=none",
        "sweep.study_name=s", f"sweep.storage=journal:{folder / 'study.log'}", f"hydra.sweep.dir={folder}",
        *SWEEPS[name],
    )  # fmt: skip
    seconds = time.process_time() - started
    outcomes = _outcomes(folder / "study.log")
    winner = json.loads((folder / "result.json").read_text())["models"][-1]["results"]["rte"]
    found = {
        "select": max(outcome["values"][0] for outcome in outcomes if outcome["pruned_at"] is None),
        "report": winner["report"]["accuracy"]["value"],
        "examples": sum(outcome["pruned_at"] or outcome["examples"] for outcome in outcomes),
        "whole": sum(outcome["examples"] for outcome in outcomes),
        "seconds": seconds,
    }
    record.write_text(json.dumps(found))
    return found


def _mergelab(*arguments: str) -> None:
    from hydra.core.global_hydra import GlobalHydra

    from mergelab.__main__ import main

    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, ["mergelab", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    finally:
        sys.argv = before


def _outcomes(log: Path) -> list[dict[str, Any]]:
    import optuna

    from mergelab.sweep.storage import open_storage
    from mergelab.sweep.study import OUTCOME

    study = optuna.load_study(storage=open_storage(f"journal:{log}"), study_name="s")
    return [trial.user_attrs[OUTCOME] for trial in study.trials]


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Write the page's rows."""
    rows = []
    for name, sweeps in found.items():
        scores = [_spread([sweep[key] for sweep in sweeps], 4) for key in ("select", "report")]
        share = fmean(sweep["examples"] / sweep["whole"] for sweep in sweeps)
        examples = _spread([sweep["examples"] for sweep in sweeps], 0)
        seconds = _spread([sweep["seconds"] for sweep in sweeps], 1)
        rows.append(f"| {name} | {scores[0]} | {scores[1]} | {examples} | {share:.0%} | {seconds} |")
    return "\n".join(rows)


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def verdict(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Say how pruning did, seed by seed."""
    lines = []
    for name in ("tpe, wilcoxon", "tpe, futility (default)"):
        differences = [on["select"] - off["select"] for on, off in zip(found[name], found["tpe"], strict=True)]
        told = ", ".join(f"{difference:+.4f}" for difference in differences)
        lines.append(f"- {name}: best selection score beside that of tpe without pruning, seed by seed: {told}.")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--work", type=Path, help="keep the studies in this folder")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = (given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        work.mkdir(parents=True, exist_ok=True)
        os.chdir(work)
        _mergelab("method=soup", "task=rte", "source=mini", "tracking=none")  # builds the miniature, fills the cache
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SWEEPS}
        for seed in range(given.seeds):
            for name in SWEEPS:
                found[name].append(run(name, seed, given.trials, work))
                sys.stderr.write(f"{name}, seed {seed}: {found[name][-1]}\n")
    whole = (given.seeds, given.trials) == (5, 50)
    page = HEAD.format(
        day=date.today().isoformat(),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "optuna")),
        command="python experiments/sweeps.py" + ("" if whole else f" --seeds {given.seeds} --trials {given.trials}"),
        trials=given.trials,
        seeds=given.seeds,
        rows=table(found),
        options="\n".join(f"  `{' '.join(options)}` ({name})," for name, options in SWEEPS.items()).rstrip(",") + ".",
        verdict=verdict(found),
    )
    _, heading, recorded = PAGE.read_text().partition(RECORDED)  # what adaptive.py has written
    PAGE.write_text(page + (f"\n{heading}{recorded}" if heading else ""))


if __name__ == "__main__":
    main()
