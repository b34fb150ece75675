from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from mergelab.config import CONF_DIR
from mergelab.errors import ConfigError
from mergelab.tracking import TrackingConfig, experiment_name, tracking_config


@pytest.mark.parametrize(("name", "enabled"), [("mlflow", True), ("none", False)])
def test_the_ready_configs_are_valid(name: str, enabled: bool) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = tracking_config(compose(overrides=[f"+tracking={name}"]).tracking)
    assert config == TrackingConfig(enabled=enabled)


def test_a_misspelt_key_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.experimnt: .*did you mean 'experiment'.*$"):
        tracking_config({"experimnt": "x"})


def test_a_value_that_is_not_allowed_is_shown_with_what_is() -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.log_model='some': must be one of 'none', 'best' or 'all'$"):
        tracking_config({"log_model": "some"})


def test_runs_on_the_miniature_never_share_an_experiment_with_real_ones() -> None:
    assert experiment_name(TrackingConfig(), "rte", mini=False) == "rte"
    assert experiment_name(TrackingConfig(), "rte", mini=True) == "mini/rte"
    assert experiment_name(TrackingConfig(experiment="thesis"), "rte", mini=True) == "thesis"
