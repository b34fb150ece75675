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
