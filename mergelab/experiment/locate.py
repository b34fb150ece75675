"""Decide where models and data come from, and bring every model of an experiment into a local folder."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from safetensors import SafetensorError

import mergelab.miniature as miniature
from mergelab.cache import replace_cache
from mergelab.config import ModelsConfig, StackConfig
from mergelab.errors import ConfigError, HubError, listed
from mergelab.miniature import text
from mergelab.models import hub
from mergelab.models.adapted import base_reference, in_part, is_adapter_folder, on_base
from mergelab.models.references import AnyReference, local_folder, parse_reference, references

Source = Literal["hub", "mini", "local"]
Progress = Callable[[str, float], None]
Built = TypeVar("Built")


@dataclass(frozen=True)
class LocatedModel:
    """A model in a local folder, with the name and the label by which tables and tags call it."""

    name: str
    label: str
    folder: Path
    revision: str | None = None


@dataclass(frozen=True)
class LocatedExpert(LocatedModel):
    """An expert: a located model with its weight, the task of its head, and its labels where the user gave them."""

    weight: float = 1.0
    task: str | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LocatedModels:
    """All models of one experiment, and for the miniature the folder of each task's data."""

    name: str
    source: Source
    base: LocatedModel | None
    experts: tuple[LocatedExpert, ...]
    mini_data: Mapping[str, Path]


def decide_source(
    wanted: str, models: ModelsConfig, tasks: Mapping[str, tuple[str, str | None]], *, data_is_local: bool
) -> Source:
    """Decide between hub, miniature and local folders; takes at most three seconds.

    ``wanted`` is ``auto``, ``hub`` or ``mini``. With ``auto`` the hub's local cache comes first, then the hub itself,
    then the miniature; models and data that are all local need none of them. ``tasks`` names, for each task that needs
    data, the dataset and its configuration.

    Raises:
        HubError: ``hub`` was wanted, or is the only possibility, and neither it nor its cache can serve.
        ModelError: a reference cannot be read.
    """
    if wanted == "mini":
        return "mini"
    remote = [reference for reference in references(models) if reference.repository]
    if not remote and data_is_local:
        return "local"
    absent = (r.text for r in remote if r.repository and hub.cached(r.repository, r.revision) is None)
    missing = list(dict.fromkeys(absent))
    data_cached = data_is_local or all(hub.dataset_cached(*data) for data in tasks.values())
    if (not missing and data_cached) or hub.reachable():
        return "hub" if remote else "local"
    lacking = [*missing, *([] if data_cached else [f"the data of {listed(tasks)}"])]
    if wanted == "auto" and len(remote) == len(references(models)) and not data_is_local:
        return "mini"
    raise HubError(
        f"the hub at {hub.endpoint()} cannot be reached and its cache lacks {listed(lacking, 3)}; "
        "give local folders and task.data_dir, or source=mini for the embedded miniature"
    )


def locate(
    models: ModelsConfig, source: Source, tasks: Sequence[str], progress: Progress = lambda _message, _done: None
) -> LocatedModels:
    """Bring every model into a local folder: download it, find it, or build its miniature.

    Raises:
        HubError, ModelError: a model cannot be had.
        ConfigError: the miniature does not have what was asked for.
    """
    if source == "mini":
        if any(isinstance(expert.reference, StackConfig) for expert in models.experts.values()):
            raise ConfigError(
                "models.slices: layers are chosen of models that are there; the embedded miniature is none"
            )
        return _locate_mini(models, tasks, progress)
    base = None
    if models.base is not None:
        reference = parse_reference(models.base)
        folder = local_folder(reference, "models.base")
        base = LocatedModel("base", reference.label, folder, _revision(reference))
    experts = []
    for count, (name, expert) in enumerate(models.experts.items()):
        where = f"models.experts.{name}"
        reference = parse_reference(expert.reference)
        progress(f"reading {reference.text}", count / len(models.experts))
        folder, label = local_folder(reference, where), reference.label
        if expert.part is not None:
            assert base is not None
            folder, label = in_part(base.folder, folder, expert.part, where=where), f"{label} ({expert.part})"
        elif is_adapter_folder(folder):
            on = base.folder if base else local_folder(parse_reference(base_reference(folder, where)), where)
            folder = on_base(on, folder, where=where)
        labels = tuple(expert.labels) if expert.labels else None
        experts.append(
            LocatedExpert(name, label, folder, _revision(reference), expert.weight, expert.task or name, labels)
        )
    return LocatedModels(models.name, source, base, tuple(experts), {})


def _revision(reference: AnyReference) -> str | None:
    """Return the commit of a model that the hub's cache has, or those of a pair's two."""
    commits = [hub.commit(local_folder(model, "")) for model in reference.models]
    return " + ".join(commit or "local" for commit in commits) if any(commits) else None


def _built(build: Callable[[], Built]) -> Built:
    """Build a miniature in the cache, or in a temporary one where that is full or cannot be written to."""
    try:
        return build()
    except (OSError, SafetensorError) as error:
        replace_cache(error)
        return build()


def _locate_mini(models: ModelsConfig, tasks: Sequence[str], progress: Progress) -> LocatedModels:
    """Put a miniature expert in the place of each expert, of the task that it serves or else of the measured one."""
    if models.mini is not None:
        return _locate_text(models, models.mini, tasks, progress)
    served = {
        name: next(
            (task for task in (expert.task, name) if task in miniature.TASKS), None if len(tasks) > 1 else tasks[0]
        )
        for name, expert in models.experts.items()
    }
    unknown = [task for task in tasks if task not in miniature.TASKS]
    if unknown := unknown or [name for name, task in served.items() if task not in miniature.TASKS]:
        texts = [task for kinds in text.SETS.values() for about in kinds.values() for task in about.tasks]
        raise ConfigError(
            f"the embedded miniature has nothing for {listed(unknown)} (it has classifiers for "
            f"{', '.join(miniature.TASKS)}, and models that write for {', '.join(texts)}); choose among those, or give "
            "local folders and task.data_dir"
        )
    sets = {
        task: _built(partial(miniature.build, task, progress=progress))
        for task in dict.fromkeys([*tasks, *filter(None, served.values())])
    }
    taken: Counter[str] = Counter()
    experts = []
    for name, expert in models.experts.items():
        task = served[name]
        assert task is not None
        folders = list(sets[task].experts.items())
        if taken[task] == len(folders):
            raise ConfigError(f"the embedded miniature has {len(folders)} experts for {task}; models.experts has more")
        mini_name, folder = folders[taken[task]]
        taken[task] += 1
        experts.append(LocatedExpert(name, f"mini/{task}/{mini_name}", folder, None, expert.weight, task))
    some = next(iter(sets.values()))
    base = LocatedModel("base", "mini/base", some.base) if models.base is not None else None
    what = tasks[0] if len(tasks) == 1 else "+".join(tasks)
    return LocatedModels(f"mini/{what}", "mini", base, tuple(experts), {task: made.data for task, made in sets.items()})


def _locate_text(models: ModelsConfig, name: str, tasks: Sequence[str], progress: Progress) -> LocatedModels:
    """Put an expert of the text miniature ``name`` in the place of each expert: of its kind, or of those in turn."""
    measured = {task: text.kind_of(name, task) for task in tasks}
    if unknown := [task for task, kind in measured.items() if kind is None]:
        known = [task for about in text.SETS[name].values() for task in about.tasks]
        raise ConfigError(
            f"the embedded miniature mini/{name} has nothing for {listed(unknown)} (it has {', '.join(known)}); "
            "choose among those, or give local folders and task.data_dir"
        )
    turns = itertools.cycle(dict.fromkeys(filter(None, measured.values())) or text.SETS[name])
    kinds = {
        called: text.kind_of(name, expert.task) or text.kind_of(name, called) or next(turns)
        for called, expert in models.experts.items()
    }
    for kind, count in Counter(kinds.values()).items():
        if count > (most := len(text.SETS[name][kind].experts)):
            raise ConfigError(
                f"the embedded miniature mini/{name} has {most} expert{'s' * (most > 1)} for {kind}; "
                f"models.experts has {count}"
            )
    made = _built(partial(text.build, name, progress=progress))
    free = {kind: iter(folders.items()) for kind, folders in made.experts.items()}
    experts = []
    for called, kind in kinds.items():
        expert, folder = next(free[kind])
        task = next((task for task in tasks if measured[task] == kind), text.SETS[name][kind].tasks[0])
        experts.append(
            LocatedExpert(called, f"mini/{name}/{expert}", folder, None, models.experts[called].weight, task)
        )
    base = LocatedModel("base", f"mini/{name}/base", made.base) if models.base is not None else None
    return LocatedModels(f"mini/{name}", "mini", base, tuple(experts), {task: made.data[task] for task in tasks})
