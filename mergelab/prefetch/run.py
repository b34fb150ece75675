"""Fetch what an experiment needs: find out what is there, fetch the rest, and say how large all of it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergelab.config import ModelsConfig
from mergelab.console.formats import chosen_format, for_a_page, for_a_program
from mergelab.console.progress import gathered_warnings, is_silenced, progress_bar, say
from mergelab.console.tables import print_fitting
from mergelab.errors import HubError, listed
from mergelab.experiment.locate import locate
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.models import hub
from mergelab.models.adapted import base_reference, is_adapter_folder
from mergelab.models.references import Reference, parse_reference, references
from mergelab.tasks.loading import task_of_expert

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.tasks.spec import TaskSpec

Status = Literal["missing", "there", "fetched"]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Needed:
    """A part of what an experiment needs.

    Attributes:
        kind: whether it is a model or a dataset.
        name: its id on the hub, or its folder.
        status: whether it was there, or had to be fetched.
        folder: where it is; None where it is missing.
        fetch: brings it into the cache, and returns its folder.
    """

    kind: Literal["model", "dataset", "miniature"]
    name: str
    status: Status
    folder: Path | None
    fetch: Callable[[], Path]

    @property
    def size(self) -> int | None:
        """Its size in bytes; None where it is missing."""
        return None if self.folder is None else _size(self.folder)


def run_prefetch(config: DictConfig) -> None:
    """Fetch what the experiment needs that ``config`` composes, and print what there is.

    Raises:
        MergelabError: a setting is not usable, or the hub does not have something.
        HubError: something is missing, and the hub cannot be reached.
    """
    plan = plan_experiment(config, merges=False)
    with gathered_warnings(), progress_bar() as progress:
        if plan.config.source == "mini":
            found = _miniature(plan, progress)
        else:
            found = _needed(plan)
            missing = [one.name for one in found if one.status == "missing"]
            if missing and not hub.reachable():
                _print(found)
                raise HubError(f"the hub at {hub.endpoint()} cannot be reached; the cache lacks {listed(missing, 3)}")
            found = [*_fetched(found, progress)]
            # An adapter names its base only when it is there.
            found += _fetched(_bases_of_adapters(plan.config.models, found), progress)
    _print(found)


# ------------------------------------------------------------------------------------------------------ what is needed


def _needed(plan: Plan) -> list[Needed]:
    models = [_model(one) for one in dict.fromkeys(references(plan.config.models))]
    if not plan.config.evaluate and "data" not in plan.method.needs:
        return models
    if plan.data_dir is not None:
        return models
    datasets = {(task.path, task.config, task.revision): task for task in _tasks(plan)}
    return [*models, *(_dataset(task) for task in datasets.values()), *_of_lm_eval(plan)]


def _tasks(plan: Plan) -> Iterable[TaskSpec]:
    """Yield the tasks that are measured, and those that experts were made for, whose data methods learn from."""
    for task in plan.tasks:
        if task.path:
            yield task
    if "data" in plan.method.needs:
        for name, expert in plan.config.models.experts.items():
            if (own := task_of_expert(expert.task or name, plan.tasks)) is not None and own.path:
                yield own


def _model(reference: Reference) -> Needed:
    if reference.repository is None:
        assert reference.folder is not None
        return Needed("model", reference.text, "there", reference.folder, partial(Path, reference.folder))
    repository, revision = reference.repository, reference.revision
    folder = hub.cached(repository, revision)
    status: Status = "missing" if folder is None else "there"
    return Needed("model", reference.text, status, folder, lambda: hub.fetch(repository, revision))


def _dataset(task: TaskSpec) -> Needed:
    def fetch() -> Path:
        from mergelab.tasks.data import load_data

        load_data(task)  # reads every column that the task needs
        folder = hub.dataset_folder(task.path, task.config)
        if folder is None:
            raise HubError(f"task={task.name}: {task.path} was read, but the cache does not have it afterwards")
        return folder

    folder = hub.dataset_folder(task.path, task.config)
    name = f"{task.path}/{task.config}" if task.config else task.path
    return Needed("dataset", name, "missing" if folder is None else "there", folder, fetch)


def _of_lm_eval(plan: Plan) -> Iterator[Needed]:
    """Yield the data of lm-eval's tasks, which are there: lm-eval has fetched them to say which metrics there are."""
    from mergelab.tasks.lm_eval import lm_eval_task_set

    for task in plan.tasks:
        for name, own in lm_eval_task_set(task).tasks.items() if task.kind == "lm_eval" else ():
            path = str(own.DATASET_PATH or "")
            folder = hub.dataset_folder(path, own.DATASET_NAME)
            yield Needed("dataset", f"{path} (lm-eval's {name})", "there", folder, partial(Path, folder or ""))


def _bases_of_adapters(models: ModelsConfig, found: Iterable[Needed]) -> list[Needed]:
    """Return the bases that adapters name, where the experiment names none."""
    if models.base is not None:
        return []
    adapters = [one for one in found if one.kind == "model" and one.folder and is_adapter_folder(one.folder)]
    named = [parse_reference(base_reference(one.folder, one.name)) for one in adapters if one.folder]
    return [_model(each) for each in dict.fromkeys(each for one in named for each in one.models)]


def _miniature(plan: Plan, progress: Progress) -> list[Needed]:
    located = locate(plan.config.models, "mini", [task.name for task in plan.tasks if task.path], progress)
    models = [*([located.base] if located.base else []), *located.experts]
    folders = {model.label: model.folder for model in models}
    folders |= {f"data of mini/{task}": folder for task, folder in located.mini_data.items()}
    return [Needed("miniature", name, "there", folder, partial(Path, folder)) for name, folder in folders.items()]


# ------------------------------------------------------------------------------------------------------- fetching it


def _fetched(needed: Iterable[Needed], progress: Progress) -> list[Needed]:
    found = []
    needed = list(needed)
    for done, one in enumerate(needed):
        if one.status == "missing":
            progress(f"fetching {one.name}", done / len(needed))
            one = replace(one, status="fetched", folder=one.fetch())
        found.append(one)
    return found


def _size(folder: Path) -> int:
    """Return how many bytes a folder's files have; what links lead to counts once."""
    return sum({file.resolve(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}.values())


def _print(found: list[Needed]) -> None:
    """Print a row for each part."""
    if is_silenced():
        return
    records = [
        {"kind": one.kind, "name": one.name, "status": one.status, "bytes": one.size, "folder": str(one.folder or "")}
        for one in found
    ]
    form = chosen_format()
    if form in ("csv", "json"):
        sys.stdout.write(for_a_program(form, records))
        return
    header = ["kind", "name", "status", "size"]
    rows = [[one.kind, one.name, one.status, _shown(one.size)] for one in found]
    if form != "table":
        sys.stdout.write(for_a_page(form, header, rows))
        return
    from rich.table import Table

    table = Table()
    for name in header:
        table.add_column(name, justify="right" if name == "size" else "left")
    for row in rows:
        table.add_row(*row)
    print_fitting(iter([table]))
    say(f"{_shown(sum(one.size or 0 for one in found))} in all; metrics come with the package")


def _shown(size: int | None) -> str:
    """Write a size in the unit that suits it."""
    if size is None:
        return ""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size} B"
