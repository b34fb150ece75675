"""Compare samplers, and how much of a trial is measured, on the miniature; write experiments/SWEEPS.md and its figure.

Usage:
    python experiments/sweeps.py                             # every setting with its seeds and trials
    python experiments/sweeps.py --seeds 1 --trials 10 --page look.md     # a quick look: look.md and look.png
    python experiments/sweeps.py --work outputs/compared     # keeps what is done: started again, it goes on from there

Each row is the command ``python -m mergelab -m sweep=ties task=rte source=mini ...`` with the options that the page
shows, run in this one process so that models are loaded once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU seconds of one thread can be compared
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import figures  # noqa: E402

if TYPE_CHECKING:
    from mergelab.sweep.run import FinishedSweep
    from mergelab.sweep.study import SweepStudy

Array = np.ndarray[Any, Any]

PAGE = ROOT / "experiments" / "SWEEPS.md"
FIGURE = ROOT / "docs" / "images" / "sweeps.png"
RECORDED = "## Evaluations compared on recorded sweeps"  # from here on adaptive.py writes the page
GRID = ("sweep.sampler=grid", "method.lambda=range(0.2,2.1,0.2)", "method.density=range(0.1,1.0,0.2)")
WAYS: Mapping[str, tuple[str, ...]] = {
    "grid, full": (*GRID, "sweep.evaluation=full"),
    "gp, full": ("sweep.sampler=gp", "sweep.evaluation=full"),
    "tpe, full": ("sweep.sampler=tpe", "sweep.evaluation=full"),
    "tpe, pruned by wilcoxon": ("sweep.sampler=tpe", "sweep.evaluation=pruned", "sweep.pruner=wilcoxon"),
    "tpe, pruned": ("sweep.sampler=tpe", "sweep.evaluation=pruned", "sweep.pruner=futility"),
    "tpe, adaptive": ("sweep.sampler=tpe", "sweep.evaluation=adaptive"),
    "gp, adaptive": ("sweep.sampler=gp", "sweep.evaluation=adaptive"),
    "random, adaptive": ("sweep.sampler=random", "sweep.evaluation=adaptive"),
}
LINES = ("tpe, full", "tpe, pruned", "tpe, adaptive")  # of the figure
LEAST_SHARE = 0.1  # where they begin: the first trials' scores would take all of its height
COMPARED = (
    ("tpe, pruned by wilcoxon", "tpe, full"),
    ("tpe, pruned", "tpe, full"),
    ("tpe, adaptive", "tpe, full"),
    ("tpe, adaptive", "tpe, pruned"),
    ("gp, adaptive", "gp, full"),
)


@dataclass(frozen=True)
class Setting:
    """What sweeps are compared on.

    Attributes:
        name: of the setting, short.
        title: of its section and its panel.
        about: what is merged and measured.
        arguments: of the command, besides those of a row.
        seeds, trials: how many, where the command line does not say it.
    """

    name: str
    title: str
    about: str
    arguments: tuple[str, ...]
    seeds: int
    trials: int


SETTINGS = (
    Setting(
        "rte",
        "TIES on the miniature's RTE",
        "Accuracy of five merged classifiers; 250 examples select, 250 others report",
        ("sweep=ties", "task=rte", "source=mini"),
        seeds=5,
        trials=50,
    ),
    Setting(
        "samsum",
        "TIES on the miniature's SAMSum",
        "ROUGE-L of the texts of three merged summarisers; 100 examples select, 100 others report",
        ("sweep=ties", "task=samsum", "source=mini"),
        seeds=4,
        trials=50,
    ),
)


@dataclass(frozen=True)
class Measured:
    """What one sweep has found, and what it took.

    Attributes:
        select: the winner's selection score.
        report: the winner's score on the examples that report.
        examples: how many were measured for selecting, finalists included.
        whole: how many there are for whole trials.
        seconds: of the CPU.
        curve: after each measurement, the examples so far and the best selection score of a whole trial.
    """

    select: float
    report: float
    examples: int
    whole: int
    seconds: float
    curve: Sequence[tuple[int, float]]

    @property
    def share(self) -> float:
        """The share of all examples that was measured."""
        return self.examples / self.whole

    def best_at(self, shares: Array) -> Array:
        """Return the best selection score of a whole trial after these ``shares`` (k,) of all examples."""
        examples, best = np.array(self.curve, np.float64).T
        found: Array = best[np.searchsorted(examples / self.whole, shares + 1e-9) - 1]
        return found


# --------------------------------------------------------------------------------------------------------- the sweeps


def run(setting: Setting, name: str, seed: int, trials: int, work: Path) -> Measured:
    """Run one sweep, or read what it found when it was run before."""
    folder = folder_of(setting, name, seed, trials, work)
    record = folder / "record.json"
    if record.exists():
        return Measured(**json.loads(record.read_text()))
    started = time.process_time()
    finished: FinishedSweep = _mergelab(
        True, *setting.arguments, *WAYS[name], f"sweep.n_trials={trials}", f"seed={seed}", "sweep.study_name=s",
        f"sweep.storage=journal:{folder / 'study.log'}", f"hydra.sweep.dir={folder}",
    )  # fmt: skip
    seconds = time.process_time() - started
    score = finished.reports[0].result.merged.score
    assert score is not None  # its task has a metric
    found = measured(finished.study, trials, score, seconds)
    record.write_text(json.dumps(asdict(found)))
    return found


def folder_of(setting: Setting, name: str, seed: int, trials: int, work: Path) -> Path:
    """Return the folder of one sweep."""
    return work / re.sub(r"\W+", "-", f"{setting.name} {name} {seed} {trials}")


def _mergelab(multirun: bool, *overrides: str) -> Any:
    from mergelab.cli.run import experiment_or_trial
    from mergelab.console.progress import silenced
    from mergelab.notebook.launch import run_many, run_one

    with silenced():
        return (run_many if multirun else run_one)([*overrides, "tracking=none"], experiment_or_trial)


def measured(study: SweepStudy, trials: int, report: float, seconds: float) -> Measured:
    """Return what a sweep has found, of its study, its winner's score on the examples that report, and its seconds.

    A trial that was measured whole after it was stopped counts twice: with the examples that it was measured on before,
    and with the rest.
    """
    from mergelab.sweep.outcome import TrialOutcome

    outcomes = [TrialOutcome.read(stored) for stored in study.outcomes()]
    best = study.best()
    assert best is not None  # without one there is an error, and no report
    curve: list[tuple[int, float]] = []
    for outcome in outcomes:
        examples, highest = curve[-1] if curve else (0, -np.inf)
        value = outcome.values[0] if outcome.pruned_at is None else -np.inf
        curve.append((examples + outcome.measured, max(highest, value)))
    return Measured(best.values[0], report, curve[-1][0], trials * outcomes[0].examples, seconds, curve)


# ----------------------------------------------------------------------------------------------------------- the page

Found = Mapping[Setting, Mapping[str, Sequence[Measured]]]

HEAD = """\
# Samplers and evaluations compared

Written by a script; do not edit. Measured on {day} on the CPU, one thread, with {versions}:

```bash
{command}
```

![Best selection score over the share of the examples that was measured]({figure})

The lines are means over the seeds, the bands one standard error to both sides. A line has the best selection score of
the trials that had been measured whole by then; it begins after {least:.0%} of the examples. It ends with a dot: the
mean share of the examples that a sweep measured, and the mean selection score of its winner. Each seed draws another
hold-out, and the bands have the difference between these. The lists below compare sweeps of the same seed.

{sections}
## How these sweeps were measured

- A seed draws the hold-out, the order of the examples and the sampler's points. Tables have means over the seeds ±
  their standard deviation.
- The command of a row is that of its section with
{options}
- All samplers but the grid start from the paper's λ = 1 and density 0.2, which is not among the grid's 50 points.
- "best selection score" is the winner's: the best of the trials that were measured whole. With adaptive evaluation some
  are measured whole in the end.
- "examples measured" counts those that select, the rest of the examples of such finalists included. "of all" is their
  share of what whole trials measure.
- CPU seconds are of the whole sweep, its report included; the base and the experts come from the cache of scores.
"""
SECTION = """\
## {title}

{about}. {trials} trials per sweep, {seeds} seed{s}:
`python -m mergelab -m {arguments} sweep.n_trials={trials} seed=<seed>`

| sweep | best selection score | its report score | examples measured | of all | CPU s |
| --- | --- | --- | --- | --- | --- |
{rows}

The first trial of all but the grid, the paper's point, has a selection score of {first}.
Best selection scores and shares of the examples, seed by seed:

{verdict}
"""


def section(setting: Setting, sweeps: Mapping[str, Sequence[Measured]], trials: int) -> str:
    """Write a setting's section."""
    whole = sweeps["tpe, full"]
    return SECTION.format(
        title=setting.title,
        about=setting.about,
        trials=trials,
        seeds=len(whole),
        s="s" * (len(whole) > 1),
        first=_spread([sweep.curve[0][1] for sweep in whole], 4),
        arguments=" ".join(setting.arguments),
        rows="\n".join(row(name, each) for name, each in sweeps.items()),
        verdict="\n".join(verdict(*names, sweeps) for names in COMPARED),
    )


def row(name: str, sweeps: Sequence[Measured]) -> str:
    """Write a table's row."""
    select, report = (_spread([getattr(sweep, key) for sweep in sweeps], 4) for key in ("select", "report"))
    examples = _spread([sweep.examples for sweep in sweeps], 0)
    share = fmean(sweep.share for sweep in sweeps)
    seconds = _spread([sweep.seconds for sweep in sweeps], 1)
    return f"| {name} | {select} | {report} | {examples} | {share:.0%} | {seconds} |"


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def verdict(name: str, other: str, sweeps: Mapping[str, Sequence[Measured]]) -> str:
    """Say how the sweeps of one row did beside those of another one, seed by seed."""
    differences = [one.select - two.select for one, two in zip(sweeps[name], sweeps[other], strict=True)]
    scores = ", ".join(f"{difference:+.4f}" for difference in differences)
    own, others = (", ".join(f"{sweep.share:.0%}" for sweep in sweeps[key]) for key in (name, other))
    mean = f"mean {fmean(differences):+.4f}"
    return f"- **{name}** minus **{other}**: {scores}; {mean}. Examples: {own}, against {others}."


def draw(found: Found, file: Path) -> None:
    """Draw the best selection score over the share of the examples: a panel for each setting, a line for each way."""
    figure, axes = figures.panels(1, len(found), 4.4, 3.4)
    for axis, (setting, sweeps) in zip(axes[0], found.items(), strict=True):
        for name in LINES:
            shares, best, error = mean_curve(sweeps[name])
            (line,) = axis.plot(100 * shares, best, label=name)
            axis.fill_between(100 * shares, best - error, best + error, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.plot(100 * shares[-1], best[-1], "o", color=line.get_color())
        figures.describe(axis, setting.title, "examples measured, % of all", "best selection score")
    figures.save(figure, file)


def mean_curve(sweeps: Sequence[Measured]) -> tuple[Array, Array, Array]:
    """Return shares of the examples (k,), the mean of the best scores there (k,), and its standard error (k,).

    The last ones are the mean share that the sweeps measured in all, and the mean of what they selected. A sweep that
    ended before has its winner's score.
    """
    last = fmean(sweep.share for sweep in sweeps)
    first = max(LEAST_SHARE, *(sweep.curve[0][0] / sweep.whole for sweep in sweeps))
    shares = np.linspace(min(first, last), last, 500)
    best = np.array([sweep.best_at(shares) for sweep in sweeps])
    best[:, -1] = [sweep.select for sweep in sweeps]
    deviation = best.std(axis=0, ddof=1) if len(sweeps) > 1 else np.zeros(len(shares))
    return shares, best.mean(axis=0), deviation / np.sqrt(len(sweeps))


# ----------------------------------------------------------------------------------------------------------- the whole


def run_all(seeds: int | None, trials: int | None, work: Path) -> Found:
    """Run every sweep of every setting, with its files in the folder ``work``."""
    found: dict[Setting, dict[str, list[Measured]]] = {}
    for setting in SETTINGS:
        one = [argument for argument in setting.arguments if not argument.startswith("sweep=")]
        _mergelab(False, "method=soup", *one)  # builds the miniature, fills the cache
        found[setting] = {name: [] for name in WAYS}
        for seed in range(seeds or setting.seeds):
            for name in WAYS:
                sweep = run(setting, name, seed, trials or setting.trials, work)
                found[setting][name].append(sweep)
                took = f"{sweep.share:.0%} of the examples, {sweep.seconds:.1f} CPU s"
                sys.stderr.write(f"{setting.name}, {name}, seed {seed}: {sweep.select:.4f}, {took}\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="of every setting, in place of its own number")
    parser.add_argument("--trials", type=int, help="of every sweep, in place of its setting's own number")
    parser.add_argument("--work", type=Path, help="keep the studies in this folder")
    parser.add_argument("--page", type=Path, default=PAGE, help="write this file, with its figure beside it")
    given = parser.parse_args(arguments)
    page = given.page.resolve()
    figure = FIGURE if page == PAGE else page.with_suffix(".png")
    with contextlib.ExitStack() as stack:
        work = (given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        work.mkdir(parents=True, exist_ok=True)
        stack.enter_context(contextlib.chdir(work))  # outputs/ of the commands is there
        found = run_all(given.seeds, given.trials, work)
    draw(found, figure)
    asked = [f" --{key} {value}" for key in ("seeds", "trials") if (value := getattr(given, key))]
    text = HEAD.format(
        day=date.today().isoformat(),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "optuna")),
        command="python experiments/sweeps.py" + "".join(asked),
        figure=os.path.relpath(figure, page.parent),
        least=LEAST_SHARE,
        sections="\n".join(
            section(setting, sweeps, given.trials or setting.trials) for setting, sweeps in found.items()
        ),
        options="\n".join(f"  `{' '.join(options)}` ({name})," for name, options in WAYS.items()).rstrip(",") + ".",
    )
    _, heading, recorded = page.read_text().partition(RECORDED) if page.exists() else ("", "", "")
    page.write_text(text + (f"\n{heading}{recorded}" if heading else ""))


if __name__ == "__main__":
    main()
