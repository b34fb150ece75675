"""What the card of an experiment's merged model says: gathered from its plan, its models, its scores and its run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mergelab.config import ExpertConfig, ReferenceConfig, local_path
from mergelab.console.progress import say
from mergelab.experiment.exporting import as_mergekit
from mergelab.mergekit.tokens import NoEqual
from mergelab.models.architecture import pipeline_tag
from mergelab.models.references import Pair, local_folder, parse_reference
from mergelab.report.card import CardFacts, Library, MeasuredOn, common_license, model_card, read_metadata
from mergelab.report.local_paths import LocalPaths, is_local_path, name_of
from mergelab.report.provenance import Merge, SourceModel, read_provenance
from mergelab.tracking import names
from mergelab.weights.companions import MERGEKIT, PROVENANCE, README

if TYPE_CHECKING:
    from pathlib import Path

    from mergelab.evaluation.results import ExperimentResult, ModelResult
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.locate import LocatedModel, LocatedModels
    from mergelab.experiment.opening import OpenedModels
    from mergelab.experiment.plan import Plan
    from mergelab.models.references import Reference
    from mergelab.tasks.data import TaskData
    from mergelab.tracking import Run, Tracker

# Keys of the configuration that say where something is kept, and not what is merged.
_NOT_THE_RECIPE = ("tracking", "output", "save.push_to_hub", "save.private", "save.stages", "hydra", "sweep")


@dataclass(frozen=True)
class Cards:
    """Makes the card and the provenance of a merged model's folder, and its config for mergekit.

    Attributes:
        plan: the experiment.
        located: its models; None where adapters were averaged without a model.
        run, tracker: where it is recorded, if it is.
        tags: the run's tags that name the models' hashes; empty where runs are not tracked.
        result: the scores, if the model was measured.
        evaluator: has the examples that the scores are of.
        whole: whether the folder has a whole model, where ``save.form`` asks for an adapter.
        opened: the models, where there are any.
    """

    plan: Plan
    located: LocatedModels | None
    run: Run
    tracker: Tracker
    tags: Mapping[str, str]
    result: ExperimentResult | None = None
    evaluator: Evaluator | None = None
    whole: bool = False
    opened: OpenedModels | None = None

    def __call__(self, config: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """Return the texts of the files to write, by their names.

        Args:
            config: the content of the model's ``config.json``, or at least its ``architectures``.
            task: the one whose head the model has, where there is a model for each; None: it is for all tasks.
        """
        library = self._library
        base_models = self._hub_ids([self.plan.config.models.base] if library != "transformers" else self._written)
        facts = CardFacts(
            name=self.name(task),
            merge=self._merge,
            paper=self.plan.method.paper,
            library=library,
            pipeline_tag=pipeline_tag(config) if config.get("architectures") else None,
            base_models=[] if self._is_mini else base_models,
            license={} if self._is_mini else common_license([read_metadata(folder) for folder in self._folders]),
            command=self._command,
            settings=self._settings,
            result=self._result_on(task),
            measured_on=self._measured_on,
            experiment=self.run.experiment,
            miniature=self._is_mini,
        )
        config_file = {} if self._exported[0] is None else {MERGEKIT: self._exported[0]}
        return {README: model_card(facts), PROVENANCE: self._merge.to_json(), **config_file}

    def say_not_exported(self) -> None:
        """Write which setting keeps the merge from being a mergekit config, where one does."""
        if self._exported[1] is not None:
            say(f"mergekit  no {MERGEKIT}: {self._exported[1]}")

    @cached_property
    def _exported(self) -> tuple[str | None, str | None]:
        """The merge as a mergekit config, or else why it is none."""
        if self.located is None or self.opened is None:
            return None, f"save.form={self.plan.config.save.form}: mergekit writes whole models"
        try:
            return as_mergekit(self.plan, self.located, self.opened), None
        except NoEqual as reason:
            return None, str(reason)

    def name(self, task: str | None) -> str:
        """Return the model's name: that of its repository on the hub, or of its folder."""
        config = self.plan.config
        if config.save.push_to_hub is not None:
            return f"{config.save.push_to_hub}-{task}" if task else config.save.push_to_hub
        if task is not None:
            return task
        return name_of(config.output) if config.output else f"{self.plan.method.name}-{self.plan.task_name}"

    @property
    def _is_mini(self) -> bool:
        return self.located is not None and self.located.source == "mini"

    @property
    def _library(self) -> Library:
        save = self.plan.config.save
        if save.form == "dense" or self.whole:
            return "transformers"
        return "adapter-transformers" if save.library == "adapters" or save.form == "module_average" else "peft"

    # -------------------------------------------------------------------------------------------------- what was merged

    @property
    def _written(self) -> list[ReferenceConfig]:
        """The references as they are written, the base's first."""
        models = self.plan.config.models
        return [*([models.base] if models.base else []), *(expert.reference for expert in models.experts.values())]

    def _hub_ids(self, references: Iterable[ReferenceConfig | None]) -> list[str]:
        parsed = [one for reference in references if reference for one in parse_reference(reference).models]
        return list(dict.fromkeys(one.repository for one in parsed if one.repository))

    @cached_property
    def _folders(self) -> list[Path]:
        """The folders of all models that were merged, adapters' own included."""
        return [folder for reference in self._written for folder in _folders_of(reference)]

    @cached_property
    def _merge(self) -> Merge:
        models = self.plan.config.models
        return Merge(
            method=self.plan.method.name,
            parameters=self._plain({k: v for k, v in self.plan.parameters.by_key().items() if v is not None}),
            base=self._source("base", models.base, None) if models.base else None,
            experts=[self._source(name, expert.reference, expert) for name, expert in models.experts.items()],
            run=self.run.id,
            tracking=self._paths.masked(self.tracker.store.shown) if self.run.id and self.tracker.store else None,
            mergelab=version("mergelab"),
        )

    def _source(self, name: str, reference: ReferenceConfig, expert: ExpertConfig | None) -> SourceModel:
        located = self._located.get(name)
        made = [] if self._is_mini else [read_provenance(folder) for folder in _folders_of(reference)]
        return SourceModel(
            name=name,
            model=self._shown(name),
            revision=located.revision if located else None,
            sha256=self.tags.get(names.model_hash(name)),
            weight=None if expert is None else expert.weight,
            merge=made[0] if len(made) == 1 else None,
        )

    @property
    def _located(self) -> dict[str, LocatedModel]:
        if self.located is None:
            return {}
        base = {"base": self.located.base} if self.located.base is not None else {}
        return {**base, **{expert.name: expert for expert in self.located.experts}}

    def _shown(self, name: str) -> str:
        """Return what the card calls a model: its hub id, or the name of its folder."""
        if self._is_mini:
            return self._located[name].label
        models = self.plan.config.models
        reference = models.base if name == "base" and models.base is not None else models.experts[name].reference
        return " + ".join(_name(one) for one in parse_reference(reference).models)

    # --------------------------------------------------------------------------------------------- how to make it again

    @cached_property
    def _paths(self) -> LocalPaths:
        return LocalPaths(self.plan.resolved)

    def _plain(self, values: Any) -> Any:
        return self._paths.of_values(json.loads(json.dumps(values, default=str)))

    @property
    def _command(self) -> str:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        typed: Any = []
        if HydraConfig.initialized():
            typed = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        recipe = [self._paths.masked(override) for override in typed if not _is_kept_place(override)]
        return " ".join(
            ["python -m mergelab", *map(shlex.quote, recipe), f"output={self.name(None).rpartition('/')[2]}"]
        )

    @property
    def _settings(self) -> str:
        from omegaconf import OmegaConf

        wanted = ("models", "method", "task", "eval", "save", "source", "seed")
        settings = {key: self.plan.resolved[key] for key in wanted if key in self.plan.resolved}
        settings["save"] = {k: v for k, v in settings["save"].items() if k not in ("push_to_hub", "private", "stages")}
        return OmegaConf.to_yaml(OmegaConf.create(self._paths.of_values(settings)))

    # ---------------------------------------------------------------------------------------------------------- scores

    def _result_on(self, task: str | None) -> ExperimentResult | None:
        """Return the result, on one task or on all, with the names that the card has for the models."""
        if self.result is None:
            return None
        result = self.result if task is None else _on(self.result, task)
        labels = {model.label: self._shown(name) for name, model in self._located.items()}
        models = [replace(model, label=labels.get(model.label, model.label)) for model in result.models]
        return replace(result, models=tuple(models), note=self._paths.masked(result.note))

    @cached_property
    def _measured_on(self) -> dict[str, MeasuredOn]:
        if self.evaluator is None:
            return {}
        protocol = self.plan.config.eval.protocol
        return {name: _measured_on(data, protocol) for name, data in self.evaluator.data.items()}


def _measured_on(data: TaskData, protocol: str) -> MeasuredOn:
    spec = data.spec
    if data.origin == "mini":
        return MeasuredOn(names.labelled(spec.name, mini=True), "mergelab-miniature", None, data.split, None, protocol)
    if spec.kind == "lm_eval":
        return MeasuredOn(spec.name, "lm-evaluation-harness", None, data.split, None, protocol)
    if data.origin == "hub" and spec.path and not is_local_path(spec.path):
        return MeasuredOn(spec.name, spec.path, spec.config, data.split, spec.revision, protocol)
    # Which dataset files of the user's own are from is not known.
    return MeasuredOn(f"{spec.name} (local files)", "local-files", None, data.split, None, protocol)


def _on(result: ExperimentResult, task: str) -> ExperimentResult:
    """Return the part of a suite's result that one task has."""
    models: list[ModelResult] = [
        replace(model, results={task: model.results[task]}, average=None, normalised=None)
        for model in result.models
        if task in model.results
    ]
    return replace(result, tasks=(task,), models=tuple(models))


def _folders_of(reference: ReferenceConfig) -> list[Path]:
    parsed = parse_reference(reference)
    return [local_folder(one, "models") for one in parsed.models]


def _name(reference: Reference | Pair) -> str:
    if isinstance(reference, Pair) or reference.folder is None:
        return reference.text
    return name_of(str(local_path(reference.text, "models")))


def _is_kept_place(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return any(key == one or key.startswith((f"{one}.", f"{one}/")) for one in _NOT_THE_RECIPE)
