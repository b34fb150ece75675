"""One fine-tuning: plan → locate the base → read and divide the data → train expert after expert → write and record."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.console.progress import gathered_warnings, progress_bar, say, say_where
from mergelab.errors import ConfigError, listed, shortened
from mergelab.experiment.locate import LocatedModels, Source, locate
from mergelab.experiment.plan import warn_if_mini
from mergelab.finetune.plan import FinetunePlan, Member, plan_finetuning
from mergelab.finetune.recording import is_open, open_run, record_curve, record_expert
from mergelab.finetune.table import print_experts
from mergelab.models.adapted import open_model
from mergelab.models.references import parse_reference
from mergelab.tracking import names
from mergelab.weights.locking import only_writer
from mergelab.weights.unfinished import unfinished_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.experiment.locate import LocatedModel
    from mergelab.finetune.examples import TrainingData
    from mergelab.finetune.expert import Made
    from mergelab.finetune.training import Log, Outcome
    from mergelab.tracking import Tracker

Progress = Callable[[str, float], None]
RECIPE = "finetuning.json"


@dataclass(frozen=True)
class _Ready:
    """All that the trainings of one command share.

    Attributes:
        plan: what was asked for.
        source: where base and data come from.
        base: the located base.
        sha256: of its weights.
        data: the training split, divided.
        folder: of the experts.
        identity: all that the experts depend on besides their seed and part.
    """

    plan: FinetunePlan
    source: Source
    base: LocatedModel
    sha256: str
    data: TrainingData
    folder: Path
    identity: Mapping[str, Any]


def run_finetuning(config: DictConfig) -> dict[str, Path]:
    """Make the experts that ``config`` asks for, and return their folders by name.

    Those that are finished are not made again; one that was interrupted goes on from its last whole epoch.

    Raises:
        MergelabError: something in the configuration, the base or the data is not usable.
    """
    from mergelab.tracking import open_tracking

    plan = plan_finetuning(config)
    source = plan.source()
    with gathered_warnings(), progress_bar() as progress:
        warn_if_mini(plan.config.source, source)
        ready, located = _prepared(plan, source, progress)
        tracker = open_tracking(plan.tracking)
        say(_announcement(ready))
        ready.folder.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(ready.folder):
            _check_folder(ready.folder, ready.identity)  # another process may have been first
            _note_recipe(ready.folder, ready.identity)
            outcomes = {member.name: _expert(ready, member, tracker, progress) for member in plan.members}
    folders = {name: ready.folder / name for name in outcomes}
    print_experts(names.labelled(plan.task.name, mini=source == "mini"), outcomes, folders)
    say(f"merge them: {_merge_command(ready, located, folders)}", to_copy=True)
    if tracker.enabled:
        say_where(tracker, _experiment(ready))
    return folders


def _prepared(plan: FinetunePlan, source: Source, progress: Progress) -> tuple[_Ready, LocatedModels]:
    """Check base, data and what was made before; nothing is written but caches.

    Raises:
        MergelabError: one of them is not usable.
    """
    from mergelab.finetune.base import check_base, check_settings
    from mergelab.finetune.examples import training_data

    task = plan.task
    reference = parse_reference(plan.config.base) if source != "mini" else None
    for model in reference.models if reference is not None and len(reference.models) == 1 else ():
        if model.folder is not None:
            check_base(model.folder, model.text, task)
    located = locate(plan.models, source, [task.name], progress)
    assert located.base is not None
    base = located.base
    check_base(base.folder, base.label, task)
    data = training_data(plan, located.mini_data.get(task.name))
    check_settings(base.folder, base.label, task, plan.config)
    sha256, folder = open_model(base.folder, base.label).content_hash(), plan.folder(source)
    identity = {
        "base": sha256,
        "task": {
            "name": task.name,
            "version": task.version,
            "kind": task.kind,
            "labels": task.labels and list(task.labels),
            "window": task.window,
            "stride": task.stride,
            "join": task.join,
        },
        "data": data.data.fingerprint,
        **plan.recipe(source),
    }
    _check_folder(folder, identity)
    return _Ready(plan, source, base, sha256, data, folder, identity), located


# Settings that older recipes do not say, and what their experts were trained with.
_UNSAID = {"train.group_by_length": False}


def _check_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Check that a folder is new, or has experts of the same recipe.

    Raises:
        ConfigError: it has something else.
    """
    file = folder / RECIPE
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={folder}: is a file; a folder that does not exist yet is needed")
    if not file.is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(f"output={folder}: the folder is not empty, and has no experts; choose another one")
        return
    try:
        before = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError):
        raise ConfigError(f"output={folder}: {RECIPE} in it cannot be read; choose another folder") from None
    before, now = {**_UNSAID, **before}, _flat(identity)
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) != now.get(key):
            was, wanted = (shortened(json.dumps(found.get(key))) for found in (before, now))
            raise ConfigError(
                f"output={folder}: its experts have another recipe: {key} was {was} and is {wanted} now; give another "
                "output, or remove that folder"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _note_recipe(folder: Path, identity: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / RECIPE).is_file():
        with unfinished_file(folder / RECIPE) as file:
            file.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def _announcement(ready: _Ready) -> str:
    plan, data = ready.plan, ready.data
    task = names.labelled(plan.task.name, mini=ready.source == "mini")
    members = listed([member.name for member in plan.members])
    recipe = plan.recipe(ready.source)
    kind = "all weights" if recipe["lora"] is None else f"LoRA of rank {recipe['lora']['r']}"
    train = recipe["train"]
    sizes = sorted({len(part) for part in data.parts})
    each = " to ".join(map(str, dict.fromkeys([sizes[0], sizes[-1]])))
    return "\n".join(
        [
            f"finetune  {ready.base.label} on {task}: {members}",
            f"train     {kind}, at most {train['epochs']} epochs, batches of {train['batch_size']}, "
            f"learning rate {train['learning_rate']:g}",
            f"data      {each} training examples for each, {len(data.held_out)} held out",
            f"save      {ready.folder}",
        ]
    )


def _experiment(ready: _Ready) -> str:
    from mergelab.tracking import experiment_name

    return experiment_name(ready.plan.tracking, ready.plan.task.name, mini=ready.source == "mini")


# ---------------------------------------------------------------------------------------------------------- one expert


def _expert(ready: _Ready, member: Member, tracker: Tracker, progress: Progress) -> Outcome:
    """Make one expert, or return how the training of a finished one went."""
    from mergelab.finetune.expert import Made, read_outcome

    folder, experiment = ready.folder / member.name, _experiment(ready)
    checkpoints = ready.folder / f".{member.name}.training"
    parts = {**ready.identity, "member": member.name}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    finished, seconds = folder.is_dir(), None
    if finished and not is_open(tracker, experiment, key):
        shutil.rmtree(checkpoints, ignore_errors=True)  # of a process that was killed before it removed them
        return read_outcome(folder)
    with ExitStack() as stack:
        run, before = open_run(tracker, experiment, key, ready.plan, member, ready.source, ready.base)
        stack.enter_context(run)
        sizes = len(ready.data.parts[member.shard]), len(ready.data.held_out)
        made = partial(
            Made, ready.plan, member, ready.source, ready.base, ready.sha256, ready.data.data, *sizes, run=run,
            tracker=tracker,
        )  # fmt: skip
        if finished:  # by a process that was killed before it recorded it
            outcome = read_outcome(folder)
        else:
            started = time.perf_counter()
            outcome = _trained(ready, member, checkpoints, partial(record_curve, run, before), made, progress)
            seconds = time.perf_counter() - started
        record_expert(run, made(outcome=outcome), folder, seconds)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return outcome


def _trained(
    ready: _Ready, member: Member, checkpoints: Path, log: Log, made: Callable[..., Made], progress: Progress
) -> Outcome:
    from mergelab.evaluation.options import best_device
    from mergelab.finetune.base import open_for_training, open_tokenizers, with_adapter
    from mergelab.finetune.examples import encoded_examples
    from mergelab.finetune.expert import write_expert
    from mergelab.finetune.training import last_checkpoint, seeded, train

    plan, base, task = ready.plan, ready.base, ready.plan.task
    recipe, device = plan.recipe(ready.source), best_device(plan.config.device)
    checkpoints.mkdir(exist_ok=True)
    last = last_checkpoint(checkpoints)
    with seeded(member.seed, device):
        model, drawn = open_for_training(base.folder, base.label, task)
        own, held_out = ready.data.data.take(ready.data.parts[member.shard]), ready.data.data.take(ready.data.held_out)
        tokenizers = open_tokenizers(base.folder, base.label)
        examples, reserved = (
            encoded_examples(model, tokenizers, data, recipe["train"]["max_length"]) for data in (own, held_out)
        )
        padding = examples.padding_for(model)
        _check_batches(padding, recipe["train"]["batch_size"], base.label)
        if recipe["lora"] is not None:
            model = with_adapter(model, drawn, recipe["lora"], task, _reference(ready), base.revision)
        elif last is not None:
            # What the Trainer then loads changes nothing: it would not notice names that have changed.
            model, _ = open_for_training(last, base.label, task)
    outcome = train(
        model,
        examples,
        reserved,
        held_out.labels,
        task,
        recipe["train"],
        seed=member.seed,
        padding=padding,
        folder=checkpoints,
        device=device,
        log=log,
        progress=lambda done: progress(f"training {member.name}", done),
    )
    write_expert(made(outcome=outcome), model, ready.folder / member.name)
    return outcome


def _check_batches(padding: str, batch_size: int, label: str) -> None:
    """Raise `ConfigError` where examples of different lengths cannot share a batch."""
    if padding not in ("right", "left") and batch_size > 1:
        raise ConfigError(f"base={label}: padding changes what this model answers; train.batch_size=1 needs none")


def _reference(ready: _Ready) -> str:
    """Return how an adapter names its base: by its hub id, or by its folder."""
    models = parse_reference(ready.plan.config.base).models if ready.source != "mini" else ()
    repository = models[0].repository if len(models) == 1 else None
    return repository or str(ready.base.folder)


def _merge_command(ready: _Ready, located: LocatedModels, folders: Mapping[str, Path]) -> str:
    """Return a command that merges the experts and measures them."""
    plan = ready.plan
    settings = [f"task={plan.task.name}", f"models.base={_reference(ready)}"]
    written = [str(folder) if folder.is_absolute() else f"./{folder}" for folder in folders.values()]
    settings.append(f"models.experts=[{','.join(written)}]")
    if (data := located.mini_data.get(plan.task.name) or plan.data_dir) is not None:
        settings.append(f"task.data_dir={data}")
    return " ".join(["python -m mergelab method=soup", *map(shlex.quote, settings)])
