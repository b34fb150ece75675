"""The experts of a fine-tuning in the terminal, or in the format that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.console.formats import chosen_format, for_a_page, for_a_program
from mergelab.console.progress import is_silenced
from mergelab.console.tables import print_fitting

if TYPE_CHECKING:
    from mergelab.finetune.training import Outcome

_NOTE = "best epoch, and what it has on the part of the training split that was held out"


def print_experts(task: str, outcomes: Mapping[str, Outcome], folders: Mapping[str, Path]) -> None:
    """Print a row for each expert: its best epoch of how many, its figures on what was held out, and its folder."""
    if is_silenced():
        return
    records = [
        {"expert": name, "epoch": one.epoch, "epochs": one.epochs, **one.held_out, "folder": str(folders[name])}
        for name, one in outcomes.items()
    ]
    form, title = chosen_format(), f"experts for {task}"
    if form in ("csv", "json"):
        sys.stdout.write(for_a_program(form, records, title=title, note=_NOTE))
        return
    header = list(records[0])
    rows = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in record.values()] for record in records]
    if form != "table":
        sys.stdout.write(for_a_page(form, header, rows, f"{title}: {_NOTE}"))
        return
    from rich.table import Table

    table = Table(title=title, caption=_NOTE, title_justify="left", caption_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name in ("expert", "folder") else "right")
    for row in rows:
        table.add_row(*row)
    print_fitting(iter([table]))
