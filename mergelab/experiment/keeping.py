"""What becomes of a merged model: written to the output folder, pushed to the hub, logged with its run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.config import local_path
from mergelab.console.progress import say, warn
from mergelab.errors import ConfigError
from mergelab.models import hub_push
from mergelab.tracking import names
from mergelab.tracking.logged_models import model_folders

if TYPE_CHECKING:
    from mergelab.experiment.cards import Cards
    from mergelab.experiment.plan import Plan
    from mergelab.experiment.saving import Saving
    from mergelab.tracking import Run, Tracker

Write = Callable[[Path], object]


def repositories(plan: Plan) -> list[str]:
    """List the repositories of the hub that a plan's model is pushed to: one, or one for each task's head."""
    repository = plan.config.save.push_to_hub
    if repository is None:
        return []
    if plan.config.models.head == "per_task" and len(plan.tasks) > 1 and any(task.outputs for task in plan.tasks):
        return [f"{repository}-{task.name}" for task in plan.tasks]
    return [repository]


def check_push(plan: Plan, source: str) -> None:
    """Check, before anything is merged, that a plan's model can be pushed where that is asked for.

    Raises:
        HubError: as `mergelab.models.hub_push.check_push`.
        ConfigError: it is an adapter on the miniature, which nobody else could load.
    """
    wanted = repositories(plan)
    if wanted and source == "mini" and plan.config.save.form != "dense":
        raise ConfigError(
            f"save.push_to_hub={wanted[0]}: an adapter is of use with its base alone, and the miniature is only here; "
            "save.form=dense"
        )
    for repository in wanted:
        hub_push.check_push(repository, private=plan.config.save.private)


def keep(
    plan: Plan,
    tracker: Tracker,
    run: Run,
    write: Write,
    *,
    whole: Write | None = None,
    written: Callable[[], None] = lambda: None,
    put_aside: Path | None = None,
) -> None:
    """Write a merged model where the plan says: into its output folder, to the hub, with the run.

    Args:
        plan, tracker, run: the experiment, the store and its run.
        write: writes the model or the adapter into a folder.
        whole: writes what MLflow logs, if that is not what ``write`` writes: an adapter's base with the adapter in it.
        written: is called when the output folder is there.
        put_aside: a folder in which the model waits for being logged; None: it is logged at once.
    """
    output, logged = plan.config.output, run.id is not None and plan.tracking.log_model != "none"
    with ExitStack() as stack:

        def made(by: Write, place: Path | None = None) -> Path:
            folder = place or Path(stack.enter_context(tempfile.TemporaryDirectory())) / names.MODEL
            by(folder)
            return folder

        folder = None
        if output is not None:
            folder = made(write, local_path(output, "output"))
            written()
        if plan.config.save.push_to_hub is not None:
            folder = folder or made(write)
            push(plan, folder)
        if logged and put_aside is not None:  # which one is logged is known at the grid's end
            made(whole or write, put_aside)
        elif logged:
            log(plan, tracker, run, made(whole) if whole else folder or made(write))


def say_written(saving: Saving, cards: Cards) -> None:
    """Say what else is in a written model's folder, and what is not."""
    saving.say_copied()
    cards.say_not_exported()


def push(plan: Plan, folder: Path) -> None:
    """Push a written model, or each task's, to its repository."""
    for place, repository in zip(model_folders(folder), sorted(repositories(plan)), strict=True):
        say(f"pushed    {hub_push.push(place, repository, private=plan.config.save.private)}", to_copy=True)


def log(plan: Plan, tracker: Tracker, run: Run, folder: Path) -> None:
    """Log a written model, or each task's, with its run, and register it where that is asked for."""
    assert run.id is not None
    for place in tracker.log_models(run.id, folder, plan.tracking.register_as):
        if place.refusal is not None:
            warn(f"{place.uri}: logged as files alone, which mlflow.transformers cannot load: {place.refusal}")
        say(
            f"logged    {place.uri}" + (f", registered as {place.registered}" if place.registered else ""), to_copy=True
        )
