"""Measure how far every merge method is from another implementation of it, and write experiments/PARITY.md.

Usage:
    python experiments/parity.py                                          # without mergekit: its recorded values only
    python experiments/parity.py --mergekit /path/to/env/bin/python       # an interpreter that has mergekit

Runs the tests that compare (those that use tests/parity.py) and writes the page from what they
measured. A method that nothing is compared with has a row that says so. A test that fails leaves the page as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mergelab.engine.registry import method_names  # noqa: E402
from tests.methods.toy import SHAPES  # noqa: E402
from tests.parity import FORMULA, VARIABLE, Record, merge_records, read  # noqa: E402

PAGE = ROOT / "experiments" / "PARITY.md"
TRANSCRIPTION = "float64 transcription"
NOTHING = "no independent implementation yet"
LIBRARIES = ("torch", "numpy", "scipy", "peft", "transformers")
COLUMNS = (
    "method",
    "held against",
    "options",
    "largest difference",
    "dtype",
    "what differs by design",
    "largest value",
    "shapes",
)

HEAD = """\
# Parity with other implementations

Written by a script; do not edit. Measured on {day} on the CPU with
{versions}:

```bash
{command}
```

- A row is the largest absolute difference between what the method answers here and what the other implementation
  answers for the same models, over all entries of all tensors; "largest value" is the largest magnitude among them.
- "{formula}" is NumPy's or PyTorch's arithmetic in a test, written from the paper; a
  transcription of a project computes what the authors' code of that commit does.
- "recorded values" are the eight or nine digits that mergekit printed once, so 1e-8 is in the record.{live}
- Runs that differ only in options that are not shown, such as the number of experts, are one row.
- A result is at best the nearest number of its dtype: for values between 4 and 8 that is up to 2.4e-7 away in float32,
  1.6e-2 in bfloat16 and 4.4e-16 in float64.
- "toy" stands for the shapes {toy}.
"""
LIVE = """
- "mergekit" and its version alone is mergekit run beside mergelab, tensor by tensor in memory."""


def measure(mergekit: str | None) -> list[Record]:
    """Run the tests that compare and read what they measured."""
    places = [
        path
        for name in ("methods", "mergekit", "adapters")
        for path in sorted((ROOT / "tests" / name).glob("test_*.py"))
    ]
    files = [path for path in places if "compared(" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "parity.jsonl"
        environment = {**os.environ, VARIABLE: str(lines)} | ({"MERGELAB_MERGEKIT": mergekit} if mergekit else {})
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *map(str, files)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return merge_records(read(lines))


def page(records: Sequence[Record], methods: Sequence[str], command: str, versions: str, day: str) -> str:
    """The page's text, with at least a row for each of ``methods``."""
    own = sorted({record.method for record in records} - {r.method for r in records if not by_formula(r)})
    live = LIVE if any(map(is_live, records)) else ""
    head = HEAD.format(
        day=day, versions=versions, command=command, formula=FORMULA, live=live, toy=shapes(SHAPES.values())
    )
    rows = [(record.method, row(cells(record))) for record in records]
    rows += [(name, row([f"`{name}`", NOTHING, *[""] * 6])) for name in set(methods) - {name for name, _ in rows}]
    table = [row(COLUMNS), row(["---"] * len(COLUMNS)), *(line for _, line in sorted(rows, key=lambda each: each[0]))]
    tail = ["## Compared with a transcription only", "", *(f"- `{name}`" for name in own)]
    return "\n".join([head, *table, "", *tail, ""])


def by_formula(record: Record) -> bool:
    """Whether the other implementation is a transcription in a test."""
    return record.compared_with.startswith(TRANSCRIPTION)


def is_live(record: Record) -> bool:
    """Whether mergekit ran."""
    return record.compared_with.startswith("mergekit ") and "recorded" not in record.compared_with


def row(cells: Sequence[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def cells(record: Record) -> list[str]:
    """A record's line."""
    difference = f"{record.difference:.1e}" if record.difference else "0"
    sizes = set(record.shapes)
    toy = set(SHAPES.values())
    named = "toy" if sizes == toy else "toy but the scalar" if sizes == toy - {()} else shapes(record.shapes)
    return [
        f"`{record.method}`",
        record.compared_with,
        record.options,
        difference,
        record.dtype,
        record.note,
        f"{record.largest:.2g}",
        named,
    ]


def shapes(found: Sequence[tuple[int, ...]]) -> str:
    """Shapes such as 3×4; of very many their number and the largest."""
    names = ["×".join(map(str, shape)) or "scalar" for shape in found]
    if len(names) <= 8:
        return ", ".join(names)
    return f"{len(names)} shapes up to {names[-1]}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter of an environment that has mergekit")
    mergekit = parser.parse_args().mergekit
    try:
        records = measure(mergekit)
    except subprocess.CalledProcessError as failed:
        sys.exit(f"the tests fail (code {failed.returncode}); {PAGE.name} is left as it is")
    kits = sorted({record.compared_with.partition(",")[0] for record in records if is_live(record)})
    versions = ", ".join(
        [f"Python {sys.version.split()[0]}", *(f"{each} {version(each)}" for each in LIBRARIES), *kits]
    )
    command = "python experiments/parity.py" + (" --mergekit /path/to/env/bin/python" if mergekit else "")
    PAGE.write_text(page(records, method_names(), command, versions, str(date.today())), encoding="utf-8")
    compared = {record.method for record in records}
    print(f"{PAGE.relative_to(ROOT)}: {len(records)} comparisons of {len(compared)} methods")
    if missing := [name for name in method_names() if name not in compared]:
        print(f"nothing is compared with {', '.join(missing)}")


if __name__ == "__main__":
    main()
