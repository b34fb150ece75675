"""docs/architecture.md stays true: every file and name that it mentions exists, and the folders are the contract's."""

from __future__ import annotations

import importlib
import re
import tomllib
from functools import reduce

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "architecture.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not part of this copy")
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
CODE = re.findall(r"`([^`\n]+)`", TEXT)
PATHS = sorted({code.partition(":")[0] for code in CODE if "/" in code or code.endswith((".py", ".toml", ".md"))})
NAMES = sorted({code for code in CODE if re.fullmatch(r"[\w/]+\.py:[\w.]+", code)})


def questions() -> list[tuple[str, str]]:
    rows = [line.strip("| ").split(" | ") for line in TEXT.partition("## Questions")[2].splitlines()[4:]]
    return [(question, answer) for question, answer in rows]


def test_there_are_names_to_check() -> None:
    assert len(NAMES) > 20


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path: str) -> None:
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists_in_its_file(name: str) -> None:
    path, _, symbol = name.partition(":")
    module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = reduce(getattr, symbol.split("."), module)
    assert getattr(found, "__module__", module.__name__) == module.__name__, "it is defined elsewhere"


def test_questions_are_answered_each_by_a_file() -> None:
    asked = questions()
    assert len(asked) == len({question for question, _ in asked}) >= 20
    assert all(question.endswith("?") for question, _ in asked)
    assert all(re.search(r"`(mergelab|conf)/[\w/]+\.(py|yaml)", answer) for _, answer in asked)


def test_the_folders_are_those_of_the_import_contract_in_its_order() -> None:
    shown = re.findall(r"^\| `mergelab/(\w+)/`", TEXT, flags=re.MULTILINE)
    (layers,) = (
        contract["layers"]
        for contract in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    folders = [layer.removeprefix("mergelab.") for layer in layers]
    assert shown == [name for name in folders if (ROOT / "mergelab" / name).is_dir()]
    assert {*shown} == {path.parent.name for path in (ROOT / "mergelab").glob("*/__init__.py")}


def test_the_page_is_at_most_two_pages() -> None:
    assert len(TEXT.split()) < 1200
