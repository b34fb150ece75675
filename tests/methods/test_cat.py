"""CAT Merging, against the paper's formulas in NumPy's float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.content_order import content_order
from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.methods.cat import cat, leading_directions, masked
from mergelab.ops.site import Site
from tests.methods.test_fisher import Drawn
from tests.methods.test_lot import (
    FLOAT32_GRAMS,
    LINEAR,
    NORMS,
    Array,
    experts_of,
    features,
    gram_of,
    normalised_squares,
    task_vectors,
)
from tests.methods.tiny_classifiers import Expert
from tests.parity import FORMULA, compared


def trimmed(taus: list[Array], grams: list[Array], count: int, omega: float) -> list[Array]:
    """τ̂_t of matrices (in, out), task by task."""
    bases = []
    for k, own in enumerate(grams):
        conflict = sum(
            tau.T @ (own - omega * gram) @ tau for t, (tau, gram) in enumerate(zip(taus, grams, strict=True)) if t != k
        )
        values, directions = np.linalg.eigh(conflict)
        order = np.argsort(values)[::-1][:count]
        least = len(values) * np.finfo(np.float32).eps * np.abs(values).max()
        bases.append(directions[:, order[values[order] > least]])
    results = []
    for t, tau in enumerate(taus):
        for k, basis in enumerate(bases):
            tau = tau if k == t else tau - tau @ basis @ basis.T
        results.append(tau)
    return results


def without(taus: list[Array], squares: list[Array], count: int, omega: float) -> list[Array]:
    """τ̂_t of vectors: the entries of largest conflict set to 0."""
    results = [tau.copy() for tau in taus]
    for k, own in enumerate(squares):
        conflict = sum(
            (own - omega * s) * tau**2 for t, (s, tau) in enumerate(zip(squares, taus, strict=True)) if t != k
        )
        at = np.argsort(-conflict, kind="stable")[:count]
        for t, result in enumerate(results):
            if t != k:
                result[at[conflict[at] > 0]] = 0
    return results


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("omega", "count"), [(0.2, 3)])
def test_whole_models_are_merged_by_the_papers_formulas(kind: str, omega: float, count: int) -> None:
    networks, models = experts_of(kind)
    order = content_order(models.experts, models.names)  # projections do not commute
    drawn = Drawn({name: Expert(network) for name, network in networks.items()})
    options = {"lambda": 0.4, "components": count, "tradeoff": omega, "scales": count, "scales_tradeoff": omega}
    weights = [1.0, 0.5, 2.0]
    found = merge_to_dict(get_method("cat"), {**options, "shifts": count, "weights": weights}, models, examples=drawn)
    changed = 0
    for name in models.names:
        taus, path = task_vectors(models, name), name.rpartition(".")[0]
        shown, weight = type(networks["a"].get_submodule(path)).__name__, name.endswith(".weight")
        taus = [taus[t] for t in order]
        ordered = [list(networks.values())[t] for t in order]
        expected = taus
        if weight and shown in LINEAR:
            grams = [gram_of(network, path) for network in ordered]
            turned = trimmed([tau.T if shown == "Linear" else tau for tau in taus], grams, count, omega)
            expected = [tau.T if shown == "Linear" else tau for tau in turned]
        elif weight and shown in NORMS:
            expected = without(taus, [normalised_squares(n, path) for n in ordered], count, omega)
        elif taus[0].ndim == 1:
            expected = without(taus, [np.ones(len(taus[0]))] * 3, count, 0.0)
        changed += any(not np.allclose(a, b) for a, b in zip(taus, expected, strict=True))
        assert models.base is not None
        total = models.base.get(name).detach().numpy() + 0.4 * sum(
            weights[t] * tau for t, tau in zip(order, expected, strict=True)
        )
        shape = f"{kind}, tradeoff={omega:g}, components={count}"
        compared("cat", FORMULA, found[name].detach(), total, options=shape, note=FLOAT32_GRAMS)
        np.testing.assert_allclose(found[name].detach().numpy(), total, rtol=0, atol=2e-5 * np.abs(total).max())
    assert changed


@pytest.mark.parametrize("rows", [5, 8, 40])
def test_leading_directions_are_those_of_the_whole_matrix_however_it_is_decomposed(rows: int) -> None:
    rng = np.random.default_rng(rows)
    factors = [rng.normal(size=(rows, 4)) for _ in range(2)]
    middles = [m + m.T for m in (rng.normal(size=(4, 4)) for _ in range(2))]
    whole = sum(f @ m @ f.T for f, m in zip(factors, middles, strict=True))
    values, directions = np.linalg.eigh(whole)
    wanted = directions[:, np.argsort(values)[::-1][:2]]
    found = leading_directions([torch.from_numpy(f) for f in factors], [torch.from_numpy(m) for m in middles], 2)
    np.testing.assert_allclose(found.numpy() @ found.numpy().T, wanted @ wanted.T, atol=1e-10)


def test_directions_that_disturb_the_other_task_are_removed_by_hand() -> None:
    # Task a's inputs are along the first axis, b's along the second. Weights are (out, in).
    first, second = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    a = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # moves output 1 at its own inputs, output 2 at b's
    b = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])  # moves output 1 at a's inputs, output 3 at its own
    site = Site("w", ("a", "b"), (3, 2))
    options: dict[str, Any] = {"prepared": features([first, second]), "site": site, "components": 1, "tradeoff": 1.0}
    found = cat([torch.from_numpy(a), torch.from_numpy(b)], **options)
    np.testing.assert_allclose(found.numpy(), [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], atol=1e-12)


def test_entries_without_a_conflict_stay_though_more_are_asked_for() -> None:
    vectors = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 5.0])]
    factor = torch.tensor([1.0, 1.0, -1.0]).double()
    first, second = masked(vectors, 3, lambda k, t: factor)
    assert first.tolist() == [0.0, 0.0, 3.0]
    assert second.tolist() == [0.0, 0.0, 5.0]


def test_one_expert_has_no_conflicts() -> None:
    tau = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"prepared": features([np.eye(2)]), "site": Site("w", ("a",), (3, 2))}
    assert torch.equal(cat([tau], **options), tau)
