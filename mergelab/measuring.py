"""Measure base, experts and merged models on an experiment's tasks, and compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mergelab.config import ExperimentConfig
from mergelab.errors import DataError
from mergelab.results import ModelResult, Role
from mergelab.tasks.measure import Examples, compare, measure, split_examples
from mergelab.tasks.metrics import score
from mergelab.tasks.statistics import chance_level
from mergelab.tasks.suite import average, normalised_average

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.session import Prediction, Session
    from mergelab.tasks.data import TaskData


@dataclass(frozen=True)
class Bench:
    """A session with the tasks' examples, ready to measure weights."""

    config: ExperimentConfig
    session: Session
    data: Mapping[str, TaskData]
    progress: Callable[[str, float], None]

    @property
    def examples(self) -> dict[str, Examples]:
        """Which examples of each task select and which report."""
        return {name: split_examples(data, self.config.eval, self.config.seed) for name, data in self.data.items()}

    def baselines(self) -> list[ModelResult]:
        """Measure the base (with the merged model's heads) and every expert (with its own head, on its tasks)."""
        located, session, found = self.session.located, self.session, []
        if located.base is not None:
            contents = (session.content("base"), self.config.models.head, *self._expert_contents())
            predictions = {
                name: session.predict(
                    data,
                    session.base_backbone,
                    session.heads[name],
                    located.base.label,
                    key=contents,
                    progress=self.progress,
                )
                for name, data in self.data.items()
            }
            found.append(self._result(located.base.label, "base", predictions, contents))
        for index, expert in enumerate(located.experts):
            contents = (session.content(expert.name), *(expert.labels or ()))
            predictions = {
                name: session.predict(
                    data,
                    partial(session.expert_backbone, index),
                    session.expert_head(index, data.spec),
                    expert.label,
                    key=contents,
                    progress=self.progress,
                )
                for name, data in self.data.items()
                if session.expert_serves(expert, data.spec)
            }
            found.append(self._result(expert.label, "expert", predictions, contents))
        return self._with_averages(found)

    def preflight(self, baselines: Sequence[ModelResult]) -> None:
        """Check that every expert is better than chance on its own task, all examples counted.

        Raises:
            DataError: one is not; most often its labels are in another order than its configuration says.
        """
        for model in baselines:
            for name, prediction in model.predictions.items() if model.role == "expert" else ():
                data = self.data[name]
                chance = chance_level(data.spec, data.labels)
                value = score(data.spec, prediction.logits, data.labels)[data.spec.primary]
                if not value > chance:
                    raise DataError(
                        f"expert {model.label} is at chance on its own task {name}: {data.spec.primary} {value:.4f}, "
                        f"a constant answer gets {chance:.4f}; are its labels in another order "
                        "(models.experts.<name>.labels=[...])? eval.preflight=false goes on without this check"
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
        experts = [model for model in baselines if model.role == "expert" and model.results]
        if len(self.data) == 1 and experts:
            name, data = next(iter(self.data.items()))
            best = max(experts, key=lambda model: model.score)
            own, other = predictions[name].logits, best.predictions[name].logits
            p = compare(data, own, other, self.examples[name], self.config.eval, self.config.seed)
            result = replace(result, p_value=p)
        return self._with_averages([*baselines, result])[-1]

    def _expert_contents(self) -> list[str]:
        return [self.session.content(expert.name) for expert in self.session.located.experts]

    def _result(
        self, label: str, role: Role, predictions: Mapping[str, Prediction], contents: tuple[str, ...] = ()
    ) -> ModelResult:
        examples, config = self.examples, self.config
        results = {
            name: measure(self.data[name], prediction.logits, examples[name], config.eval, config.seed)
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
        if len(self.data) == 1:
            return list(models)
        own = {
            name: max(m.results[name].score.value for m in models if m.role == "expert" and name in m.results)
            for name in self.data
        }

        def averaged(model: ModelResult) -> ModelResult:
            if set(model.results) != set(self.data):
                return model
            scores = {name: result.score.value for name, result in model.results.items()}
            return replace(model, average=average(scores), normalised=normalised_average(scores, own))

        return [averaged(model) for model in models]
