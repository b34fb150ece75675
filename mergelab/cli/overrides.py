"""``models.experts.NAME=null``: an expert of a ready set is left out, and there has to be one of that name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from mergelab.errors import ConfigError, did_you_mean, listed

if TYPE_CHECKING:
    from omegaconf import DictConfig

_LEFT_OUT = re.compile(r"^(\+\+)?(?P<rest>models\.experts\.(?P<name>[\w\-]+)=\s*null\s*)$", re.IGNORECASE)
# A sweep over other groups than `method`, which a sweep's or an experiment's own file may ask for too, may bring each
# job other experts than the sweep itself is composed with.
_MAY_SWEEP_EXPERTS = re.compile(r"^\+*((?!method=)[\w/]+=.*[,(*]|(sweep|experiment)=)")
_WHOLE, _LIST = "models.experts=", re.compile(r"^models\.experts=\s*\[")
_NAMED = re.compile(r"^[+~]*(models\.experts\.[^\W\d][\w\-]*)")


def spelled(argument: str, arguments: Sequence[str], *, multirun: bool) -> str | None:
    """Spell an argument that leaves an expert out so that Hydra checks that it is there; None for other arguments.

    Where a sweep's jobs have other experts than the sweep itself, only the jobs are to check it: see `CheckedInJobs`.

    Args:
        argument: one of the command line's.
        arguments: all of them.
        multirun: whether they are a sweep's.
    """
    if (found := _LEFT_OUT.match(argument)) is None:
        return None
    return f"++{found['rest']}" if multirun and any(map(_MAY_SWEEP_EXPERTS.match, arguments)) else found["rest"]


def check_named(arguments: Sequence[str]) -> None:
    """Raise `ConfigError` where experts are given as a list and one of them is then set, or left out, by name."""
    whole = ""
    for argument in arguments:
        if argument.startswith(_WHOLE):
            whole = argument
        elif _LIST.match(whole) and (found := _NAMED.match(argument)):
            raise ConfigError(
                f"{found[1]}: models.experts is a list here, whose entries cannot be set by name; "
                "write models.experts={NAME: REFERENCE, ...}"
            )


def refusal(argument: str, error: BaseException) -> str | None:
    """Say which experts there are, where Hydra refused ``argument``; None for one that leaves no expert out."""
    if (found := _LEFT_OUT.match(argument)) is None:
        return None
    experts: Any = getattr(error.__cause__, "parent_node", None) or {}
    names = [str(name) for name, expert in experts.items() if expert is not None]
    hint = did_you_mean(found["name"], names)
    return f"{found['rest']}: no expert {found['name']!r}{hint} (there are {listed(names)})"


class CheckedInJobs(Callback):
    """Hydra callback: in every job of a sweep the experts that are left out have to be there."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the spelling for the sweep itself from what its jobs are told."""
        told = config.hydra.overrides.task
        for at, override in enumerate(told):
            if found := _LEFT_OUT.match(override):
                told[at] = found["rest"]
