"""Samplers: Optuna's by short names, any other `optuna.samplers.BaseSampler` by the dotted path of its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.errors import SweepError
from mergelab.sweep.classes import Known, load_class, make, named
from mergelab.sweep.storage import silence

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from mergelab.sweep.space import Space


@dataclass(frozen=True)
class KnownSampler(Known):
    """A sampler that has a short name; an option may be a function of the space and of whether trials run in parallel.

    Attributes:
        one_sequence: all trials draw from one sequence of points, so that the seed is the same for all.
        single_objective: cannot draw for several objectives.
    """

    one_sequence: bool = False
    single_objective: bool = False


def _parallel(space: Space, parallel: bool) -> bool:
    return parallel


def _points(space: Space, parallel: bool) -> dict[str, Any]:
    return space.grid()


# A line here adds a sampler.
SAMPLERS: Mapping[str, KnownSampler] = {
    "tpe": KnownSampler("optuna.samplers.TPESampler", {"constant_liar": _parallel}),
    "gp": KnownSampler("optuna.samplers.GPSampler"),
    "cmaes": KnownSampler("optuna.samplers.CmaEsSampler", {"warn_independent_sampling": False}, single_objective=True),
    "qmc": KnownSampler("optuna.samplers.QMCSampler", {"scramble": True}, one_sequence=True),
    "random": KnownSampler("optuna.samplers.RandomSampler"),
    "grid": KnownSampler("optuna.samplers.GridSampler", {"search_space": _points}, one_sequence=True),
    "nsga2": KnownSampler("optuna.samplers.NSGAIISampler", {"population_size": 16}),
}


def sampler_name(setting: str | dict[str, Any]) -> str:
    """Return the sampler's short name, or the dotted path of its class.

    Raises:
        SweepError: there is no such sampler.
    """
    return named(setting, "sampler", SAMPLERS)[0]


def make_sampler(
    setting: str | dict[str, Any], space: Space, *, seed: int, number: int, objectives: int = 1, parallel: bool
) -> BaseSampler:
    """Create the sampler that draws one trial.

    Its random numbers depend on the seed and the trial's number alone, so that a resumed sweep draws what an
    uninterrupted one would have drawn.

    Args:
        setting: one of `SAMPLERS`, the dotted path of a class, or a mapping with ``name`` and the class's options.
        space: what is searched.
        seed: the sweep's.
        number: the trial's.
        objectives: how many scores there are.
        parallel: whether other trials run at the same time.

    Raises:
        SweepError: there is no such sampler or option, or it is not for this space.
    """
    import optuna

    silence(optuna)
    name, options = named(setting, "sampler", SAMPLERS)
    known = SAMPLERS.get(name) or KnownSampler(name)
    if objectives > 1 and known.single_objective:
        raise SweepError(f"sweep.sampler={name}: is for one objective, there are {objectives}; nsga2, tpe or gp fit")
    cls = load_class(known.path, "sampler", optuna.samplers.BaseSampler)
    if not _takes_seed(cls):
        raise SweepError(
            f"sweep.sampler={name}: {cls.__name__} takes no seed; each trial's sampler is created with one, so that a "
            "resumed sweep draws the same points"
        )
    if "seed" in options:
        raise SweepError(f"sweep.sampler={name}: its seed follows from the sweep's: sweep.seed={options['seed']}")
    defaults = {key: value(space, parallel) if callable(value) else value for key, value in known.options.items()}
    own = seed if issubclass(cls, _sequences()) else (seed * 1_000_003 + number) % 2**31
    sampler: BaseSampler = make(cls, name, "sampler", {"seed": own, **defaults, **options})
    return sampler


def _sequences() -> tuple[type, ...]:
    """Return the classes, whose subclasses are alike, that draw all trials from one sequence."""
    import optuna

    base = optuna.samplers.BaseSampler
    return tuple(load_class(known.path, "sampler", base) for known in SAMPLERS.values() if known.one_sequence)


def _takes_seed(cls: type) -> bool:
    parameters = inspect.signature(cls).parameters
    return "seed" in parameters or any(one.kind == one.VAR_KEYWORD for one in parameters.values())
