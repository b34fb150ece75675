"""A run's description in the MLflow UI, in Markdown: what was found, how it was measured, and the command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergelab.console.tables import markdown_table

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult

_PROGRAM = "python -m mergelab"
_LONGEST = 4800  # characters; MLflow takes 5000 and a description that is cut is no Markdown any more


def description(summary: str, *parts: str, command: str | None = None) -> str:
    """Return a description: a summary, the command, and the parts for which there is room.

    The UI shows the first lines and folds the rest.

    Args:
        summary: one line of Markdown.
        parts: Markdown, the most important first.
        command: what was typed, or does the same.
    """
    text = summary
    for part in ([f"```\n{command}\n```"] if command else []) + [part for part in parts if part]:
        if len(text) + len(part) + 2 <= _LONGEST:
            text = f"{text}\n\n{part}" if text else part
    return text


def summary_of(result: ExperimentResult) -> str:
    """Say in one line what was found of a result's last model; nothing where it has no score."""
    merged = result.merged
    scores = [
        f"{task} {one.primary} {one.score.value:.4f} [{one.score.low:.3f}, {one.score.high:.3f}]"
        for task, one in merged.scored.items()
    ]
    return f"**{merged.label}**: {', '.join(scores)}" if scores else ""


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


def command(overrides: Sequence[Any], *, multirun: bool = False) -> str:
    """Return the command with these overrides, for a shell."""
    program = f"{_PROGRAM} -m" if multirun else _PROGRAM
    return " ".join([program, *(shlex.quote(str(one)) for one in overrides)])
