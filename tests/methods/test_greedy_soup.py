"""The experts that a greedy soup averages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, merged, toy_models
from tests.parity import FORMULA, compared


class Scores:
    """Scores from a table; an average that is not in it is worse than all others."""

    def __init__(self, table: dict[str, float]) -> None:
        self.table, self.asked = table, list[str]()
        self.chosen: list[str] = []

    def score(self, experts: Sequence[str]) -> float:
        self.asked.append("+".join(experts))
        return self.table.get("+".join(experts), 0.0)

    def settle(self, experts: Sequence[str]) -> None:
        self.chosen = list(experts)


ALONE = {"pear": 0.7, "apple": 0.8, "quince": 0.75, "fig": 0.75}


@pytest.mark.parametrize(
    ("averages", "strict", "chosen"),
    [
        ({}, False, ["apple"]),
        ({"apple+fig": 0.8, "apple+fig+pear": 0.81}, False, ["apple", "fig", "pear"]),
        ({"apple+fig": 0.8, "apple+quince": 0.82, "apple+quince+pear": 0.819}, True, ["apple", "quince"]),
        ({"apple+fig": 0.9, "apple+fig+quince": 0.95, "apple+fig+quince+pear": 0.95}, False, [*"afqp"]),
    ],
)
def test_experts_join_best_first_while_the_average_does_not_get_worse(
    averages: dict[str, float], strict: bool, chosen: list[str]
) -> None:
    models = toy_models(4)
    scores = Scores(ALONE | averages)
    result = merge_to_dict(get_method("greedy_soup"), {"strict": strict}, models, examples=scores)
    assert [name[: len(wanted)] for name, wanted in zip(scores.chosen, chosen, strict=True)] == chosen
    weights = [float(expert.name in scores.chosen) for expert in models.experts]
    expected = merged("soup", models, weights=weights)
    members = [expert for expert in models.experts if expert.name in scores.chosen]
    means = [torch.stack([each.get(name).double() for each in members]).mean(0) for name in SHAPES]
    note = "the mean of the experts that a table of scores makes join"
    compared("greedy_soup", FORMULA, [result[name] for name in SHAPES], means, options=f"strict={strict}", note=note)
    assert all(torch.equal(result[name], expected[name]) for name in SHAPES)
    assert scores.asked[:4] == ["apple", "fig", "pear", "quince"]
    assert len(scores.asked) == 4 + 3


def test_without_scores_it_is_an_error() -> None:
    with pytest.raises(ConfigError, match="method=greedy_soup: needs scores on selecting examples"):
        merge_to_dict(get_method("greedy_soup"), {}, toy_models(2))
