"""The randomised SVD of a change is near the best one, whatever its spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergelab.adapters import factored

Spectrum = Callable[[np.ndarray], np.ndarray]
SPECTRA: dict[str, Spectrum] = {
    "flat": lambda i: np.ones_like(i),
    "fourth root": lambda i: i**-0.25,
    "root": lambda i: i**-0.5,
    "inverse": lambda i: 1 / i,
    "squared": lambda i: i**-2.0,
    "fast": lambda i: 0.9**i,
    "slow": lambda i: 0.97**i,
    "a step at the rank": lambda i: np.where(i <= 12, 1.0, 0.3),
    "a step beyond": lambda i: np.where(i <= 40, 1.0, 0.05),
    "exactly of low rank": lambda i: np.where(i <= 8, 1.0, 0.0),
}


def matrix(shape: tuple[int, int], spectrum: Spectrum | None, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    draw = np.random.default_rng(seed)
    if spectrum is None:
        noise = draw.standard_normal(shape)
        return torch.from_numpy(noise).float(), np.linalg.svd(noise, compute_uv=False)
    least = min(shape)
    u, v = (np.linalg.qr(draw.standard_normal((size, least)))[0] for size in shape)
    values = spectrum(np.arange(1, least + 1).astype(float))
    return torch.from_numpy((u * values) @ v.T).float(), values


@pytest.mark.parametrize("shape", [(90, 260), (260, 90), (150, 150)])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "noise"])
def test_the_error_is_within_a_percent_of_the_least(spectrum: str, shape: tuple[int, int]) -> None:
    for seed in range(3):
        change, values = matrix(shape, SPECTRA.get(spectrum), seed)
        for rank in (2, 12):
            found = factored.of_matrix(change, rank, None)
            error = float((change.double() - found.left.double() @ found.right.double()).norm())
            least = math.sqrt((values[rank:] ** 2).sum())
            assert error <= 1.01 * least + 1e-5 * math.sqrt((values**2).sum())
            whole = (values**2).sum()
            assert found.energy == pytest.approx(1 - error**2 / whole, abs=1e-5)
            assert found.whole == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("shape", [(120, 330), (330, 120), (200, 200)])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "noise"])
def test_an_energy_is_kept_at_the_least_rank_with_an_error_near_the_least(
    spectrum: str, shape: tuple[int, int]
) -> None:
    change, values = matrix(shape, SPECTRA.get(spectrum), 0)
    whole = (values**2).sum()
    shares = (values**2).cumsum() / whole
    for energy in (0.1, 0.5, 0.9, 0.99, 0.9999, 0.9999999):
        found = factored.of_matrix(change, None, energy)
        rank, rounding = found.left.shape[1], 1e-6
        assert found.energy >= energy - rounding
        least = int(np.searchsorted(shares, energy - rounding)) + 1
        assert rank >= least
        assert rank == 1 or shares[rank - 2] <= energy + 2e-2 * (1 - energy) + rounding  # one less keeps too little
        error = float((change.double() - found.left.double() @ found.right.double()).norm())
        assert error <= 1.01 * math.sqrt((values[rank:] ** 2).sum()) + 1e-5 * math.sqrt(whole)
        assert found.energy == pytest.approx(1 - error**2 / whole, abs=1e-5)
        assert found.whole == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("energy", "most"), [(0.5, 24), (0.9, 24), (0.99, 48), (0.9998, 96), (1.0, 300)])
def test_no_larger_svd_is_computed_than_the_energy_needs(
    energy: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, _ = matrix((300, 420), SPECTRA["fast"], 0)
    svd, sizes = torch.linalg.svd, []

    def noted(a: torch.Tensor, **settings: bool) -> tuple[torch.Tensor, ...]:
        sizes.append(min(a.shape))
        return svd(a, **settings)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    factored.of_matrix(change, None, energy)
    assert max(sizes) == most


def test_the_random_numbers_of_others_are_left_alone() -> None:
    change, _ = matrix((90, 120), None, 0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = factored.of_matrix(change, 2, None)
    assert torch.equal(torch.rand(4), expected)
    second = factored.of_matrix(change, 2, None)
    assert torch.equal(first.left, second.left)


def test_an_svd_that_has_not_converged_is_replaced_by_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    change, values = matrix((90, 120), SPECTRA["slow"], 0)
    monkeypatch.setattr(factored, "_ITERATIONS", (0,))
    found = factored.of_matrix(change, 12, None)
    error = float((change.double() - found.left.double() @ found.right.double()).norm())
    assert error == pytest.approx(math.sqrt((values[12:] ** 2).sum()), rel=1e-4)
