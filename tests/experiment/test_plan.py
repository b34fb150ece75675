"""What can be refused before anything is loaded is refused there."""

from __future__ import annotations

import pytest

from mergelab.config import CONF_DIR
from mergelab.errors import ConfigError
from mergelab.experiment.plan import Plan, plan_experiment


def planned(*overrides: str) -> Plan:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return plan_experiment(compose("config", list(overrides)))


LEARNT = ("++models.experts.a={reference: ./a, task: samsum}", "evaluate=false", "output=merged")


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=gradient_matching", "task=law_recipes"),
        ("task=law_recipes",),
        ("task=law_recipes", "source=mini"),
        ("task=samsum",),
        ("task=t5_rte",),
        ("task=prompts",),
        ("task=law_recipes", "~models.experts", "+models.experts=[a/b,c/d]"),  # made for one of these two tasks
        ("models=gpt2_law_recipes", "evaluate=false", "output=merged"),  # though the task is still RTE
        LEARNT,
    ],
)
def test_an_estimator_that_there_is_not_for_models_that_write_is_refused(overrides: tuple[str, ...]) -> None:
    if not overrides[0].startswith("method="):
        overrides = ("method=fisher", *overrides)
    with pytest.raises(ConfigError, match=r"method\.estimator=expected: .* take sampled .* or empirical"):
        planned("method.estimator=expected", *overrides)
    rule = "+method.rules=[{{match: '*.attention.*', estimator: {}}}]"
    with pytest.raises(ConfigError, match=r"method\.estimator=expected: .* take sampled .* or empirical"):
        planned(rule.format("expected"), *overrides)
    for estimator in ("auto", "sampled", "empirical"):
        planned(f"method.estimator={estimator}", rule.format("sampled"), *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("task=rte",),
        ("task=stsb",),
        ("task=suite",),
        ("task=rte", "source=mini", "+models.experts.legal=a/b"),  # the miniature's classifier takes its place
    ],
)
def test_the_same_estimator_is_taken_for_classifiers(overrides: tuple[str, ...]) -> None:
    assert planned("method=fisher", "method.estimator=expected", *overrides).method.name == "fisher"


@pytest.mark.parametrize("method", ["adamerging", "adarank"])
def test_a_method_on_predicted_classes_is_refused_for_models_that_write(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method={method}: minimises the entropy of predicted classes, and models"):
        planned(f"method={method}", "task=law_recipes")
    planned(f"method={method}", "task=rte")
    planned("method=regmean", "task=law_recipes")


def test_an_expert_may_not_have_the_bases_name() -> None:
    with pytest.raises(ConfigError, match=r"models\.experts\.base: that is the base's name"):
        planned("~models.experts", "+models.experts=[a/base,b/other]")
    planned("~models.experts", "+models.experts=[a/base,b/other]", "models.base=null", "method=soup")
