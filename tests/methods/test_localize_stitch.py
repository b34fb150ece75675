"""Localize-and-Stitch: learnt masks, against autograd in float64 over all examples at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.errors import ModelError
from mergelab.methods.localize_stitch import localize_stitch, mean_loss
from mergelab.ops.site import Site
from tests.methods.test_adamerging import HEAD, Drawn, drawn, turned
from tests.methods.tiny_classifiers import classifier, single_examples
from tests.methods.toy import merged, task_vector, toy_models
from tests.parity import FORMULA, LOCALIZE, compared

SETTINGS: dict[str, Any] = {"density": 0.2, "steps": 3, "lr": 300.0, "l1": 2.0, "bias": 1.0}


def merge(setting: Drawn, **parameters: Any) -> dict[str, Tensor]:
    return merge_to_dict(get_method("localize_stitch"), parameters, setting.models, seed=5, examples=setting)


def learnt(setting: Drawn, expert: str, penalty: str) -> dict[str, Tensor]:
    """An expert's mask, step by step; the regulariser as the authors' code has it, or as the paper says."""
    own = setting.experts[expert]
    names = [name for name in setting.base if not name.startswith(HEAD)]
    taus = {name: own.weights[name] - setting.base[name] for name in names}
    flat = torch.cat([tau.flatten().abs() for tau in taus.values()])
    bound = flat.sort(descending=True).values[int(SETTINGS["density"] * len(flat)) - 1]
    scores = {
        name: torch.where(tau.abs() >= bound, 1.0, -1.0).double() * SETTINGS["bias"] for name, tau in taus.items()
    }
    heads = {name: value for name, value in own.weights.items() if name.startswith(HEAD)}
    network = classifier("bert", 3)
    for _ in range(SETTINGS["steps"]):
        moved = {name: setting.base[name] + scores[name].sigmoid() * taus[name] for name in names}
        network.load_state_dict({**moved, **heads}, strict=False)
        network.zero_grad()
        losses = []
        for inputs, label in single_examples():
            output = network(**{**inputs, "input_ids": turned(inputs["input_ids"], own.turn)})
            losses.append(torch.nn.functional.cross_entropy(output.logits, label[None]))
        torch.stack(losses).mean().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        for name, score in scores.items():
            slope = score.sigmoid() * (1 - score.sigmoid())
            gradient = gradients[name] if gradients[name] is not None else torch.zeros_like(score)
            if penalty == "certainty":
                reg = SETTINGS["l1"] * torch.where(score > 0, slope, -slope)
                scores[name] = score - (SETTINGS["lr"] * gradient * taus[name] * slope - reg)
            else:
                scores[name] = score - slope * (SETTINGS["lr"] * gradient * taus[name] + SETTINGS["l1"])
    return {name: score.sigmoid().round() for name, score in scores.items()}


@pytest.mark.parametrize("penalty", ["mask", "certainty"])
def test_it_is_the_formula_and_the_authors_code(penalty: str) -> None:
    setting = drawn()
    found = merge(setting, penalty=penalty, **SETTINGS)
    masks = {expert: learnt(setting, expert, penalty) for expert in "ab"}
    start = {name: int((mask != 0).sum()) for name, mask in masks["a"].items()}
    changed = 0
    for name in masks["a"]:
        both = [masks[expert][name] for expert in "ab"]
        taus = [setting.experts[expert].weights[name] - setting.base[name] for expert in "ab"]
        total = sum(m * tau for m, tau in zip(both, taus, strict=True))
        expected = setting.base[name] + total / (both[0] + both[1]).clamp(min=1)
        changed += int((total != 0).sum())
        other = LOCALIZE if penalty == "certainty" else FORMULA
        compared("localize_stitch", other, found[name], expected.numpy(), options=f"penalty={penalty}")
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)
    assert 0 < changed < sum(mask.numel() for mask in masks["a"].values())
    assert sum(start.values()) != int(SETTINGS["density"] * sum(m.numel() for m in masks["a"].values())), "it learns"
    assert sorted(setting.asked) == [(name, 64, 5, True) for name in ("a", "b")]


def test_without_steps_the_largest_entries_are_stitched() -> None:
    models = toy_models(3)
    found = merged("localize_stitch", models, steps=0, density=0.1)
    assert models.base is not None
    vectors = [{name: task_vector(models, t, name).numpy() for name in models.names} for t in range(3)]
    bounds = []
    for vector in vectors:
        flat = np.sort(np.abs(np.concatenate([np.float32(each).ravel() for each in vector.values()])))[::-1]
        bounds.append(flat[int(0.1 * len(flat)) - 1])
    for name in models.names:
        masks = [np.float32(np.abs(v[name])) >= bound for v, bound in zip(vectors, bounds, strict=True)]
        total = sum(np.where(mask, v[name], 0) for mask, v in zip(masks, vectors, strict=True))
        expected = models.base.get(name).numpy() + total / np.maximum(sum(map(np.int64, masks)), 1)
        compared("localize_stitch", FORMULA, found[name], expected, options="steps=0")
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=0, atol=1e-6)


def test_entries_by_hand() -> None:
    masks = [{"x": torch.tensor([True, True, False, False])}, {"x": torch.tensor([True, False, True, False])}]
    vectors = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])]
    found = localize_stitch(vectors, prepared=masks, site=Site("x", ("a", "b"), (4,)))
    assert found.tolist() == [3.0, 2.0, 7.0, 0.0]
    part = localize_stitch([v[2:] for v in vectors], prepared=masks, site=Site("x", ("a", "b"), (4,), offset=2))
    assert part.tolist() == [7.0, 0.0]


def test_a_larger_penalty_leaves_fewer_entries() -> None:
    setting = drawn()
    kept = []
    for l1 in (0.0, 1.0, 8.0):
        found = merge(setting, **{**SETTINGS, "lr": 1.0, "l1": l1})
        kept.append(sum(int((found[n] != setting.base[n]).sum()) for n in found if not n.startswith(HEAD)))
    assert kept[0] > kept[2]
    assert kept[0] >= kept[1] >= kept[2]


def test_masks_are_kept_and_belong_to_base_and_settings(tmp_path: Any) -> None:
    setting = drawn()
    setting.folder = tmp_path
    first, again = merge(setting, **SETTINGS), merge(setting, **SETTINGS, **{"lambda": 0.5})
    assert [expert.asked for expert in setting.experts.values()] == [1, 1]
    name = "bert.encoder.layer.0.output.dense.weight"
    half = (first[name] - setting.base[name]) / 2
    torch.testing.assert_close(again[name] - setting.base[name], half, rtol=0, atol=1e-12)
    merge(setting, **{**SETTINGS, "l1": 3.0})
    assert [expert.asked for expert in setting.experts.values()] == [2, 2]
    setting.base = {name: value * 1.01 for name, value in setting.base.items()}
    merge(setting, **SETTINGS)
    assert [expert.asked for expert in setting.experts.values()] == [3, 3]


def test_the_loss_of_scores_and_of_tokens() -> None:
    scores = SimpleNamespace(logits=torch.tensor([[1.0], [4.0]]))
    assert float(mean_loss(scores, torch.tensor([2.0, 2.0]))) == 2.5
    tokens = SimpleNamespace(logits=torch.zeros(2, 3, 4))
    labels = torch.tensor([[1, -100, -100], [3, 2, -100]])
    assert float(mean_loss(tokens, labels)) == pytest.approx(float(np.log(4)))
    with pytest.raises(ModelError, match="a loss needs outputs"):
        mean_loss(tokens, torch.tensor([1, 2, 3]))
