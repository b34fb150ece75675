"""Merges of the small models, made by the command line in this process; each is made once and shared by the tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.architectures.building import is_known, save_models
from tests.architectures.zoo import BY_NAME, WORDS, Kind

EXAMPLES = 16
NEW_TOKENS = 6
DARE_DENSITY = 0.6
TIES_DENSITY = 0.3
METHODS: Mapping[str, tuple[str, ...]] = {
    "soup": ("method=soup",),
    "ties": ("method=ties", f"method.density={TIES_DENSITY}"),
    "dare": ("method=dare", f"method.density={DARE_DENSITY}"),
}


@dataclass(frozen=True)
class Measured:
    """A merge that was measured: the merged model's folder, and what was recorded of it and of the experts."""

    folder: Path
    _run: Path
    _store: str
    _experiment: str

    def texts(self) -> dict[str, list[str]]:
        """Return what each model wrote, by the model's name."""
        result = json.loads((self._run / "result.json").read_text())
        return {
            _name(model["label"], model["role"]): [text for _, text in task["texts"]]
            for model in result["models"]
            for task in model["results"].values()
        }

    def predictions(self) -> dict[str, dict[str, list[Any]]]:
        """Return the recorded columns of predictions of the experts and of the merged model, by the model's name."""
        from mlflow.tracking import MlflowClient

        client, found = MlflowClient(self._store), {}
        for one in client.search_runs([client.get_experiment_by_name(self._experiment).experiment_id]):
            role = one.data.tags["mergelab.kind"]
            label = one.data.tags["mergelab.models"] if role != "merge" else "merged"
            folder = Path(client.download_artifacts(one.info.run_id, "predictions"))
            found[_name(label, role)] = pq.read_table(next(folder.glob("*.parquet"))).to_pydict()
        return found

    def scores(self) -> dict[str, dict[str, float]]:
        """Return the recorded scores of each model, by the model's name and the metric's."""
        result = json.loads((self._run / "result.json").read_text())
        return {
            _name(model["label"], model["role"]): {n: score["value"] for n, score in task["report"].items()}
            for model in result["models"]
            for task in model["results"].values()
        }


def _name(label: str, role: str) -> str:
    return "merged" if role in ("merge", "merged") else label.rsplit("/", 1)[-1]


@dataclass
class Workshop:
    """A folder in which models are built and merged."""

    folder: Path
    _made: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def models(self, name: str) -> Path:
        """Return the folder that holds ``base``, ``a`` and ``b``; skip where transformers has no such models."""
        kind = BY_NAME[name]
        if not is_known(kind):
            pytest.skip(f"this transformers has no {kind.model}")
        return self._once(("models", name), lambda: self._save(kind))  # type: ignore[no-any-return]

    def merged(self, name: str, method: str) -> Path:
        """Merge to disk without measuring anything, and return the folder."""
        folder = self.models(name)

        def make() -> Path:
            output = folder / f"merged-{method}"
            run(folder, *models(folder), *METHODS[method], "evaluate=false", "tracking=none", f"output={output}")
            return output

        return self._once((name, method), make)  # type: ignore[no-any-return]

    def measured(self, name: str, task: str) -> Measured:
        """Merge with TIES and measure on a task."""
        folder = self.models(name)

        def make() -> Measured:
            output = folder / f"measured-{task}"
            settings = {
                "rte": (f"task.data_dir={self._pairs()}",),
                "recipes": (f"task.data_dir={self._texts()}",),
                "prompts": (f"task.file={self._prompts()}", f"task.decoding.max_new_tokens={NEW_TOKENS}"),
            }[task]
            tracking = (f"tracking.uri={self._store}", f"tracking.experiment={name}-{task}")
            quick = ("eval.preflight=false", "eval.bootstrap=10", f"hydra.run.dir={output}.run")
            run(
                folder,
                *models(folder),
                *METHODS["ties"],
                f"task={task}",
                *settings,
                *tracking,
                *quick,
                f"output={output}",
            )
            return Measured(output, output.with_suffix(".run"), self._store, f"{name}-{task}")

        return self._once((name, "measured", task), make)  # type: ignore[no-any-return]

    @property
    def _store(self) -> str:
        return f"sqlite:///{self.folder / 'store.db'}"

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            try:
                self._made[key] = make()
            except AssertionError as error:  # the same for every test that needs it
                self._made[key] = error
        if isinstance(self._made[key], AssertionError):
            raise AssertionError(str(self._made[key]))
        return self._made[key]

    def _save(self, kind: Kind) -> Path:
        folder = self.folder / kind.name
        save_models(kind, folder)
        return folder

    def _pairs(self) -> Path:
        """Write pairs of sentences of many lengths, as RTE has them."""
        draw = np.random.default_rng(0)
        columns = {name: _sentences(draw, 1, 12) for name in ("sentence1", "sentence2")}
        table = {**columns, "label": draw.integers(0, 2, EXAMPLES).tolist(), "idx": list(range(EXAMPLES))}
        return self._once(("pairs",), lambda: _write(self.folder / "pairs", table))  # type: ignore[no-any-return]

    def _texts(self) -> Path:
        table = {"input": texts()}
        return self._once(("texts",), lambda: _write(self.folder / "texts", table))  # type: ignore[no-any-return]

    def _prompts(self) -> Path:
        file = self.folder / "prompts.txt"
        file.write_text("".join(f"{prompt}\n" for prompt in prompts()))
        return file


def texts() -> list[str]:
    """Return running texts of many lengths."""
    return _sentences(np.random.default_rng(1), 2, 20)


def prompts() -> list[str]:
    """Return prompts of many lengths."""
    return _sentences(np.random.default_rng(2), 1, 14)


def pairs(workshop: Workshop) -> list[tuple[str, str]]:
    """Return the pairs of sentences that classifiers are measured on."""
    table = pq.read_table(workshop._pairs() / "validation.parquet").to_pydict()
    return list(zip(table["sentence1"], table["sentence2"], strict=True))


def models(folder: Path) -> tuple[str, ...]:
    """Return the settings that name the models of a folder."""
    return f"models.base={folder / 'base'}", f"models.experts=[{folder / 'a'},{folder / 'b'}]"


def run(folder: Path, *settings: str) -> None:
    """Run ``python -m mergelab SETTINGS`` in ``folder``, in this process.

    Raises:
        AssertionError: it did not end with code 0; with what it said.
    """
    code, said = command(folder, *settings)
    assert code == 0, f"{' '.join(settings)}: ended with {code}: {said.strip()[-600:]}"


def command(folder: Path, *settings: str) -> tuple[int, str]:
    """Run the command line, and return its exit code and what it printed to the standard error."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from mergelab.__main__ import main

    said, code = io.StringIO(), 0
    with _settled(folder, settings), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        GlobalHydra.instance().clear()
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
    return code, said.getvalue()


@contextlib.contextmanager
def _settled(folder: Path, settings: tuple[str, ...]) -> Iterator[None]:
    before, arguments = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["mergelab", *settings]
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = arguments


def _sentences(draw: np.random.Generator, shortest: int, longest: int) -> list[str]:
    lengths = draw.integers(shortest, longest + 1, EXAMPLES)
    return [" ".join(draw.choice(list(WORDS), size=length)) for length in lengths]


def _write(folder: Path, table: Mapping[str, list[Any]]) -> Path:
    folder.mkdir()
    pq.write_table(pa.table(dict(table)), folder / "validation.parquet")
    return folder
