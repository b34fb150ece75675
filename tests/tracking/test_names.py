"""What is recorded has its name from one file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mergelab.tracking import names

PACKAGE = Path(names.__file__).resolve().parent.parent
TAG = re.compile(r"mergelab\.[a-z_]+$")
PREFIX = re.compile(r"(report|select|time|memory|coefficient|best)/|(calibration|greedy_soup|version)\.")
# Calls that record something, each with the places of its arguments that name it.
RECORDING = {"log_dict": 1, "log_table": 1, "log_text": 1, "log_artifact": 1, "log_artifacts": 1}
NAMED_KEYS = {"log_metrics", "set_tags", "runs", "find_run"}
# Neither tags nor artifacts: files, keys in files, and the composed configuration, which an artifact is called after.
ELSEWHERE = {
    ("weights/writer.py", "mergelab.key"),
    ("weights/companions.py", "mergelab.json"),
    ("cli/help.py", "config.yaml"),
    ("experiment/compared.py", "config.yaml"),
    ("weights/files.py", "model."),  # of files and tensors
    ("weights/wrappers.py", "model."),
    ("mergekit/modules.py", "model."),
}


def sources() -> Iterator[tuple[str, ast.AST]]:
    """Every file of the package but the one that has the names."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != Path(names.__file__).resolve():
            yield file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The literal texts of a file, of f-strings the first part, without its docstrings."""
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.lineno, node.value


def literal_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The literal texts of a file that name a tag, a metric or an artifact."""
    own = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    distinctive = {name for name in own if re.search(r"[./]", name)}
    for line, text in texts(tree):
        is_module = TAG.match(text) and find_spec(text) is not None
        if (TAG.match(text) and not is_module) or PREFIX.match(text) or text in distinctive:
            yield line, text
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        place = RECORDING.get(call.func.attr)
        if place is not None and len(call.args) > place and isinstance(call.args[place], ast.Constant | ast.JoinedStr):
            yield call.lineno, ast.unparse(call.args[place])
        keyed = call.args[:1] if call.func.attr in NAMED_KEYS else []
        for given in [*keyed, *(keyword.value for keyword in call.keywords if keyword.arg == "tags")]:
            keys = given.keys if isinstance(given, ast.Dict) else [given.key] if isinstance(given, ast.DictComp) else []
            for key in keys:
                if isinstance(key, ast.Constant | ast.JoinedStr):
                    yield call.lineno, ast.unparse(key)


def test_no_other_file_spells_the_name_of_a_tag_a_metric_or_an_artifact() -> None:
    found = [
        f"{file}:{line}: {text!r}"
        for file, tree in sources()
        for line, text in literal_names(tree)
        if (file, text) not in ELSEWHERE
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        'tags = {"mergelab.method": 1}',
        'x = f"report/{metric}"',
        'name = "time/merge_s"',
        'run.log_metrics({"seconds": 1})',
        'run.set_tags({f"best.{key}": value for key, value in best.items()})',
        'tracker.start_run(name, tags={"kind": "trial"})',
        'tags = {f"calibration.{name}": 1}',
        'run.log_table(rows, "rows.csv")',
        'run.log_artifact(file, f"{task}.parquet")',
        'tracker.runs({"kind": "trial"})',
        'file = folder / "study.db"',
    ],
)
def test_a_name_that_is_spelled_elsewhere_is_found(code: str) -> None:
    assert list(literal_names(ast.parse(code)))


def test_scores_of_several_tasks_are_told_apart() -> None:
    assert names.report_metric("accuracy") == "report/accuracy"
    assert names.select_metric("f1", "mrpc") == "select/mrpc/f1"
    assert names.low(names.report_metric("f1", "mrpc")) == "report/mrpc/f1_low"


def test_no_name_is_used_for_two_things() -> None:
    own = [value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)]
    assert len(own) == len(set(own))
