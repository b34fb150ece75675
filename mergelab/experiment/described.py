"""A run's description in the MLflow UI, in Markdown: what was found, how it was measured, and the command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergelab.console.tables import markdown_table

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult

_PROGRAM = "python -m mergelab"
# Overrides of a sweep and of its jobs, which a single experiment does not have.
_OF_SWEEPS = ("sweep", "hydra", "tracking")
_LONGEST = 4800  # characters; MLflow takes 5000 and a description that is cut is no Markdown any more


def description(*parts: str, command: str | None = None) -> str:
    """Join the parts of a description, without those for which there is no room, and the command.

    Args:
        parts: Markdown, the most important first.
        command: what was typed, or does the same.
    """
    ending = f"\n\n```\n{command}\n```" if command else ""
    if len(ending) > _LONGEST // 2:
        ending = ""
    text = ""
    for part in filter(None, parts):
        if len(text) + len(part) + len(ending) + 2 > _LONGEST:
            break
        text += f"{part}\n\n"
    return text.rstrip() + ending


def result_text(result: ExperimentResult) -> str:
    """Return a result's table with the note on how it was measured; where no task has scores, the note alone."""
    if any(model.scored for model in result.models):
        return markdown_table(result)
    return result.note.replace("\n", "  \n")


def typed_command(*, multirun: bool = False) -> str | None:
    """Return the command of this experiment, grid or sweep as it was typed; None outside of one."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    return command(HydraConfig.get().overrides.task, multirun=multirun)


def single_command(method: str) -> str | None:
    """Return the command that runs a sweep's job as an experiment of its own; None outside of one."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    typed = [str(one) for one in HydraConfig.get().overrides.task]
    own = [one for one in typed if not one.lstrip("+~").startswith(_OF_SWEEPS)]
    chosen = [] if any(one.startswith("method=") for one in own) else [f"method={method}"]
    return command([*chosen, *own])


def command(overrides: Sequence[Any], *, multirun: bool = False) -> str:
    """Return the command with these overrides, for a shell."""
    program = f"{_PROGRAM} -m" if multirun else _PROGRAM
    return " ".join([program, *(shlex.quote(str(one)) for one in overrides)])
