from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergelab.errors import ConfigError, KeyMismatch, ModelError, ShapeMismatch
from mergelab.weights.state_dict import StateDict, dict_map


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 4, generator=generator), "b": torch.randn(4, generator=generator)}


def test_dict_map_without_arguments_maps_over_the_first_parameter():
    @dict_map
    def median(models: list[Tensor], **kw) -> Tensor:
        return torch.median(torch.stack(models), dim=0).values

    models = [tensors(seed) for seed in range(3)]
    result = median(models, task="text-classification")
    assert isinstance(result, StateDict)
    assert list(result) == ["b", "w"]
    assert torch.equal(result["w"], torch.stack([model["w"] for model in models]).median(0).values)
    assert torch.equal(median(models=models)["w"], result["w"])
    assert median.__name__ == "median"
    assert torch.equal(median.layer_function([models[0]["w"]]), models[0]["w"])


def test_dict_map_called_without_names_is_the_same():
    @dict_map()
    def mean(models, scale=1.0):
        return scale * torch.stack(models).mean(0)

    models = [StateDict(tensors(seed)) for seed in range(2)]
    assert torch.equal(mean(models, 2.0)["b"], models[0]["b"] + models[1]["b"])


@pytest.mark.parametrize("decorator", [dict_map(["models", "fishers"]), dict_map(names=["models", "fishers"])])
def test_dict_map_over_several_parameters(decorator):
    @decorator
    def weighted(models, power, *, fishers, floor=0.0):
        assert len(models) == len(fishers) == 2
        weights = [fisher.abs() ** power + floor for fisher in fishers]
        return sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)

    models, fishers = [tensors(0), tensors(1)], [tensors(2), tensors(3)]
    result = weighted(models, 2, fishers=fishers, floor=0.1)
    for key in models[0]:
        w = [fisher[key] ** 2 + 0.1 for fisher in fishers]
        assert torch.allclose(result[key], (w[0] * models[0][key] + w[1] * models[1][key]) / (w[0] + w[1]))


def test_dict_map_gives_a_fresh_list_each_time_and_records_no_gradient(bert):
    @dict_map
    def first(models):
        assert not torch.is_grad_enabled()
        return models.pop(0) * 2

    models = [StateDict.from_model(bert()), StateDict.from_model(bert(seed=1))]
    result = first(models)
    assert not any(value.requires_grad for value in result.values())
    assert result == models[0] * 2


def test_dict_map_copies_integers_without_asking_the_function():
    @dict_map
    def half(models):
        assert all(tensor.is_floating_point() for tensor in models)
        return models[0] / 2

    ids = torch.arange(3)
    result = half([{**tensors(), "ids": ids}, {**tensors(1), "ids": ids.clone()}])
    assert torch.equal(result["ids"], ids)
    assert result["ids"].data_ptr() != ids.data_ptr()
    with pytest.raises(ModelError, match=r"ids: integer tensors must be equal, but models\[1\] differs"):
        half([{"ids": ids}, {"ids": ids + 1}])


def test_dict_map_is_strict_about_keys_and_shapes():
    @dict_map(["models", "fishers"])
    def take(models, fishers):
        return models[0]

    torn = {"w": torch.ones(3, 4)}
    with pytest.raises(KeyMismatch, match=r"models\[2\] lacks b"):
        take([tensors(), tensors(), torn], [tensors()] * 3)
    with pytest.raises(ShapeMismatch, match=r"b is float32\[4\] in models\[0\] but float32\[5\] in fishers\[0\]"):
        take([tensors()], [{**tensors(), "b": torch.ones(5)}])
    with pytest.raises(ConfigError, match="models, fishers must be lists of the same length"):
        take([tensors(), tensors()], [tensors()])


def test_dict_map_says_how_it_is_to_be_called():
    with pytest.raises(ConfigError, match="mean has no parameter fishers; it has models, scale"):

        @dict_map(["fishers"])
        def mean(models, scale):
            return models[0]

    with pytest.raises(ConfigError, match="nothing has no parameter to map over"):

        @dict_map
        def nothing():
            return torch.ones(1)

    @dict_map
    def shape(models):
        return models[0].shape[0]

    for wrong in (tensors(), [], [1], None):
        with pytest.raises(ConfigError, match="models must be a list of dictionaries of tensors"):
            shape(wrong)
    with pytest.raises(ModelError, match="shape must return a tensor; for w it returned a int"):
        shape([{"w": torch.ones(1)}])
