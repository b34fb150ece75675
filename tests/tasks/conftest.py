"""What the tests of tasks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergelab.tasks.data import TaskData
from mergelab.tasks.loading import load_task
from mergelab.tasks.spec import TaskSpec
from tests.tasks.tiny import sentences


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rte() -> TaskSpec:
    return load_task("rte")


@pytest.fixture
def stsb() -> TaskSpec:
    return load_task("stsb")


@pytest.fixture
def pairs(rte: TaskSpec) -> TaskData:
    """Fifty pairs of sentences of very different lengths, labelled like RTE."""
    texts = tuple(zip(sentences(50, 0), sentences(50, 1), strict=True))
    labels = np.arange(50) % 2
    zeros = np.zeros(50, dtype=np.int64)
    return TaskData(rte, texts, labels, np.arange(50), zeros, "validation", "folder", "", "")
