"""Presets: the authors' values where nothing else is asked for, from the command line, the library and ``then``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from mergelab.config import CONF_DIR
from mergelab.engine.parameters import key_of
from mergelab.engine.registry import check_parameters, get_method, method_config, method_from_config, method_names
from mergelab.errors import ConfigError
from mergelab.experiment.plan import plan_experiment
from tests.methods.toy import merged, toy_models

WITH_PRESET = [name for name in method_names() if get_method(name).authors]
AUTHORS = {
    "adamerging": {"batch": 32},
    "adarank": {"lr": 5e-5, "steps": 5000, "batch": 8},
    "breadcrumbs": {"density": 0.2, "gamma": 0.1, "lambda": 0.4},
    "c2m3": {"start": "identity"},
    "dare": {"density": 0.9},
    "della": {"density": 0.7, "epsilon": 0.07, "lambda": 1.1},
    "fisher": {"floor_of": "first"},
    "greedy_soup": {"strict": True},
    "localize_stitch": {"penalty": "certainty"},
    "pcb": {"clamp": 0.01},
    "ram_plus": {"r": 0.2, "alpha": 1.0},
    "regmean": {"alpha": 0.1, "samples": 16000},
    "regmean_plus": {"alpha": 0.95, "samples": 256},
    "sce": {"select_topk": 0.1, "entries": "all"},
    "zipit": {"budget": "first"},
}


def composed(*overrides: str) -> dict[str, Any]:
    """The parameters with which the command line runs a method."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return plan_experiment(compose("config", list(overrides))).parameters.by_key()


@pytest.mark.parametrize("name", AUTHORS)
def test_a_preset_sets_the_authors_values_and_leaves_all_others(name: str) -> None:
    method = get_method(name)
    defaults, found = check_parameters(method, {}).by_key(), check_parameters(method, {"preset": "authors"}).by_key()
    assert found == {**defaults, **AUTHORS[name]}
    assert all(defaults[key] != value for key, value in AUTHORS[name].items()), "a value that is the default anyway"


@pytest.mark.parametrize("name", WITH_PRESET)
def test_every_preset_is_of_parameters_that_there_are_with_values_that_they_take(name: str) -> None:
    method = get_method(name)
    keys = {key_of(key) for key in method.authors}
    assert keys <= method_config(name).keys()
    found = check_parameters(method, {"preset": "authors"}).by_key()
    assert {key: found[key] for key in keys} == {key_of(key): value for key, value in method.authors.items()}


@pytest.mark.parametrize("name", method_names())
def test_parameters_that_the_authors_tune_exist(name: str) -> None:
    method = get_method(name)
    assert set(method.tuned) <= set(method.parameters.model_fields)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (0.7, 0.07, 1.1)),
        (("method.density=0.5",), (0.5, 0.07, 1.1)),  # the default's value, but asked for
        (("method.lambda=0.9", "method.epsilon=0.15"), (0.7, 0.15, 0.9)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_the_command_line_sets_wins_over_the_preset_before_it_or_after_it(
    overrides: tuple[str, ...], expected: tuple[float, ...], first: bool
) -> None:
    preset = ("method.preset=authors",)
    given = (*preset, *overrides) if first else (*overrides, *preset)
    found = composed("method=della", *given)
    assert (found["density"], found["epsilon"], found["lambda"]) == expected
    assert "preset" not in found


def test_null_is_no_preset() -> None:
    assert composed("method=della", "method.preset=null") == composed("method=della")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=soup", "method.preset=authors"), "method.preset=authors: soup has no preset; methods with one are "),
        (("method=della", "method.preset=author"), "method.preset='author': must be 'authors' or null"),
        (("method=della", "method={preset: authors}"), "method.preset: must be an override of its own"),
    ],
)
def test_a_preset_that_is_none_is_one_line(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        composed(*overrides)
    assert len(str(refused.value)) <= 400
    assert "\n" not in str(refused.value)


def test_the_line_names_the_methods_with_a_preset() -> None:
    with pytest.raises(ConfigError) as refused:
        check_parameters(get_method("soup"), {"preset": "authors"})
    assert all(name in str(refused.value) for name in WITH_PRESET)


def test_from_python_the_merge_is_that_with_the_values() -> None:
    models = toy_models(3)
    found = merged("ram_plus", models, preset="authors", epsilon=0.03)
    expected = merged("ram_plus", models, r=0.2, alpha=1.0, epsilon=0.03)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["embed"], merged("ram_plus", models, epsilon=0.03)["embed"])


def test_a_chained_method_has_its_preset_too() -> None:
    models = toy_models(2)
    base = models.base
    assert base is not None
    chained = {"name": "dare", "preset": "authors"}
    found = merged("lines", models, then=chained, alpha=1.0, beta=0.0)
    expected = merged("dare", models, density=0.9)
    torch.testing.assert_close(found["embed"], expected["embed"])


def test_a_users_function_may_have_a_parameter_of_that_name() -> None:
    path = "tests.engine.test_presets.own"
    _, parameters = method_from_config({"function": path, "preset": "loud"})
    assert parameters.by_key() == {"preset": "loud"}


def own(experts: Any, *, preset: str = "quiet") -> Any:
    return experts[0]
