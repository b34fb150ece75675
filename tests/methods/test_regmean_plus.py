"""RegMean++, against a float64 transcription that runs the merged blocks by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.estimation.input_gram import InputGramSums, linear_layers
from mergelab.methods.regmean_plus import stages_of
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource
from tests.methods.test_fisher import Drawn
from tests.methods.test_regmean import FROM_FLOAT32, paper
from tests.methods.tiny_classifiers import Expert, classifier, padded_batches, single_examples
from tests.parity import FORMULA, compared

BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h"}


@dataclass
class Fresh(Expert):
    """Returns a new copy of the module each time, as it may be written into."""

    def module(self) -> nn.Module:
        return copy.deepcopy(super().module())


def two_experts(kind: str) -> tuple[dict[str, nn.Module], AlignedModels, Drawn]:
    networks = {name: classifier(kind, scale=scale).float() for name, scale in (("a", 2.0), ("b", 3.0))}
    models = align(None, [DictSource(name, dict(network.named_parameters())) for name, network in networks.items()])
    return networks, models, Drawn({name: Fresh(network, key=name) for name, network in networks.items()})


def hidden(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@torch.no_grad()
def by_hand(kind: str, networks: dict[str, nn.Module], alpha: float) -> dict[str, np.ndarray[Any, Any]]:
    """Merge block after block: own block on the merged prefix's states, for single examples without padding."""
    doubles = {name: copy.deepcopy(network).double() for name, network in networks.items()}
    first = next(iter(doubles.values()))
    merged = copy.deepcopy(first)
    for name, value in merged.named_parameters():
        value.copy_(sum(dict(network.named_parameters())[name] for network in doubles.values()) / len(doubles))
    found = {}
    states: list[Tensor] = []
    path = BLOCKS[kind]
    seen = merged.get_submodule(f"{path}.0").register_forward_pre_hook(lambda _, a: states.append(a[0]))
    for inputs, _ in single_examples():
        merged(**inputs)
    seen.remove()
    for number in range(len(merged.get_submodule(path))):  # type: ignore[arg-type]
        grams: dict[str, list[Any]] = {}
        for network in doubles.values():
            block = network.get_submodule(f"{path}.{number}")
            layers = [p for p, each in block.named_modules() if type(each).__name__ in ("Linear", "Conv1D")]
            rows: dict[str, list[Any]] = {layer: [] for layer in layers}
            handles = [
                block.get_submodule(layer).register_forward_pre_hook(
                    lambda _, a, kept=rows[layer]: kept.append(a[0].reshape(-1, a[0].shape[-1]).numpy())
                )
                for layer in layers
            ]
            for state in states:
                block(state)
            for handle in handles:
                handle.remove()
            for layer in layers:
                x = np.concatenate(rows[layer])
                grams.setdefault(layer, []).append(x.T @ x / len(x))
        block = merged.get_submodule(f"{path}.{number}")
        for layer, products in grams.items():
            turn = type(block.get_submodule(layer)).__name__ == "Linear"
            name = f"{path}.{number}.{layer}.weight"
            weights = [dict(network.named_parameters())[name].numpy() for network in doubles.values()]
            solved = paper(products, [w.T if turn else w for w in weights], alpha)
            found[name] = solved.T if turn else solved
            dict(merged.named_parameters())[name].copy_(torch.from_numpy(found[name]))
        states = [hidden(block(state)) for state in states]
    return found


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_blocks_are_fitted_to_what_the_merged_blocks_before_them_give(kind: str) -> None:
    networks, models, drawn = two_experts(kind)
    found = merge_to_dict(get_method("regmean_plus"), {"alpha": 0.8}, models, examples=drawn)
    expected = by_hand(kind, networks, 0.8)
    assert len(expected) == {"bert": 12, "gpt2": 8}[kind]
    for name, value in expected.items():
        compared("regmean_plus", FORMULA, found[name], value, options=f"{kind}, alpha=0.8", note=FROM_FLOAT32)
        np.testing.assert_allclose(found[name].numpy(), value, rtol=0, atol=5e-5 * np.abs(value).max(), err_msg=name)
    plain = merge_to_dict(get_method("regmean"), {"alpha": 0.8}, models, examples=drawn)
    last = list(expected)[-1]
    assert (plain[last] - found[last]).abs().max() > 1e-3
    others = [name for name in models.names if name.endswith("bias") or "embeddings" in name or ".wte" in name]
    assert all(torch.equal(found[name], plain[name]) for name in others)


def test_what_is_merged_is_kept(tmp_path: Path) -> None:
    _, models, drawn = two_experts("bert")
    drawn = Drawn(drawn.experts, tmp_path)
    first = merge_to_dict(get_method("regmean_plus"), {}, models, examples=drawn)
    asked = [expert.asked for expert in drawn.experts.values()]
    again = merge_to_dict(get_method("regmean_plus"), {}, models, examples=drawn)
    assert [expert.asked for expert in drawn.experts.values()] == asked
    assert all(torch.equal(again[name], value) for name, value in first.items())
    merge_to_dict(get_method("regmean_plus"), {"alpha": 0.5}, models, examples=drawn)
    assert sum(expert.asked for expert in drawn.experts.values()) > sum(asked)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1", ""]),
        ("gpt2", ["transformer.h.0", "transformer.h.1", ""]),
        ("albert", ["", "albert.encoder.albert_layer_groups.0", ""]),
        ("t5", [*(f"transformer.{half}.block.{i}" for half in ("encoder", "decoder") for i in (0, 1)), ""]),
    ],
)
def test_stages_are_the_blocks_in_the_order_in_which_they_run(kind: str, expected: list[str]) -> None:
    network = classifier(kind)
    names = {name: name for name, _ in network.named_parameters()}
    batch = next(padded_batches(1 if kind == "t5" else None))
    order = linear_layers(network, names, {name: value for name, value in batch.items() if name != "labels"})
    stages = stages_of(network, order)
    assert [stage.block for stage in stages] == expected
    assert [name for stage in stages for name in stage.names] == order


def test_a_pass_ends_where_it_may() -> None:
    network = classifier("bert").float()
    names = {name: name for name, _ in network.named_parameters()}
    ran: list[int] = []
    network.get_submodule("bert.encoder.layer.1").register_forward_hook(lambda *_: ran.append(1))
    whole, part = InputGramSums(network, names), InputGramSums(network, names, until="bert.encoder.layer.1")
    part.add(padded_batches())
    assert not ran
    whole.add(padded_batches())
    assert ran
    found, same = part.mean().matrices, whole.mean().matrices
    assert len(found) == 4
    assert all(torch.equal(same[name], product) for name, product in found.items())
