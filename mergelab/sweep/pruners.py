"""Pruners: short names for ours and Optuna's, any other `optuna.pruners.BasePruner` by the dotted path of its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergelab.sweep.classes import Known, load_class, make, named
from mergelab.sweep.storage import silence

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

# Median and halving count in the checks of a trial (`mergelab.sweep.reporting.CHECKS`).
PRUNERS: Mapping[str, Known | None] = {
    "futility": Known("mergelab.sweep.futility.Futility"),
    "wilcoxon": Known("optuna.pruners.WilcoxonPruner", {"p_threshold": 0.1, "n_startup_steps": 16}),
    "median": Known("optuna.pruners.MedianPruner", {"n_startup_trials": 5, "n_warmup_steps": 2}),
    "halving": Known("optuna.pruners.SuccessiveHalvingPruner", {"min_resource": 2, "reduction_factor": 2}),
    "none": None,
}
DEFAULT = "futility"


def pruner_name(setting: str | dict[str, Any] | None) -> str:
    """Return the pruner's short name, or the dotted path of its class; None is `DEFAULT`.

    Raises:
        SweepError: there is no such pruner.
    """
    return named(setting or DEFAULT, "pruner", PRUNERS)[0]


def make_pruner(setting: str | dict[str, Any] | None) -> BasePruner | None:
    """Create the pruner that a setting names; None for ``none``.

    Args:
        setting: one of `PRUNERS`, the dotted path of a class, or a mapping with ``name`` and the class's options. None:
            `DEFAULT`.

    Raises:
        SweepError: there is no such pruner or option.
    """
    import optuna

    silence(optuna)
    name, options = named(setting or DEFAULT, "pruner", PRUNERS)
    known = PRUNERS[name] if name in PRUNERS else Known(name)
    if known is None:
        return None
    cls = load_class(known.path, "pruner", optuna.pruners.BasePruner)
    pruner: BasePruner = make(cls, name, "pruner", {**known.options, **options})
    return pruner
