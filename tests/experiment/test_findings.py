"""``experiments/findings.py``: how much choosing on the examples that report flatters."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the experiments are not in this copy")


@pytest.fixture(scope="module")
def findings() -> Any:
    return importlib.import_module("experiments.findings")


def test_the_best_of_many_coins_is_flattered_by_their_expected_maximum(findings: Any) -> None:
    coins = np.random.default_rng(1).integers(0, 2, (200, 1000)).astype(float)
    # The largest of 200 standard normal numbers is 2.746 on average; 500 throws deviate by 2.24 points.
    gaps = findings.flattery(coins, 200, 400)
    assert gaps.mean() == pytest.approx(2.746 * 50 / np.sqrt(500), rel=0.15)
    assert abs(findings.flattery(coins, 1, 400).mean()) < 0.5  # nothing is chosen


def test_a_trial_that_is_always_best_is_not_flattered(findings: Any) -> None:
    scores = np.array([[1.0] * 40, [0.0] * 40])
    assert findings.flattery(scores, 2, 20).tolist() == [0.0] * 20
