"""The library's functions have types: the stub is current, and a type checker knows parameters from it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mergelab as ml
from mergelab.engine.registry import get_method, method_names
from mergelab.notebook.stub import FILE, stub

SNIPPET = """
import mergelab as ml
reveal_type(ml.ties)
reveal_type(ml.run)
ml.ties([], density=0.2, lambda_=1.0, rules=[{"match": "*", "density": 0.1}])
ml.ties([], density={"a": 0.1, "b": 0.2})
ml.run(method="ties", task="rte").scores["accuracy"]
ml.sweep(method="ties", n_trials=3).best_params
ml.slerp([], tau=0.5)
ml.ties([], densty=0.2)
ml.ties([], scope="modell")
ml.run(metod="ties")
ml.sweep(method="ties", trials=3)
ml.tis([])
"""


def test_the_stub_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == stub(), "run python -m mergelab.notebook.stub"


def test_every_name_of_the_package_is_in_the_stub() -> None:
    text = FILE.read_text(encoding="utf-8")
    for name in set(dir(ml)):
        if name in ml._EXPORTS or name in ml._function_names():
            assert f"def {name}(" in text or f" as {name}\n" in text, name


@pytest.mark.parametrize("name", method_names())
def test_a_functions_signature_has_the_methods_parameters(name: str) -> None:
    parameters = inspect.signature(getattr(ml, name)).parameters
    fields = get_method(name).parameters.model_fields
    assert set(parameters) >= {*fields, "models", "task", "base_index", "passthrough", "seed"}
    for field, info in fields.items():
        default = parameters[field].default
        assert (default is inspect.Parameter.empty) if info.is_required() else default == info.get_default()


def test_a_type_checker_knows_the_functions(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    calls = FILE.parent / "notebook" / "calls.py"
    results = FILE.parent / "notebook" / "results.py"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--follow-imports=skip", "--ignore-missing-imports", "--no-incremental"),
            *("--config-file=", str(tmp_path / "snippet.py"), str(FILE), str(calls), str(results)),
        ],
        capture_output=True,
        text=True,
        cwd=FILE.parent.parent,
    )
    lines = [line.partition("snippet.py:")[2] for line in done.stdout.splitlines() if "snippet.py:" in line]
    revealed = [line for line in lines if "Revealed type" in line]
    assert re.search(r" density: (Union\[)?(builtins\.)?float", revealed[0]), done.stdout
    assert "MergeRun" in revealed[1]
    errors = [line for line in lines if " error: " in line]
    assert [int(line.split(":")[0]) for line in errors] == [10, 11, 12, 13, 14], done.stdout
    assert "densty" in errors[0]
    assert "metod" in errors[2]
    assert "trials" in errors[3]
