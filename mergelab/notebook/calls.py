"""``ml.run`` and ``ml.sweep``: the command line's experiments and sweeps as functions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict, Unpack

from mergelab.console.progress import silenced
from mergelab.errors import ConfigError
from mergelab.notebook.launch import run_many, run_one
from mergelab.notebook.overrides import check_known, name_in, overrides_of, space_of, text_of
from mergelab.notebook.results import MergeRun, SweepRun

Choice = str | Mapping[str, Any] | None
"""An option of a group by its name, or settings of it, ``name`` among them where an option is chosen."""
Range = str | tuple[float, float] | list[Any]


class RunSettings(TypedDict, total=False):
    """The keywords of `run`."""

    method: Choice
    task: Choice
    models: Choice
    experiment: str | None
    eval: Choice
    save: Choice
    tracking: Choice
    source: Literal["auto", "hub", "mini"]
    device: str
    seed: int
    evaluate: bool
    output: str | PathLike[str] | None


class SweepSettings(RunSettings, total=False):
    """The keywords of `sweep`."""

    sweep: str
    params: Mapping[str, Range]
    n_trials: int
    n_jobs: int
    sampler: str | Mapping[str, Any]
    evaluation: Literal["full", "pruned", "adaptive"] | None
    pruner: str | Mapping[str, Any] | None
    budget: int | str | None
    objective: str | Sequence[str] | None
    direction: Literal["maximize", "minimize"] | Sequence[Literal["maximize", "minimize"]] | None
    storage: str | None
    study_name: str | None
    enqueue: Sequence[Mapping[str, Any]] | None
    retries: int
    compile: bool
    max_failure_rate: float


_RUN = tuple(RunSettings.__annotations__)
_SPACE = ("sweep", "params")
_SWEEP = tuple(key for key in SweepSettings.__annotations__ if key not in (*_RUN, *_SPACE))


def run(*overrides: str, verbose: bool = False, **settings: Unpack[RunSettings]) -> MergeRun:
    """Run one experiment, as ``python -m mergelab`` does, and return its result.

    Usage:
        found = ml.run(method="ties", task="rte")
        found = ml.run("eval.protocol=holdout", method={"name": "ties", "density": 0.3, "lambda": 0.8}, task="rte")
        found.table, found.scores, found.plot()

    Args:
        overrides: as on the command line, for any key: ``"method.density=0.3"``.
        verbose: whether to write what the command writes.
        settings: ``method``, ``task``, ``models``, ``experiment``, ``eval``, ``save`` and ``tracking`` are the name of
            an option, or a mapping of settings in which ``name`` chooses the option; ``source``, ``device``, ``seed``,
            ``evaluate`` and ``output`` are values. In place of ready models:
            ``models={"base": "ORG/BASE", "experts": ["ORG/A", "./folder"]}``.

    Raises:
        MergelabError: something in the settings, the models or the data is not usable; nothing is written then.
    """
    from mergelab.experiment.run import finish_experiment

    check_known(settings, _RUN, "ml.run")
    arguments = [*overrides_of(settings), *overrides]
    with _shown(verbose):
        return MergeRun.of(run_one(arguments, finish_experiment))


def sweep(*overrides: str, verbose: bool = False, **settings: Unpack[SweepSettings]) -> SweepRun:
    """Run a sweep, as ``python -m mergelab -m sweep=…`` does, and return its trials and the report on its winner.

    A sweep that was interrupted goes on where it stopped when it is called again.

    Usage:
        found = ml.sweep(method="ties", task="rte", n_trials=20)
        found = ml.sweep(method="slerp", task="rte", params={"method.t": (0.0, 1.0)}, n_trials=10, sampler="random")
        found.table, found.best_params, found.report, found.plot()

    Args:
        overrides: as on the command line, for any key.
        verbose: whether to write what the command writes.
        settings: those of `run`; ``sweep``, the search space's name, by default the method's; ``params``, a search
            space of ranges ``(low, high)``, lists of values, or texts in Hydra's syntax; and the sweep's own settings:
            ``n_trials``, ``n_jobs``, ``sampler``, ``evaluation``, ``pruner``, ``budget``, ``objective``, ``direction``,
            ``storage``, ``study_name``, ``enqueue``, ``retries``, ``compile``, ``max_failure_rate``.

    Raises:
        MergelabError: something in the settings, the models, the data or the study is not usable.
        KeyboardInterrupt: the user interrupted it; the trials so far are stored.
    """
    from mergelab.cli.run import experiment_or_trial

    check_known(settings, [*_RUN, *_SPACE, *_SWEEP], "ml.sweep")
    plain = {key: value for key, value in settings.items() if key in _RUN}
    of_sweep = {f"sweep.{key}": value for key, value in settings.items() if key in _SWEEP}
    chosen = settings.get("sweep") or _method(plain)
    if chosen is None:
        raise ConfigError("ml.sweep: say what is swept: method='ties', or sweep='layerwise'")
    ranges = space_of(settings.get("params") or {})
    arguments = [
        f"sweep={text_of(chosen, 'sweep')}",
        *overrides_of(plain),
        *overrides_of(of_sweep),
        *ranges,
        *overrides,
    ]
    with _shown(verbose):
        return SweepRun.of(run_many(arguments, experiment_or_trial))


def _method(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the method, whose own search space is swept where none is chosen."""
    method = settings.get("method")
    if isinstance(method, Mapping):
        return next((str(value) for key, value in method.items() if name_in("method", key) == "name"), None)
    return None if method is None else str(method)


def _shown(verbose: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if verbose else silenced()
