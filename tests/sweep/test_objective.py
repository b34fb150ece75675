"""What a sweep's objective names, and what is picked from the scores."""

from __future__ import annotations

from typing import Any

import pytest

from mergelab.errors import SweepError
from mergelab.sweep.objective import objectives
from mergelab.tasks.loading import load_task

MRPC, RTE, STSB = (load_task(name) for name in ("mrpc", "rte", "stsb"))
PERPLEXITY = load_task("wikitext")
SCORES = {"mrpc": {"accuracy": 0.7, "f1": 0.8}, "rte": {"accuracy": 0.5}}
PRIMARY = {"mrpc": "accuracy", "rte": "accuracy"}


@pytest.mark.parametrize(
    ("wanted", "tasks", "values"),
    [
        (None, [MRPC], [0.7]),
        ("f1", [MRPC], [0.8]),
        ("mrpc/f1", [MRPC], [0.8]),
        (["f1", "accuracy"], [MRPC], [0.8, 0.7]),
        (None, [MRPC, RTE], [0.6]),
        ("average", [MRPC, RTE], [0.6]),
        (["rte", "mrpc"], [MRPC, RTE], [0.5, 0.7]),
        (["mrpc/f1", "average"], [MRPC, RTE], [0.8, 0.6]),
    ],
)
def test_an_objective_is_the_score_that_it_names(wanted: Any, tasks: Any, values: list[float]) -> None:
    found = objectives(wanted, None, tasks)
    assert [objective.value(SCORES, PRIMARY) for objective in found] == pytest.approx(values)
    assert [objective.direction for objective in found] == ["maximize"] * len(values)


def test_each_metric_has_its_own_direction() -> None:
    assert [objective.direction for objective in objectives(None, None, [PERPLEXITY])] == ["minimize"]
    both = objectives(["wikitext", "rte"], ["minimize", "maximize"], [PERPLEXITY, RTE])
    assert [objective.direction for objective in both] == ["minimize", "maximize"]


@pytest.mark.parametrize(
    ("wanted", "directions", "tasks", "message"),
    [
        (
            "acuracy",
            None,
            [MRPC],
            r"sweep\.objective=acuracy: mrpc does not report 'acuracy'; did you mean 'accuracy'\?",
        ),
        ("f1", None, [RTE], r"sweep\.objective=f1: rte does not report 'f1' \(there are accuracy\)"),
        ("rtee", None, [MRPC, RTE], r"rtee: not among what is measured; did you mean 'rte'\?"),
        ("rte/f1", None, [MRPC, RTE], r"rte does not report 'f1'"),
        ("accuracy", None, [MRPC, RTE], r"accuracy: not among what is measured \(there are mrpc, rte, average\)"),
        (None, None, [PERPLEXITY, RTE], r"says nothing; name tasks: sweep\.objective=\[wikitext,rte\]"),
        (None, "minimize", [RTE], r"sweep\.direction: accuracy is better when it is greater \(maximize\)"),
        (None, ["maximize"] * 2, [RTE], r"sweep\.direction: 2 directions for 1 objectives \(accuracy\)"),
    ],
)
def test_an_objective_that_nothing_reports_is_refused(wanted: Any, directions: Any, tasks: Any, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        objectives(wanted, directions, tasks)


def test_an_empty_list_of_objectives_is_refused() -> None:
    with pytest.raises(SweepError, match=r"^sweep\.objective: names nothing"):
        objectives([], None, [MRPC])
