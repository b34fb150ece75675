"""The form in which results are printed: a table to read, or one for a page, a paper or a program."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from mergelab.errors import ConfigError, did_you_mean, listed

Format = Literal["table", "markdown", "latex", "csv", "json"]

FORMATS: tuple[Format, ...] = get_args(Format)
FORMAT = "MERGELAB_FORMAT"
"""The environment variable that ``--format`` sets."""


def checked_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"--format={name}: no such format{did_you_mean(name, FORMATS)} (there are {listed(FORMATS)})")
    return name


def chosen_format() -> Format:
    """Return the format that the command was given; ``table`` without one."""
    return checked_format(os.environ.get(FORMAT) or "table")


def for_a_page(form: Format, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """Write a table in Markdown, or in LaTeX with the rules of ``booktabs``; what has a meaning there is escaped.

    The note follows the table, in LaTeX as comments.
    """
    from tabulate import tabulate

    if form == "latex":
        table = tabulate(rows, columns, tablefmt="latex_booktabs", disable_numparse=True)
        return "\n".join([table, *(f"% {line}" for line in note.splitlines())]) + "\n"
    columns, *rows = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    table = tabulate(rows, columns, tablefmt="github", disable_numparse=True)
    plain = note.replace("*", "\\*").replace("\n", "  \n")
    return f"{table}\n" + (f"\n{plain}\n" if note else "")


def for_a_program(form: Format, records: Sequence[Mapping[str, Any]], **about: Any) -> str:
    """Write records as CSV with a header, or as one line of JSON: an object with ``about`` and the ``rows``.

    What a record lacks is empty, in JSON null. Numbers have all their digits. JSON has none that are not finite: there
    they are text, ``"nan"`` and ``"inf"``.
    """
    if form == "json":
        rows = [{key: _in_json(value) for key, value in record.items()} for record in records]
        return json.dumps({**about, "rows": rows}, ensure_ascii=False, allow_nan=False) + "\n"
    file = io.StringIO()
    keys = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(file, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _in_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
