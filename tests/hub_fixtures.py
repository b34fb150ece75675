"""Fixtures: stand-in checkpoints, trained once per test session, and a loopback hub that serves them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.conftest import shared_folder
from tests.forks import Forks, start_forks
from tests.hub_server import HubServer, glue_repository
from tests.standins import bert_standins, glue_table, gpt2_standins

GPT2_TASKS = ("cola", "rte", "sst2")

_REPORT = """
import json
try:
    {body}
except Exception as error:
    result = {{"error": type(error).__name__, "message": str(error)}}
print(json.dumps(result, default=str))
"""


@pytest.fixture(scope="session")
def bert_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by repository: google-bert/bert-base-uncased and five RTE experts."""
    return _once(tmp_path_factory, "bert", bert_standins)


@pytest.fixture(scope="session")
def gpt2_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by repository: openai-community/gpt2 and an expert for each of `GPT2_TASKS`."""
    return _once(tmp_path_factory, "gpt2", lambda folder: gpt2_standins(folder, GPT2_TASKS))


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository folder like nyu-mll/glue, with what the experts were trained on and 240 rows for validation."""
    splits = {"train": (512, 0), "validation": (240, 1000)}
    tasks = {
        task: {split: glue_table(task, rows, seed) for split, (rows, seed) in splits.items()} for task in GPT2_TASKS
    }
    return glue_repository(tmp_path_factory.mktemp("glue"), tasks)


@pytest.fixture
def empty_hub(tmp_path: Path) -> Iterator[HubServer]:
    """A running hub without any repository; folders are found under the test's ``tmp_path``."""
    with HubServer(tmp_path) as hub:
        yield hub


@pytest.fixture
def hub(empty_hub: HubServer, bert_checkpoints: Mapping[str, Path], glue_folder: Path) -> HubServer:
    """A running hub with the BERT stand-ins and the GLUE-shaped dataset."""
    for repository, folder in bert_checkpoints.items():
        empty_hub.add_model(repository, folder)
    empty_hub.add_dataset("nyu-mll/glue", glue_folder)
    return empty_hub


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Start Python processes that need not import what is large."""
    with start_forks("mergelab.config", "mergelab.tracking") as started:
        yield started


@pytest.fixture
def client(empty_hub: HubServer, tmp_path: Path, forks: Forks) -> Callable[..., Any]:
    """Run code in a new process that talks to the hub, with a fresh cache per test; answer what it left in ``result``.

    An exception is answered as ``{"error": its type's name, "message": its text}``.
    """

    def run(code: str, **environment: str) -> Any:
        env = {**os.environ, **empty_hub.environment(tmp_path / "home")} | environment
        script = _REPORT.format(body=code.strip().replace("\n", "\n    "))
        done = forks.run("-c", script, folder=tmp_path, environment=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], dict[str, Path]]) -> dict[str, Path]:
    """Make checkpoints once for all of pytest-xdist's workers, whose temporary folders have one parent."""
    shared = shared_folder(factory)
    folder, listing = shared / f"standins-{name}", shared / f"standins-{name}.json"
    with FileLock(f"{listing}.lock"):
        if not listing.exists():
            made = make(folder)
            listing.write_text(json.dumps({repository: str(path) for repository, path in made.items()}))
    return {repository: Path(path) for repository, path in json.loads(listing.read_text()).items()}
