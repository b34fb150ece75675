"""Whatever Python value is given, the composed configuration holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mergelab.errors import ConfigError
from mergelab.notebook.calls import RunSettings, SweepSettings
from mergelab.notebook.overrides import overrides_of, space_of, text_of
from mergelab.sweep.config import SweepConfig

SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="_-/.@"), min_size=1, max_size=8)


def composed(key: str, value: Any) -> Any:
    """The value as a configuration holds it once Hydra has read the override."""
    (override,) = overrides_of({key: value})
    read = OverridesParser.create().parse_override(override).value()
    found: Any = OmegaConf.to_container(OmegaConf.create({"value": read}), resolve=True)
    return found["value"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(value=SCALARS | TEXT | st.lists(SCALARS | TEXT, max_size=3))
def test_a_value_is_the_same_in_the_configuration(value: Any) -> None:
    if value == "???" or value == ["???"]:  # OmegaConf's own mark of a missing value
        return
    assert composed("method.density", value) == value


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(value=st.dictionaries(NAMES.filter(lambda name: name.strip(".") == name), TEXT, min_size=1, max_size=2))
def test_a_mapping_is_the_same_in_the_configuration(value: dict[str, str]) -> None:
    found = composed("method.weights", value)
    assert {str(name): text for name, text in found.items()} == value


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "ties"}, ["method=ties"]),
        ({"method": {"name": "ties", "lambda_": 0.5}}, ["method=ties", "method.lambda=0.5"]),
        ({"models": {"base": Path("a b")}}, ['models.base="a b"']),
        ({"models": {"experts": {"x": "./a"}}}, ["models.experts={x:./a}"]),
        ({"method.density": np.float32(0.5)}, ["method.density=0.5"]),
        ({"output": None, "evaluate": False}, ["output=null", "evaluate=false"]),
        ({"method.scope": "true"}, ['method.scope="true"']),
        ({"output": "${seed}"}, ['output="\\${seed}"']),
    ],
)
def test_settings_are_overrides_as_they_are_typed(settings: dict[str, Any], expected: list[str]) -> None:
    assert overrides_of(settings) == expected


def test_a_key_is_not_given_in_two_spellings() -> None:
    with pytest.raises(ConfigError, match="twice"):
        overrides_of({"method": {"lambda": 1, "lambda_": 2}})


@pytest.mark.parametrize("value", [object(), np.ones(3), {1, 2}, b"bytes", print])
def test_what_a_configuration_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.base=.*cannot hold"):
        text_of(value, "models.base")


def test_ranges_are_hydras() -> None:
    found = space_of({"a": (0, 1), "b": [1, "x"], "c": "tag(log,interval(1e-3,1))"})
    assert found == ["a=interval(0.0,1.0)", "b=choice(1,x)", "c=tag(log,interval(1e-3,1))"]


@pytest.mark.parametrize("value", [0.5, (1, 2, 3), ("a", "b"), [], None])
def test_what_is_no_range_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="params"):
        space_of({"a": value})


def test_every_setting_of_a_sweep_is_a_keyword() -> None:
    own = SweepSettings.__annotations__.keys() - RunSettings.__annotations__.keys()
    assert own == (SweepConfig.model_fields.keys() | {"sweep"}) - {"seed"}
