"""The catalogue of merge methods, made from the methods themselves.

Usage:
    mergelab methods                    # all methods: what they need and do, parameters, paper
    mergelab methods ties               # one in full: formula, departures, parameters with their ranges
    mergelab methods --format markdown  # the table for a page; also latex, csv, json

``python -m mergelab.methods`` is the same command.
"""

from __future__ import annotations

import argparse
import sys

from mergelab.console.formats import FORMATS, for_a_page, for_a_program
from mergelab.console.progress import console
from mergelab.engine.catalogue import COLUMNS, Entry, entries, entry, markdown
from mergelab.errors import MergelabError

# From how many columns of the terminal on a column of the table is shown; the others always are.
_FROM_WIDTH = {"cost": 110, "parameters": 110, "family": 150, "paper": 150}
LEGEND = (
    "B: a base model, D: the experts' training examples, G: gradients, S: examples that select, L: experts that are "
    "LoRA adapters, 2: exactly two experts\nevery number may also be given by layer or by tensor name, and many for "
    "each expert; mergelab methods NAME describes one"
)


def main(arguments: list[str] | None = None) -> int:
    """Print what was asked for and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="mergelab methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a method, or the dotted path of a function")
    parser.add_argument("--format", choices=FORMATS, default="table")
    options = parser.parse_args(arguments)
    try:
        if options.name:
            _print_one(entry(options.name))
        elif options.format == "table":
            _print_all(entries())
        elif options.format == "markdown":
            sys.stdout.write(markdown(entries()))
        elif options.format == "latex":
            sys.stdout.write(for_a_page("latex", COLUMNS, [each.cells() for each in entries()]))
        else:
            rows = [dict(zip(COLUMNS, each.cells(), strict=True)) for each in entries()]
            sys.stdout.write(for_a_program(options.format, rows))
    except MergelabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _print_all(found: list[Entry]) -> None:
    from rich.table import Table

    out = console()
    shown = [column for column in COLUMNS if out.width >= _FROM_WIDTH.get(column, 0)]
    table = Table(show_lines=False, title=f"{len(found)} merge methods", title_justify="left", title_style="bold")
    for column in shown:
        table.add_column(column, no_wrap=column in ("method", "needs"), overflow="fold")
    family = None
    for each in found:
        if family not in (None, each.family):
            table.add_section()
        family = each.family
        cells = dict(zip(COLUMNS, each.cells(), strict=True))
        table.add_row(*(cells[column] for column in shown))
    out.print(table)
    if left_out := [column for column in COLUMNS if column not in shown]:
        out.print(f"too narrow for {', '.join(left_out)}; --format=csv has everything", markup=False)
    out.print(LEGEND, markup=False)


def _print_one(found: Entry) -> None:
    sys.stdout.write(f"{found.name}  ({found.family or 'your own'}; needs {found.needs or 'experts only'})\n\n")
    sys.stdout.write((found.method.documentation or "No description.") + "\n\n")
    sys.stdout.write("Parameters (method.<name>=...)\n")
    width = max((len(name) for name, *_ in found.parameters), default=0)
    for name, default, allowed in found.parameters:
        sys.stdout.write(f"  {name:{width}}  {default:>10}  {allowed}\n")
    if found.paper:
        sys.stdout.write(f"\n{found.paper}\n")


if __name__ == "__main__":
    sys.exit(main())
