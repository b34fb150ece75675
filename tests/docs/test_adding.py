"""docs/adding.md stays true: in a copy of the project its files are added, and its commands print what it shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.forks import Forks, start_forks

PAGE = ROOT / "docs" / "adding.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not part of this copy"),
]
COPIED = ("conf", "experiments", "hydra_plugins", "mergelab", "tests", "pyproject.toml")
_BLOCK = re.compile(r"(?:`(?P<file>[\w./]+)`:\n\n)?```(?P<language>\w+)\n(?P<content>.*?)```", re.DOTALL)
_FRAME = str.maketrans(dict.fromkeys("│┃", "|"))


@dataclass(frozen=True)
class Block:
    """A fenced block; the file whose content it is, where the page names one just before it."""

    language: str
    content: str
    file: str | None


def sections() -> dict[str, list[Block]]:
    """The page's sections with their blocks, in order."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    found = {}
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        found[title] = [Block(m["language"], m["content"], m["file"]) for m in _BLOCK.finditer(body)]
    return found


SECTIONS = sections()


@pytest.fixture(scope="module")
def libraries() -> Iterator[Forks]:
    """Start Python processes that have imported what is large, and nothing of the project."""
    with start_forks("transformers", "datasets") as started:
        yield started


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project."""
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path


def add(project: Path, block: Block) -> None:
    """Write a file of the page, or insert a diff's lines after the line that it shows before them."""
    assert block.file is not None
    file = project / block.file
    if block.language != "diff":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.content, encoding="utf-8")
        return
    text = file.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*\n", block.content, flags=re.MULTILINE):
        if lines := hunk.splitlines():
            before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            assert text.count(before) == 1, f"{block.file} does not have these lines once:\n{before}"
            text = text.replace(before, after)
    file.write_text(text, encoding="utf-8")


def run(libraries: Forks, project: Path, commands: str) -> str:
    """Run commands, each in a fresh process, and return all that they print."""
    printed = ""
    of_user = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**of_user, "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}
    for line in commands.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "python"
        done = libraries.run(*arguments, folder=project, environment=environment, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed += done.stdout
    return printed


def plain(line: str) -> str:
    """A line with single spaces, and tables' frames as ASCII."""
    return " ".join(line.translate(_FRAME).split())


def check_printed(printed: str, shown: str) -> None:
    """Check that each line shown is a part of a line printed, in that order; "..." and decimals stand for any."""
    lines = iter([plain(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        pattern = re.sub(r"\d+\\\.\d{3,}", r"[\\d.]+", re.escape(plain(line))).replace(r"\.\.\.", ".*")
        assert any(re.search(pattern, each) for each in lines), f"{line!r} is not (or not there) in\n{printed}"


def test_every_file_of_the_page_is_new_or_changed_in_place() -> None:
    files = [block for blocks in SECTIONS.values() for block in blocks if block.file]
    assert len(files) > 4
    assert [block.file for block in files if (ROOT / str(block.file)).exists() and block.language != "diff"] == []


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_does_what_it_says(libraries: Forks, project: Path, title: str) -> None:
    for earlier, blocks in SECTIONS.items():
        if earlier == title:
            break
        for block in blocks:
            if block.file:
                add(project, block)
    printed = None
    for block in SECTIONS[title]:
        if block.file:
            add(project, block)
        elif block.language == "bash":
            printed = run(libraries, project, block.content)
        elif block.language == "text":
            assert printed is not None, "what is shown is not printed by a command"
            check_printed(printed, block.content)
    assert printed is not None
