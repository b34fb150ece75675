"""Measure base, experts and merged models on an experiment's tasks, and compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mergelab.config import EvalConfig
from mergelab.errors import DataError, listed
from mergelab.evaluation.averages import average, normalised_average
from mergelab.evaluation.bootstrap import chance_level
from mergelab.evaluation.label_check import better_order
from mergelab.evaluation.metrics import score
from mergelab.evaluation.results import ModelResult, Role, common_direction
from mergelab.evaluation.scoring import Examples, compare, measure, split_examples

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.evaluation.scoring import Array, Prediction, TaskResult
    from mergelab.experiment.description import Description
    from mergelab.experiment.session import Session
    from mergelab.models.heads import Head
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.metric import Direction
    from mergelab.tasks.spec import TaskSpec

_FEW = 20  # examples


@dataclass(frozen=True)
class Evaluator:
    """A session with the tasks' examples, ready to measure weights.

    Attributes:
        session: the opened models.
        data: the examples of each task, by its name.
        settings: how scores are obtained.
        seed: of the hold-out and of the bootstrap.
        progress: called with a message and the fraction done.
    """

    session: Session
    data: Mapping[str, TaskData]
    settings: EvalConfig
    seed: int
    progress: Callable[[str, float], None]

    @cached_property
    def examples(self) -> dict[str, Examples]:
        """Which examples of each task select and which report."""
        return {name: split_examples(data, self.settings, self.seed) for name, data in self.data.items()}

    @property
    def note(self) -> str:
        """Say what is measured on, and how."""
        parts = []
        for name, data in self.data.items():
            real = "GLUE" if data.spec.path == "nyu-mll/glue" else data.spec.path
            label = f"mini/{name} (generated, not {real})" if data.origin == "mini" else name
            count = len(self.examples[name].report)
            what = f"{data.spec.primary} on {count} {data.split} examples" if data.spec.metrics else data.split
            what = f"{count} prompts" if data.spec.kind == "prompts" else what
            what += self._windows(data.spec) if data.spec.kind == "language_modelling" else ""
            what += ", too few for intervals and p-values to mean much" if data.spec.metrics and count < _FEW else ""
            parts.append(f"{label}: {what}")
        protocol = {
            "full": "whole split",
            "holdout": "other examples select than report",
            "oracle": "ORACLE: the same examples select and report",
        }[self.settings.protocol]
        return "\n".join([*parts, f"protocol {self.settings.protocol} ({protocol})"])

    def _windows(self, task: TaskSpec) -> str:
        """Say what perplexity depends on besides model and text: how much of it a model sees at once."""
        from mergelab.evaluation.perplexity import window_and_stride

        config = self.session.module(task.outputs).config
        window, stride = window_and_stride(task, config, self.settings.max_length)
        return f", windows of {window} tokens, {stride} of them new"

    def baselines(self) -> list[ModelResult]:
        """Measure the base (with the merged model's heads) and every expert (with its own head, on its tasks)."""
        session, opened, found = self.session, self.session.opened, []
        base = session.located.base
        if base is not None:
            heads = {name: session.heads[name] for name in self.data}
            key = (opened.content("base"), *self._expert_contents())
            of = {name: session.descriptions.of_base(data.spec.outputs) for name, data in self.data.items()}
            found.append(self._baseline(base.label, "base", opened.base_backbone, heads, key, of))
        for index, expert in enumerate(session.located.experts):
            specs = {name: data.spec for name, data in self.data.items() if session.heads.serves(expert, data.spec)}
            heads = {name: session.heads.of_expert(index, spec) for name, spec in specs.items()}
            backbone, of = partial(opened.expert_backbone, index), dict.fromkeys(specs, session.described(index))
            found.append(self._baseline(expert.label, "expert", backbone, heads, (opened.content(expert.name),), of))
        return self._with_averages(found)

    def _baseline(
        self,
        label: str,
        role: Role,
        backbone: Callable[[], Mapping[str, Tensor]],
        heads: Mapping[str, Head],
        key: tuple[str, ...],
        of: Mapping[str, Description],
    ) -> ModelResult:
        """Measure a model with these heads, by task.

        ``key`` names the content of its backbone; ``of`` is what it is measured with, by task.
        """
        predictions = {
            name: self.session.predict(
                self.data[name], backbone, head, label, of=of[name], key=key, progress=self.progress
            )
            for name, head in heads.items()
        }
        settings = [digest for each in of.values() for digest in (each.config_digest, each.tokenizer_digest)]
        contents = (*key, *settings, *(head.digest for head in heads.values()))
        return self._result(label, role, predictions, contents)

    def preflight(self, baselines: Sequence[ModelResult]) -> None:
        """Check that every expert is better than chance on its own task, and than in another order of its labels.

        All examples count.

        Raises:
            DataError: one is not; most often its labels are in another order than its configuration says.
        """
        for model in baselines:
            for name, prediction in model.predictions.items() if model.role == "expert" else ():
                self._check_expert(model.label, self.data[name], prediction.outputs)

    def _check_expert(self, label: str, data: TaskData, outputs: Array) -> None:
        spec, without = data.spec, "eval.preflight=false goes on without this check"
        if (chance := chance_level(spec, data.truth)) is None:
            return
        value = score(spec, outputs, data.truth)[spec.primary]
        sign = -1 if spec.direction == "minimize" else 1
        better = better_order(outputs, data.truth) if spec.kind == "classification" and spec.labels else None
        names = "..." if better is None else listed((spec.labels or ())[row] for row in np.argsort(better.order))
        hint = f"are its labels in another order (models.experts.<name>.labels=[{names}])?"
        if spec.kind == "generation":
            hint = f"does it write what task.prompt asks for? Its first text is {outputs[0]!r:.60}."
        if not sign * value > sign * chance:
            raise DataError(
                f"expert {label} is at chance on its own task {spec.name}: {spec.primary} {value:.4f}, "
                f"a constant answer gets {chance:.4f}; {hint} {without}"
            )
        if better is not None:
            raise DataError(
                f"expert {label} is right on {better.given:.1%} of {spec.name} with its labels as they are, and on "
                f"{better.accuracy:.1%} in another order: {hint} {without}"
            )

    def merged(
        self, backbones: Mapping[str, Mapping[str, Tensor]], label: str, baselines: Sequence[ModelResult]
    ) -> ModelResult:
        """Measure merged weights, given for each task, and test them against the best expert."""
        predictions = {
            name: self.session.predict(
                data, partial(backbones.__getitem__, name), self.session.heads[name], label, progress=self.progress
            )
            for name, data in self.data.items()
        }
        result = self._result(label, "merged", predictions)
        experts = [model for model in baselines if model.role == "expert" and model.scored]
        name, data = next(iter(self.data.items()))
        if len(self.data) == 1 and experts and data.spec.metrics:
            best = _best(experts, lambda model: model.results[name].score.value, result.results[name].direction)
            own, other = predictions[name].outputs, best.predictions[name].outputs
            p = compare(data, own, other, self.examples[name], self.settings, self.seed)
            result = replace(result, p_value=p)
        return self._with_averages([*baselines, result])[-1]

    def _expert_contents(self) -> list[str]:
        return [self.session.opened.content(expert.name) for expert in self.session.located.experts]

    def _result(
        self, label: str, role: Role, predictions: Mapping[str, Prediction], contents: tuple[str, ...] = ()
    ) -> ModelResult:
        results = {
            name: measure(self.data[name], prediction.outputs, self.examples[name], self.settings, self.seed)
            for name, prediction in predictions.items()
        }
        return ModelResult(
            label,
            role,
            results,
            predictions,
            contents,
            eval_seconds=sum(prediction.seconds for prediction in predictions.values()),
            cached=bool(predictions) and all(prediction.cached for prediction in predictions.values()),
        )

    def _with_averages(self, models: Sequence[ModelResult]) -> list[ModelResult]:
        """Add a suite's averages to the models that were measured on all of its tasks."""
        tasks = list(models[-1].scored) if models else []
        experts = [model for model in models if model.role == "expert"]
        if len(tasks) < 2 or any(not any(name in model.scored for model in experts) for name in tasks):
            return list(models)
        results = models[-1].scored
        less = [name for name in tasks if results[name].direction == "minimize"]

        def best(read: Callable[[TaskResult], float]) -> dict[str, float]:
            return {
                name: read(
                    _best(
                        [model.scored[name] for model in experts if name in model.scored],
                        read,
                        results[name].direction,
                    )
                )
                for name in tasks
            }

        def averaged(model: ModelResult) -> ModelResult:
            if set(model.scored) != set(tasks):
                return model
            scores = {name: _reported(result) for name, result in model.scored.items()}
            found = replace(model, normalised=_normalised(scores, best(_reported), less))
            if common_direction(results.values()) is not None:
                found = replace(found, average=average(scores))
            if model.select_score is not None:
                selected = {name: _selected(result) for name, result in model.scored.items()}
                found = replace(found, select_normalised=_normalised(selected, best(_selected), less))
            return found

        return [averaged(model) for model in models]


def _normalised(scores: Mapping[str, float], experts: Mapping[str, float], less: Sequence[str]) -> float | None:
    """Average relative to the experts; None where an expert's score is no measure: zero or negative."""
    return normalised_average(scores, experts, less) if all(value > 0 for value in experts.values()) else None


def _reported(result: TaskResult) -> float:
    return result.score.value


def _selected(result: TaskResult) -> float:
    return result.select[result.primary]


T = TypeVar("T")


def _best(found: Sequence[T], read: Callable[[T], float], direction: Direction) -> T:
    """Return the one that is best by what ``read`` returns."""
    return (max if direction == "maximize" else min)(found, key=read)
