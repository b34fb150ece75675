"""What tests measure against other implementations is written down, and the committed page has every method."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mergelab.engine.registry import method_names
from tests.conftest import ROOT
from tests.parity import FORMULA, RECORDED_MERGEKIT, VARIABLE, Record, compared, measured, merge_records, read

SCRIPT = ROOT / "experiments" / "parity.py"
needs_experiments = pytest.mark.skipif(not SCRIPT.is_file(), reason="the experiments are not part of this copy")


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "parity.jsonl"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_largest_difference_is_written_with_dtype_shapes_and_options(lines: Path) -> None:
    ours = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)}
    compared("ties", "PEFT", ours, [np.array([[1.0, 2.5]]), -3.25], options={"lambda_": 1.0, "weights": [1, 2.0]})
    compared("soup", FORMULA, torch.ones(2, dtype=torch.bfloat16), [1.0, 0.5], note="rounded")
    assert read(lines) == [
        Record("ties", "PEFT", "lambda=1, weights=[1, 2]", "float32", 6.25, 3.25, ((1, 2), ())),
        Record("soup", FORMULA, "", "bfloat16", 0.5, 1.0, ((2,),), "rounded"),
    ]


def test_several_tensors_are_compared_with_one_flat_array() -> None:
    found = measured("pcb", FORMULA, [torch.zeros(2, 2), torch.ones(1)], np.array([0, 0, 0, 0.5, 1.0]))
    assert (found.difference, found.shapes) == (0.5, ((2, 2), (1,)))


def test_without_the_variable_nothing_is_written(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    compared("ties", "PEFT", torch.zeros(2), torch.zeros(3))
    assert not lines.exists()


@pytest.mark.parametrize("theirs", [[1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_values_that_cannot_be_compared_are_an_error(theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="ties, PEFT: "):
        measured("ties", "PEFT", torch.ones(2), theirs)
    with pytest.raises(ValueError, match="0 values cannot be compared with 0"):
        measured("ties", "PEFT", [], [])


def test_records_of_the_same_comparison_are_one_with_the_largest_difference() -> None:
    made = [
        Record("ties", "PEFT", "a=1", dtype, difference, 2 * difference, (shape,), note)
        for dtype, difference, shape, note in [
            ("float32", 0.1, (3,), ""),
            ("float64", 0.4, (3,), ""),
            ("float32", 0.3, (2, 2), "known"),
            ("float32", 0.2, (3,), "known"),
        ]
    ]
    assert merge_records(made) == [
        Record("ties", "PEFT", "a=1", "float32", 0.3, 0.6, ((2, 2), (3,)), "known"),
        Record("ties", "PEFT", "a=1", "float64", 0.4, 0.8, ((3,),)),
    ]
    assert len(merge_records([*made, Record("ties", "PEFT", "a=2", "float32", 0, 0, ())])) == 3


@needs_experiments
def test_the_page_lists_the_methods_that_only_a_transcription_is_compared_with(script: ModuleType) -> None:
    made = [
        Record("pcb", FORMULA, "", "float64", 0.0, 1.0, ((3,), ())),
        Record("ram", FORMULA, "", "float32", 1.25e-7, 4.0, ((2, 2),)),
        Record("ram", RECORDED_MERGEKIT, "r=1", "float32", 1e-8, 4.0, tuple((n,) for n in range(1, 12)), "said"),
    ]
    page = script.page(made, ["pcb", "quite_new", "ram"], "the command", "torch 9", "2026-01-02")
    assert "2026-01-02 on the CPU with\ntorch 9:" in page
    assert f"| `pcb` | {FORMULA} | | 0 | float64 | | 1 | 3, scalar |" in page
    assert f"| `ram` | {FORMULA} | | 1.2e-07 | float32 | | 4 | 2×2 |" in page
    assert f"| `ram` | {RECORDED_MERGEKIT} | r=1 | 1.0e-08 | float32 | said | 4 | 11 shapes up to 11 |" in page
    assert page.split("transcription only\n")[1].split() == ["-", "`pcb`"]


@needs_experiments
def test_a_method_that_nothing_is_compared_with_has_a_row_that_says_so(script: ModuleType) -> None:
    made = [Record("ram", FORMULA, "", "float32", 0.0, 4.0, ((2, 2),))]
    page = script.page(made, ["soup", "pcb", "ram"], "the command", "torch 9", "2026-01-02")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == ["pcb", "ram", "soup"]
    assert [line for line in rows if "no independent implementation yet" in line] == [rows[0], rows[2]]
    assert {line.count("|") for line in rows} == {9}
    assert page.split("transcription only\n")[1].split() == ["-", "`ram`"]


@needs_experiments
def test_the_committed_page_has_every_method_whose_own_tests_compare() -> None:
    text = (ROOT / "experiments" / "PARITY.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")}
    own = {name: ROOT / "tests" / "methods" / f"test_{name}.py" for name in method_names()}
    compares = {
        name for name, file in own.items() if file.is_file() and "compared(" in file.read_text(encoding="utf-8")
    }
    assert len(compares) > 10
    assert compares <= rows <= set(method_names()), "run experiments/parity.py"
