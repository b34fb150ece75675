"""The check, before anything is merged, that every expert is better than chance on its own task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.errors import DataError
from mergelab.evaluation.results import ModelResult
from mergelab.evaluation.scoring import Prediction
from mergelab.experiment.evaluator import Evaluator
from mergelab.tasks.data import TaskData
from mergelab.tasks.loading import load_task
from mergelab.tasks.metric import get_metric


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))


def preflight(right: int, role: Any = "expert") -> None:
    """Check a model that has ``right`` of 10 answers right, five of each label."""
    labels = np.arange(10) % 2
    zeros, texts = np.zeros(10, dtype=np.int64), (("a", "b"),) * 10
    data = TaskData(load_task("rte"), texts, labels, np.arange(10), zeros, "validation", "folder", "", "")
    outputs = np.eye(2)[np.where(np.arange(10) < right, labels, 1 - labels)]
    model = ModelResult("a", role, {}, {"rte": Prediction(outputs, 0.0, False)})
    nothing: Any = None
    Evaluator(nothing, {"rte": data}, nothing, 0, nothing).preflight([model])


def test_an_expert_must_be_better_than_a_constant_answer() -> None:
    preflight(6)
    preflight(0, role="base")
    for right in (5, 4):
        with pytest.raises(DataError, match=rf"expert a is at chance .* accuracy 0\.{right}000, a constant .* 0\.5000"):
            preflight(right)


def test_where_less_is_better_an_expert_must_be_below_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_metric("accuracy")), "direction", "minimize")
    preflight(4)
    for right in (5, 6):
        with pytest.raises(DataError, match="expert a is at chance"):
            preflight(right)


def test_a_metric_that_declares_no_chance_level_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_metric("accuracy")), "chance", None)
    preflight(0)


def answering(order: tuple[int, ...], share: float, count: int = 300) -> None:
    """Check a model of four labels whose outputs are in ``order`` and that is right on this share of the examples."""
    draw = np.random.default_rng(0)
    spec = replace(load_task("mnli"), labels=("red", "green", "blue", "grey"))
    labels = draw.choice(4, size=count, p=(0.3, 0.3, 0.2, 0.2))
    answers = np.where(draw.random(count) < share, labels, draw.integers(0, 4, count))
    texts, zeros = (("a", "b"),) * count, np.zeros(count, dtype=np.int64)
    data = TaskData(spec, texts, labels, np.arange(count), zeros, "validation", "folder", "", "")
    model = ModelResult("a", "expert", {}, {"mnli": Prediction(np.eye(4)[np.asarray(order)[answers]], 0.0, False)})
    nothing: Any = None
    Evaluator(nothing, {"mnli": data}, nothing, 0, nothing).preflight([model])


@pytest.mark.parametrize(
    ("order", "why", "said"),
    [
        ((0, 1, 3, 2), "is right on .*% of mnli .* in another order", "red, green, grey, blue"),
        ((1, 2, 3, 0), "is at chance", "grey, red, green, blue"),
    ],
)
def test_a_model_that_is_better_in_another_order_of_its_labels_is_refused(
    order: tuple[int, ...], why: str, said: str
) -> None:
    with pytest.raises(DataError, match=rf"{why}.*labels=\[{said}\]"):
        answering(order, 0.95)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_weak_model_in_the_right_order_passes(share: float) -> None:
    answering((0, 1, 2, 3), share)
