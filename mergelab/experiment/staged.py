"""Make the stages of a merge: each a run of its own, and used again where it and its models are the same."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.config import ExperimentConfig, check, local_path
from mergelab.console.progress import say
from mergelab.errors import ConfigError
from mergelab.experiment import described, recording
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.experiment.stages import KEY, OF_SAVE, in_order, model_names, named, stage_experiment
from mergelab.models.references import parse_reference
from mergelab.report.commands import spelled
from mergelab.report.provenance import read_provenance
from mergelab.tracking import names
from mergelab.tracking.tracker import GridParent, open_tracking

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Runs an experiment below a run, and returns the id of its own.
Finish = Callable[["DictConfig", GridParent | None], str | None]


@contextmanager
def made_stages(plan: Plan, finish: Finish) -> Iterator[tuple[dict[str, str], GridParent | None]]:
    """Make the stages of a plan; yield their folders, and the run that theirs are shown under.

    A stage's folder is ``NAME-HASH``: of its settings, and of the files of its models. Where it is there already, it is
    used as it is.

    Args:
        plan: has stages that are to be made.
        finish: merges one of them.

    Raises:
        MergelabError: a stage cannot be made; one line that names it.
    """
    models = plan.config.models
    _check_leaves(plan)
    tracker = open_tracking(plan.tracking)
    title = names.stages_run(names.labelled(plan.task_name, mini=False), list(models.stages or {}))
    source = "hub" if _remote(plan) else "local"
    with recording.open_run(tracker, "stages", plan, source, title) as run:
        recording.record_inputs(run, plan.resolved, ())
        run.set_tags({names.DESCRIPTION: described.description("", command=described.typed_command())})
        parent = None if run.id is None else GridParent(run.id, run.experiment, None)
        folders = {name: each for name, each in _stages_of(plan).items() if isinstance(each, str)}
        rows = []
        for name in in_order(models):
            with named(f"{KEY}.{name}"):
                folder, its_run, made = _made(plan, name, folders, finish, parent)
            folders[name] = str(folder)
            run.set_tags({names.stage(name): its_run or str(folder)})
            rows.append({"stage": name, "made": made, "run_id": its_run or "", "folder": str(folder)})
        run.log_table(rows, names.SUMMARY)
        yield folders, parent


def with_stages(plan: Plan, folders: dict[str, str]) -> DictConfig:
    """Return a plan's configuration with the folders of its stages in place of their settings."""
    from omegaconf import OmegaConf

    return OmegaConf.create({**plan.resolved, "models": {**plan.resolved["models"], "stages": folders}})


def _stages_of(plan: Plan) -> dict[str, Any]:
    return dict(plan.resolved["models"]["stages"])


def _made(
    plan: Plan,
    name: str,
    folders: dict[str, str],
    finish: Finish,
    parent: GridParent | None,
) -> tuple[Path, str | None, bool]:
    """Return a stage's folder and the run that made it, and whether that was now."""
    from filelock import FileLock

    config = stage_experiment(plan.resolved, name, folders)
    home = local_path(plan.config.save.stages, "save.stages").absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / f".{name}.lock")
        with lock:
            folder = home / f"{name}-{_key(plan_experiment(config, merges=False))}"
            if (folder / "config.json").is_file():
                say(f"stage     {name}: as it is in {folder}")
                known = read_provenance(folder)
                return folder, None if known is None else known.run, False
            say(f"stage     {name}")
            config.output = str(folder)
            with as_experiment(_overrides(config)):
                return folder, finish(config, parent), True
    except OSError as error:
        raise ConfigError(f"save.stages={plan.config.save.stages}: {home}: {error.strerror or error}") from None


def _key(plan: Plan) -> str:
    """Hash all that a stage's content depends on: its settings, and its models' files."""
    from mergelab.experiment.locate import locate
    from mergelab.experiment.saving import merge_key
    from mergelab.experiment.session import open_session

    located = locate(plan.config.models, plan.source, [])
    session = open_session(located, plan.tasks, plan.config, module_names=bool(plan.method.needs))
    return hashlib.sha256(merge_key(plan, session).encode()).hexdigest()[:12]


def _check_leaves(plan: Plan) -> None:
    """Check that every model that is no stage is a folder or a hub id, before anything is merged."""
    if plan.config.source == "mini":
        raise ConfigError(f"{KEY}: are made of models that are there; the embedded miniature is none")
    for place, text in _leaves(plan):
        with named(place):
            parse_reference(text)


def _remote(plan: Plan) -> bool:
    return any(model.repository for _, text in _leaves(plan) for model in parse_reference(text).models)


def _leaves(plan: Plan) -> Iterator[tuple[str, str]]:
    stages = _stages_of(plan)
    final = check(ExperimentConfig, plan.resolved).models.model_dump(include={"base", "experts"})
    merges = {name: each for name, each in stages.items() if not isinstance(each, str)}
    for where, node in {**{f"{KEY}.{name}": each for name, each in merges.items()}, "models": final}.items():
        for place, text in model_names(node):
            if text.partition("+")[0] not in stages:
                yield f"{where}.{place}", text


def _overrides(config: DictConfig) -> list[str]:
    """Return the overrides that make a stage on its own: its card and its run have them."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config)
    method, models = plain["method"], plain["models"]
    groups = {"models": models, "method": method, "save": plain["save"]}
    kept = {"save": OF_SAVE}
    found = [f"method={method['name']}", "models=custom"]
    for group, values in groups.items():
        for key, value in values.items():
            wanted = key in kept.get(group, (key,)) and key not in ("name", "function", "mini")
            if wanted and value not in (None, [], {}, False):
                found.append(f"{group}.{key}={spelled(_without_none(value))}")
    return [*found, "evaluate=false", f"output={spelled(config.output)}"]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return value


@contextmanager
def as_experiment(overrides: Sequence[str] | None = None, hydra: DictConfig | None = None) -> Iterator[None]:
    """Let Hydra's configuration be that of one experiment.

    Args:
        overrides: what it is composed of; None: as it is.
        hydra: that of a sweep or a grid which is about to start; None: that of the job.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import open_dict, read_write

    state = HydraConfig.instance()
    before = state.cfg
    own: Any = copy.deepcopy(before if hydra is None else hydra)
    if own is None:
        yield
        return
    with read_write(own.hydra), open_dict(own.hydra):
        own.hydra.mode = RunMode.RUN
        if hydra is not None:
            own.hydra.runtime.output_dir = str(Path(own.hydra.sweep.dir).absolute())
        if overrides is not None:
            own.hydra.overrides.task = list(overrides)
    state.cfg = own
    try:
        yield
    finally:
        state.cfg = before
