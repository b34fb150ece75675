"""Compare what two checkouts of mergelab compute: every method's merged weights, bit by bit, and every score.

Usage:
    git worktree add ../before <commit>
    python experiments/same_results.py ../before .                       # every method, RTE and the text tasks
    python experiments/same_results.py ../before . --methods ties dare    # some

Both run the same commands on the embedded miniature, each in a folder and with a cache of its own: a grid that measures
and saves every method's merge, and the same merges to disk without measuring. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXT = (("law_recipes", "soup"), ("law_recipes", "ties"), ("samsum", "task_arithmetic"))
# What some methods ask for besides five experts of one task.
SPECIAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pairs": (
        ("arcee_fusion", "nearswap", "nuslerp", "slerp"),
        ("models.experts=[howey/bert-base-uncased-rte,textattack/bert-base-uncased-RTE]",),
    ),
    "outputs": (("emr",), ("models.head=per_task",)),
    "selection": (("greedy_soup",), ("eval.protocol=holdout",)),
}
COMMON = ("source=mini", "tracking=none")
WEIGHTS = "*.safetensors"


def main() -> int:
    """Run both checkouts, print what differs, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the results of two checkouts on the embedded miniature.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--methods", nargs="*", default=methods_of(ROOT))
    parser.add_argument("--options", nargs="*", default=[], help="overrides for both, such as method.lambda=0.5")
    parser.add_argument("--work", type=Path, help="keep the folders, and use what is there")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="same-results-"))
    found = [
        results(side.resolve(), work.resolve() / name, args.methods, args.options)
        for name, side in (("before", args.before), ("after", args.after))
    ]
    return report(*found)


def methods_of(checkout: Path) -> list[str]:
    """List the built-in methods of a checkout."""
    return sorted(path.stem for path in (checkout / "conf" / "method").glob("*.yaml") if path.stem != "custom")


def results(checkout: Path, folder: Path, methods: list[str], options: list[str]) -> dict[str, str]:
    """Run a checkout's commands in ``folder`` and return every result by its name: hashes of weights, and scores."""
    folder.mkdir(parents=True, exist_ok=True)
    others = set(methods).difference(*(names for names, _ in SPECIAL.values()))
    for name, (names, own) in {"all": (others, ()), **SPECIAL}.items():
        chosen = sorted(set(methods) & set(names))
        grid = ("-m", f"method={','.join(chosen)}", "task=rte", *own, *options)
        if chosen and not (folder / f"grid-{name}").is_dir():
            mergelab(checkout, folder, *grid, f"hydra.sweep.dir=grid-{name}", "output=saved/${method.name}")
        if chosen and name != "selection" and not (folder / f"disk-{name}").is_dir():
            streamed = ("evaluate=false", f"hydra.sweep.dir=disk-{name}", "output=streamed/${method.name}")
            mergelab(checkout, folder, *grid, *streamed)
    for task, method in TEXT:
        if not (folder / f"text/{task}-{method}").is_dir():
            mergelab(checkout, folder, f"task={task}", f"method={method}", f"hydra.run.dir=text/{task}-{method}")
    found = {}
    for file in sorted(folder.glob("saved/**/" + WEIGHTS)) + sorted(folder.glob("streamed/**/" + WEIGHTS)):
        found[str(file.relative_to(folder))] = hashlib.sha256(tensors(file)).hexdigest()
    for file in sorted(folder.glob("grid-*/*/result.json")) + sorted(folder.glob("text/*/result.json")):
        where = file.parent.relative_to(folder).as_posix().rstrip("0123456789/")  # without the job's number
        for model in json.loads(file.read_text())["models"]:
            found[f"{where} {model['label']}"] = json.dumps(scores(model), sort_keys=True)
    return found


def tensors(file: Path) -> bytes:
    """Return a safetensors file's bytes without its free-text metadata, which names the merge and not its result."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + raw[8 + length :]


def scores(model: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of a model, without seconds and memory."""
    kept = ("report", "select", "primary", "texts")
    own = {task: {key: result[key] for key in kept} for task, result in model["results"].items()}
    return {"tasks": own, "p": model["p_value"], "average": model["average"], "normalised": model["normalised"]}


def mergelab(checkout: Path, folder: Path, *arguments: str) -> None:
    """Run a checkout's ``python -m mergelab`` in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "MERGELAB_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "mergelab", *arguments, *COMMON]
    print("+", checkout.name, *arguments, flush=True)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def report(before: dict[str, str], after: dict[str, str]) -> int:
    """Print what differs, and how much is the same."""
    differing = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    for name in differing:
        print(f"differs: {name}\n  before {before.get(name)}\n  after  {after.get(name)}")
    weights = sum(name.endswith(".safetensors") for name in before)
    print(f"{weights} files of merged weights and {len(before) - weights} scores compared; {len(differing)} differ")
    return 1 if differing or not before else 0


if __name__ == "__main__":
    sys.exit(main())
