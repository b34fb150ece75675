"""The report on a sweep's winner: evaluated on the reporting examples, and compared with what it has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mergelab.engine.registry import check_parameters, get_method
from mergelab.evaluation.results import ExperimentResult, ModelResult
from mergelab.evaluation.scoring import compare
from mergelab.experiment import recording
from mergelab.experiment.adapter_output import AdapterOutput, base_reference
from mergelab.experiment.cards import Cards
from mergelab.experiment.keeping import keep, say_written
from mergelab.experiment.loaded import LoadedModels, open_loaded
from mergelab.experiment.logged import Measured, measure_merged, with_logged
from mergelab.experiment.merging import Merging
from mergelab.experiment.saving import Saving
from mergelab.sweep.plan import expert_weights
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.engine.method import MergeMethod
    from mergelab.engine.parameters import Parameters
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.locate import Source
    from mergelab.experiment.plan import Plan
    from mergelab.tracking import Run, Tracker


@dataclass(frozen=True)
class Report:
    """The winner's result, after those of the models that it is compared with.

    Attributes:
        against: the two-sided p-value of the paired test of the winner against other models, by their names.
        model_tags: the tags that name the models that were merged; empty where runs are not tracked.
        run: id of the report's run; None where runs are not tracked.
    """

    result: ExperimentResult
    against: Mapping[str, float]
    model_tags: Mapping[str, str]
    run: str | None


def report_winner(plan: Plan, source: Source, tracker: Tracker, run: Run, progress: Any) -> Report:
    """Evaluate the winner, the uniform soup and the method's defaults, record them, and save the winner.

    They are evaluated on all examples, those that report included. The winner is saved where the user asked for it.

    Args:
        plan: the experiment at the winner's point.
        source: where models and data come from.
        tracker: the tracking store.
        run: the report's run.
        progress: shows how far a long step is.
    """
    loaded = open_loaded(plan, source, progress, keep=True)
    evaluator, session = loaded.evaluator, loaded.session
    model_tags = recording.record_models(run, session)
    recording.record_inputs(run, plan.resolved, evaluator.data.values())
    baselines = tuple(with_logged(Measured(model, session)) for model in loaded.baselines)
    for baseline in baselines:
        recording.record_baseline(tracker, run.experiment, plan, source, baseline, evaluator)

    examples = loaded.calibration(plan, progress)
    own = _Merge(f"best {plan.method.name}", plan.method, plan.parameters, examples, expert_weights(plan))
    others = {name: _measured(loaded, rival, progress) for name, rival in _rivals(plan, examples).items()}
    winner = _measured(loaded, own, progress)

    against = _against(plan, evaluator, winner, others)
    winner = replace(winner, logged={**winner.logged, **{names.p_value(name): p for name, p in against.items()}})
    title = f"sweep of {plan.method.name} on {session.located.name}"
    models = (*baselines, *others.values(), winner)
    result = ExperimentResult(title, evaluator.note, tuple(evaluator.data), models)
    recording.log_coefficients(run, examples)
    tags = {names.MERGE_PATH: loaded.path} | recording.calibration_tags(examples)
    recording.record_result(run, result, evaluator, tags=tags)
    cards = Cards(plan, session.located, run, tracker, model_tags, result, evaluator, opened=session.opened)
    _save(plan, source, loaded, tracker, run, examples, progress, cards)
    without_predictions = tuple(replace(model, predictions={}) for model in models)
    return Report(replace(result, models=without_predictions), against, model_tags, run.id)


class _Merge(NamedTuple):
    """One merge of the sweep's models, its training examples and its experts' weights included."""

    label: str
    method: MergeMethod
    parameters: Parameters
    examples: Calibration | None
    weights: Sequence[float]


def _rivals(plan: Plan, examples: Calibration | None) -> dict[str, _Merge]:
    """Return what the winner has to beat: the uniform soup and, where it has any, the method with its defaults."""
    experts = len(plan.config.models.experts)
    uniform, soup = [1.0] * experts, get_method("soup")
    rivals = {"soup": _Merge(f"soup of {experts}", soup, check_parameters(soup, {}), None, uniform)}
    has_defaults = not any(field.is_required() for field in plan.method.parameters.model_fields.values())
    if plan.method.name != "soup" and has_defaults:
        defaults = check_parameters(plan.method, {})
        rivals["defaults"] = _Merge(f"{plan.method.name}, defaults", plan.method, defaults, examples, uniform)
    return rivals


def _measured(loaded: LoadedModels, merge: _Merge, progress: Any) -> ModelResult:
    backbones, seconds = loaded.merged(merge.method, merge.parameters, merge.examples, progress, merge.weights)
    return measure_merged(loaded.evaluator, backbones, merge.label, loaded.baselines, seconds)


def _save(
    plan: Plan,
    source: Source,
    loaded: LoadedModels,
    tracker: Tracker,
    run: Run,
    examples: Calibration | None,
    progress: Any,
    cards: Cards,
) -> None:
    """Write the winner where the user asked for it: in a folder, to the hub, or with the run."""
    log = run.id is not None and plan.tracking.log_model != "none"
    if plan.config.output is None and plan.config.save.push_to_hub is None and not log:
        return
    session, weights = loaded.session, expert_weights(plan)
    if plan.config.save.form != "dense":
        merging = Merging(plan.method, plan.parameters, session, plan.config.seed, progress, examples, weights)
        reference, revision = base_reference(plan, source, session.located)
        adapter = AdapterOutput(merging, plan.config.save)
        write = partial(adapter.write, reference=reference, revision=revision, documents=cards)
        saving = Saving(session, plan.config.save, replace(cards, whole=True))
        keep(plan, tracker, run, write, whole=lambda folder: saving.save(adapter.in_memory()[0], folder))
        return
    backbones, _ = loaded.merged(plan.method, plan.parameters, examples, progress, weights)
    saving = Saving(session, plan.config.save, cards)
    keep(plan, tracker, run, partial(saving.save, backbones), written=partial(say_written, saving, cards))


def _against(
    plan: Plan, evaluator: Evaluator, winner: ModelResult, others: Mapping[str, ModelResult]
) -> dict[str, float]:
    """Test the winner against the best expert and against each other merge; of a suite nothing is tested."""
    if len(evaluator.data) > 1:
        return {}
    (name, data), *_ = evaluator.data.items()
    found = {} if winner.p_value is None else {"best_expert": winner.p_value}
    for other, result in others.items():
        own, theirs = winner.predictions[name].outputs, result.predictions[name].outputs
        found[other] = compare(data, own, theirs, evaluator.examples[name], plan.config.eval, plan.config.seed)
    return found
