"""README.md and the pages of docs/, with their blocks of commands and of code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

# A page whose commands have a test of their own names it: <!-- commands run by tests/docs/test_adding.py -->
_OWN_TEST = re.compile(r"^<!-- commands run by (?P<test>\S+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        name: its path below the project's folder.
        text: its content.
    """

    name: str
    text: str

    @property
    def own_test(self) -> str | None:
        """The test that runs its commands, where it has one of its own."""
        found = _OWN_TEST.search(self.text)
        return found["test"] if found else None

    def blocks(self, language: str) -> list[str]:
        """Return the blocks of a language."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, flags=re.DOTALL | re.MULTILINE)

    @property
    def commands(self) -> list[str]:
        """The commands of its blocks, without comments."""
        lines = [line for block in self.blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
        return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@cache
def pages() -> tuple[Page, ...]:
    """Return the pages that there are; without docs/, as in an installed copy, none."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return tuple(Page(_name(path), path.read_text(encoding="utf-8")) for path in files if path.is_file())


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def common() -> list[Page]:
    """Return the pages whose commands have no test of their own."""
    return [page for page in pages() if page.own_test is None]


def commands() -> list[str]:
    """Return the commands of these pages, each once, in their order."""
    return list(dict.fromkeys(command for page in common() for command in page.commands))


def code() -> list[str]:
    """Return the Python code of these pages, each block once."""
    return list(dict.fromkeys(block for page in common() for block in page.blocks("python")))
