"""Write anew what the commands of README.md and of the pages in docs/ print.

A block of output begins with the command that printed it, in a comment:

    <!-- output columns="80" drop="^run " elide="^trial [1-9]": python -m mergelab method=ties task=rte -->

``columns`` is the terminal's width (160), lines that match ``drop`` are left out, and "..." stands for lines that match
``elide``. A command is run once, however many blocks show it. Scores and times are those of this machine.

Usage:
    python -m docs.scripts.printed                  # or: make readme
    python -m docs.scripts.printed README.md        # these pages alone
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"(?P<head><!-- output(?P<options>(?: \w+=\"[^\"]*\")*): (?P<command>.+?) -->\n\n```text\n)(?P<shown>.*?)(?=```)",
    re.DOTALL,
)
_OPTION = re.compile(r"(\w+)=\"([^\"]*)\"")


@dataclass(frozen=True)
class Printed:
    """A block of a page that shows what a command prints."""

    command: str
    shown: str
    columns: int = 160
    drop: str = "$^"
    elide: str = "$^"

    @classmethod
    def of(cls, found: re.Match[str]) -> Printed:
        """Return the block that a comment begins."""
        options = dict(_OPTION.findall(found["options"]))
        if unknown := options.keys() - {"columns", "drop", "elide"}:
            raise ValueError(f"{found['command']}: output has no option {', '.join(sorted(unknown))}")
        columns = int(options.pop("columns", cls.columns))
        return cls(found["command"], found["shown"], columns, **options)

    def excerpt(self, output: str) -> str:
        """Return of the command's output what the block shows."""
        lines: list[str] = []
        for line in output.splitlines():
            if re.search(self.elide, line):
                if lines[-1:] != ["..."]:
                    lines.append("...")
            elif not re.search(self.drop, line):
                lines.append(line.rstrip())
        return "\n".join(lines).strip("\n") + "\n"


def pages() -> list[Path]:
    """Return README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Printed]:
    """Yield the blocks of a page."""
    return (Printed.of(found) for found in _BLOCK.finditer(text))


def renewed(text: str, folder: Path) -> str:
    """Return a page with every block as its command prints it now, run in ``folder``."""

    def block(found: re.Match[str]) -> str:
        printed = Printed.of(found)
        return found["head"] + printed.excerpt(output_of(printed.command, printed.columns, folder))

    return _BLOCK.sub(block, text)


@cache
def output_of(command: str, columns: int, folder: Path) -> str:
    """Return what a command prints without network; raises `CalledProcessError` where it fails."""
    sys.stderr.write(f"{command}\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "COLUMNS": str(columns), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """Write the pages and return the exit code."""
    chosen = [ROOT / name for name in arguments] or pages()
    with tempfile.TemporaryDirectory() as folder:
        for page in chosen:
            text = page.read_text(encoding="utf-8")
            if (new := renewed(text, Path(folder))) != text:
                page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
