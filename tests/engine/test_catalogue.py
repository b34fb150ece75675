"""The catalogue is made of the methods themselves."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import mergelab as ml
from mergelab.engine.catalogue import COLUMNS, entries, entry, markdown
from mergelab.engine.registry import method_config, method_names
from mergelab.methods.__main__ import main


@ml.model_merge
def on_dicts(models: list[Any]) -> Any:
    return models[0]


def test_the_table_has_every_method_once_with_its_needs_and_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert f"{len(method_names())} merge methods" in shown
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.count("│") > 3}
    assert set(method_names()) <= rows.keys()
    assert "Yadav et al. 2023" in rows["ties"]
    for name, needs in {"soup": "", "ties": "B", "slerp": "2", "fisher": "D G", "gradient_matching": "B D G"}.items():
        assert rows[name].split("│")[2].strip() == needs, name
    order = [line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") > 3]
    families = {each.family for each in entries()}
    under, heading = {}, ""
    for name in order:
        heading = name if name in families else heading
        under[name] = heading
    assert all(under[each.name] == each.family for each in entries())


def test_a_wide_terminal_shows_every_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(column in shown for column in COLUMNS if column != "family")
    assert "too narrow" not in shown


def test_the_authors_values_stand_beside_the_defaults() -> None:
    assert entry("della").authors == "lambda=1.1, density=0.7, epsilon=0.07"
    assert entry("consensus").authors == "lambda=tuned, mask_lambda=tuned"
    assert entry("ties").authors == ""


@pytest.mark.parametrize(
    ("name", "memory", "data", "streaming"),
    [
        ("soup", "a block of one tensor of each model", "", "exact"),
        ("ties", "a block of one tensor of each model", "", "exact, after a first pass"),
        ("tsv_m", "the whole of one tensor of each model", "", "exact"),
        ("rebasin", "as the method that merges", "", "exact, after a first pass"),
        (
            "fisher",
            "a model with its gradients, and what is learnt from it; then a block of one tensor of each model",
            "4096 training examples of each expert",
            "exact, after a first pass",
        ),
        (
            "greedy_soup",
            "a model; then as the method that merges",
            "the examples that select",
            "exact, once the experts are chosen",
        ),
        (
            "tests.engine.test_catalogue.on_dicts",
            "all models",
            "",
            "none: whole models in memory",
        ),
    ],
)
def test_memory_data_and_streaming_are_said(name: str, memory: str, data: str, streaming: str) -> None:
    found = entry(name)
    assert (found.memory, found.data, found.streaming) == (memory, data, streaming)


@pytest.mark.parametrize("asked", [["--json"], ["--format", "json"], ["--format=json"]])
def test_programs_get_every_method_with_typed_values(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == set(method_names())
    for name, row in rows.items():
        config = {key: value for key, value in method_config(name).items() if key not in ("name", "function")}
        assert {each["name"]: each["default"] for each in row["parameters"]} == config
        assert set(COLUMNS) == row.keys()
    assert rows["gradient_matching"]["needs"] == ["B", "D", "G"]
    assert rows["ram_plus"]["authors' values"] == {"r": 0.2, "alpha": 1.0}
    assert main(["ties", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["ties"]


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
    assert re.search(r"\n  density +0\.2 +0\.2  a number greater than 0 and at most 1", shown)
    assert "majority_sign: whether the sign of larger total magnitude is elected" in shown
    assert shown.rstrip().endswith("Yadav et al. 2023, arXiv:2306.01708")
    assert "method.preset" not in shown


def test_one_method_with_a_preset_shows_both_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["della"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\n  density +0\.5 +0\.7  a number greater than 0", shown)
    assert re.search(r"\n  reduce +mean +mean  'mean'", shown)
    assert "method.preset=authors sets density, epsilon, lambda" in shown
    assert "Use it for: as dare_ties, where large changes" in shown


def test_an_unknown_name_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tis"]) == 2
    assert capsys.readouterr().err == "error: method=tis: no such method; did you mean 'ties'?\n"


def test_the_page_has_a_row_for_each_method() -> None:
    lines = markdown(entries()).splitlines()
    assert len(lines) == 2 + len(method_names())
    assert len({line.count(" | ") for line in lines}) == 1


def test_a_users_own_function_has_an_entry_too() -> None:
    assert entry("tests.engine.test_registry.example").needs == "B"
