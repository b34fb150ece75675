"""Time a report on many runs: a sweep and a grid of 500 runs in a synthetic store, each step of it apart.

Usage:
    OMP_NUM_THREADS=1 python experiments/benchmarks/reports.py               # 250 trials and 250 merges
    OMP_NUM_THREADS=1 python experiments/benchmarks/reports.py --runs 2000

The store is made once, in --folder, with what such runs record: parameters, metrics, tags, datasets; of the merges also
the configuration and every example's prediction. What is timed is the whole command in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir

from mergelab.config import CONF_DIR
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.experiment.recording import open_run
from mergelab.tracking import Run, Tracker, TrackingConfig, names, open_tracking

EXAMPLES = 1000
MODELS = {"base": "org/base", "a": "org/a", "b": "org/b", "c": "org/c"}


def main() -> None:
    """Make the store and time the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    uri = f"sqlite:///{folder}/mlflow.db"
    if not (folder / "mlflow.db").exists():
        make_store(open_tracking(TrackingConfig(uri=uri)), options.runs, folder)
    command = [sys.executable, "-m", "mergelab.report", "rte", f"--tracking-uri={uri}", f"--output={folder}/report"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    size = (folder / "report" / "report.html").stat().st_size
    sys.stdout.write(f"{options.runs} runs: {seconds:.1f} s, page {size / 1e6:.1f} MB\n")


def make_store(tracker: Tracker, runs: int, folder: Path) -> None:
    """Record base and experts, a sweep with half of the runs as trials, and a grid with the other half."""
    random = np.random.default_rng(0)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        plan = plan_experiment(compose("config", overrides=["method=ties", "task=rte"]))
    for key, reference in MODELS.items():
        role = "base" if key == "base" else "expert"
        params = {"models": {"name": reference}, "eval": plan.config.eval.model_dump(), "seed": 0}
        tags = {names.model(key): reference, names.model_hash(key): reference, names.METHOD: None}
        with open_run(tracker, role, plan, "local", f"{role} {reference}", params=params, tags=tags) as run:
            measured(run, random, 0.5 if role == "base" else 0.85, folder)
    parents = {}
    for kind in ("sweep", "grid"):
        space = {"method.density": "interval(0.05,0.95)", "method.lambda": "interval(0.2,2.0)"}
        params = {**plan.resolved, names.SPACE: space} if kind == "sweep" else {names.JOBS: runs // 2}
        with open_run(tracker, kind, plan, "local", f"{kind}: rte ties", params=params) as run:
            parents[kind] = run.id
    for number in range(runs):
        job(tracker, plan, number, parents, random, folder)


def job(
    tracker: Tracker, plan: Plan, number: int, parents: dict[str, str | None], random: np.random.Generator, folder: Path
) -> None:
    """Record a trial or a grid's job."""
    trial = number % 2 == 0
    density, strength = random.uniform(0.05, 0.95), random.uniform(0.2, 2.0)
    method = {**plan.resolved["method"], "density": density, "lambda": strength}
    rate = 0.9 - (density - 0.3) ** 2 - 0.2 * (strength - 1) ** 2
    params = {**plan.resolved, "method": method}
    tags = {names.model(key): reference for key, reference in MODELS.items()}
    tags |= {names.model_hash(key): reference for key, reference in MODELS.items()}
    name = f"rte ties trial {number}" if trial else f"rte ties density={density:.4f} lambda={strength:.4f}"
    parent = parents["sweep" if trial else "grid"]
    kind = "trial" if trial else "merge"
    with open_run(tracker, kind, plan, "local", name, params=params, tags=tags, parent=parent) as run:
        if not trial:
            run.log_dict(params, names.CONFIG)
            measured(run, random, rate, folder)
            return
        stopped = number % 5 > 0
        estimate, select = names.estimate_metric("accuracy"), names.select_metric("accuracy")
        scores = {estimate: rate, names.low(estimate): rate - 0.02, names.high(estimate): rate + 0.02}
        run.log_metrics(scores | ({} if stopped else {select: rate}) | {names.SELECT_EXAMPLES: 120 if stopped else 500})
        said = {names.PRUNED: "after 120 of 500 examples"} if stopped else {}
        run.set_tags(
            {names.PRIMARY: select, names.NOTE: note(), names.TRIAL: number, names.DIRECTION: "maximize"} | said
        )
        dataset(run)


def measured(run: Run, random: np.random.Generator, rate: float, folder: Path) -> None:
    """Record a model's score, costs and predictions."""
    labels = np.arange(EXAMPLES) % 2
    said = np.where(random.uniform(size=EXAMPLES) < rate, labels, 1 - labels)
    score, metric = float((said == labels).mean()), names.report_metric("accuracy")
    costs = {names.MERGE_SECONDS: 0.1, names.EVAL_SECONDS: 0.4, names.PEAK_MB: 700.0}
    run.log_metrics({metric: score, names.low(metric): score - 0.02, names.high(metric): score + 0.02} | costs)
    run.set_tags({names.PRIMARY: metric, names.DIRECTION: "maximize", names.NOTE: note()})
    dataset(run)
    columns = {"idx": np.arange(EXAMPLES), "label": labels, "output_0": 1.0 - said, "output_1": said + 0.0}
    file = folder / names.predictions("rte")
    everything = np.ones(EXAMPLES, bool)
    pq.write_table(pa.table({**columns, "prediction": said, "selects": ~everything, "reports": everything}), file)
    run.log_artifact(file, names.PREDICTIONS)
    file.unlink()


def note() -> str:
    """Say what is measured, as the evaluator does."""
    return f"rte: accuracy on {EXAMPLES} validation examples\nprotocol full (whole split)"


def dataset(run: Run) -> None:
    """Record the examples."""
    run.log_dataset("rte", origin="folder", location="d", fingerprint="f" * 64, rows=EXAMPLES, split="validation")


if __name__ == "__main__":
    main()
