"""What may not be compared is never ranked together, and the report says what it left out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergelab.report.build import build_report
from mergelab.tracking import names
from tests.conftest import Outcome
from tests.report.conftest import Store, right_on

ACCURACY = names.report_metric("accuracy")


def rows(outcome: Outcome) -> list[dict[str, str]]:
    assert outcome.code == 0, outcome.err
    return list(csv.DictReader(io.StringIO(outcome.out)))


def groups(*wanted: str) -> list[list[str]]:
    report = build_report(wanted, None, None, lambda _message, _done: None)
    return [[row.label for row in ranking.group.ranked] for ranking in report.rankings]


def test_models_are_ranked_by_their_score(compared: Store) -> None:
    (ranked,) = groups("rte")
    assert ranked == ["ties density=0.3", "org/a", "soup", "org/b", "ties density=0.5", "org/base"]


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (("task=rte",), {"source": "hub"}),
        (("task=rte", "eval.protocol=oracle"), {}),
        (("task=rte",), {"fingerprint": "e" * 64}),
        (("task=rte", "eval.dtype=bfloat16"), {}),
        (("task=rte", "eval.max_length=64"), {}),
        (("task=rte",), {"note": "rte: f1 on 200 validation examples\nprotocol full"}),
    ],
    ids=["source", "protocol", "examples", "dtype", "length", "metric"],
)
def test_what_was_measured_otherwise_has_a_ranking_of_its_own(
    compared: Store, overrides: tuple[str, ...], options: dict[str, Any], report: Callable[..., Outcome]
) -> None:
    options = {"experiment": "rte", "name": "rte dare"} | options
    compared.run("merge", "method=dare", *overrides, correct=right_on(199), **options)
    found = groups("rte")
    assert sorted(map(len, found)) == [1, 6]
    assert ["dare"] in found  # no base and no expert was measured so
    said = report("rte")
    assert "2 groups, each ranked apart" in said.out


def test_hold_outs_of_other_seeds_are_not_ranked_together(store: Store) -> None:
    for seed in (0, 1):
        overrides = ("method=ties", "task=rte", "eval.protocol=holdout", f"seed={seed}")
        store.run("merge", *overrides, correct=right_on(150), name=f"rte seed {seed}")
    assert sorted(groups("rte")) == [["seed 0"], ["seed 1"]]
    # Where no examples are set apart, a seed changes no examples.
    for seed in (0, 1):
        overrides = ("method=ties", "task=rte", f"seed={seed}")
        store.run("merge", *overrides, correct=right_on(140), name=f"rte full seed {seed}")
    assert ["full seed 0", "full seed 1"] in groups("rte")


def test_a_model_without_the_metric_has_no_rank_and_that_is_said(
    compared: Store, report: Callable[..., Outcome]
) -> None:
    f1 = names.report_metric("f1")
    compared.run("merge", "method=dare", "task=rte", correct=right_on(150), metrics={f1: 0.7}, name="rte dare")
    found = rows(report("rte", "--metric=f1", "--format=csv"))
    assert [row["model"] for row in found if row["rank"]] == ["dare"]
    assert {row["not_ranked"] for row in found if not row["rank"]} == {"has no f1"}
    assert "3 of 4 merges have no f1, and no rank" in report("rte", "--metric=f1").out


def test_a_score_that_is_better_when_it_is_less_ranks_so(store: Store) -> None:
    for name, value in (("one", 12.0), ("two", 9.5), ("three", 20.0)):
        tags = {names.PRIMARY: names.report_metric("word_perplexity"), names.DIRECTION: "minimize"}
        scores = {names.report_metric("word_perplexity"): value}
        store.run("merge", "method=soup", "task=rte", metrics=scores, tags=tags, name=f"rte {name}")
    assert groups("rte") == [["two", "one", "three"]]


def test_a_failed_run_is_listed_and_never_ranked(compared: Store, report: Callable[..., Outcome]) -> None:
    compared.run("merge", "method=dare", "task=rte", status="FAILED", name="rte dare")
    assert groups("rte") == [["ties density=0.3", "org/a", "soup", "org/b", "ties density=0.5", "org/base"]]
    assert "1 runs have no result; rte dare: failed: it broke" in report("rte").out
    assert "failed: it broke" in Path("report/report.html").read_text(encoding="utf-8")


def sweep(store: Store, *, status: str = "FINISHED", trials: int = 4, stopped: int = 2) -> str:
    """A sweep of TIES whose last trials were stopped early, at higher scores than any complete one has."""
    overrides = ("method=ties", "task=rte", "eval.protocol=holdout")
    params = {"method": {"name": "ties"}, names.SPACE: {"method.density": "interval(0.05,0.95)"}}
    tags = {names.N_TRIALS: 8, names.NOTE: None, names.PRIMARY: None}
    parent = store.run("sweep", *overrides, params=params, tags=tags, name="sweep: rte ties tpe", status=status)
    for number in range(trials):
        early = number >= trials - stopped
        value = 0.7 + number / 100
        estimate = names.estimate_metric("accuracy")
        scores = {estimate: value, names.low(estimate): value - 0.02, names.high(estimate): value + 0.02}
        if not early:
            scores = {names.select_metric("accuracy"): value, **dict.fromkeys(scores, value)}
        own = {names.TRIAL: number, names.PRIMARY: names.select_metric("accuracy")}
        own |= {names.PRUNED: "after 40 of 100 examples"} if early else {}
        store.run(
            "trial",
            *overrides,
            f"method.density={0.1 + number / 10:.1f}",
            metrics=scores,
            tags=own,
            parent=parent,
            name=f"rte ties trial {number}",
        )
    if status == "FINISHED":
        own = {names.TRIAL: 1}
        store.run(
            "report", *overrides, "method.density=0.2", correct=right_on(180), tags=own, parent=parent,
            name="rte ties report: trial 1",
        )  # fmt: skip
    return parent


def test_a_sweeps_winner_is_ranked_and_its_trials_are_not(store: Store, report: Callable[..., Outcome]) -> None:
    parent = sweep(store)
    (ranking,) = build_report([parent], None, None, lambda _message, _done: None).rankings
    assert [row.label for row in ranking.group.ranked] == ["ties density=0.2 (winner: trial 1)"]
    (trials,) = ranking.group.trials.values()
    assert [(t.number, t.score, t.stopped != "") for t in trials] == [
        (0, pytest.approx(0.70), False), (1, pytest.approx(0.71), False), (2, None, True), (3, None, True),
    ]  # fmt: skip
    assert trials[3].estimate is not None
    assert trials[3].point == {"method.density": 0.4}
    report(parent)
    with Path("report/trials.csv").open() as file:
        table = {row["trial"]: row for row in csv.DictReader(file)}
    assert table["3"]["state"] == "stopped"
    assert table["3"]["select accuracy"] == ""
    assert float(table["3"]["estimate_low"]) == pytest.approx(0.71)


def test_an_unfinished_sweep_is_reported_as_such(store: Store, report: Callable[..., Outcome]) -> None:
    parent = sweep(store, status="KILLED")
    said = report(parent)
    assert said.code == 0, said.err
    assert "unfinished: sweep: rte ties tpe was stopped; 4 of 8 trials have ended" in said.out
    assert "unfinished: sweep" in Path("report/report.html").read_text(encoding="utf-8")


def test_nothing_named_is_the_newest_sweep_and_a_run_of_it_alone_is_that_run(
    compared: Store, report: Callable[..., Outcome]
) -> None:
    parent = sweep(compared)
    report()
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "<h1>sweep: rte ties tpe</h1>" in page
    with Path("report/trials.csv").open() as file:
        first = next(csv.DictReader(file))["run_id"]
    report_of_one = build_report([first], None, None, lambda _message, _done: None)
    assert [run.record.id for run in report_of_one.selection.runs] == [first]
    assert list(report_of_one.selection.parents) == [parent]


def test_tags_choose_runs_in_full_or_without_their_beginning(compared: Store) -> None:
    assert [label for label in groups("rte", "method=ties")[0] if "org" not in label] == [
        "ties density=0.3",
        "ties density=0.5",
    ]
    assert groups("mergelab.method=ties") == groups("rte", "method=ties")


def test_an_experiments_baselines_alone_can_be_compared(store: Store) -> None:
    store.baseline("base", "base", right_on(100))
    store.baseline("expert", "a", right_on(170, seed=1))
    assert groups("rte") == [["org/a", "org/base"]]


def test_runs_of_other_kinds_are_no_merges_without_a_result(compared: Store, report: Callable[..., Outcome]) -> None:
    compared.run("analysis", "method=ties", "task=rte", name="analysis of five experts")
    assert "no result" not in report("rte").out
