"""``experiments/published.py``: published numbers beside ours, from a hub on loopback under the real names."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from mergelab.cli.quoting import as_text
from mergelab.config import CONF_DIR
from mergelab.experiment.plan import plan_experiment
from tests.conftest import ROOT
from tests.forks import Forks
from tests.hub_server import HubServer

pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the experiments are not in this copy")
RECIPES = ("mergecraft_glue", "fusionbench_gpt2", "mergebench")


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_of_a_recipe_is_one_that_mergelab_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergelab.tasks.loading.with_metrics", lambda spec: spec)  # lm-eval would read its tasks' data
    published = importlib.import_module("experiments.published")
    recipe = yaml.safe_load((ROOT / "experiments" / name / "recipe.yaml").read_text(encoding="utf-8"))
    steps = published.steps(recipe)
    assert len(steps) == len(recipe["rows"]) * len(recipe["measures"])
    assert recipe["source"]
    assert recipe["differences"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for step in steps:
            one = [_first(argument) for argument in step.arguments if argument != "-m"]
            plan_experiment(compose("config", as_text(one)))


def _first(argument: str) -> str:
    """Return an argument of a grid with the first of its values."""
    key, _, value = argument.partition("=")
    return argument if value[0] in "[{" else f"{key}={value.partition(',')[0]}"


@pytest.mark.slow
def test_the_page_has_what_the_hub_gives_beside_what_was_published(
    hub: HubServer, tmp_path: Path, forks: Forks
) -> None:
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["MERGELAB_CACHE"] = str(tmp_path / "cache")
    recipe = ROOT / "experiments" / "mergecraft_glue" / "recipe.yaml"
    script = str(ROOT / "experiments" / "published.py")
    arguments = (script, str(recipe), "--work", "work", "--rows", "soup,slerp", "--", "task.limit=80", "source=hub")
    done = forks.run(*arguments, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "work" / "page.md").read_text()
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "work").rglob("record.json")}
    assert set(records) == {"published-soup-rte", "published-slerp-rte"}

    def cell(model: dict[str, object]) -> str:
        score = model["results"]["rte"]["report"]["accuracy"]  # type: ignore[index]
        return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"

    assert f"| soup | 0.621 | {cell(records['published-soup-rte']['models'][-1])} | 0.782 | not run | 0.917 |" in page
    points = records["published-slerp-rte"]["points"]
    assert [point["settings"]["t"] for point in points] == [0.1, 0.3, 0.5, 0.7, 0.9]
    best = max(points, key=lambda point: point["results"]["rte"]["report"]["accuracy"]["value"])
    assert f"| slerp | 0.726 | {cell(best)} |" in page
    assert "| ties | 0.744 | not run | 0.858 | not run |" in page
    assert "- ties, rte" in page.partition("## Not run")[2].partition("## Commands")[0]
    failed = page.partition("## Failed")[2].partition("## Not run")[0]
    assert "- soup, mrpc: error: " in failed
    assert "textattack/bert-base-uncased-MRPC" in failed
    assert "| bert-base-uncased-RTE | 0.726 | 0." in page
