"""Compare how much of a sweep's trials is measured, on recorded sweeps: no model is run.

Usage:
    python experiments/adaptive.py                         # all recorded sweeps of experiments/matrices, 20 orders each
    python experiments/adaptive.py --record rte.parquet task=rte source=mini sweep=ties sweep.n_trials=150

A recorded sweep is a Parquet file with a row for each model: its ``role`` (``trial``, ``base`` or ``expert``) and its
``scores``, one for each selecting example. A simulated sweep takes its trials in a random order. It is judged by the
score of the trial that it chooses, below that of the best of its trials (the regret), and by the share of the examples
that it measures. `mergelab.sweep.adaptive` itself decides; what is here only looks the scores up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import irt  # noqa: E402
from mergelab.sweep.adaptive import finalists as chosen  # noqa: E402
from mergelab.sweep.adaptive.history import MeasuredTrial  # noqa: E402
from mergelab.sweep.adaptive.policy import POLICY  # noqa: E402
from mergelab.sweep.adaptive.reporter import AdaptiveReporter  # noqa: E402
from mergelab.sweep.futility import Futility  # noqa: E402
from mergelab.sweep.reporting import Pruned  # noqa: E402
from mergelab.tasks.spec import TaskSpec  # noqa: E402

MATRICES = ROOT / "experiments" / "matrices"
PAGE = ROOT / "experiments" / "SWEEPS.md"
HEADING = "## Evaluations compared on recorded sweeps"
SECTION = """\
{heading}

Written by `python experiments/adaptive.py --orders {orders} --trials {trials}`, which runs no model: the sweeps of
`experiments/matrices` were measured whole once, at random points, and their trials are taken in {orders} random orders.

| sweep | trials × examples | evaluation | measured | regret, points | worst | 95 % intervals that hold |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

- "measured" is the share of all examples of all trials, whole trials and finalists included.
- The regret is the best trial's selection score minus that of the trial chosen, with a 95 % interval over the orders.
- "random subset": all trials on the same 20 % of the examples, and the best of them whole. Its choice is that one.
- "MERGE³'s estimate": the same subset, and the best by an item response model whose ability of a merge is combined from
  the experts' (Mencattini et al. 2025, arXiv:2502.10436; `irt.py` says what the paper leaves open). Its evolution of
  merges is no part of this.
- `mini_rte_ties` is the miniature's RTE: 150 TIES merges of its five experts, their base and experts. It is generated
  text. `sst2_minilm_ties` is SST-2: 28 TIES merges of three MiniLM experts, each fine-tuned on 1500 other sentences, on
  all validation sentences; `--record` with `task=sst2 eval.protocol=oracle sweep=ties sweep.sampler=random` and the
  experts wrote it. Of so few trials the whole ones, two at first and the finalists, are a good part.
- The settings of adaptive evaluation were chosen on `mini_rte_ties`, those of its intervals on synthetic sweeps too.
- No generation task has been recorded so far.
- Trials at random points are an easy case for `pruned`: those of a sampler come near the best one, and stop later (44%
  above).
"""
METRIC = "exact_match"  # the mean of an example's scores
SPEC = TaskSpec(name="recorded", version=1, kind="generation", metrics=(METRIC,), primary=METRIC)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recorded:
    """A recorded sweep.

    Attributes:
        name: the file's.
        trials: (t, n) scores.
        points: (t, d) of the trials, in the unit cube.
        models: (e, n) scores of base and experts.
    """

    name: str
    trials: Array
    points: Array
    models: Array

    @classmethod
    def read(cls, file: Path) -> Recorded:
        """Read a Parquet file."""
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
        scores = {role: [row["scores"] for row in rows if row["role"] == role] for role in ("trial", "base", "expert")}
        models = np.array([*scores["base"], *scores["expert"]], np.float64)
        trials = np.array(scores["trial"], np.float64)
        points = np.array([row["point"] for row in rows if row["role"] == "trial"], np.float64)
        return cls(file.stem, trials, points, models.reshape(-1, trials.shape[1]))

    def ordered(self, order: Array) -> Recorded:
        """Return the sweep with its trials in an order."""
        return replace(self, trials=self.trials[order], points=self.points[order])


@dataclass
class Simulated:
    """What a simulated sweep has measured: the number of examples, its whole trials' values, estimates that it made."""

    used: int
    whole: dict[int, float]
    estimates: list[tuple[float, float, float]]  # value, half of the interval's width, the score that comes out


def full(sweep: Recorded, seed: int) -> Simulated:
    """Measure every trial whole."""
    return Simulated(sweep.trials.size, dict(enumerate(sweep.trials.mean(axis=1))), [])


def pruned(sweep: Recorded, seed: int) -> Simulated:
    """Stop a trial for futility, asked after every eight examples in random order."""
    rng, pruner, found = np.random.default_rng(seed), Futility(), Simulated(0, {}, [])
    best: Array | None = None
    for number, scores in enumerate(sweep.trials):
        order, count = rng.permutation(len(scores)), len(scores)
        for end in range(8, count, 8) if best is not None else ():
            if pruner.is_futile((scores - best)[order[:end]], count - end):
                found.used += end
                break
        else:
            found.used += count
            found.whole[number] = float(scores.mean())
            best = scores if best is None or scores.mean() > best.mean() else best
    return found


def adaptive(sweep: Recorded, seed: int) -> Simulated:
    """Measure the trials as ``sweep.evaluation=adaptive`` does."""
    history: list[MeasuredTrial] = []
    found = Simulated(0, {}, [])
    rows = [{METRIC: model[:, None]} for model in sweep.models]
    for number in range(len(sweep.trials)):
        history.append(_trial(sweep, number, history, rows, seed, found))
    for _ in range(POLICY.finalists):
        likely = chosen.likely_best(SPEC, METRIC, history, rows)
        if not likely:
            break
        found.used += sweep.trials.shape[1] - len(history[likely[0]].positions)
        history[likely[0]] = _whole(sweep, likely[0])
    found.whole = {one.number: one.value for one in history if one.whole}
    return found


def _trial(
    sweep: Recorded, number: int, history: Sequence[MeasuredTrial], rows: Any, seed: int, found: Simulated
) -> MeasuredTrial:
    scores, point = sweep.trials[number], sweep.points[number]
    reporter = AdaptiveReporter(SPEC, METRIC, list(history), rows, len(scores), (seed, number), point)
    rounds = np.zeros(len(scores), np.int64) if reporter.rounds is None else reporter.rounds
    seen = np.empty(0, np.int64)
    try:
        for one in np.unique(rounds):
            members = np.flatnonzero(rounds == one)
            seen = np.sort(np.concatenate([seen, members]))
            reporter.report(members, scores[members])
    except Pruned:
        statistics = {METRIC: scores[seen, None]}
        (estimate,) = reporter.estimates(seen, statistics, np.zeros(len(scores), np.int64)).values()
        found.used += len(seen)
        assert estimate.low is not None
        found.estimates.append((estimate.value, estimate.value - estimate.low, float(scores.mean())))
        return MeasuredTrial(number, estimate.value, seen, statistics, len(scores), whole=False, point=point)
    found.used += len(scores)
    return _whole(sweep, number)


def _whole(sweep: Recorded, number: int) -> MeasuredTrial:
    scores = sweep.trials[number]
    rows, everything = {METRIC: scores[:, None]}, np.arange(len(scores))
    value, point = float(scores.mean()), sweep.points[number]
    return MeasuredTrial(number, value, everything, rows, len(scores), whole=True, point=point)


def subset(sweep: Recorded, seed: int, share: float = 0.2) -> Simulated:
    """Measure every trial on the same random examples, and the best of them whole."""
    trials, count = sweep.trials, sweep.trials.shape[1]
    members = np.random.default_rng(seed).permutation(count)[: round(share * count)]
    best = int(trials[:, members].mean(axis=1).argmax())
    return Simulated(len(trials) * len(members) + count - len(members), {best: float(trials[best].mean())}, [])


def merge3(sweep: Recorded, seed: int, share: float = 0.2) -> Simulated:
    """Measure every trial on the same random examples, and the best by MERGE³'s estimate whole."""
    trials, count = sweep.trials, sweep.trials.shape[1]
    members = np.random.default_rng(seed).permutation(count)[: round(share * count)]
    model, experts = irt.fit(sweep.models), np.arange(1, len(sweep.models))
    values = [irt.estimate(model, experts, members, scores[members]) for scores in trials]
    best = int(np.argmax(values))
    return Simulated(len(trials) * len(members) + count - len(members), {best: float(trials[best].mean())}, [])


WAYS: Mapping[str, Callable[[Recorded, int], Simulated]] = {
    "full": full,
    "pruned": pruned,
    "adaptive": adaptive,
    "random subset of 20 %": subset,
    "MERGE³'s estimate, 20 %": merge3,
}


def compare(recorded: Recorded, trials: int, orders: int, ways: Sequence[str]) -> list[str]:
    """Return the rows of a table, a way each."""
    lines = []
    for name in ways:
        shares, regrets, estimates = [], [], []
        for seed in range(orders):
            order = np.random.default_rng(seed).permutation(len(recorded.trials))[:trials]
            own = recorded.ordered(order)
            found = WAYS[name](own, seed)
            shares.append(found.used / own.trials.size)
            regrets.append(float(own.trials.mean(axis=1).max()) - max(found.whole.values()))
            estimates += found.estimates
        spread = 1.96 * np.std(regrets) / np.sqrt(orders)
        inside = [abs(value - truth) <= half for value, half, truth in estimates]
        held = f"{np.mean(inside):.1%} of {len(inside)}" if inside else ""
        size = f"{trials} × {recorded.trials.shape[1]}"
        lines.append(
            f"| {recorded.name} | {size} | {name} | {np.mean(shares):.1%} | {100 * np.mean(regrets):.2f} ± "
            f"{100 * spread:.2f} | {100 * max(regrets):.2f} | {held} |"
        )
        print(lines[-1], flush=True)
    return lines


def record(file: Path, overrides: Sequence[str]) -> None:
    """Run a sweep that measures every trial whole, and write what it and its base and experts score.

    The study is beside the file until that is written: the same command again goes on.
    """
    import tempfile

    from mergelab.__main__ import main as mergelab

    file.parent.mkdir(parents=True, exist_ok=True)
    study = file.with_suffix(".study.db").resolve()
    url = f"sqlite:///{study}"
    # A pruner that never prunes has the scores stored.
    own = ["sweep.study_name=s", f"sweep.storage={url}", "sweep.pruner={name:futility,n_startup_steps:1000000000}"]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["mergelab", "-m", *overrides, *own, "tracking=none", f"hydra.sweep.dir={folder}"]
        mergelab()
    _write(file, url)
    study.unlink()


def _write(file: Path, url: str) -> None:
    import optuna
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mergelab.experiment import loaded
    from mergelab.sweep.reporting import unpacked
    from mergelab.sweep.selecting import example_scores
    from mergelab.sweep.space import in_cube
    from mergelab.sweep.storage import open_storage
    from mergelab.sweep.study import SCORES

    rows: list[dict[str, Any]] = []
    for one in optuna.load_study(storage=open_storage(url), study_name="s").trials:
        if SCORES in one.user_attrs:
            name = " ".join(f"{key.removeprefix('method.')}={value:.4f}" for key, value in one.params.items())
            point, scores = in_cube(one.params, one.distributions), unpacked(one.user_attrs[SCORES])
            rows.append({"role": "trial", "name": name, "point": point.tolist(), "scores": scores.tolist()})
    trials = len(rows)
    ((_, models),) = loaded._last
    ((task, data),) = models.evaluator.data.items()
    select = models.evaluator.examples[task].select
    for model in models.baselines:
        scores = example_scores(data.spec, model.predictions[task].outputs[select], data.truth[select])
        rows.append({"role": model.role, "name": Path(model.label).name, "point": [], "scores": scores.tolist()})
    numbers = pa.list_(pa.float32())
    schema = pa.schema([("role", pa.string()), ("name", pa.string()), ("point", numbers), ("scores", numbers)])
    pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd")
    print(f"{file}: {trials} trials, {len(rows) - trials} models, {len(select)} examples")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, help="the file to write a recorded sweep to; the rest are its overrides")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--policy", nargs="*", default=[], metavar="KEY=NUMBER", help="other settings than the policy's"
    )
    parser.add_argument("given", nargs="*")
    options = parser.parse_args()
    if options.record:
        record(options.record, options.given)
        return
    changed = {key: float(value) for key, _, value in (one.partition("=") for one in options.policy)}
    if changed:
        from mergelab.sweep.adaptive import policy, reporter

        other = replace(POLICY, **{key: int(v) if float(v).is_integer() else v for key, v in changed.items()})
        for module in (policy, reporter, chosen, sys.modules[__name__]):
            module.POLICY = other  # type: ignore[attr-defined]
        for function in (policy.draw_rounds, policy.round_ends, policy.ends_trial, policy.finalists):
            function.__defaults__ = (other,)
    files = [Path(one) for one in options.given] or sorted(MATRICES.glob("*.parquet"))
    rows: list[str] = []
    for file in files:
        recorded = Recorded.read(file)
        rows += compare(recorded, min(options.trials, len(recorded.trials)), options.orders, options.ways)
    if not options.given and not changed:
        above, _, _ = PAGE.read_text().partition(HEADING)
        told = SECTION.format(heading=HEADING, orders=options.orders, trials=options.trials, rows="\n".join(rows))
        PAGE.write_text(f"{above.rstrip()}\n\n{told}")


if __name__ == "__main__":
    main()
