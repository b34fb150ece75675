"""``mergelab prefetch``: what it fetches is all that the experiment needs without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.hub_server import HubServer
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS


def command(folder: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment, "MERGELAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if "HF_HUB_OFFLINE" not in environment:
        env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_what_was_fetched_is_enough_without_a_network(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    environment = hub.environment(folder / "home")
    asked = ("mergelab.prefetch", "models=bert_base_rte", "task=rte", "--format=json")
    done = command(folder, environment, *asked)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in rows] == [BERT_BASE, *BERT_RTE_EXPERTS, "nyu-mll/glue/rte"]
    assert {row["status"] for row in rows} == {"fetched"}
    for row in rows:
        files = [file for file in Path(row["folder"]).rglob("*") if file.is_file()]
        assert row["bytes"] == sum(file.stat().st_size for file in files) > 0
    assert sorted(path.name for path in folder.iterdir()) == ["home"], "nothing is written but the hub's cache"

    before = len(hub.requests)
    again = command(folder, environment, *asked)
    assert {row["status"] for row in json.loads(again.stdout)["rows"]} == {"there"}
    assert len(hub.requests) == before, "what is there is not asked for again"

    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    ran = command(folder, offline, "mergelab", "source=hub", "method=soup", "task=rte", "tracking=none")
    assert ran.returncode == 0, ran.stderr


def test_without_a_hub_it_says_what_is_missing(mergelab_command: Callable[..., Outcome], workplace: Path) -> None:
    outcome = mergelab_command("prefetch", "models=bert_base_rte", "task=rte", "evaluate=false", "output=x")
    assert outcome.code == 2
    assert BERT_BASE in outcome.out
    assert "missing" in outcome.out
    assert f"cannot be reached; the cache lacks {BERT_BASE}" in outcome.err
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-m", "task=rte,mrpc"), "one experiment at a time"),
        (("models.base=./nowhere",), "the folder does not exist"),
        (("task=rtee",), "task=rtee: no such option; did you mean 'rte'?"),
    ],
)
def test_bad_input_is_one_line(mergelab_command: Callable[..., Outcome], arguments: tuple[str, ...], said: str) -> None:
    outcome = mergelab_command("prefetch", *arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert said in line
