"""Outputs are cached under all that they depend on: what is corrected is measured anew, what is the same is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import Outcome
from tests.standins import BERT_BASE, NAMED_LABELS, OTHER_LABEL_ORDER, glue_table

Command = Callable[..., Outcome]


@pytest.fixture
def arguments(bert_checkpoints: Mapping[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    for name, repository in (("base", BERT_BASE), ("a", NAMED_LABELS), ("b", OTHER_LABEL_ORDER)):
        shutil.copytree(bert_checkpoints[repository], workplace / name)
    (workplace / "data").mkdir()
    pq.write_table(glue_table("rte", 60, 1), workplace / "data" / "validation.parquet")
    models = ["models.base=./base", "models.experts={a: ./a, b: {reference: ./b}}"]
    return [*models, "task=rte", "task.data_dir=data", "method=soup", "tracking=none", "eval.preflight=false"]


def measured(command: Command, workplace: Path, *arguments: str) -> tuple[list[bool], list[float]]:
    """Return for base, experts and merged model whether the outputs were cached, and the accuracy."""
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    newest = sorted(workplace.glob("outputs/runs/*/*/result.json"))[-1]
    models = json.loads(newest.read_text())["models"]
    return [m["cached"] for m in models], [m["results"]["rte"]["report"]["accuracy"]["value"] for m in models]


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_corrected_label_map_is_a_new_measurement(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    _, before = measured(mergelab_command, workplace, *arguments)
    assert measured(mergelab_command, workplace, *arguments) == ([True, True, True, False], before)
    change(workplace / "b" / "config.json", id2label={"0": "entailment", "1": "not_entailment"})
    cached, after = measured(mergelab_command, workplace, *arguments)
    # The base has the average of the experts' heads.
    assert cached == [False, True, False, False]
    assert after[2] == pytest.approx(1 - before[2])
    assert measured(mergelab_command, workplace, *arguments, "eval.cache=false")[1] == after
    labels = "+models.experts.b.labels=[not_entailment,entailment]"
    assert measured(mergelab_command, workplace, *arguments, labels) == ([True, True, True, False], before)


def test_another_config_is_a_new_measurement(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    _, before = measured(mergelab_command, workplace, *arguments)
    for name in ("base", "a", "b"):
        change(workplace / name / "config.json", hidden_act="relu", layer_norm_eps=0.1)
    cached, after = measured(mergelab_command, workplace, *arguments)
    assert cached == [False] * 4
    assert after != before
