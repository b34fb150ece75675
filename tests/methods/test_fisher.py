"""Merging by Fisher information and by gradient matching, against the papers' formulas in float64."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge, merge_to_dict
from mergelab.errors import ConfigError
from mergelab.estimation.fisher import FisherDiagonal
from mergelab.methods.fisher import fisher
from mergelab.ops.site import Site
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource
from tests.methods.tiny_classifiers import Expert, classifier
from tests.methods.toy import merged, toy_models
from tests.methods.toy_data import ToyExamples
from tests.parity import FORMULA, MODEL_MERGING, UNCERTAINTY, compared

THETA = [[1.0, 2.0, -3.0, 4.0], [5.0, -6.0, 7.0, 8.0]]
OWN_INFORMATION = "of the same Fisher information, which torch.func checks"
F = [[1.0, 3.0, 1e-9, 0.0], [1.0, 1.0, 1e-8, 2.0]]


def fisher_x(diagonals: Sequence[Sequence[float]], **parameters: Any) -> Tensor:
    """Merge THETA with given Fisher information."""
    prepared = [FisherDiagonal({"x": torch.tensor(values)}) for values in diagonals]
    return fisher(
        [torch.tensor(values) for values in THETA], prepared=prepared, site=Site("x", ("a", "b"), (4,)), **parameters
    )


def test_entries_are_weighted_by_information() -> None:
    found = fisher_x(F)
    expected = [3.0, 0.0, 2.0, (1e-6 * 4 + 2 * 8) / (2 + 1e-6)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_weights_count_and_where_all_information_is_under_the_floor_it_is_their_mean() -> None:
    found = fisher_x(F, weights=(3.0, 1.0))
    expected = [2.0, (3 * 3 * 2 - 6) / 10, (3 * -3 + 7) / 4, (3e-6 * 4 + 2 * 8) / (2 + 3e-6)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_no_information_at_all_gives_the_mean_and_never_zero() -> None:
    torch.testing.assert_close(fisher_x([[0.0] * 4] * 2), torch.tensor(THETA).mean(0))
    prepared = [FisherDiagonal({})] * 2
    found = fisher([torch.tensor(values) for values in THETA], prepared=prepared, site=Site("x", ("a", "b"), (4,)))
    torch.testing.assert_close(found, torch.tensor(THETA).mean(0))


def test_a_part_of_a_tensor_takes_its_own_part_of_the_information() -> None:
    prepared = [FisherDiagonal({"x": torch.tensor(values).reshape(2, 2)}) for values in F]
    parts = [torch.tensor(values[1:3]) for values in THETA]
    found = fisher(parts, prepared=prepared, site=Site("x", ("a", "b"), (2, 2), offset=1))
    torch.testing.assert_close(found, fisher_x(F)[1:3])


def test_normalising_makes_the_scale_of_an_experts_information_irrelevant(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergelab.estimation import fisher as module

    models, original = toy_models(2), module.diagonal_fisher
    whole = merged("fisher", models)
    raw = merged("fisher", models, normalize=False, floor=1e-30)

    def loud(examples: Any, **options: Any) -> dict[str, Tensor]:
        factor = 1000.0 if examples.expert == "apple" else 1.0
        return {name: factor * value for name, value in original(examples, **options).items()}

    monkeypatch.setattr(module, "diagonal_fisher", loud)
    for name, tensor in merged("fisher", models).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        merged("fisher", models, normalize=False, floor=1e-30)["layer.weight"], raw["layer.weight"]
    )


@dataclass
class Drawn:
    """Experts and their examples by name, with statistics cached in a folder."""

    experts: dict[str, Expert]
    folder: Path | None = None
    asked: list[tuple[str, int, int, bool]] = field(default_factory=list)

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> Expert:
        self.asked.append((expert, samples, seed, labelled))
        return self.experts[expert]


@pytest.fixture(scope="module")
def berts() -> tuple[AlignedModels, Drawn]:
    """A base and two experts that are tiny BERTs."""
    networks = {name: classifier("bert", 3, scale=scale) for name, scale in (("a", 2.0), ("b", 3.0), ("base", 1.0))}
    dicts = {name: {k: v.detach().float() for k, v in n.named_parameters()} for name, n in networks.items()}
    base, a, b = (DictSource(name, dicts[name]) for name in ("base", "a", "b"))
    return align(base, [a, b]), Drawn({name: Expert(networks[name], key=name) for name in "ab"})


def formula_fisher(theta: list[Tensor], information: list[Tensor], weights: list[float], floor: float) -> Tensor:
    raised = [w * f.double().clamp(min=floor) for w, f in zip(weights, information, strict=True)]
    return sum(f * t.double() for f, t in zip(raised, theta, strict=True)) / sum(raised)  # type: ignore[return-value]


def test_whole_models_are_merged_by_the_papers_formula(berts: tuple[AlignedModels, Drawn]) -> None:
    from mergelab.estimation.fisher import diagonal_fisher

    models, drawn = berts
    method = get_method("fisher")
    found = merge_to_dict(method, {"normalize": False, "weights": [2.0, 1.0]}, models, examples=drawn)
    information = [diagonal_fisher(drawn.experts[name]) for name in "ab"]
    for name in models.names:
        theta = [expert.get(name) for expert in models.experts]
        expected = formula_fisher(theta, [f[name] for f in information], [2.0, 1.0], 1e-6)
        options = "normalize=False, weights=[2, 1]"
        compared("fisher", FORMULA, found[name], expected, options=options, note=OWN_INFORMATION)
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-7)
    normal = merge_to_dict(method, {}, models, examples=drawn)
    count = sum(information[0][name].numel() for name in models.names)
    for name in models.names:
        theta = [expert.get(name) for expert in models.experts]
        rms = [(sum(f[n].square().sum() for n in models.names) / count).sqrt() for f in information]
        expected = formula_fisher(theta, [f[name] / r for f, r in zip(information, rms, strict=True)], [1, 1], 1e-6)
        compared("fisher", FORMULA, normal[name], expected, note=OWN_INFORMATION)
        torch.testing.assert_close(normal[name], expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
def test_with_the_floor_of_the_first_expert_it_is_the_authors_merge(
    berts: tuple[AlignedModels, Drawn], normalize: bool
) -> None:
    from mergelab.estimation.fisher import diagonal_fisher

    models, drawn = berts
    found = {}
    for order in ("ab", "ba"):
        turned = replace(models, experts=tuple(sorted(models.experts, key=lambda e: order.index(e.name))))
        options = {"floor_of": "first", "floor": 1e-4, "normalize": normalize, "weights": {"a": 2.0, "b": 1.0}}
        found[order] = merge_to_dict(get_method("fisher"), options, turned, examples=drawn)
        information = {name: diagonal_fisher(drawn.experts[name]) for name in order}
        scales = {n: sum(f[k].double().square().sum() for k in models.names).sqrt() for n, f in information.items()}
        for name in models.names:
            lhs = rhs = torch.zeros(())
            for expert in turned.experts:
                diagonal = information[expert.name][name].double()
                if expert.name == order[0]:
                    diagonal = torch.maximum(diagonal, torch.tensor(1e-4))
                weight = {"a": 2.0, "b": 1.0}[expert.name] / (scales[expert.name] if normalize else 1.0)
                lhs, rhs = lhs + weight * diagonal, rhs + weight * diagonal * expert.get(name).double()
            expected = rhs / lhs
            shown = {"floor_of": "first", "floor": 1e-4, "normalize": normalize}
            compared("fisher", MODEL_MERGING, found[order][name], expected, options=shown, note=OWN_INFORMATION)
            torch.testing.assert_close(found[order][name], expected.float(), rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(found["ab"][name], found["ba"][name]) for name in models.names)


def test_where_the_floor_leaves_no_information_it_is_the_weighted_mean() -> None:
    prepared = [FisherDiagonal({"x": torch.zeros(4)}), FisherDiagonal({"x": torch.zeros(4)}, first=True)]
    theta, site = [torch.tensor(values) for values in THETA], Site("x", ("a", "b"), (4,))
    found = fisher(theta, prepared=prepared, site=site, weights=(1.0, 0.0), floor_of="first")
    assert torch.equal(found, theta[0])


@pytest.mark.parametrize("sizes", [{"a": 300, "b": 2000.0}, 5.0])
def test_gradient_matching_multiplies_each_hessian_by_the_experts_number_of_examples(
    berts: tuple[AlignedModels, Drawn], sizes: Any
) -> None:
    from mergelab.estimation.fisher import diagonal_fisher

    models, drawn = berts
    assert models.base is not None
    found = merge_to_dict(get_method("gradient_matching"), {"sizes": sizes, "delta0": 1e-2}, models, examples=drawn)
    each = sizes if isinstance(sizes, dict) else dict.fromkeys("ab", sizes)
    h = {name: diagonal_fisher(drawn.experts[name]) for name in "ab"}
    for name in models.names:
        start = models.base.get(name).double()
        own = {e.name: each[e.name] * h[e.name][name].double() for e in models.experts}
        preconditioner = 1 / (sum(own.values()) + 1e-2)
        step = sum(preconditioner * (own[e.name] + 1e-2) * (e.get(name).double() - start) for e in models.experts)
        options = {"sizes": "300 and 2000" if isinstance(sizes, dict) else sizes, "delta0": 0.01}
        compared("gradient_matching", UNCERTAINTY, found[name], start + step, options=options, note=OWN_INFORMATION)
        torch.testing.assert_close(found[name], (start + step).float(), rtol=1e-5, atol=1e-6)


def test_gradient_matching_is_the_papers_formula(berts: tuple[AlignedModels, Drawn]) -> None:
    from mergelab.estimation.fisher import diagonal_fisher

    models, drawn = berts
    assert models.base is not None
    settings = {"weights": [0.5, 1.5], "delta0": 1e-3}
    found = merge_to_dict(get_method("gradient_matching"), settings, models, examples=drawn)
    h = [diagonal_fisher(drawn.experts[name]) for name in "ab"]
    for name in models.names:
        start = models.base.get(name).double()
        tau = [expert.get(name).double() - start for expert in models.experts]
        total = 1e-3 + 0.5 * h[0][name] + 1.5 * h[1][name]
        step = (0.5 * (1e-3 + h[0][name]) * tau[0] + 1.5 * (1e-3 + h[1][name]) * tau[1]) / total
        compared("gradient_matching", FORMULA, found[name], start + step, options=settings, note=OWN_INFORMATION)
        torch.testing.assert_close(found[name], (start + step).float(), rtol=1e-5, atol=1e-6)


def test_without_information_gradient_matching_is_task_arithmetic() -> None:
    models = toy_models(2)
    assert models.base is not None
    found, plain = merged("gradient_matching", models, delta0=1e9), merged("task_arithmetic", models, lambda_=1.0)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_not_computed_again(berts: tuple[AlignedModels, Drawn], tmp_path: Path) -> None:
    models, drawn = berts
    drawn = Drawn(drawn.experts, tmp_path / "kept")

    def run(**parameters: Any) -> int:
        for expert in drawn.experts.values():
            expert.asked = 0
        list(merge(get_method("fisher"), parameters, models, examples=drawn))
        return sum(expert.asked for expert in drawn.experts.values())

    first = merge_to_dict(get_method("fisher"), {}, models, examples=drawn)
    assert run() == 0
    assert run(floor=1e-3, normalize=False, weights=[1.0, 2.0]) == 0
    assert run(estimator="empirical") == 2
    assert run(estimator="empirical") == 0
    again = merge_to_dict(get_method("fisher"), {}, models, examples=drawn)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 4
    files[0].write_bytes(b"broken")
    files[1].write_bytes(files[1].read_bytes()[:-40])
    assert run() + run(estimator="empirical") == 2
    drawn.experts["a"].key = "other content"
    assert run() == 1
    drawn.experts["a"].key = "a"
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert run() == 2


def test_labels_are_asked_for_only_where_they_count(berts: tuple[AlignedModels, Drawn]) -> None:
    models, drawn = berts
    drawn = Drawn(drawn.experts)
    for estimator in ("expected", "sampled", "empirical"):
        list(merge(get_method("fisher"), {"estimator": estimator, "samples": 7}, models, seed=5, examples=drawn))
    pairs = [sorted(drawn.asked[start : start + 2]) for start in (0, 2, 4)]
    assert pairs == [[(name, 7, 5, labelled) for name in "ab"] for labelled in (False, False, True)]


@pytest.mark.parametrize("method", ["fisher", "gradient_matching"])
def test_bad_requests_are_refused_before_anything_runs(method: str) -> None:
    models = toy_models(2)
    examples = ToyExamples(models)
    with pytest.raises(ConfigError, match=r"method\.weights: must be at least 0 .* apple is -1"):
        merge(get_method(method), {"weights": [1.0, -1.0]}, models, examples=examples)
    with pytest.raises(ConfigError, match=r"method\.weights: at least one must be above 0"):
        merge(get_method(method), {"weights": [0.0, 0.0]}, models, examples=examples)
    with pytest.raises(ConfigError, match=f"method={method}: needs the experts' training examples, and there are none"):
        merge(get_method(method), {}, models)
    with pytest.raises(ConfigError, match=r"method\.samples=0: must be at least 1"):
        merge(get_method(method), {"samples": 0}, models, examples=examples)
