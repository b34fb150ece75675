"""NuSLERP, Multi-SLERP and the Karcher mean against mergekit, SciPy and float64 transcriptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial import geometric_slerp
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from tests.methods.toy import SHAPES, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, RECORDED_MERGEKIT, compared

Vector = np.ndarray[Any, Any]

# mergekit 0.1.5 (``merge_tensors``, float64) on the 4×4 matrices of `recipe`. Its nuslerp_row_wise goes along the first
# axis, contrary to its documentation.
GOLDEN: list[tuple[str, dict[str, Any], list[float]]] = [
    ("nuslerp", {"weights": [1, 3], "task_vectors": False},
     [-0.43915168, 0.176690821, 0.524089155, -0.261033019, 0.287226655, -0.565478347, -0.150497186, 0.397762488,
      -0.454942513, -0.0399613523, 0.508298322, -0.34440668, 0.0705744812, 0.618834155, -0.233870846, 0.181110315]),
    ("nuslerp", {"weights": [1, 3]},
     [-0.46973798, 0.218500168, 0.519233905, -0.247651438, 0.320705791, -0.566060472, -0.145445815, 0.422911414,
      -0.463854849, -0.0432401919, 0.525117037, -0.361649226, 0.058965431, 0.62732266, -0.259443603, 0.161171054]),
    ("nuslerp", {"weights": [1, 3], "flatten": False, "row_wise": True},  # nuslerp_row_wise: false
     [-0.455205921, 0.201047112, 0.519227276, -0.25243705, 0.318364195, -0.565577602, -0.145774029, 0.421040563,
      -0.469714942, -0.0439416144, 0.53350374, -0.370358678, 0.0532712301, 0.636325466, -0.278440366, 0.150810258]),
    ("nuslerp", {"weights": [1, 3], "flatten": False},  # nuslerp_row_wise: true
     [-0.458240438, 0.217684624, 0.519147891, -0.243247364, 0.309232409, -0.565919893, -0.144115507, 0.432849353,
      -0.459248584, -0.0431997003, 0.530443092, -0.369340089, 0.0620443591, 0.627053472, -0.266745709, 0.155501527]),
    ("multislerp", {"weights": [1, 2, 0.5], "task_vectors": False},
     [-0.429756262, 0.145864464, 0.543691304, -0.242807684, 0.257571562, -0.557421517, -0.131100586, 0.369278659,
      -0.445714419, -0.0193934886, 0.480985757, -0.334007321, 0.0923136091, 0.592692855, -0.222300224, 0.204020707]),
    ("multislerp", {"weights": [1, 2, 0.5]},
     [-0.469591536, 0.225845235, 0.557849009, -0.228318709, 0.320357126, -0.5351391, -0.133806818, 0.414869017,
      -0.440627209, -0.0392949267, 0.509380908, -0.346115318, 0.0552169643, 0.603892799, -0.251603427, 0.149728855]),
]  # fmt: skip
# Experts far apart: their cosines are 0.24, -0.32 and -0.15.
KARCHER = {
    1: [-1.01651724, 0.587704739, 2.0516716, 0.127290388, 0.587704739, -0.377311234, 0.127290388, 0.587704739,
        -0.377311234, 0.127290388, 0.587704739, -0.377311234, 0.127290388, 0.587704739, -0.377311234, 0.127290388],
    10: [-1.01542519, 0.581042531, 2.0622244, 0.132635212, 0.581042531, -0.37424819, 0.132635212, 0.581042531,
         -0.37424819, 0.132635212, 0.581042531, -0.37424819, 0.132635212, 0.581042531, -0.37424819, 0.132635212],
}  # fmt: skip


def recipe(step: float = 64) -> tuple[Tensor, list[Tensor]]:
    base = [((7 * i + 3) % 19 - 9) / 16 for i in range(16)]
    experts = [[x + ((11 * i + 5 * t) % 17 - 8.3 + t) / step for i, x in enumerate(base)] for t in range(3)]
    made = [torch.tensor(values, dtype=torch.float64).view(4, 4) for values in (base, *experts)]
    return made[0], made[1:]


@pytest.mark.parametrize(("method", "parameters", "values"), GOLDEN)
def test_values_are_mergekits(method: str, parameters: dict[str, Any], values: list[float]) -> None:
    base, experts = recipe()
    models = one_tensor(base, *experts[: len(parameters["weights"])], dtype=torch.float64)
    expected = torch.tensor(values, dtype=torch.float64).view(4, 4)
    note = "mergekit's nuslerp_row_wise goes along the first axis" if "flatten" in parameters else ""
    compared(method, RECORDED_MERGEKIT, merged_x(method, models, **parameters), expected, options=parameters, note=note)
    torch.testing.assert_close(merged_x(method, models, **parameters), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("iterations", KARCHER)
def test_karcher_means_are_mergekits(iterations: int) -> None:
    _, experts = recipe(8)
    result = merged_x("karcher", one_tensor(None, *experts, dtype=torch.float64), max_iterations=iterations)
    expected = torch.tensor(KARCHER[iterations], dtype=torch.float64).view(4, 4)
    compared("karcher", RECORDED_MERGEKIT, result, expected, options=f"max_iterations={iterations}")
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-9)


def interpolated(a: Vector, b: Vector, t: float, axis: int | None) -> Vector:
    def along(x: Vector) -> Vector:
        return x.sum(axis=axis, keepdims=True)

    angle = np.arccos(along(a * b) / np.sqrt(along(a * a) * along(b * b)))
    interpolation: Vector = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return interpolation


@pytest.mark.parametrize("task_vectors", [True, False])
@pytest.mark.parametrize("spread", [0.05, 2.0])
@pytest.mark.parametrize(
    ("options", "axis"),
    [({}, None), ({"flatten": False}, 0), ({"flatten": False, "row_wise": True}, 1)],
)
def test_each_tensor_row_or_column_is_interpolated_along_its_own_arc(
    task_vectors: bool, spread: float, options: dict[str, bool], axis: int | None
) -> None:
    models = toy_models(2, spread=spread)
    result = merged("nuslerp", models, weights=[1.0, 3.0], task_vectors=task_vectors, **options)
    assert models.base is not None
    for key in [key for key in SHAPES if key != "gate"]:
        base = models.base.get(key).double().numpy()
        a, b = (expert.get(key).double().numpy() - (base if task_vectors else 0) for expert in models.experts)
        expected = interpolated(a, b, 0.75, axis if base.ndim == 2 else None) + (base if task_vectors else 0)
        asked = {"weights": [1, 3], "task_vectors": task_vectors, **options}
        compared("nuslerp", FORMULA, result[key], expected, options=asked)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("row_wise", [True, False])
def test_a_convolutions_vectors_run_along_its_last_axis_or_its_first(row_wise: bool) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6))
    models = one_tensor(None, a, b, dtype=torch.float64)
    result = merged_x("nuslerp", models, flatten=False, row_wise=row_wise)
    expected = interpolated(a, b, 0.5, 3 if row_wise else 0)
    compared("nuslerp", FORMULA, result, expected, options=f"flatten=False, row_wise={row_wise}")
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_a_block_of_rows_is_no_different_from_one_row() -> None:
    a, b = torch.randn(2, 700, 300, generator=torch.Generator().manual_seed(0))
    whole = merged_x("nuslerp", one_tensor(None, a, b), flatten=False, row_wise=True)
    for row in (0, 435, 436, 437, 699):
        alone = merged_x("nuslerp", one_tensor(None, a[row], b[row]))
        torch.testing.assert_close(whole[row], alone, rtol=1e-6, atol=1e-6)
    by_column = merged_x("nuslerp", one_tensor(None, a.T.contiguous(), b.T.contiguous()), flatten=False)
    torch.testing.assert_close(by_column.T, whole, rtol=1e-6, atol=1e-6)


def test_weights_say_how_far_along_scipys_arc() -> None:
    a, b = (v / np.linalg.norm(v) for v in np.random.default_rng(0).standard_normal((2, 50)))
    result = merged_x("nuslerp", one_tensor(None, a, b, dtype=torch.float64), weights=[0.7, 0.3])
    compared("nuslerp", "SciPy's geometric_slerp", result, geometric_slerp(a, b, 0.3), options="weights=[0.7, 0.3]")
    np.testing.assert_allclose(result.numpy(), geometric_slerp(a, b, 0.3), rtol=1e-12)


@pytest.mark.parametrize("flatten", [True, False])
def test_a_small_angle_is_an_arc_still(flatten: bool) -> None:
    models = one_tensor(None, [2.0, 0.0], [2 * np.cos(1e-3), 2 * np.sin(1e-3)], dtype=torch.float64)
    result = merged_x("nuslerp", models, flatten=flatten)
    np.testing.assert_allclose(result.numpy(), [2 * np.cos(5e-4), 2 * np.sin(5e-4)], rtol=1e-12)


def test_a_negative_weight_goes_beyond_the_other_expert() -> None:
    result = merged_x("nuslerp", one_tensor(None, [1.0, 0.0], [0.0, 1.0]), weights=[-0.5, 1.5])
    torch.testing.assert_close(result, torch.tensor([-(0.5**0.5), 0.5**0.5]))


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.7], [3.0, 2.1], [1.5, 1.05]),  # collinear
        ([1.0, 0.7], [-3.0, -2.1], [0.0, 0.0]),  # opposite
        ([0.0, 0.0], [4.0, 8.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 0.0], [0.0, 0.0], [0.75e-30, 0.0]),
    ],
)
def test_collinear_opposite_and_zero_vectors_are_interpolated_linearly(
    flatten: bool, a: list[float], b: list[float], expected: list[float]
) -> None:
    models = one_tensor(None, a, b, dtype=torch.float64)
    result = merged_x("nuslerp", models, weights=[3, 1], flatten=flatten)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_what_is_averaged_is_task_vectors_where_there_is_a_base_unless_set_otherwise(method: str) -> None:
    start, a, b = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    with_base, without = one_tensor(start, a, b), one_tensor(None, a, b)
    assert torch.equal(merged_x(method, with_base), merged_x(method, with_base, task_vectors=True))
    assert torch.equal(merged_x(method, without), merged_x(method, with_base, task_vectors=False))
    assert not torch.allclose(merged_x(method, with_base), merged_x(method, without), atol=0.01)
    about_start = merged_x(method, one_tensor(None, a - start, b - start)) + start
    torch.testing.assert_close(merged_x(method, with_base), about_start)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_what_cannot_be_computed_is_an_error_before_a_tensor_is_read(method: str) -> None:
    models = one_tensor(None, [1.0, 2.0], [3.0, 4.0])
    with pytest.raises(ConfigError, match=r"method\.weights: \[1\.0, -1\.0\] add up to 0"):
        merge(get_method(method), {"weights": [1.0, -1.0]}, models)
    with pytest.raises(ConfigError, match=r"method\.task_vectors=True: needs a base model"):
        merge(get_method(method), {"task_vectors": True}, models)


def tangent_mean(vectors: list[Vector], weights: Vector) -> Vector:
    """Multi-SLERP as it is described: project onto the tangent space at the mean, average there, project back."""
    units = np.array([v / np.linalg.norm(v) for v in vectors])
    mean = weights @ units
    mean /= np.linalg.norm(mean)
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    step = np.linalg.norm(tangent)
    direction = mean * np.cos(step) + tangent * np.sinc(step / np.pi)
    result: Vector = direction * (weights @ [np.linalg.norm(v) for v in vectors])
    return result


@pytest.mark.parametrize("task_vectors", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5], [2.0, -0.5, 1.0]])
def test_multislerp_is_the_mean_in_the_tangent_space_brought_back(task_vectors: bool, weights: list[float]) -> None:
    models = toy_models(3, spread=0.7)
    result = merged("multislerp", models, weights=weights, task_vectors=task_vectors)
    assert models.base is not None
    for key in [key for key in SHAPES if key != "gate"]:
        start = models.base.get(key).double().numpy().ravel() * task_vectors
        vectors = [expert.get(key).double().numpy().ravel() - start for expert in models.experts]
        expected = start + tangent_mean(vectors, np.array(weights) / sum(weights))
        asked = {"weights": weights, "task_vectors": task_vectors}
        compared("multislerp", FORMULA, result[key], expected, options=asked)
        np.testing.assert_allclose(result[key].numpy().ravel(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_of_two_vectors_of_one_length_it_is_the_middle_of_the_arc(method: str) -> None:
    a, b = (v / np.linalg.norm(v) for v in np.random.default_rng(1).standard_normal((2, 30)))
    models = one_tensor(None, 3 * a, 3 * b, dtype=torch.float64)
    result, expected = merged_x(method, models), 3 * geometric_slerp(a, b, 0.5)
    compared(method, "SciPy's geometric_slerp", result, expected, options="2 experts of one length")
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1.0, 0.7], [-3.0, -2.1]], [-1.0, -0.7]),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -4.0]], [0.0, -0.5]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_directions_that_cancel_leave_the_linear_mean(
    method: str, vectors: list[list[float]], expected: list[float]
) -> None:
    models = one_tensor(None, *vectors, dtype=torch.float64)
    result = merged_x(method, models)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_eps_says_when_directions_cancel() -> None:
    models = one_tensor(None, [1.0, 0.0], [-1.0, 0.02])
    torch.testing.assert_close(merged_x("multislerp", models, eps=0.1), torch.tensor([0.0, 0.01]))
    assert merged_x("multislerp", models)[1] > 0.99


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_a_zero_vector_has_a_length_but_no_direction(method: str) -> None:
    result = merged_x(method, one_tensor(None, [0.0, 0.0], [3.0, 0.0], [0.0, 3.0]))
    torch.testing.assert_close(result, torch.tensor([2**0.5, 2**0.5]))


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_the_length_of_tiny_tensors_is_kept(method: str) -> None:
    result = merged_x(method, one_tensor(None, [3e-12, 4e-12], [4e-12, 3e-12]))
    torch.testing.assert_close(result / 1e-12, torch.tensor([5 / 2**0.5, 5 / 2**0.5]))


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_scalars_take_the_majoritys_sign_and_the_mean_magnitude(method: str) -> None:
    assert merged_x(method, one_tensor(None, 1.0, -3.0, -5.0)).item() == pytest.approx(-3.0)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_expert_is_returned_unchanged(method: str) -> None:
    expert = torch.randn(50, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(merged_x(method, one_tensor(None, expert)), expert, rtol=2e-7, atol=0)


def test_the_karcher_mean_has_the_least_sum_of_squared_angles() -> None:
    units = np.random.default_rng(5).standard_normal((4, 6)) + 0.7
    units /= np.linalg.norm(units, axis=1, keepdims=True)

    def spread(point: Vector) -> float:
        return float((np.arccos(np.clip(units @ point / np.linalg.norm(point), -1, 1)) ** 2).sum())

    models = one_tensor(None, *(2 * unit for unit in units), dtype=torch.float64)
    result = merged_x("karcher", models, max_iterations=100, tolerance=1e-7).numpy() / 2
    least = minimize(spread, units.mean(axis=0), method="BFGS", options={"gtol": 1e-9})
    assert spread(result) <= least.fun + 1e-12
    expected = least.x / np.linalg.norm(least.x)
    options = "max_iterations=100, tolerance=1e-07"
    compared("karcher", "SciPy's minimize (BFGS)", result, expected, options=options, note="directions")
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert np.linalg.norm(result) == pytest.approx(1)


def test_at_the_karcher_mean_the_ways_to_the_experts_cancel() -> None:
    models = toy_models(5, spread=1.5)
    result = merged("karcher", models, max_iterations=50, tolerance=1e-7)
    for key in [key for key in SHAPES if key != "gate"]:
        units = np.array([e.get(key).double().numpy().ravel() for e in models.experts])
        lengths = np.linalg.norm(units, axis=1)
        units /= lengths[:, None]
        mean = result[key].double().numpy().ravel()
        assert np.linalg.norm(mean) == pytest.approx(lengths.mean(), rel=1e-6)
        mean /= np.linalg.norm(mean)
        cosines = units @ mean
        ways = (np.arccos(cosines) / np.sin(np.arccos(cosines)))[:, None] * (units - cosines[:, None] * mean)
        assert np.linalg.norm(ways.mean(axis=0)) < 5e-7


def test_an_expert_opposite_to_the_others_does_not_turn_the_mean() -> None:
    result = merged_x("karcher", one_tensor(None, [0.0, 1.0], [0.0, 2.0], [0.0, -3.0]))
    torch.testing.assert_close(result, torch.tensor([0.0, 2.0]))
    balanced = [[0.3, 0.7], [-0.3, 0.7], [0.0, -0.4]]
    result = merged_x("karcher", one_tensor(None, *balanced, dtype=torch.float64))
    expected = torch.tensor([0.0, (2 * 0.58**0.5 + 0.4) / 3], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_long_vectors_have_their_lengths_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1_500_000, generator=generator)
    experts = [base + 0.3 * torch.randn(1_500_000, generator=generator) for _ in range(2)]
    models = one_tensor(base, *experts)
    vectors = [task_vector(models, i, "x").numpy() for i in range(2)]
    expected = base.double().numpy() + tangent_mean(vectors, np.array([0.5, 0.5]))
    result = merged_x("multislerp", models)
    compared("multislerp", FORMULA, result, expected, options="weights=[1, 1], task_vectors=True")
    assert np.abs(result.double().numpy() - expected).max() < 1e-6


def test_slerp_takes_a_threshold_of_one() -> None:
    assert merged_x("slerp", one_tensor(None, [1.0, 2.0], [1.0, 2.0]), t=0.25, threshold=1.0).tolist() == [1.0, 2.0]
