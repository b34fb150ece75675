"""What every evaluation takes: the configuration's values, the device, the size of a batch."""

from __future__ import annotations

import pytest
import torch

from mergelab.config import EvalConfig
from mergelab.errors import ConfigError
from mergelab.evaluation.options import EvaluationOptions, best_device, options_from_config


def test_the_defaults_are_those_of_the_configuration() -> None:
    options, config = EvaluationOptions(), EvalConfig()
    assert (options.batch_tokens, options.max_length) == (config.batch_tokens, config.max_length)


def test_every_setting_of_the_configuration_arrives() -> None:
    config = EvalConfig(dtype="bfloat16", max_length=40, batch_tokens=77)
    options = options_from_config(config, "cpu")
    assert options == EvaluationOptions(torch.device("cpu"), "bfloat16", 77, 40)
    assert options.torch_dtype == torch.bfloat16


def test_a_batch_on_a_cpu_is_no_larger_than_its_caches() -> None:
    options = EvaluationOptions(batch_tokens=4096)
    assert options.batch_budget(torch.device("cpu")) < options.batch_budget(torch.device("cuda")) == 4096
    assert EvaluationOptions(batch_tokens=7).batch_budget(torch.device("cpu")) == 7


def test_a_model_is_run_where_it_is_unless_a_device_is_asked_for() -> None:
    model = torch.nn.Linear(2, 2, device="meta")
    assert EvaluationOptions().device_for(model) == torch.device("meta")
    assert EvaluationOptions(device="cpu").device_for(model) == torch.device("cpu")


def test_the_best_device_is_there() -> None:
    device = best_device()
    assert torch.zeros(1, device=device).device.type == device.type
    assert best_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"), [("tpu", "must be auto, cpu"), ("gpu", "must be auto"), ("cuda:99", "not on this mach")]
)
def test_a_device_that_is_not_there_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"device={name}: {message}"):
        best_device(name)
