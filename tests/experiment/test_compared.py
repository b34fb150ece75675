"""A run's parameters: what was used and is compared; with the named files they say the whole configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mergelab.config import CONF_DIR, ModelsConfig
from mergelab.experiment.compared import compared, models_used, used_name
from mergelab.experiment.described import description
from mergelab.tracking.values import flatten

# What a run's parameters leave out wherever it is not set.
NOBODY_COMPARES = {"eval.cache", "eval.batch_tokens", "method.function", "method.weights", "task.columns", "output",
                   "tracking.uri", "source", "models.passthrough", "save.max_shard_size", "device"}  # fmt: skip


def composed(*overrides: str) -> dict[str, Any]:
    """A configuration as an experiment resolves it."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
        parts = {key: config[key] for key in config if key not in ("hydra", "sweep", "experiment")}
        return {
            str(key): OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
            for key, part in parts.items()
        }


def logged(*overrides: str, source: str = "hub", typed: Sequence[str] = ()) -> dict[str, str]:
    return flatten(compared(composed(*overrides), source, typed))


def test_what_is_compared_is_there_and_what_nobody_compares_is_not() -> None:
    found = logged("method=ties", "task=rte")
    assert found == {
        "method.name": "ties", "method.density": "0.2", "method.lambda": "1.0", "task.name": "rte", "seed": "0",
        "eval.protocol": "full", "models.name": "bert_base_rte", "models.base": "google-bert/bert-base-uncased",
        "models.head": "average", **{key: value for key, value in found.items() if key.startswith("models.experts.")},
    }  # fmt: skip
    assert len(found) == 14
    assert not NOBODY_COMPARES & found.keys()


@pytest.mark.parametrize(
    "override",
    ["method.reduce=sum", "eval.max_length=128", "task.limit=10", "eval.cache=false", "models.passthrough=[a]",
     "device=cpu", "models.vocab=union", "eval.bootstrap=50", "save.form=dense", "evaluate=false"],
)  # fmt: skip
def test_what_differs_from_the_files_is_there(override: str) -> None:
    key, _, value = override.partition("=")
    found = logged("method=ties", "task=rte", override)
    assert found[key] == ('["a"]' if value == "[a]" else value)


def test_what_the_user_typed_is_there_even_where_it_is_the_default() -> None:
    assert "method.reduce" not in logged("method=ties")
    assert logged("method=ties", typed=["method.reduce", "eval.max_length", "task"])["method.reduce"] == "mean"
    assert logged("method=ties", typed=["eval.max_length"])["eval.max_length"] == "null"


@pytest.mark.parametrize("method", ["ties", "slerp", "breadcrumbs", "fisher", "custom", "adamerging"])
@pytest.mark.parametrize("task", ["rte", "t5_rte", "xsum", "wikitext"])
def test_the_named_files_with_the_parameters_are_the_whole_configuration(method: str, task: str) -> None:
    more = ["method.function=a.b"] if method == "custom" else []
    changed = composed(f"method={method}", f"task={task}", "eval.dtype=bfloat16", "task.limit=7", "seed=3", *more)
    plain = composed(f"method={method}", f"task={task}")
    kept = compared(changed, "hub")
    for group, node in plain.items():
        if group in ("tracking", "output", "source"):
            continue
        rebuilt = {**node, **kept.get(group, {})} if isinstance(node, dict) else kept.get(group, node)
        assert rebuilt == changed[group], group


def test_of_the_miniature_the_models_that_were_asked_for_are_not_there() -> None:
    found = logged("method=ties", "task=rte", source="mini")
    assert {key for key in found if key.startswith("models.")} == {"models.head"}
    tags = {"mergelab.models": "mini/rte", "model.base": "mini/base", "model.base.sha256": "1", "model.a": "mini/rte/1",
            "model.a.sha256": "2", "mergelab.kind": "merge"}  # fmt: skip
    assert flatten(models_used(tags)) == {
        "models.name": "mini/rte", "models.base": "mini/base", "models.experts.a": "mini/rte/1",
    }  # fmt: skip


def test_a_ready_sets_name_stands_for_its_models_alone() -> None:
    ready = composed("task=rte")["models"]
    assert used_name(ModelsConfig.model_validate(ready)) == "bert_base_rte"
    own = {**ready, "experts": {"a": "x/a", "b": "x/b"}}
    assert used_name(ModelsConfig.model_validate(own)) == "a, b"
    fewer = {**ready, "experts": {**ready["experts"], "howey": None}}
    assert used_name(ModelsConfig.model_validate(fewer)).startswith("textattack, ")
    many = {**ready, "experts": {letter: f"x/{letter}" for letter in "abcdef"}}
    assert used_name(ModelsConfig.model_validate(many)) == "a, b, c, d, and 2 more"
    assert used_name(ModelsConfig.model_validate({**own, "name": "mine"})) == "mine"
    assert used_name(ModelsConfig.model_validate({**own, "name": "custom"})) == "a, b"
    other_base = {**ready, "base": "x/base"}
    assert used_name(ModelsConfig.model_validate(other_base)) != "bert_base_rte"


@pytest.mark.parametrize("file", sorted((CONF_DIR / "models").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_ready_set_has_its_own_name(file: Path) -> None:
    if file.stem != "custom":  # without models until they are given
        ready = ModelsConfig.model_validate(composed(f"models={file.stem}", "task=rte")["models"])
        assert used_name(ready) == file.stem


def test_a_description_is_whole_or_leaves_parts_out() -> None:
    assert description("best", "| table |", command="python -m mergelab") == (
        "best\n\n```\npython -m mergelab\n```\n\n| table |"
    )
    long = description("best", "x" * 6000, "short", command="python")
    assert long == "best\n\n```\npython\n```\n\nshort"
    assert description("", command=None) == ""
