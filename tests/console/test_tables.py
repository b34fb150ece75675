"""Result tables fit the terminal without losing names, and come in the formats that pages and programs read."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable

import pytest

from mergelab.console.formats import FORMAT, FORMATS
from mergelab.console.tables import result_table
from mergelab.evaluation.results import ExperimentResult, ModelResult
from mergelab.evaluation.scoring import Score, TaskResult
from tests.conftest import Outcome

NAMES = ("google-bert/bert-base-uncased", "howey/bert-base-uncased-rte", "ORG|A/under_score", "ties of 2")
COSTS = {"eval_seconds": 1.25, "merge_seconds": 0.5, "peak_mb": 1022.0}


def score(value: float) -> Score:
    return Score(value, value - 0.031, value + 0.029)


def task(name: str, number: int, *metrics: str) -> TaskResult:
    report = {metric: score(0.5 + number / 10 + place / 100) for place, metric in enumerate(metrics)}
    return TaskResult(name, metrics[0], {}, report, 0, 277)


def experiment(
    *tasks: str, metrics: tuple[str, ...] = ("accuracy",), note: str = "rte: on 277 examples"
) -> ExperimentResult:
    models = [
        ModelResult(
            name,
            "merged" if name == NAMES[-1] else "expert",
            {each: task(each, number, *metrics) for each in tasks},
            average=0.6 if len(tasks) > 1 else None,
            p_value=0.125 if name == NAMES[-1] and len(tasks) == 1 else None,
            **(COSTS if name == NAMES[-1] else {"eval_seconds": 0.75, "cached": True}),
        )
        for number, name in enumerate(NAMES)
    ]
    return ExperimentResult("ties on rte", note, tasks, tuple(models))


Command = Callable[..., Outcome]
RESULTS = {
    "one metric": experiment("rte"),
    "two metrics": experiment("mrpc", metrics=("accuracy", "f1")),
    "five tasks": experiment("rte", "mrpc", "sst2", "cola", "stsb"),
}


def printed(
    result: ExperimentResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    result_table(result)
    return capsys.readouterr().out


def cells(shown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("kind", RESULTS)
def test_names_and_scores_are_whole_at_every_width(
    kind: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = RESULTS[kind]
    shown = printed(result, monkeypatch, capsys, width)
    rows = cells(shown)
    assert [row[0] for row in rows if row[0]] == list(NAMES)
    assert "…" not in shown
    assert all(len(line) <= width for line in shown.splitlines() if line[:1] in "┏┃┡│└")
    scores = re.findall(r"\b0\.\d{4}\b", shown)
    expected = [
        f"{value.value:.4f}"
        for model in result.models
        for each in model.results.values()
        for value in each.report.values()
    ]
    expected += ["0.6000"] * (4 if kind == "five tasks" else 0)
    assert sorted(scores) == sorted(expected)
    intervals = re.findall(r"\[0\.\d{3}, 0\.\d{3}\]", shown)
    with_intervals = sum(len(each.report) for model in result.models for each in model.results.values())
    assert len(intervals) == (0 if "too narrow for intervals" in shown else with_intervals)
    for cost in ("p vs best", "merge s", "eval s", "peak MB"):
        in_header = any(cost in line for line in shown.splitlines() if line[:1] == "┃")
        told = re.search(rf"too narrow for .*{cost}", shown) is not None
        asked = cost != "p vs best" or kind != "five tasks"
        assert (in_header != told) == asked


def test_scores_in_rows_have_their_intervals_beside_them_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "0.8000 [0.769, 0.829] *" in printed(RESULTS["five tasks"], monkeypatch, capsys, 120)


def test_what_is_wider_than_the_terminal_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(RESULTS["two metrics"], monkeypatch, capsys, 20)
    assert [row[0] for row in cells(shown) if row[0]] == list(NAMES)
    assert "accuracy" in shown


def test_columns_go_in_the_order_of_what_they_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["peak MB", "eval s", "merge s", "p vs best expert", "intervals"]
    numbers = []
    for width in range(130, 35, -1):
        found = re.search(r"too narrow for (.*);", printed(RESULTS["one metric"], monkeypatch, capsys, width))
        left_out = found[1].split(", ") if found else []
        assert set(left_out) == set(order[: len(left_out)])
        numbers.append(len(left_out))
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, 5)


def test_csv_and_json_hold_every_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(FORMAT, "csv")
    (*_, merged) = csv.DictReader(io.StringIO(printed(RESULTS["two metrics"], monkeypatch, capsys, 40)))
    assert (merged["model"], merged["role"], merged["cached"]) == ("ties of 2", "merged", "False")
    assert float(merged["accuracy"]) == pytest.approx(0.8)
    assert float(merged["f1_low"]) == pytest.approx(0.81 - 0.031)
    assert float(merged["f1_high"]) == pytest.approx(0.81 + 0.029)
    assert [float(merged[key]) for key in ("p_value", "merge_seconds", "eval_seconds", "peak_mb")] == [
        0.125, 0.5, 1.25, 1022.0
    ]  # fmt: skip
    monkeypatch.setenv(FORMAT, "json")
    read = json.loads(printed(RESULTS["five tasks"], monkeypatch, capsys, 40))
    assert read["title"] == "ties on rte"
    assert [row["model"] for row in read["rows"]] == list(NAMES)
    assert read["rows"][0]["merge_seconds"] is None
    assert read["rows"][1]["stsb_low"] == pytest.approx(0.6 - 0.031)
    assert read["rows"][3]["average"] == 0.6


def test_json_stays_json_where_a_score_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FORMAT, "json")
    report = {"perplexity": Score(float("inf"), 12.5, float("nan"))}
    measured = TaskResult("wikitext", "perplexity", {}, report, 0, 9, minimized=("perplexity",))
    model = ModelResult("soup of 2", "merged", {"wikitext": measured})
    result = ExperimentResult("soup on wikitext", "", ("wikitext",), (model,))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (row,) = json.loads(printed(result, monkeypatch, capsys, 80), parse_constant=refuse)["rows"]
    assert (row["perplexity"], row["perplexity_low"], row["perplexity_high"]) == ("inf", 12.5, "nan")


def test_tables_for_pages_escape_what_has_a_meaning_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FORMAT, "markdown")
    shown = printed(RESULTS["one metric"], monkeypatch, capsys, 40).splitlines()
    assert [line.count("|") - line.count("\\|") for line in shown[:6]] == [7] * 6
    assert "ORG\\|A/under_score" in shown[4]
    assert "rte: on 277 examples" in "\n".join(shown[6:])
    monkeypatch.setenv(FORMAT, "latex")
    shown = printed(RESULTS["one metric"], monkeypatch, capsys, 40).splitlines()
    assert [line for line in shown if "under\\_score" in line]
    assert all(line.startswith(("%", "\\", " ")) for line in shown)


def test_texts_are_shown_whole_at_every_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tuple((f"prompt{number}", f"text{number}") for number in range(3))
    models = tuple(
        ModelResult(name, "expert", {"prompts": TaskResult("prompts", "", {}, {}, 0, 3, texts=texts)}) for name in NAMES
    )
    result = ExperimentResult("soup on prompts", "prompts: 3 texts", ("prompts",), models)
    for width in (60, 200):
        shown = printed(result, monkeypatch, capsys, width)
        assert all(shown.count(f"text{number}") == len(NAMES) for number in range(3))
        assert all(name in shown for name in NAMES)
    monkeypatch.setenv(FORMAT, "csv")
    rows = list(csv.DictReader(io.StringIO(printed(result, monkeypatch, capsys, 60))))
    assert {(row["model"], row["prompt"], row["text"]) for row in rows} == {
        (name, *text) for name in NAMES for text in texts
    }


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "table"])
def test_with_a_format_only_the_result_is_on_standard_output(
    mergelab_command: Command, arguments: list[str], form: str
) -> None:
    settings = (*arguments, "task.limit=20", "eval.preflight=false", "eval.bootstrap=10", "tracking=none")
    outcome = mergelab_command("method=soup", f"--format={form}", *settings)
    assert outcome.code == 0, outcome
    first = {"json": '{"title"', "csv": "model,", "markdown": "| model", "latex": "\\begin{tabular}"}[form]
    assert outcome.out.startswith(first)
    assert "soup of 3" in outcome.out
    if form == "json":
        json.loads(outcome.out)
    if form == "csv":
        assert len(list(csv.DictReader(io.StringIO(outcome.out)))) == 5


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--format=cvs", "--format=cvs: no such format; did you mean 'csv'? (there are table, markdown, latex, csv"),
        ("--format", "--format: needs a format, as in --format=csv"),
    ],
)
def test_a_format_that_there_is_not_is_one_line(mergelab_command: Command, flag: str, said: str) -> None:
    outcome = mergelab_command("method=soup", "source=mini", flag)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
