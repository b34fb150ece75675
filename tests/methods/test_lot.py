"""LOT Merging, against the paper's formulas in NumPy's float64 and against least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.estimation.input_gram import InputGram
from mergelab.estimation.layer_features import LayerFeatures, norm_squares
from mergelab.methods.lot import lot
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource
from tests.methods.test_fisher import Drawn
from tests.methods.test_regmean import inputs_of
from tests.methods.tiny_classifiers import Expert, classifier
from tests.parity import FORMULA, compared

Array = np.ndarray[Any, Any]
FLOAT32_GRAMS = "Gram matrices are stored in float32 here"
LINEAR, NORMS = ("Linear", "Conv1D"), ("LayerNorm", "LlamaRMSNorm")


def experts_of(kind: str, scales: tuple[float, ...] = (2.0, 3.0, 2.5)) -> tuple[dict[str, nn.Module], AlignedModels]:
    """Experts that are tiny classifiers in float64, and a base."""
    networks = {name: classifier(kind, scale=scale) for name, scale in zip("abc", scales, strict=False)}
    sources = [DictSource(name, dict(network.named_parameters())) for name, network in networks.items()]
    base = DictSource("base", dict(classifier(kind, scale=1.0).named_parameters()))
    return networks, align(base, sources)


def normalised_squares(network: nn.Module, path: str) -> Array:
    """Mean squares of a norm's normalised inputs over real tokens, from the inputs alone."""
    x = inputs_of(network, path)
    layer: Any = network.get_submodule(path)
    epsilon = layer.eps if hasattr(layer, "eps") else layer.variance_epsilon
    if type(layer).__name__ == "LayerNorm":
        x = x - x.mean(1, keepdims=True)
    return np.asarray((x**2 / ((x**2).mean(1, keepdims=True) + epsilon)).mean(0))


def task_vectors(models: AlignedModels, name: str) -> list[Array]:
    assert models.base is not None
    start = models.base.get(name).detach().double().numpy()
    return [expert.get(name).detach().double().numpy() - start for expert in models.experts]


def gram_of(network: nn.Module, path: str) -> Array:
    x = inputs_of(network, path)
    return np.asarray(x.T @ x / len(x))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_whole_models_are_merged_by_the_papers_formulas(kind: str) -> None:
    networks, models = experts_of(kind)
    drawn = Drawn({name: Expert(network) for name, network in networks.items()})
    found = merge_to_dict(get_method("lot"), {"lambda": 0.8}, models, examples=drawn)
    seen = set()
    for name in models.names:
        taus, path = task_vectors(models, name), name.rpartition(".")[0]
        shown = type(networks["a"].get_submodule(path)).__name__
        expected, rounding = sum(taus) / len(taus), 1e-12
        if name.endswith(".weight") and shown in LINEAR:
            grams = [gram_of(network, path) for network in networks.values()]
            turned = [tau.T if shown == "Linear" else tau for tau in taus]
            cut = len(grams[0]) * np.finfo(np.float32).eps
            rounding = 4 * np.finfo(np.float32).eps * np.linalg.cond(sum(grams))  # of the solution, by float32's Grams
            expected = np.linalg.pinv(sum(grams), rcond=cut, hermitian=True) @ sum(
                g @ t for g, t in zip(grams, turned, strict=True)
            )
            expected = expected.T if shown == "Linear" else expected
        elif name.endswith(".weight") and shown in NORMS:
            squares = [normalised_squares(network, path) for network in networks.values()]
            expected = sum(s * t for s, t in zip(squares, taus, strict=True)) / sum(squares)
        seen.add(shown)
        assert models.base is not None
        expected = models.base.get(name).detach().numpy() + 0.8 * expected
        compared("lot", FORMULA, found[name].detach(), expected, options=kind, note=FLOAT32_GRAMS)
        largest = max(np.abs(tau).max() for tau in taus)
        np.testing.assert_allclose(found[name].detach().numpy(), expected, rtol=0, atol=rounding * largest)
    assert seen & set(LINEAR)
    assert seen & set(NORMS)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_norms_are_seen_at_real_tokens_alone(kind: str) -> None:
    network = classifier(kind)
    found = norm_squares(Expert(network, padding=4))
    norms = [path for path, layer in network.named_modules() if type(layer).__name__ in NORMS]
    assert set(found) == {f"{path}.weight" for path in norms}
    for path in norms:
        np.testing.assert_allclose(found[f"{path}.weight"].numpy(), normalised_squares(network, path), rtol=1e-9)


def features(grams: list[Array], norms: list[dict[str, Array]] | None = None) -> list[LayerFeatures]:
    squares = norms or [{} for _ in grams]
    return [
        LayerFeatures(
            InputGram({"w": torch.from_numpy(gram)} if gram.size else {}, {}, frozenset()),
            {name: torch.from_numpy(values) for name, values in own.items()},
        )
        for gram, own in zip(grams, squares, strict=True)
    ]


def lot_w(vectors: list[Array], prepared: list[LayerFeatures]) -> Tensor:
    site = Site("w", tuple("abcdef"[: len(vectors)]), tuple(vectors[0].shape))
    return lot([torch.from_numpy(vector) for vector in vectors], prepared=prepared, site=site)


def test_the_layer_has_the_least_squared_output_error() -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) for _ in range(3)]
    taus = [rng.normal(size=(4, 6)) for _ in range(3)]
    targets = np.concatenate([x @ tau.T for x, tau in zip(inputs, taus, strict=True)])
    best, *_ = np.linalg.lstsq(np.concatenate(inputs), targets, rcond=None)
    found = lot_w(taus, features([x.T @ x / len(x) for x in inputs]))
    np.testing.assert_allclose(found.numpy(), best.T, rtol=0, atol=1e-9 * np.abs(best).max())


def test_experts_whose_inputs_are_orthogonal_keep_their_own_changes_and_nothing_else() -> None:
    first, second = np.diag([1.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 0.0])
    taus = [np.full((2, 4), 1.0), np.full((2, 4), 5.0)]
    found = lot_w(taus, features([first, second]))
    np.testing.assert_allclose(found.numpy(), [[1.0, 1.0, 5.0, 0.0]] * 2, atol=1e-12)


def test_a_norms_scale_is_weighed_by_its_inputs_and_is_the_mean_where_there_are_none() -> None:
    squares = [{"w": np.array([1.0, 0.0, 0.0])}, {"w": np.array([3.0, 2.0, 0.0])}]
    found = lot_w([np.array([4.0, 4.0, 4.0]), np.array([8.0, 8.0, 8.0])], features([np.zeros((0, 0))] * 2, squares))
    np.testing.assert_allclose(found.numpy(), [7.0, 8.0, 6.0])
