"""RegMean, against the paper's formula in NumPy's float64 and against least squares."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge, merge_to_dict
from mergelab.errors import MergeWarning
from mergelab.estimation.input_gram import InputGram, run_for_gram
from mergelab.methods.regmean import regmean
from mergelab.ops.site import Site
from mergelab.weights.align import align
from mergelab.weights.source import DictSource
from tests.methods.test_fisher import Drawn
from tests.methods.tiny_classifiers import Expert, classifier, single_examples
from tests.methods.toy import merged, toy_models
from tests.parity import FORMULA, compared

FROM_FLOAT32 = "the models run in float32 here"


def inputs_of(network: nn.Module, layer: str) -> np.ndarray[Any, Any]:
    """All inputs of a layer, example by example without padding: (n, d) float64."""
    rows: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0]))
    with torch.no_grad():
        for inputs, _ in single_examples():
            network(**inputs)
    handle.remove()
    return np.concatenate([row.reshape(-1, row.shape[-1]).double().numpy() for row in rows])


def paper(grams: list[Any], weights: list[Any], alpha: float) -> Any:
    """(Σ Ĝ)⁻¹ Σ Ĝ W with W (in, out)."""
    scaled = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    return np.linalg.solve(sum(scaled), sum(g @ w for g, w in zip(scaled, weights, strict=True)))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "albert"])
def test_input_gram_matrices_are_those_of_real_tokens(kind: str) -> None:
    network = classifier(kind).float()
    found = run_for_gram(Expert(network))
    layers = [
        (path, layer) for path, layer in network.named_modules() if hasattr(layer, "weight") and layer.weight.dim() == 2
    ]  # type: ignore[union-attr,operator]
    linear = [(path, layer) for path, layer in layers if not isinstance(layer, nn.Embedding)]
    assert linear
    for path, layer in linear:
        x = inputs_of(network, path)
        product = found.of(f"{path}.weight")
        assert product is not None
        np.testing.assert_allclose(product.numpy(), x.T @ x / len(x), rtol=2e-5, atol=2e-5 * (x**2).mean(0).max())
        assert (f"{path}.weight" in found.input_first) == (type(layer).__name__ == "Conv1D")
    assert all(found.of(f"{path}.weight") is None for path, layer in layers if isinstance(layer, nn.Embedding))


def test_layers_with_the_same_input_share_one_matrix() -> None:
    found = run_for_gram(Expert(classifier("bert").float()))
    attention = "bert.encoder.layer.0.attention.self"
    assert found.of(f"{attention}.query.weight") is found.of(f"{attention}.value.weight")
    assert len(found.matrices) == 2 * 4 + 2  # of each layer's six; the pooler's and the head's


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_more_padding_changes_nothing(kind: str) -> None:
    network, end = classifier(kind).float(), 1 if kind == "t5" else None
    plain = run_for_gram(Expert(network, ends_with=end))
    padded = run_for_gram(Expert(network, padding=5, ends_with=end))
    for name, product in plain.matrices.items():
        torch.testing.assert_close(padded.matrices[name], product, rtol=1e-4, atol=1e-5 * float(product.abs().max()))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_whole_models_are_merged_by_the_papers_formula(kind: str, alpha: float) -> None:
    networks = {name: classifier(kind, scale=scale).float() for name, scale in (("a", 2.0), ("b", 3.0), ("c", 2.5))}
    sources = [DictSource(name, dict(network.named_parameters())) for name, network in networks.items()]
    models = align(None, sources)
    drawn = Drawn({name: Expert(network) for name, network in networks.items()})
    found = merge_to_dict(get_method("regmean"), {"alpha": alpha}, models, examples=drawn)
    for name in models.names:
        values = [source.get(name).double().numpy() for source in sources]
        layer = networks["a"].get_submodule(name.rpartition(".")[0])
        expected = sum(values) / 3
        if name.endswith(".weight") and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            xs = [inputs_of(network, name.rpartition(".")[0]) for network in networks.values()]
            grams = [x.T @ x / len(x) for x in xs]
            turn = isinstance(layer, nn.Linear)
            expected = paper(grams, [v.T if turn else v for v in values], alpha)
            expected = expected.T if turn else expected
        compared("regmean", FORMULA, found[name], expected, options=f"{kind}, alpha={alpha}", note=FROM_FLOAT32)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def drawn_inputs() -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Inputs (n, 6) and weights (4, 6) of three experts."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(4, 6))


def regmean_w(experts: list[Any], inputs: list[Any], **parameters: Any) -> Tensor:
    prepared = [InputGram({"w": torch.from_numpy(x.T @ x / len(x))}, {"w": "w"}, frozenset()) for x in inputs]
    site = Site("w", tuple("abcdef"[: len(experts)]), tuple(experts[0].shape))
    return regmean([torch.from_numpy(w) for w in experts], prepared=prepared, site=site, **parameters)


def test_with_alpha_1_the_merged_layer_has_the_least_squared_output_error() -> None:
    inputs, weights = map(list, zip(*drawn_inputs(), strict=True))
    targets = np.concatenate([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    best, *_ = np.linalg.lstsq(np.concatenate(inputs), targets, rcond=None)
    found = regmean_w(weights, inputs, alpha=1.0)
    compared("regmean", "NumPy's lstsq on outputs", found, best.T, options="alpha=1")
    np.testing.assert_allclose(found.numpy(), best.T, rtol=1e-9)


def test_with_alpha_0_each_input_is_averaged_by_its_own_power() -> None:
    inputs, weights = map(list, zip(*drawn_inputs(), strict=True))
    powers = [(x**2).mean(0) for x in inputs]
    expected = sum(p * w for p, w in zip(powers, weights, strict=True)) / sum(powers)
    found = regmean_w(weights, inputs, alpha=0.0)
    compared("regmean", FORMULA, found, expected, options="alpha=0")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_singular_system_warns_by_name_and_leaves_what_is_not_determined_at_the_mean() -> None:
    inputs, weights = map(list, zip(*drawn_inputs(), strict=True))
    for x in inputs:
        x[:, 2] = 0  # a dead input
        x[:, 5] = x[:, 4]  # two that cannot be told apart
    with pytest.warns(MergeWarning, match="method=regmean: the inputs of w do not determine"):
        found = regmean_w(weights, inputs, alpha=1.0).numpy()
    np.testing.assert_allclose(found[:, 2], sum(w[:, 2] for w in weights) / 3, rtol=1e-6)
    targets = np.concatenate([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    stacked = np.concatenate(inputs)
    best, *_ = np.linalg.lstsq(stacked, targets, rcond=None)
    np.testing.assert_allclose(stacked @ found.T, stacked @ best, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs[0][:, 2] = 1.0
        regmean_w(weights, inputs, alpha=0.9)


def test_inputs_that_are_all_zero_give_the_mean() -> None:
    _, weights = map(list, zip(*drawn_inputs(), strict=True))
    with pytest.warns(MergeWarning):
        found = regmean_w(weights, [np.zeros((5, 6))] * 3)
    np.testing.assert_allclose(found.numpy(), sum(weights) / 3, rtol=1e-12)


def test_identical_layers_stay_even_where_the_system_is_singular() -> None:
    (x, w), *_ = drawn_inputs()
    x[:, 2] = 0
    with pytest.warns(MergeWarning):
        found = regmean_w([w, w, w], [x, x, x], alpha=1.0)
    np.testing.assert_allclose(found.numpy(), w, rtol=1e-15)


def test_one_expert_is_itself() -> None:
    models = toy_models(1)
    for name, tensor in merged("regmean", models).items():
        assert torch.equal(tensor, models.experts[0].get(name)), name


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    networks = {name: classifier("gpt2", scale=scale).float() for name, scale in (("a", 2.0), ("b", 3.0))}
    models = align(None, [DictSource(name, dict(network.named_parameters())) for name, network in networks.items()])
    drawn = Drawn({name: Expert(network, key=name) for name, network in networks.items()}, tmp_path)
    first = dict(merge(get_method("regmean"), {}, models, examples=drawn))
    assert [expert.asked for expert in drawn.experts.values()] == [1, 1]
    again = dict(merge(get_method("regmean"), {}, models, examples=drawn))
    other = dict(merge(get_method("regmean"), {"alpha": 0.3}, models, examples=drawn))
    assert [expert.asked for expert in drawn.experts.values()] == [1, 1]
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["transformer.h.0.attn.c_attn.weight"], first["transformer.h.0.attn.c_attn.weight"])
