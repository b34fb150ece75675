"""What an experiment has loaded; a sweep's trials in one process share it, so that none loads anything again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.console.progress import warn
from mergelab.errors import InsufficientMemoryError
from mergelab.experiment.calibration import Calibration
from mergelab.experiment.evaluator import Evaluator
from mergelab.experiment.locate import LocatedModels, Source, locate
from mergelab.experiment.merging import Merging
from mergelab.experiment.session import Session, open_session
from mergelab.tasks.data import load_data

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.engine.method import MergeMethod
    from mergelab.engine.parameters import Parameters
    from mergelab.engine.warm_session import MergeSession
    from mergelab.evaluation.results import ModelResult
    from mergelab.experiment.plan import Plan
    from mergelab.experiment.selection import EvaluatorSelection
    from mergelab.tasks.data import TaskData

Progress = Callable[[str, float], None]
Backbones = Mapping[str, Mapping[str, "Tensor"]]


@dataclass
class LoadedModels:
    """Opened models with their data, and what has been measured of them."""

    evaluator: Evaluator
    compiling: bool = False
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    @property
    def session(self) -> Session:
        """The opened models."""
        return self.evaluator.session

    @cached_property
    def baselines(self) -> list[ModelResult]:
        """The base and the experts, measured and, if wanted, checked to be better than chance."""
        found = self.evaluator.baselines()
        if self.evaluator.settings.preflight:
            self.evaluator.preflight(found)
        return found

    def calibration(self, plan: Plan, progress: Progress) -> Calibration | None:
        """Return training examples for a method that learns from them; the same object for the same method."""
        if "data" not in plan.method.needs:
            return None
        if plan.method.name not in self.calibrations:
            self.calibrations[plan.method.name] = Calibration(self.session, plan.method.name, plan.data_dir, progress)
        return self.calibrations[plan.method.name]

    def merged(
        self,
        method: MergeMethod,
        parameters: Parameters,
        examples: Calibration | EvaluatorSelection | None,
        progress: Progress,
        weights: Sequence[float],
    ) -> tuple[Backbones, float]:
        """Merge from memory, the models weighted with ``weights`` where the parameters have none.

        Returns:
            As `mergelab.experiment.merging.Merging.in_memory`; the tensors are overwritten by the next call.
        """
        opened, seed = self.session.opened, self.evaluator.seed
        if self._merge_session is None:
            return Merging(method, parameters, self.session, seed, progress, examples, weights).in_memory()
        started = time.perf_counter()
        owners = self.session.heads.owners() if method.one_model_per_expert else dict.fromkeys(self.evaluator.data)
        found: dict[str | None, dict[str, Tensor]] = {}
        for output in dict.fromkeys(owners.values()):
            self._merge_session.merge(method, parameters, weights=weights, output=output, examples=examples)
            made = (
                {name: tensor.clone() for name, tensor in self._merged.items()}
                if method.one_model_per_expert
                else self._merged
            )
            aliases = {alias: made[name] for alias, name in opened.aligned.aliases.items() if name in made}
            found[output] = {**opened.passed_through, **self._integers, **made, **aliases}
        return {task: found[output] for task, output in owners.items()}, time.perf_counter() - started

    @property
    def path(self) -> str:
        """How the last merge from memory computed: "compiled" or "plain" torch operations."""
        return "plain" if self._merge_session is None else self._merge_session.path

    @cached_property
    def _merge_session(self) -> MergeSession | None:
        from mergelab.engine.warm_session import MergeSession

        try:
            return MergeSession(
                self.session.opened.aligned,
                self._merged,
                seed=self.evaluator.seed,
                device=self.session.device,
                dtype=self.session.opened.dtype,
                compiling=self.compiling,
            )
        except InsufficientMemoryError as error:
            warn(f"{error}. Every trial of this sweep reads the models again.")
            return None

    @cached_property
    def _merged(self) -> dict[str, Tensor]:
        """The tensors that merges are written to."""
        import torch

        aligned, wanted = self.session.opened.aligned, self.session.opened.dtype
        like = aligned.base or aligned.experts[0]
        return {name: torch.empty(like.shape(name), dtype=wanted or like.dtype(name)) for name in aligned.names}

    @cached_property
    def _integers(self) -> dict[str, Tensor]:
        aligned = self.session.opened.aligned
        return {name: (aligned.base or aligned.experts[0]).get(name) for name in aligned.integers}


_last: list[tuple[str, LoadedModels]] = []  # what the last plan left for the next one


def open_loaded(
    plan: Plan, source: Source, progress: Progress, *, keep: bool = False, compiling: bool = False
) -> LoadedModels:
    """Open a plan's models and data; with ``keep``, take and leave them for the next plan on the same ones."""
    key = _key(plan, source)
    if keep and _last and _last[0][0] == key:
        return _last[0][1]
    _last.clear()  # two sets of models may not fit into memory
    located = locate(plan.config.models, source, [task.name for task in plan.tasks if task.path], progress)
    session = open_session(located, plan.tasks, plan.config, module_names=bool(plan.method.needs))
    evaluator = Evaluator(session, _load_data(plan, located), plan.config.eval, plan.config.seed, progress)
    loaded = LoadedModels(evaluator, compiling)
    if keep:
        _last.append((key, loaded))
    return loaded


def _load_data(plan: Plan, located: LocatedModels) -> dict[str, TaskData]:
    loaded = {}
    for task in plan.tasks:
        mini = located.mini_data.get(task.name)
        loaded[task.name] = load_data(
            task,
            data_dir=mini or plan.data_dir,
            origin="mini" if mini else None,
            limit=plan.limit,
            seed=plan.config.seed,
        )
    return loaded


def _key(plan: Plan, source: Source) -> str:
    """Name all that the opened models and data depend on; experts' weights count only when they are merged."""
    settings = plan.config.model_dump(include={"models", "eval", "save", "device", "seed"})
    settings["models"]["experts"] = {
        name: {key: value for key, value in expert.items() if key != "weight"}
        for name, expert in settings["models"]["experts"].items()
    }
    tasks = [asdict(task) for task in plan.tasks]
    parts = [settings, tasks, plan.data_dir, plan.limit, source, str(Path.cwd()), bool(plan.method.needs)]
    return json.dumps(parts, sort_keys=True, default=str)
