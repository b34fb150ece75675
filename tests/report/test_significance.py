"""p-values are those of the logged predictions, and are corrected for the number of tests."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from mergelab.report.build import build_report
from mergelab.report.significance import EXPERT, SOUP, PairedTest, holm
from mergelab.tracking import names
from tests.conftest import Outcome
from tests.report.conftest import EXAMPLES, Store, right_on


def closed_testing(p_values: list[float]) -> list[float]:
    """Holm's adjusted values from the closure principle: the largest Bonferroni value of any set with it."""
    count = len(p_values)
    subsets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    return [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closure_of_bonferronis_tests(seed: int) -> None:
    p_values = np.random.default_rng(seed).uniform(0, 0.4, 6).round(2).tolist()
    assert holm(p_values) == pytest.approx(closed_testing(p_values), abs=1e-12)


def test_holm_of_a_published_example_and_of_none() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def found_tests(*wanted: str) -> dict[tuple[str, str], PairedTest]:
    report = build_report(wanted, None, None, lambda _message, _done: None)
    (ranking,) = report.rankings
    return {(test.row.label, test.other): test for test in ranking.tests}


def sign_test(first: list[bool], second: list[bool]) -> float:
    """The exact two-sided p-value of McNemar's test."""
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return float(binomtest(only_first, only_first + only_second).pvalue)


def test_every_merge_is_tested_against_the_best_expert_and_the_soup(compared: Store) -> None:
    found = found_tests("rte")
    best, soup = right_on(170, seed=1), right_on(165, seed=3)
    assert set(found) == {
        ("soup", EXPERT), ("ties density=0.3", EXPERT), ("ties density=0.5", EXPERT),
        ("ties density=0.3", SOUP), ("ties density=0.5", SOUP),
    }  # fmt: skip
    for density, count in ((0.3, 180), (0.5, 140)):
        own = right_on(count, seed=count)
        for other, rival in ((EXPERT, best), (SOUP, soup)):
            test = found[f"ties density={density}", other]
            assert test.p_value == pytest.approx(sign_test(own, rival), abs=0.05)
            assert test.difference == pytest.approx(np.mean(own) - np.mean(rival))
    assert {test.label for (_, other), test in found.items() if other == EXPERT} == {"org/a"}


def test_p_values_of_a_family_are_corrected_together(compared: Store) -> None:
    found = found_tests("rte")
    for other, size in ((EXPERT, 3), (SOUP, 2)):
        family = [test for (_, against), test in found.items() if against == other]
        assert {test.family for test in family} == {size}
        adjusted = closed_testing([test.p_value or 0 for test in family])
        assert [test.adjusted for test in family] == pytest.approx(adjusted)


def test_a_logged_test_is_not_computed_again(compared: Store) -> None:
    logged = {names.P_VS_BEST_EXPERT: 0.123}
    compared.run("merge", "method=dare", "task=rte", correct=right_on(150), metrics=logged, name="rte dare")
    assert found_tests("rte")["dare", EXPERT].p_value == 0.123


def test_a_large_difference_is_significant_however_few_resamples_its_run_took(
    compared: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergelab.report.significance._LEAST_SAMPLES", 20)
    logged = {names.P_VS_BEST_EXPERT: 1 / 21}  # the least that 20 resamples can say; of four tests 0.19
    options = ("method=dare", "task=rte", "eval.bootstrap=20")
    compared.run("merge", *options, correct=right_on(20), metrics=logged, name="rte dare")
    test = found_tests("rte")["dare", EXPERT]
    assert test.family == 4
    assert test.adjusted is not None
    assert test.adjusted < 0.05


def test_a_merge_whose_predictions_are_missing_is_said_to_be_untested(
    compared: Store, report: Callable[..., Outcome]
) -> None:
    metric = names.report_metric("accuracy")
    compared.run("merge", "method=dare", "task=rte", metrics={metric: 0.99}, name="rte dare")
    found = found_tests("rte")
    assert found["dare", EXPERT].p_value is None
    assert found["dare", EXPERT].adjusted is None
    assert found["ties density=0.3", EXPERT].family == 3  # only tests that were made count
    assert "not tested, since predictions of one side are missing, or are of other examples: dare" in report("rte").out


def test_predictions_of_other_examples_are_never_paired(compared: Store) -> None:
    compared.run("merge", "method=dare", "task=rte", correct=right_on(150)[: EXAMPLES - 1], name="rte dare")
    assert found_tests("rte")["dare", EXPERT].p_value is None


def test_merges_of_other_models_are_compared_with_their_own_expert(compared: Store) -> None:
    """A merge of the weaker expert alone has that one as its best expert, and is a family of its own."""
    compared.run(
        "merge", "method=dare", "task=rte", correct=right_on(150, seed=9), name="rte dare", models=["base", "b"]
    )
    found = found_tests("rte")
    assert found["dare", EXPERT].label == "org/b"
    assert found["dare", EXPERT].family == 1
    assert found["ties density=0.3", EXPERT].family == 3


def test_the_table_says_what_was_corrected(compared: Store, report: Callable[..., Outcome]) -> None:
    out = report("rte").out
    assert "p: paired bootstrap against the best expert (org/a), two-sided; Holm's correction for 3 tests" in out
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(report("rte", "--format=csv").out))}
    row, test = rows["ties density=0.3"], found_tests("rte")["ties density=0.3", EXPERT]
    assert float(row["vs_best_expert_p"]) == test.p_value
    assert float(row["vs_best_expert_p_holm"]) == test.adjusted
    assert (row["vs_best_expert"], row["vs_best_expert_tests"]) == ("org/a", "3")


def test_a_logged_test_against_an_expert_without_a_run_is_not_taken_for_one_of_another(
    store: Store, report: Callable[..., Outcome]
) -> None:
    """The run's own p-value is that against the best expert, which this store does not have."""
    store.baseline("expert", "b", right_on(160, seed=2))
    logged = {names.P_VS_BEST_EXPERT: 0.001}
    store.run("merge", "method=ties", "task=rte", correct=right_on(165, seed=4), metrics=logged, name="rte ties")
    test = found_tests("rte")["ties", EXPERT]
    assert test.label == "org/b"
    assert test.p_value == pytest.approx(sign_test(right_on(165, seed=4), right_on(160, seed=2)), abs=0.05)
    assert "some experts of ties have no run here: tested against the best of the others" in report("rte").out
