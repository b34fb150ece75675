"""The catalogue of merge methods, made from the methods themselves.

Usage:
    mergelab methods                    # all methods: what they need and do, parameters, paper
    mergelab methods ties               # one in full: formula, departures, parameters with their ranges
    mergelab methods --format markdown  # the table for a page

``python -m mergelab.methods`` is the same command.
"""

from __future__ import annotations

import argparse
import sys

from mergelab.engine.catalogue import COLUMNS, Entry, entries, entry, markdown
from mergelab.errors import MergelabError

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
    parser.add_argument("--format", choices=["table", "markdown"], default="table")
    options = parser.parse_args(arguments)
    try:
        if options.name:
            _print_one(entry(options.name))
        elif options.format == "markdown":
            sys.stdout.write(markdown(entries()))
        else:
            _print_all(entries())
    except MergelabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _print_all(found: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table(show_lines=False, title=f"{len(found)} merge methods", title_justify="left", title_style="bold")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in ("method", "needs"), overflow="fold")
    family = None
    for each in found:
        if family not in (None, each.family):
            table.add_section()
        family = each.family
        table.add_row(*each.cells())
    console.print(table)
    console.print(LEGEND, markup=False)


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
