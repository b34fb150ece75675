"""Coefficients learnt by entropy minimisation, against autograd in float64 on one example after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor, nn

from mergelab.engine.finite_check import digest_of
from mergelab.engine.registry import get_method
from mergelab.engine.run import merge, merge_to_dict
from mergelab.errors import ConfigError
from mergelab.estimation.entropy import mean_entropy, positions
from mergelab.estimation.examples import Batch
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.module import load_into
from mergelab.weights.source import DictSource
from tests.conftest import Outcome
from tests.methods.tiny_classifiers import LENGTHS, classifier, padded_batches, single_examples
from tests.methods.toy import toy_models
from tests.methods.toy_data import ToyExamples
from tests.parity import FORMULA, compared

Weights = dict[str, Tensor]
HEAD = "classifier."
COUNT = sum(map(len, LENGTHS))


@dataclass
class Expert:
    """An expert whose weights are written into a module that all experts share, with its own padded examples."""

    network: nn.Module
    weights: Weights
    key: str
    turn: int
    asked: int = 0
    count: int = COUNT

    padding_side = "right"

    @property
    def parameter_names(self) -> Mapping[str, str]:
        return {name: name for name in self.weights if not name.startswith(HEAD)}

    def module(self) -> nn.Module:
        self.asked += 1
        return load_into(self.network, self.weights)

    def batches(self) -> Iterator[Batch]:
        for batch in padded_batches():
            yield {**batch, "input_ids": turned(batch["input_ids"], self.turn)}


def turned(ids: Tensor, turn: int) -> Tensor:
    """Other words in the place of an example's; padding stays 0."""
    return torch.where(ids > 0, (ids + turn) % 47 + 3, ids)


@dataclass
class Drawn:
    """A base, experts and their examples; keeps what is learnt."""

    base: Weights
    experts: dict[str, Expert]
    folder: Path | None = None
    asked: list[tuple[str, int, int, bool]] = field(default_factory=list)
    messages: list[tuple[str, float]] = field(default_factory=list)
    learnt: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> Expert:
        self.asked.append((expert, samples, seed, labelled))
        return self.experts[expert]

    def progress(self, message: str, done: float) -> None:
        self.messages.append((message, done))

    def settle(self, coefficients: Mapping[str, Mapping[str, float]]) -> None:
        self.learnt = coefficients

    @property
    def models(self) -> AlignedModels:
        sources = [DictSource(name, expert.weights) for name, expert in self.experts.items()]
        return align(DictSource("base", self.base), sources, ignore=[f"{HEAD}*"])

    def content(self, expert: str) -> str:
        """What an expert's batches are drawn by."""
        return digest_of(self.models.experts[list(self.experts).index(expert)], self.models.names)

    def merge(self, **parameters: Any) -> Weights:
        return merge_to_dict(get_method("adamerging"), parameters, self.models, seed=5, examples=self)


def drawn(outputs: int = 3, dtype: torch.dtype = torch.float64) -> Drawn:
    """A base and two experts that are tiny BERTs with heads of their own."""
    network = classifier("bert", outputs, scale=2.0).to(dtype)
    base = {name: value.detach().clone() for name, value in network.named_parameters()}

    def expert(seed: int) -> Expert:
        generator = torch.Generator().manual_seed(seed)

        def moved(value: Tensor) -> Tensor:
            return value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)

        return Expert(network, {name: moved(value) for name, value in base.items()}, f"content {seed}", seed)

    return Drawn(base, {"a": expert(1), "b": expert(2)})


Coefficients = Callable[[str], list[Tensor]]


def task_vectors(setting: Drawn, density: float | None) -> dict[str, list[Tensor]]:
    """Task vectors; with a density, what of them agrees after TIES' trimming and election, over all tensors."""
    names = [name for name in setting.base if not name.startswith(HEAD)]
    rows = [
        torch.cat([(expert.weights[name] - setting.base[name]).flatten() for name in names])
        for expert in setting.experts.values()
    ]
    if density is not None:
        count = int(density * rows[0].numel())
        bounds = [row.abs().sort(descending=True).values[count - 1] for row in rows]
        rows = [row * (row.abs() >= bound) for row, bound in zip(rows, bounds, strict=True)]
        sign = sum(rows[1:], rows[0]).sign()
        sign[sign == 0] = sign.sum().sign()
        rows = [row * (row * sign > 0) for row in rows]
    sizes = [setting.base[name].numel() for name in names]
    parts = [row.split(sizes) for row in rows]
    return {name: [part[i].view_as(setting.base[name]) for part in parts] for i, name in enumerate(names)}


def entropies(
    setting: Drawn, coefficients: Coefficients, chosen: Callable[[str], list[int]], density: float | None = None
) -> Tensor:
    """Σ over experts of the mean entropy of the merged model, with the expert's head, one example at a time."""
    network = classifier("bert", 3)
    theta = dict(setting.base)
    for name, vectors in task_vectors(setting, density).items():
        theta[name] = setting.base[name] + sum(c * v for c, v in zip(coefficients(name), vectors, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for label, expert in setting.experts.items():
        weights = theta | {name: value for name, value in expert.weights.items() if name.startswith(HEAD)}
        examples = [inputs for inputs, _ in single_examples()]
        places = chosen(label)
        for at in places:
            inputs = {**examples[at], "input_ids": turned(examples[at]["input_ids"], expert.turn)}
            p = torch.func.functional_call(network, weights, kwargs=inputs).logits.softmax(1)
            total = total - (p * p.log()).sum() / len(places)
    return total


def learnt_by_autograd(
    setting: Drawn, steps: int, lr: float, batch: int, *, by_tensor: bool, density: float | None = None
) -> Weights:
    """Each tensor's coefficients, by a graph that runs from them through the merged weights to the entropy."""
    names = [name for name in setting.base if not name.startswith(HEAD)]
    raw = {key: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for key in (names if by_tensor else "*")}
    adam = torch.optim.Adam(raw.values(), lr=lr)
    for step in range(steps):

        def coefficients(name: str) -> list[Tensor]:
            return list(raw[name if by_tensor else "*"].clamp(0, 1))

        def chosen(label: str, step: int = step) -> list[int]:
            return positions(COUNT, batch, 5, setting.content(label), step)

        adam.zero_grad()
        entropies(setting, coefficients, chosen, density).backward()
        adam.step()
    return {name: raw[name if by_tensor else "*"].detach().clamp(0, 1) for name in names}


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize(("steps", "lr", "batch"), [(4, 0.02, 5), (3, 0.01, 50), (6, 0.3, 7)])
def test_coefficients_are_those_of_autograd(granularity: str, steps: int, lr: float, batch: int) -> None:
    setting = drawn()
    settings = {"granularity": granularity, "steps": steps, "lr": lr, "batch": batch}
    found = setting.merge(**settings)
    expected = learnt_by_autograd(setting, steps, lr, batch, by_tensor=granularity == "layer")
    ours = {name: torch.tensor([setting.learnt[expert][name] for expert in "ab"]).double() for name in expected}
    for name, theirs in expected.items():
        exact = [setting.learnt[expert][name] for expert in "ab"]
        torch.testing.assert_close(torch.tensor(exact, dtype=torch.float64), theirs, rtol=0, atol=1e-9, msg=name)
        start = setting.base[name]
        vectors = [expert.weights[name] - start for expert in setting.experts.values()]
        merged = start + sum(c * v for c, v in zip(theirs, vectors, strict=True))
        compared("adamerging", FORMULA, found[name], merged, options=settings, note="coefficients by autograd")
        torch.testing.assert_close(found[name], merged, rtol=0, atol=1e-8)
    values = torch.stack(list(ours.values()))
    assert (values != 0.3).any()
    assert bool((values == values[0]).all()) == (granularity == "task")
    if lr == 0.3:
        assert {0.0, 1.0} & set(values.flatten().tolist())


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_on_ties_coefficients_are_those_of_autograd_on_what_agrees(granularity: str) -> None:
    setting = drawn()
    settings = {"merge": "ties", "density": 0.4, "granularity": granularity, "steps": 4, "lr": 0.02, "batch": 5}
    found = setting.merge(**settings)
    expected = learnt_by_autograd(setting, 4, 0.02, 5, by_tensor=granularity == "layer", density=0.4)
    vectors = task_vectors(setting, 0.4)
    for name, theirs in expected.items():
        exact = torch.tensor([setting.learnt[expert][name] for expert in "ab"], dtype=torch.float64)
        torch.testing.assert_close(exact, theirs, rtol=0, atol=1e-9, msg=name)
        merged = setting.base[name] + sum(c * v for c, v in zip(theirs, vectors[name], strict=True))
        compared("adamerging", FORMULA, found[name], merged, options=settings, note="coefficients by autograd")
        torch.testing.assert_close(found[name], merged, rtol=0, atol=1e-8)
    plain = learnt_by_autograd(setting, 4, 0.02, 5, by_tensor=granularity == "layer")
    assert any((plain[name] - theirs).abs().max() > 1e-3 for name, theirs in expected.items())


def test_without_steps_on_ties_it_is_the_sum_of_what_agrees() -> None:
    setting = drawn(dtype=torch.float32)
    found = setting.merge(steps=0, init=0.3, merge="ties", density=0.4)
    options = {"lambda": 0.3, "density": 0.4, "reduce": "sum"}
    for name, value in merge_to_dict(get_method("ties"), options, setting.models).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_entropy_falls() -> None:
    setting = drawn()
    setting.merge(steps=12, lr=0.03, batch=50)

    def entropy(coefficients: Coefficients) -> float:
        return float(entropies(setting, coefficients, lambda _label: list(range(COUNT))))

    before = entropy(lambda _name: [torch.tensor(0.3)] * 2)
    after = entropy(lambda name: [torch.tensor(setting.learnt[expert][name]) for expert in "ab"])
    assert after < 0.9 * before
    assert f"entropy {before:.4f}" in setting.messages[0][0]
    assert [done for _, done in setting.messages] == pytest.approx([step / 12 for step in range(1, 13)])


def test_without_steps_it_is_task_arithmetic() -> None:
    setting = drawn(dtype=torch.float32)
    found = setting.merge(steps=0, init=0.3)
    plain = merge_to_dict(get_method("task_arithmetic"), {"lambda": 0.3}, setting.models)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_changes_no_coefficient() -> None:
    setting = drawn(dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            setting.merge(steps=4, lr=0.05)
            found.append(setting.learnt)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(each == found[0] for each in found[1:])


def test_the_module_is_left_as_it_was_but_for_its_weights() -> None:
    setting = drawn()
    network = setting.experts["a"].network
    next(network.parameters()).requires_grad_(False)
    asked = [parameter.requires_grad for parameter in network.parameters()]
    setting.merge(steps=2)
    assert [parameter.requires_grad for parameter in network.parameters()] == asked
    assert all(parameter.grad is None for parameter in network.parameters())


def test_examples_are_drawn_without_labels_and_anew_in_each_step() -> None:
    setting = drawn()
    setting.merge(steps=1, samples=9)
    assert sorted(setting.asked) == [("a", 9, 5, False), ("b", 9, 5, False)]
    steps = [positions(40, 16, 0, "a", step) for step in range(50)]
    assert all(len(set(step)) == 16 for step in steps)
    assert set().union(*steps) == set(range(40))
    assert len({tuple(step) for step in steps}) == 50
    assert positions(40, 16, 0, "a", 0) not in (positions(40, 16, 0, "b", 0), positions(40, 16, 1, "a", 0))
    assert sorted(positions(5, 16, 0, "a", 0)) == list(range(5))


def test_what_is_kept_is_not_learnt_again(tmp_path: Path) -> None:
    setting = drawn()
    setting.folder = tmp_path

    def runs(**parameters: Any) -> int:
        setting.learnt = {}
        for expert in setting.experts.values():
            expert.asked = 0
        setting.merge(**({"steps": 2} | parameters))
        assert setting.learnt
        return sum(expert.asked for expert in setting.experts.values())

    assert runs() == 2
    first = setting.learnt
    assert runs() == 0
    assert setting.learnt == first
    for name, value in {"granularity": "task", "lr": 0.1, "steps": 3, "batch": 3, "init": 0.2}.items():
        assert (runs(**{name: value}), runs(**{name: value})) == (2, 0), name
    name = next(iter(setting.base))
    setting.base[name] = setting.base[name] + 1
    assert (runs(), runs()) == (2, 0)
    setting.experts["a"].key = "other content"
    assert (runs(), runs()) == (2, 0)
    setting.experts["a"].key = ""
    assert (runs(), runs()) == (2, 2)


def test_parameters_that_share_one_gradient_do_not_disturb_each_other() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=x + (self.first + self.second))

    class Setting(Drawn):
        models = property(lambda self: align(DictSource("base", self.base), [DictSource("a", end)], backbone_prefix=""))

    x = torch.arange(24, dtype=torch.float64).reshape(8, 3).sin()
    end = {"first": torch.tensor([1.0, 0, 2]).double(), "second": torch.tensor([0, 1.0, -1]).double()}
    expert = Expert(Sum(), end, "", 0)
    expert.batches = lambda: iter([{"x": x}])  # type: ignore[method-assign]
    setting = Setting({name: torch.zeros_like(value) for name, value in end.items()}, {"a": expert})
    setting.merge(steps=3, lr=0.05)
    raw = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=0.05)
    for _ in range(3):
        adam.zero_grad()
        mean_entropy(
            SimpleNamespace(logits=x + raw[0] * end["first"] + raw[1] * end["second"]), "a", "adamerging"
        ).backward()
        adam.step()
    assert list(setting.learnt["a"].values()) == pytest.approx(raw.tolist(), abs=1e-12)


def test_entropy_is_shannons() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 300.0, -300.0]])
    found = mean_entropy(SimpleNamespace(logits=logits), "a", "adamerging")
    torch.testing.assert_close(found, torch.tensor(3.0).log() / 2)


def test_what_cannot_be_learnt_from_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"entropy of predicted classes, and [ab]'s model has one score as its output"
    ):
        drawn(outputs=1).merge()
    with pytest.raises(ConfigError, match="b's model has no classes as its output"):
        mean_entropy(SimpleNamespace(logits=torch.zeros(2, 3, 4)), "b", "adamerging")
    models = toy_models(2)
    for key, value, allowed in (
        ("granularity", "block", "'task' or 'layer'"),
        ("lr", 0.0, "greater than 0"),
        ("steps", -1, "at least 0"),
        ("batch", 0, "at least 1"),
        ("init", 1.5, "at most 1"),
        ("samples", 0, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=rf"method\.{key}={value!r}: must be .*{allowed}"):
            merge(get_method("adamerging"), {key: value}, models, examples=ToyExamples(models))


def test_a_run_on_the_miniature_records_examples_and_coefficients(
    mergelab_command: Callable[..., Outcome], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.experiment.calibration import Calibration, TrainingExamples

    asked: list[str] = []
    monkeypatch.setattr(Calibration, "folder", workplace / "statistics")
    original = TrainingExamples.module
    monkeypatch.setattr(TrainingExamples, "module", lambda self: (asked.append(self.label), original(self))[1])
    run = ["method=adamerging", "task=rte", "source=mini", "method.steps=2", "method.batch=4", "eval.bootstrap=10"]
    run += ["method.samples=11"]
    outcome = mergelab_command(*run)
    assert outcome.code == 0, outcome.err
    assert "adamerging of 5" in outcome.out
    assert len(asked) == 5
    assert mergelab_command(*run).code == 0
    assert len(asked) == 5
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    found = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id], "tags.`mergelab.kind` = 'merge'")
    ]
    assert len(found) == 2
    for each in found:
        calibrations = {key: value for key, value in each.data.tags.items() if key.startswith("calibration.")}
        assert len(calibrations) == 5
        assert all(value.startswith("11 of rte/train, sha256 ") for value in calibrations.values())
        assert all(value.endswith(", without labels") for value in calibrations.values())
        means = {key: value for key, value in each.data.metrics.items() if key.startswith("coefficient/")}
        assert len(means) == 5
        assert all(0.29 < value < 0.31 for value in means.values())
        path = client.download_artifacts(each.info.run_id, "coefficients.json", str(workplace))
        assert {f"coefficient/{name}" for name in json.loads(Path(path).read_text())} == means.keys()
