"""Optuna's samplers by their short names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergelab.errors import SweepError, did_you_mean, listed
from mergelab.sweep.storage import silence

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from mergelab.sweep.space import Space

SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid", "nsga2")
# What draws from one sequence has the same seed for all trials.
_ONE_SEQUENCE = ("qmc", "grid")
_SINGLE_OBJECTIVE = ("cmaes",)


def named(setting: str | dict[str, Any], what: str, known: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Split ``tpe`` or ``{name: tpe, n_startup_trials: 20}`` into a known name and its options.

    Raises:
        SweepError: the name is not known.
    """
    options = dict(setting) if isinstance(setting, dict) else {"name": setting}
    name = str(options.pop("name", None))
    if name not in known:
        raise SweepError(f"sweep.{what}={name}: no such {what}{did_you_mean(name, known)} (there are {listed(known)})")
    return name, options


def make_sampler(
    setting: str | dict[str, Any], space: Space, *, seed: int, number: int, objectives: int = 1, side_by_side: bool
) -> BaseSampler:
    """Make the sampler that draws one trial.

    Its random numbers depend on the seed and the trial's number alone, so that a sweep that was interrupted draws
    what it would have drawn.

    Args:
        setting: one of `SAMPLERS`, or a mapping with ``name`` and options of Optuna's class.
        space: what is searched.
        seed: the sweep's.
        number: the trial's.
        objectives: how many scores there are.
        side_by_side: other trials are running.

    Raises:
        SweepError: there is no such sampler or option, or it is not for this space.
    """
    import optuna

    silence(optuna)
    name, options = named(setting, "sampler", SAMPLERS)
    if objectives > 1 and name in _SINGLE_OBJECTIVE:
        raise SweepError(f"sweep.sampler={name}: is for one objective, there are {objectives}; nsga2, tpe or gp fit")
    own = seed if name in _ONE_SEQUENCE else (seed * 1_000_003 + number) % 2**31
    samplers = optuna.samplers
    if name == "tpe":
        options = {"constant_liar": side_by_side, **options}
    if name == "qmc":
        options = {"scramble": True, **options}
    if name == "cmaes":
        options = {"warn_independent_sampling": False, **options}
    try:
        match name:
            case "grid":
                return samplers.GridSampler(space.grid(), seed=own, **options)
            case "nsga2":
                return samplers.NSGAIISampler(seed=own, **{"population_size": 16, **options})
        classes = {
            "tpe": samplers.TPESampler,
            "gp": samplers.GPSampler,
            "cmaes": samplers.CmaEsSampler,
            "qmc": samplers.QMCSampler,
            "random": samplers.RandomSampler,
        }
        made: BaseSampler = classes[name](seed=own, **options)
        return made
    except (TypeError, ValueError) as error:
        raise SweepError(f"sweep.sampler={name}: {error}") from None
