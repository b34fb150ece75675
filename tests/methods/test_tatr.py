"""Task arithmetic in the trust region, against gradients of autograd, one example after the other, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.methods.tatr import TrustRegion, tatr
from mergelab.ops.site import Site
from tests.methods.test_adamerging import HEAD, Drawn, drawn, turned
from tests.methods.tiny_classifiers import classifier, single_examples
from tests.methods.toy import distinct_models, merged, task_vector, toy_models
from tests.parity import FORMULA, compared


def merge(setting: Drawn, **parameters: Any) -> dict[str, Tensor]:
    return merge_to_dict(get_method("tatr"), parameters, setting.models, seed=5, examples=setting)


def magnitudes(setting: Drawn, expert: str) -> dict[str, Tensor]:
    """E|∂L/∂θ| at the base with the expert's head."""
    own = setting.experts[expert]
    network = classifier("bert", 3)
    heads = {name: value for name, value in own.weights.items() if name.startswith(HEAD)}
    network.load_state_dict({**setting.base, **heads}, strict=False)
    totals = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    count = 0
    for inputs, label in single_examples():
        network.zero_grad()
        output = network(**{**inputs, "input_ids": turned(inputs["input_ids"], own.turn)})
        torch.nn.functional.cross_entropy(output.logits, label[None]).backward()
        count += 1
        for name, parameter in network.named_parameters():
            totals[name] += parameter.grad.abs() if parameter.grad is not None else 0
    return {name: total / count for name, total in totals.items()}


@pytest.mark.parametrize("density", [0.99, 0.6, 1.0])
@pytest.mark.parametrize("weights", [None, [1.0, -0.5]])
def test_it_is_the_papers_formula(density: float, weights: Any) -> None:
    setting = drawn()
    found = merge(setting, density=density, weights=weights, **{"lambda": 0.7})
    names = [name for name in setting.base if not name.startswith(HEAD)]
    gradients = {expert: magnitudes(setting, expert) for expert in "ab"}
    taus = {e: {n: setting.experts[e].weights[n] - setting.base[n] for n in names} for e in "ab"}
    omega = {n: gradients["a"][n] * taus["b"][n].abs() + gradients["b"][n] * taus["a"][n].abs() for n in names}
    flat = np.sort(np.concatenate([omega[n].numpy().ravel() for n in names]))
    bound = flat[max(1, int(density * len(flat))) - 1]
    first, second = weights or (1.0, 1.0)
    dropped = 0
    for n in names:
        # Where the two are within rounding of the bound, either may be right.
        inside = (omega[n] <= bound * (1 + 1e-9)).double()
        dropped += int((inside == 0).sum())
        expected = setting.base[n] + 0.7 * inside * (first * taus["a"][n] + second * taus["b"][n])
        compared("tatr", FORMULA, found[n], expected.numpy(), options=f"density={density:g}")
        torch.testing.assert_close(found[n], expected, rtol=0, atol=1e-9)
    assert dropped == len(flat) - int(density * len(flat))
    assert sorted(setting.asked) == [(name, 128, 5, True) for name in ("a", "b")]


def test_gradients_are_kept_for_other_bounds(tmp_path: Any) -> None:
    setting = drawn()
    setting.folder = tmp_path
    first = merge(setting, density=0.5)
    again = merge(setting, density=0.5)
    assert [expert.asked for expert in setting.experts.values()] == [1, 1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    merge(setting, density=0.7)
    assert [expert.asked for expert in setting.experts.values()] == [1, 1]
    setting.base = {name: value * 1.01 for name, value in setting.base.items()}  # gradients are at the base
    merge(setting, density=0.5)
    assert [expert.asked for expert in setting.experts.values()] == [2, 2]


def test_all_entries_inside_are_task_arithmetic() -> None:
    models = distinct_models(3)
    ours, plain = merged("tatr", models, density=1.0), merged("task_arithmetic", models)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_a_smaller_region_is_part_of_a_larger_one_and_has_as_many_entries_as_asked_for() -> None:
    models = toy_models(3)
    assert models.base is not None
    kept = {}
    for density in (0.3, 0.9):
        found = merged("tatr", models, density=density)
        kept[density] = torch.cat([(found[n] != models.base.get(n)).flatten() for n in models.names])
    assert bool((kept[0.9] >= kept[0.3]).all())
    assert int((~kept[0.9]).sum()) == pytest.approx(0.1 * kept[0.9].numel(), rel=0.01)


def test_entries_by_hand() -> None:
    region = TrustRegion([{"x": torch.tensor([1.0, 0.0, 2.0])}, {"x": torch.tensor([1.0, 3.0, 0.0])}], 2.0)
    vectors = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-2.0, 2.0, 1.0])]
    # Ω: 1·2 + 1·1 = 3, 0·2 + 3·1 = 3, 2·1 + 0 = 2
    found = tatr(vectors, prepared=region, site=Site("x", ("a", "b"), (3,)))
    assert found.tolist() == [0.0, 0.0, 2.0]
    part = tatr([v[1:] for v in vectors], prepared=region, site=Site("x", ("a", "b"), (3,), offset=1))
    assert part.tolist() == [0.0, 2.0]


def test_tensors_that_no_gradient_reaches_are_inside() -> None:
    region = TrustRegion([{}, {}], 0.0)
    vectors = [torch.tensor([1.0]), torch.tensor([2.0])]
    assert tatr(vectors, prepared=region, site=Site("y", ("a", "b"), (1,))).tolist() == [3.0]


def test_one_expert_is_sensitive_to_no_other() -> None:
    models = toy_models(1)
    found = merged("tatr", models, density=0.2, **{"lambda": 1.0})
    assert models.base is not None
    for name in models.names:
        expected = models.base.get(name).double() + task_vector(models, 0, name)
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
