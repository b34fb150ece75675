"""The catalogue of merge methods, made from the methods themselves.

Usage:
    mergelab methods                    # all methods: what they need and do, parameters, paper
    mergelab methods ties               # one in full: formula, departures, parameters with their ranges
    mergelab methods --format markdown  # the table for a page; also latex, csv
    mergelab methods --json [NAME]      # for programs, as --format json

``python -m mergelab.methods`` is the same command.
"""

from __future__ import annotations

import argparse
import sys

from mergelab.cli.command import guarded
from mergelab.console.formats import FORMATS, for_a_page, for_a_program
from mergelab.console.progress import console
from mergelab.engine.catalogue import COLUMNS, Entry, entries, entry, markdown
from mergelab.engine.parameters import key_of
from mergelab.errors import MergelabError

# From how many columns of the terminal on a column of the table is shown; the others always are.
_FROM_WIDTH = {
    "cost": 110,
    "parameters": 110,
    "use it for": 150,
    "authors' values": 150,
    "memory": 220,
    "data": 220,
    "streaming": 220,
    "paper": 190,
}
_HEADING = "family"  # stands above its methods

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
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="as --format json")
    options = parser.parse_args(arguments)
    try:
        found = [entry(options.name)] if options.name else entries()
        if options.format == "table":
            _print_one(found[0]) if options.name else _print_all(found)
        elif options.format == "markdown":
            sys.stdout.write(markdown(found))
        elif options.format == "latex":
            sys.stdout.write(for_a_page("latex", COLUMNS, [each.cells() for each in found]))
        elif options.format == "json":
            sys.stdout.write(for_a_program("json", [each.record() for each in found]))
        else:
            rows = [dict(zip(COLUMNS, each.cells(), strict=True)) for each in found]
            sys.stdout.write(for_a_program(options.format, rows))
    except MergelabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _print_all(found: list[Entry]) -> None:
    from rich.table import Table

    out = console()
    shown = [column for column in COLUMNS if column != _HEADING and out.width >= _FROM_WIDTH.get(column, 0)]
    table = Table(show_lines=False, title=f"{len(found)} merge methods", title_justify="left", title_style="bold")
    for column in shown:
        table.add_column(column, no_wrap=column in ("method", "needs"), overflow="fold")
    family = None
    for each in found:
        if family != each.family:
            if family is not None:
                table.add_section()
            table.add_row(f"[bold]{each.family}[/bold]")
            table.add_section()
        family = each.family
        cells = dict(zip(COLUMNS, each.cells(), strict=True))
        table.add_row(*(cells[column] for column in shown))
    out.print(table)
    if left_out := [column for column in COLUMNS if column not in (*shown, _HEADING)]:
        out.print(f"too narrow for {', '.join(left_out)}; --format=csv has everything", markup=False)
    out.print(LEGEND, markup=False)


def _print_one(found: Entry) -> None:
    sys.stdout.write(f"{found.name}  ({found.family or 'your own'}; needs {found.needs or 'experts only'})\n\n")
    sys.stdout.write((found.method.documentation or "No description.") + "\n\n")
    for label in ("use it for", "cost", "memory", "data", "streaming"):
        if text := dict(zip(COLUMNS, found.cells(), strict=True))[label]:
            sys.stdout.write(f"{label.capitalize()}: {text}\n")
    rows = [(each.name, each.shown, each.of_authors, each.allowed) for each in found.settable]
    sys.stdout.write("\nParameters (method.<name>=...)\n")
    head = ("", "default", "authors'", "")
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(3)]
    for name, default, authors, allowed in [head, *rows] if rows else []:
        line = f"  {name:{widths[0]}}  {default:>{widths[1]}}  {authors:>{widths[2]}}  {allowed}"
        sys.stdout.write(line.rstrip() + "\n")
    if found.method.authors:
        sys.stdout.write(f"method.preset=authors sets {', '.join(map(key_of, found.method.authors))}\n")
    if found.paper:
        sys.stdout.write(f"\n{found.paper}\n")


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
