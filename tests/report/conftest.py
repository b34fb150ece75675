"""Stores with runs as experiments record them, without a model: what is measured is given."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from mergelab.config import CONF_DIR
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.experiment.recording import open_run
from mergelab.report.__main__ import main
from mergelab.tracking import Tracker, TrackingConfig, names, open_tracking
from tests.conftest import Outcome
from tests.tracking.conftest import empty_store

__all__ = ["empty_store"]

EXAMPLES = 200


@functools.cache
def plan_of(*overrides: str) -> Plan:
    """The checked experiment that these overrides compose."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return plan_experiment(compose("config", overrides=list(overrides)))


@dataclass
class Store:
    """Records runs on RTE, of a base and two experts, as the commands do."""

    tracker: Tracker
    models: Mapping[str, str]
    fingerprint: str = "f" * 64
    note: str = ""

    def run(
        self,
        kind: Any,
        *overrides: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, Any] | None = None,
        correct: Sequence[bool] | None = None,
        name: str | None = None,
        source: str = "local",
        parent: str | None = None,
        models: Sequence[str] | None = None,
        params: Mapping[str, Any] | None = None,
        status: Any = "FINISHED",
        note: str | None = None,
        fingerprint: str | None = None,
        **options: Any,
    ) -> str:
        """Record a run and return its id; ``correct`` says which examples the model is right on."""
        plan = plan_of(*overrides)
        named = self.models if models is None else {key: self.models[key] for key in models}
        own = {names.model(key): reference for key, reference in named.items()}
        own |= {names.model_hash(key): f"sha of {reference}" for key, reference in named.items()}
        scores = dict(metrics or {})
        if correct is not None:
            rate = float(np.mean(correct))
            metric = names.report_metric("accuracy")
            scores = {metric: rate, names.low(metric): rate - 0.05, names.high(metric): rate + 0.05} | scores
        protocol = plan.config.eval.protocol
        said = f"rte: accuracy on {EXAMPLES} validation examples\nprotocol {protocol}" if note is None else note
        if scores:
            own |= {names.NOTE: said, names.PRIMARY: names.report_metric("accuracy"), names.DIRECTION: "maximize"}
        run = open_run(
            self.tracker,
            kind,
            plan,
            source,
            name or f"{names.labelled('rte', mini=source == 'mini')} {plan.method.name}",
            parent=parent,
            params=params,
            tags=own | dict(tags or {}),
            **options,
        )
        run.log_metrics(scores)
        run.log_dict(dict(plan.resolved if params is None else params), names.CONFIG)
        mark = fingerprint or self.fingerprint
        run.log_dataset("rte", origin="folder", location="d", fingerprint=mark, rows=EXAMPLES, split="validation")
        if correct is not None:
            self.predict(run, correct)
        if status != "RUNNING":
            run.end(status, "it broke" if status == "FAILED" else None)
        return str(run.id)

    def predict(self, run: Any, correct: Sequence[bool], *, folder: Path = Path()) -> None:
        """Log predictions that are right where ``correct`` says so."""
        file = folder / names.predictions("rte")
        pq.write_table(predictions(correct), file)
        run.log_artifact(file, names.PREDICTIONS)
        file.unlink()

    def baseline(self, role: str, key: str, correct: Sequence[bool], *overrides: str, **options: Any) -> str:
        """Record the base or an expert."""
        plan = plan_of(*overrides)
        params = {
            "models": {"name": self.models[key]},
            names.ROLE: role,
            "task": {"name": "rte"},
            "eval": plan.config.eval.model_dump(),
            "seed": plan.config.seed,
        }
        name = f"{role} {self.models[key]}"
        tags = {names.METHOD: None}
        given = {"params": params, "models": [key], "name": name, "tags": tags} | options
        return self.run(role, *overrides, correct=correct, **given)


def predictions(correct: Sequence[bool]) -> pa.Table:
    """A table of predictions as runs log it: half of the labels are 1; more examples follow, which select alone."""
    selecting = [sum(correct) > 165] * 40
    right = np.asarray([*correct, *selecting], bool)
    labels = np.arange(len(right)) % 2
    said = np.where(right, labels, 1 - labels)
    reports = np.arange(len(right)) < len(correct)
    return pa.table(
        {
            "idx": np.arange(len(right)),
            "label": labels,
            "output_0": np.where(said == 0, 1.0, -1.0).astype(np.float32),
            "output_1": np.where(said == 1, 1.0, -1.0).astype(np.float32),
            "prediction": said,
            "selects": ~reports,
            "reports": reports,
        }
    )


def right_on(count: int, *, seed: int = 0) -> list[bool]:
    """Say which examples a model is right on: ``count`` of them, drawn by seed."""
    found = np.zeros(EXAMPLES, bool)
    found[np.random.default_rng(seed).permutation(EXAMPLES)[:count]] = True
    return found.tolist()


@pytest.fixture
def workplace(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with an empty store where commands look for one."""
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty_store, tmp_path / "outputs" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def store(workplace: Path) -> Store:
    """The store of the work folder."""
    return Store(open_tracking(TrackingConfig()), {"base": "org/base", "a": "org/a", "b": "org/b"})


@pytest.fixture
def compared(store: Store) -> Store:
    """A store with a base, two experts, a soup and two merges with TIES, all of the same models and examples."""
    store.baseline("base", "base", right_on(100))
    store.baseline("expert", "a", right_on(170, seed=1))
    store.baseline("expert", "b", right_on(160, seed=2))
    store.run("merge", "method=soup", "task=rte", correct=right_on(165, seed=3), name="rte soup")
    for density, count in ((0.3, 180), (0.5, 140)):
        overrides = ("method=ties", "task=rte", f"method.density={density}")
        store.run("merge", *overrides, correct=right_on(count, seed=count), name=f"rte ties density={density}")
    return store


@pytest.fixture
def report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``mergelab report ARGUMENTS`` in the work folder; its files go to ``report``."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        output = () if any(each.startswith("--output") for each in arguments) else ("--output=report",)
        code = main([*arguments, *output])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
