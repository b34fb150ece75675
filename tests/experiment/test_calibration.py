"""Data-driven methods from the command line: whose examples they learn from, what is recorded, what is refused."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from mergelab.console import progress
from mergelab.errors import MergeWarning
from tests.conftest import Outcome
from tests.standins import glue_table

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]


@pytest.fixture
def arguments(arguments: list[str], workplace: Path) -> list[str]:
    """Fewer examples to measure on, and training data."""
    pq.write_table(glue_table("rte", 60, 1), workplace / "data" / "validation.parquet")
    pq.write_table(glue_table("rte", 90, 2), workplace / "data" / "train.parquet")
    return arguments


def tags(folder: Path) -> dict[str, str]:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("rte").experiment_id], "tags.`mergelab.kind` = 'merge'")
    return dict(found[0].data.tags)


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which experts are run for statistics, one entry for each time."""
    from mergelab.experiment.calibration import TrainingExamples

    asked: list[str] = []
    original = TrainingExamples.module

    def module(examples: TrainingExamples) -> Any:
        asked.append(examples.session.located.experts[examples.index].name)
        return original(examples)

    monkeypatch.setattr(TrainingExamples, "module", module)
    return asked


LEARNING = [
    *("fisher", "regmean", "regmean_plus", "gradient_matching", "tatr", "cat", "lot"),
    *("adarank,steps=2", "localize_stitch,steps=2,density=0.05"),
]


@pytest.mark.parametrize("method", LEARNING)
def test_a_method_learns_from_the_training_split_and_the_run_says_so(
    mergelab_command: Command, arguments: list[str], workplace: Path, forward_passes: list[str], method: str
) -> None:
    name, *settings = method.split(",")
    run = [*arguments, f"method={name}", *(f"method.{each}" for each in settings), "method.samples=40", "output=merged"]
    outcome = mergelab_command(*run)
    assert outcome.code == 0, outcome.err
    assert set(forward_passes) == {"a", "b", "c"}
    recorded = tags(workplace)
    assert {recorded[f"calibration.{name}"] for name in "abc"} == {recorded["calibration.a"]}
    assert recorded["calibration.a"].startswith("40 of rte/train, sha256 ")
    merged = load_file(workplace / "merged" / "model.safetensors")
    mean = {k: sum(load_file(workplace / n / "model.safetensors")[k] for n in "abc") / 3 for k in merged}
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.allclose(merged[name], mean[name], atol=1e-4)  # type: ignore[arg-type]


def test_statistics_are_computed_once_for_any_coefficients(
    mergelab_command: Command, arguments: list[str], workplace: Path, forward_passes: list[str]
) -> None:
    sweep = ["-m", "method=fisher", "method.samples=30", "method.floor=1e-6,1e-2", "method.normalize=true,false"]
    assert mergelab_command(*arguments, *sweep, "tracking=none").code == 0
    assert len(forward_passes) == 3
    assert mergelab_command(*arguments, "method=fisher", "method.samples=31", "tracking=none").code == 0
    assert len(forward_passes) == 6
    table = pq.read_table(workplace / "data" / "train.parquet")
    pq.write_table(table.slice(1), workplace / "data" / "train.parquet")
    assert mergelab_command(*arguments, "method=fisher", "method.samples=30", "tracking=none").code == 0
    assert len(forward_passes) == 9


def test_the_labels_order_of_an_expert_is_its_own(
    mergelab_command: Command, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its own training labels every expert is right more often than not, so its empirical gradients are small."""
    from mergelab.experiment.calibration import TrainingExamples

    right: dict[str, float] = {}
    original = TrainingExamples.module

    def module(examples: TrainingExamples) -> Any:
        network = original(examples)
        with torch.no_grad():
            hits = [
                (
                    network(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(1) == batch["labels"]
                ).float()
                for batch in examples.batches()
            ]
        right[examples.session.located.experts[examples.index].name] = float(torch.cat(hits).mean())
        return network

    monkeypatch.setattr(TrainingExamples, "module", module)
    run = [*arguments, "method=fisher", "method.estimator=empirical", "tracking=none"]
    assert mergelab_command(*run).code == 0
    assert min(right.values()) > 0.6


def test_a_merge_alone_uses_the_same_examples(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    method = ["method=fisher", "method.samples=20", "tracking=none"]
    assert mergelab_command(*arguments, *method, "output=first").code == 0
    shutil.rmtree(workplace / "cache")
    outcome = mergelab_command(*arguments, *method, "evaluate=false", "output=second")
    assert outcome.code == 0, outcome.err
    first, second = (load_file(workplace / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_lacking_is_said_in_one_line(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    def refused(*more: str) -> str:
        outcome = mergelab_command(*arguments, "method=fisher", "tracking=none", *more)
        assert outcome.code == 2
        (line,) = outcome.err.splitlines()
        return line

    assert "task.splits=['train']" in refused("task.splits=[train]")
    train = workplace / "data" / "train.parquet"
    table = pq.read_table(train)
    hidden = table.set_column(table.schema.get_field_index("label"), "label", pa.array([-1] * len(table)))
    pq.write_table(hidden, train)
    assert "needs labels, and the training split of rte has none" in refused("method.estimator=empirical")
    pq.write_table(table.slice(0, 0), train)
    assert "needs the training split of rte" in (line := refused())
    assert "has no examples" in line
    train.unlink()
    assert "no data of the split train" in refused()
    assert "data" in refused("task.data_dir=null", "evaluate=false", "output=merged", "source=hub")


def test_the_miniature_has_training_data_too(mergelab_command: Command, workplace: Path) -> None:
    outcome = mergelab_command("method=fisher", "task=rte", "source=mini", "method.samples=16", "eval.bootstrap=10")
    assert outcome.code == 0, outcome.err
    assert "fisher of 5" in outcome.out


def test_layers_that_the_data_do_not_determine_are_named(mergelab_command: Command, arguments: list[str]) -> None:
    run = [*arguments, "method=regmean", "method.samples=2", "method.alpha=1", "tracking=none"]
    outcome = mergelab_command(*run)
    assert outcome.code == 0
    assert "bert.encoder.layer.0" in outcome.err
    assert "singular" in outcome.err


def test_of_many_warnings_the_first_are_shown_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.gathered_warnings():
        for number in (*range(9), 0, 1):
            warnings.warn(f"layer {number}.", MergeWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="another's"):
            warnings.warn("another's", UserWarning, stacklevel=1)
    shown = capsys.readouterr().err
    assert [shown.count(f"layer {number}.") for number in range(9)] == [1] * 6 + [0] * 3
    assert "and 3 more" in shown
