"""AdaRank against autograd through the authors' straight-through masks, in float64, one example after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge, merge_to_dict
from mergelab.errors import ConfigError
from mergelab.estimation.entropy import positions
from tests.methods.test_adamerging import COUNT, HEAD, Drawn, drawn, turned
from tests.methods.tiny_classifiers import classifier, single_examples
from tests.methods.toy import merged, one_tensor, toy_models
from tests.parity import ADARANK, compared

SETTINGS: dict[str, Any] = {"rank": 0.6, "lr": 0.06, "steps": 4, "batch": 5, "temperature": 2.0}


def merge_drawn(setting: Drawn, **parameters: Any) -> dict[str, Tensor]:
    return merge_to_dict(get_method("adarank"), parameters, setting.models, seed=5, examples=setting)


def is_selected(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "embeddings" not in name


def entropy(setting: Drawn, theta: dict[str, Tensor], step: int) -> Tensor:
    """Σ over experts of the mean entropy of a step's examples, with the expert's head."""
    network, examples = classifier("bert", 3), list(single_examples())
    total = torch.zeros((), dtype=torch.float64)
    for label, expert in setting.experts.items():
        heads = {name: value for name, value in expert.weights.items() if name.startswith(HEAD)}
        chosen = positions(COUNT, SETTINGS["batch"], 5, setting.content(label), step)
        for at in chosen:
            inputs = {**examples[at][0], "input_ids": turned(examples[at][0]["input_ids"], expert.turn)}
            logits = torch.func.functional_call(network, {**theta, **heads}, (), inputs).logits
            total = total - (logits.softmax(1) * logits.log_softmax(1)).sum() / len(chosen)
    return total


def transcribed(setting: Drawn) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """The merged weights, and the masks at the start and at the end."""
    names = sorted(name for name in setting.base if not name.startswith(HEAD))
    taus = {n: [e.weights[n] - setting.base[n] for e in setting.experts.values()] for n in names}
    parts = {
        n: [torch.linalg.svd(tau, full_matrices=False) for tau in taus[n]] for n in names if is_selected(n, taus[n][0])
    }
    weights = {n: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for n in names}
    masks = {}
    for n, found in parts.items():
        count = len(found[0][1])
        mask = torch.full((2, count), 0.1, dtype=torch.float64)
        mask[:, int(count * SETTINGS["rank"]) :] = -0.1
        masks[n] = mask.requires_grad_()
    start = [mask.detach() > 0 for mask in masks.values()]

    def theta() -> dict[str, Tensor]:
        result = {}
        for n in names:
            result[n] = setting.base[n]
            for t in range(2):
                change = taus[n][t]
                if n in parts:
                    u, s, v = parts[n][t]
                    soft = (masks[n][t] / SETTINGS["temperature"]).sigmoid()
                    kept = soft * s + (((soft > 0.5).double() - soft) * s).detach()
                    change = u @ torch.diag(kept) @ v
                result[n] = result[n] + weights[n][t] * change
        return result

    adam = torch.optim.Adam([*weights.values(), *masks.values()], lr=SETTINGS["lr"])
    for step in range(SETTINGS["steps"]):
        adam.zero_grad()
        entropy(setting, theta(), step).backward()
        adam.step()
    with torch.no_grad():
        return theta(), start, [mask > 0 for mask in masks.values()]


def test_it_is_what_the_authors_code_computes() -> None:
    setting = drawn()
    found = merge_drawn(setting, **SETTINGS)
    expected, start, end = transcribed(setting)
    for name, values in expected.items():
        compared("adarank", ADARANK, found[name], values.numpy(), note="embeddings have a λ of their own here")
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-9)
    changed = sum(int((a != b).sum()) for a, b in zip(start, end, strict=True))
    assert 0 < changed < sum(each.numel() for each in end)
    assert set(setting.learnt) == {"a", "b"}
    assert len(setting.messages) == SETTINGS["steps"]


def test_without_steps_the_leading_directions_are_added_up() -> None:
    models = toy_models(3, dtype=torch.float64)
    found, base = merged("adarank", models, steps=0, rank=0.5), models.base
    assert base is not None
    for name in ("layer.weight", "head", "embed", "gate"):
        expected = base.get(name).clone()
        for expert in models.experts:
            tau = expert.get(name) - base.get(name)
            if name in ("layer.weight", "head"):
                u, s, v = torch.linalg.svd(tau, full_matrices=False)
                count = int(len(s) * 0.5)
                tau = u[:, :count] @ torch.diag(s[:count]) @ v[:count]
            expected += 0.3 * tau
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)


def test_what_is_learnt_is_kept_and_belongs_to_models_and_settings(tmp_path: Path) -> None:
    setting = drawn()
    setting.folder = tmp_path
    first, again = merge_drawn(setting, **SETTINGS), merge_drawn(setting, **SETTINGS)
    assert [expert.asked for expert in setting.experts.values()] == [1, 1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    merge_drawn(setting, **{**SETTINGS, "steps": 2})
    assert [expert.asked for expert in setting.experts.values()] == [2, 2]
    setting.base = {name: value * 1.01 for name, value in setting.base.items()}
    merge_drawn(setting, **SETTINGS)
    assert [expert.asked for expert in setting.experts.values()] == [3, 3]


def test_directions_that_are_rounding_of_the_stored_dtype_are_none() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 50, generator=generator).bfloat16()
    change = torch.randn(60, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    models = one_tensor(base, (base.float() + change).bfloat16(), dtype=torch.bfloat16)
    found = dict(merge(get_method("adarank"), {"steps": 0}, models, dtype=torch.float64, examples=NoExamples()))["x"]
    assert int(torch.linalg.matrix_rank(found - base.double(), tol=1e-5)) == 2


class NoExamples:
    """Examples of no use, as nothing is learnt from them."""

    folder = None

    def of(self, expert: str, **_: Any) -> Any:
        from tests.methods.toy_data import ToyExpert

        return ToyExpert(one_tensor([0.0], [0.0]), expert, 1)

    def settle(self, found: Any) -> None: ...

    def progress(self, message: str, done: float) -> None: ...


def test_what_cannot_be_learnt_from_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"method=adarank: .* and [ab]'s model has one score as its output"):
        merge_drawn(drawn(outputs=1), **SETTINGS)
    for key, value in refused():
        with pytest.raises(ConfigError, match=rf"method\.{key}="):
            merge(get_method("adarank"), {key: value}, toy_models(2), examples=NoExamples())


def refused() -> Iterator[tuple[str, Any]]:
    yield from (("rank", 1.5), ("temperature", 0.0), ("steps", -1), ("batch", 0))
