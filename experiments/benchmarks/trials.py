"""Time the trials of a sweep: the merge, the evaluation, and all the rest (Hydra, Optuna, MLflow).

Usage:
    python experiments/benchmarks/trials.py --data-dir DATA/rte                       # BERT-base, TIES, 20 trials
    python experiments/benchmarks/trials.py --data-dir DATA/rte --mergekit /path/to/env/bin/mergekit-yaml
    python experiments/benchmarks/trials.py --mini                                    # the miniature instead

Runs `python -m mergelab -m sweep=ties` in a fresh folder with SQLite for the study and for MLflow, the way a user
would. A trial's rest is the time from the end of the one before to its own end, less what it says of merging and
evaluating. With --mergekit, the same merge is written to disk once with it: what a sweep built on it takes per trial,
reloading aside.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from merging import METHODS, mergekit_config, run
from model_sets import build


def sweep(args: argparse.Namespace, work: Path) -> None:
    """Run the sweep."""
    command = [
        sys.executable, "-m", "mergelab", "-m", "sweep=ties", "task=rte", f"sweep.n_trials={args.trials}",
        "sweep.pruner=none", "sweep.sampler=random", *args.settings,
    ]  # fmt: skip
    if args.mini:
        command += ["source=mini"]
    else:
        base, *experts = build("bert-base", args.folder)
        command += [
            f"models.base={base}", f"models.experts=[{','.join(map(str, experts))}]", "eval.preflight=false",
            f"task.data_dir={args.data_dir.absolute()}", "task.limit=16",
        ]  # fmt: skip
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def figures(work: Path) -> list[tuple[float, float, float]]:
    """Read each trial's seconds of merging, of evaluating and of the rest; the first two trials load things."""
    import optuna

    (study,) = optuna.get_all_study_names(f"sqlite:///{work}/outputs/sweeps.db")
    trials = optuna.load_study(study_name=study, storage=f"sqlite:///{work}/outputs/sweeps.db").trials
    found = []
    for before, trial in pairwise(trials[1:]):
        outcome: dict[str, Any] = trial.user_attrs["mergelab:outcome"]
        whole = (trial.datetime_complete - before.datetime_complete).total_seconds()
        merging, evaluating = outcome["merge_seconds"], outcome["eval_seconds"]
        found.append((merging, evaluating, whole - merging - evaluating))
    return found


def main() -> None:
    """Sweep, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/bert-base"))
    parser.add_argument("--data-dir", type=Path, help="RTE's Parquet files")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--mini", action="store_true")
    parser.add_argument("--mergekit", help="path of mergekit-yaml in an environment of its own")
    parser.add_argument("settings", nargs="*", help="further settings of the sweep")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    if args.data_dir is None and not args.mini:
        parser.error("--data-dir says where RTE's Parquet files are; --mini needs none")
    with tempfile.TemporaryDirectory() as work:
        sweep(args, Path(work))
        columns = [*zip(*figures(Path(work)), strict=True)]
    medians = [statistics.median(column) for column in columns]
    print(f"{args.trials} trials; medians without the first two, in seconds (and the slowest)")
    for name, median, column in zip(("merge", "evaluate", "the rest"), medians, columns, strict=True):
        print(f"{name:10}{median:8.3f}{max(column):10.3f}")
    if args.mergekit:
        with tempfile.TemporaryDirectory(dir=args.folder) as work:
            config = Path(work) / "mergekit.yaml"
            folders = build("bert-base", args.folder)
            config.write_text(mergekit_config("ties", METHODS["ties"][1], METHODS["ties"][2], folders))
            seconds, _, _ = run([args.mergekit, str(config), str(Path(work) / "out")])
        print(
            f"mergekit-yaml writes the same merge in {seconds:.1f} s: {seconds / medians[0]:.0f} times the merge here"
        )


if __name__ == "__main__":
    main()
