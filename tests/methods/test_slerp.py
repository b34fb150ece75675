"""SLERP against SciPy and a float64 transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, merged, merged_x, one_tensor, toy_models
from tests.parity import FORMULA, compared


def transcribed(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    cosine = a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b)
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_every_tensor_is_interpolated_along_its_own_arc(t: float, spread: float) -> None:
    models = toy_models(2, spread=spread)
    result = merged("slerp", models, t=t)
    for key in [key for key in SHAPES if key != "gate"]:
        a, b = (expert.get(key).double().numpy() for expert in models.experts)
        compared("slerp", FORMULA, result[key], transcribed(a, b, t), options=f"t={t}")
        np.testing.assert_allclose(result[key].numpy(), transcribed(a, b, t), rtol=2e-6, atol=2e-6)


def test_unit_vectors_are_scipys() -> None:
    a, b = (v / np.linalg.norm(v) for v in np.random.default_rng(0).standard_normal((2, 50)))
    result = merged_x("slerp", one_tensor(None, a, b, dtype=torch.float64), t=0.3)
    compared("slerp", "SciPy's geometric_slerp", result, geometric_slerp(a, b, 0.3), options="t=0.3")
    np.testing.assert_allclose(result.numpy(), geometric_slerp(a, b, 0.3), rtol=1e-12)


def test_an_obtuse_angle_is_an_angle_like_any_other() -> None:
    result = merged_x("slerp", one_tensor(None, [1.0, 0.0], [-0.5, 3**0.5 / 2]), t=0.5)
    torch.testing.assert_close(result, torch.tensor([0.5, 3**0.5 / 2]))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.0], [2.0, 0.001], [1.25, 0.00025]),  # collinear
        ([1.0, 0.0], [-2.0, 0.0], [0.25, 0.0]),  # opposite
        ([0.0, 0.0], [4.0, 8.0], [1.0, 2.0]),
        ([4.0, 8.0], [0.0, 0.0], [3.0, 6.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 0.0], [0.0, 0.0], [0.75e-30, 0.0]),
    ],
)
def test_collinear_opposite_and_zero_vectors_are_interpolated_linearly(
    a: list[float], b: list[float], expected: list[float]
) -> None:
    torch.testing.assert_close(merged_x("slerp", one_tensor(None, a, b), t=0.25), torch.tensor(expected))


def test_the_threshold_decides_what_counts_as_collinear() -> None:
    models = one_tensor(None, [1.0, 0.0], [1.0, 1.0])
    assert merged_x("slerp", models, t=0.5, threshold=0.5).tolist() == [1.0, 0.5]
    assert merged_x("slerp", models, t=0.5)[0] > 1.05


def test_long_vectors_have_their_angle_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3_000_000, generator=generator)
    b = a + 0.3 * torch.randn(3_000_000, generator=generator)
    result = merged_x("slerp", one_tensor(None, a, b), t=0.5)
    expected = transcribed(a.double().numpy(), b.double().numpy(), 0.5)
    compared("slerp", FORMULA, result, expected, options="t=0.5")
    assert np.abs(result.double().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("count", [1, 3])
def test_it_takes_two_experts(count: int) -> None:
    with pytest.raises(ConfigError, match=f"slerp: merges exactly 2 experts, and {count} are given"):
        merge(get_method("slerp"), {}, toy_models(count))
