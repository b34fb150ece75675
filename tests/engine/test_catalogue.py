"""The catalogue is made of the methods themselves."""

from __future__ import annotations

import re

import pytest

from mergelab.engine.catalogue import entries, entry, markdown
from mergelab.engine.registry import method_config, method_names
from mergelab.methods.__main__ import main


def test_the_table_has_every_method_once_with_its_needs_and_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert f"{len(method_names())} merge methods" in shown
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.count("│") > 3}
    assert set(method_names()) <= rows.keys()
    assert "Yadav et al. 2023" in rows["ties"]
    for name, needs in {"soup": "", "ties": "B", "slerp": "2", "fisher": "D G", "gradient_matching": "B D G"}.items():
        assert rows[name].split("│")[3].strip() == needs, name


def test_parameters_are_shown_with_the_defaults_of_the_configs() -> None:
    for each in entries():
        defaults = {name: default for name, default, _ in each.parameters}
        config = method_config(each.name)
        assert defaults.keys() == config.keys() - {"name", "function"}
        for key, value in config.items():
            if isinstance(value, float):
                assert float(defaults[key]) == pytest.approx(value), (each.name, key)


def test_the_table_has_ranges_choices_and_what_takes_long() -> None:
    assert "density=0.2 (> 0, ≤ 1)" in entry("ties").settings
    assert "majority_sign=total (total | frequency)" in entry("ties").settings
    assert entry("wudi").settings == "lambda=1, steps=300 (≥ 0), lr=1e-05 (> 0)"
    assert entry("wudi").cost == "one pass, tensor by tensor; multiplies every matrix hundreds of times"
    assert entry("ties").cost == "statistics, then one pass, in blocks"


def test_every_letter_in_the_column_of_needs_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    legend = capsys.readouterr().out.splitlines()[-2]
    for letter in {letter for each in entries() for letter in each.needs.split()}:
        assert f"{letter}: " in legend


def test_one_method_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ties"]) == 0
    shown = capsys.readouterr().out
    assert "Departures from the paper" in shown
    assert re.search(r"\n  density +0\.2  a number greater than 0 and at most 1", shown)
    assert shown.rstrip().endswith("Yadav et al. 2023, arXiv:2306.01708")


def test_an_unknown_name_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tis"]) == 2
    assert capsys.readouterr().err == "error: method=tis: no such method; did you mean 'ties'?\n"


def test_the_page_has_a_row_for_each_method() -> None:
    lines = markdown(entries()).splitlines()
    assert len(lines) == 2 + len(method_names())
    assert len({line.count(" | ") for line in lines}) == 1


def test_a_users_own_function_has_an_entry_too() -> None:
    assert entry("tests.engine.test_registry.example").needs == "B"
