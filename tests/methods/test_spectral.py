"""TSV-Merge and isotropic merging against float64 transcriptions of their formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.methods.iso_c import iso_c
from mergelab.methods.iso_cts import iso_cts
from mergelab.methods.tsv_m import tsv_m
from mergelab.ops import rounding, svd
from mergelab.ops.rounding import rounding_norm
from mergelab.ops.spectral import split_rank
from mergelab.ops.svd import decompose, decompose_leading, tall_matrix
from tests.methods.toy import aligned, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared

Matrix = np.ndarray[Any, np.dtype[np.float64]]
SHAPES = [(96, 96), (120, 40), (40, 130)]


def procrustes(columns: Matrix) -> Matrix:
    u, _, v = np.linalg.svd(columns, full_matrices=False)
    return u @ v


def tsv_m_transcribed(vectors: Sequence[Matrix]) -> Matrix:
    rank = min(vectors[0].shape) // len(vectors)
    parts = [np.linalg.svd(vector, full_matrices=False) for vector in vectors]
    u = np.concatenate([part[0][:, :rank] for part in parts], axis=1)
    s = np.concatenate([part[1][:rank] for part in parts])
    v = np.concatenate([part[2][:rank] for part in parts], axis=0)
    return procrustes(u) @ np.diag(s) @ procrustes(v.T).T


def iso_c_transcribed(vectors: Sequence[Matrix]) -> Matrix:
    u, s, v = np.linalg.svd(sum(vectors[1:], vectors[0]), full_matrices=False)
    return s.mean() * u @ v


def iso_cts_transcribed(vectors: Sequence[Matrix], fraction: float) -> Matrix:
    rank, tasks = min(vectors[0].shape), len(vectors)
    own = round((rank - int(rank * fraction)) / tasks)
    kept = rank - own * tasks
    u, s, v = (x[..., :kept] if i < 2 else x[:kept] for i, x in enumerate(np.linalg.svd(sum(vectors), False)))
    parts = [np.linalg.svd(vector - u @ u.T @ vector, full_matrices=False) for vector in vectors]
    us = np.concatenate([*(part[0][:, :own] for part in parts), u], axis=1)
    ss = np.concatenate([*(part[1][:own] for part in parts), s])
    vs = np.concatenate([*(part[2][:own] for part in parts), v], axis=0)
    return ss.mean() * procrustes(us) @ procrustes(vs.T).T


def drawn(shape: tuple[int, int], count: int, seed: int = 0) -> list[Matrix]:
    """Matrices with a decaying spectrum."""
    generator = np.random.default_rng(seed)
    decay = np.logspace(0, -1, shape[1])
    return [0.02 * generator.standard_normal(shape) * decay for _ in range(count)]


def merged_matrices(method: str, vectors: Sequence[Matrix], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    base = np.zeros(vectors[0].shape)
    return merged_x(method, one_tensor(base, *vectors, dtype=dtype), **options).double().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tsv_m_is_the_papers_formula(shape: tuple[int, int], count: int) -> None:
    vectors = drawn(shape, count)
    result, expected = merged_matrices("tsv_m", vectors), tsv_m_transcribed(vectors)
    compared("tsv_m", FORMULA, result, expected)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_iso_c_is_the_papers_formula(shape: tuple[int, int], count: int) -> None:
    vectors = drawn(shape, count)
    result, expected = merged_matrices("iso_c", vectors), iso_c_transcribed(vectors)
    compared("iso_c", FORMULA, result, expected)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "fraction"), [(1, 0.8), (2, 0.8), (3, 0.5), (5, 0.8), (3, 1.0), (4, 0.0)])
def test_iso_cts_is_the_papers_formula(shape: tuple[int, int], count: int, fraction: float) -> None:
    vectors = drawn(shape, count)
    expected = iso_cts_transcribed(vectors, fraction)
    result = merged_matrices("iso_cts", vectors, common_fraction=fraction)
    compared("iso_cts", FORMULA, result, expected, options=f"common_fraction={fraction}")
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_float32_weights_are_decomposed_in_float64(method: str) -> None:
    models = toy_models(3)
    result = merged(method, models)
    vectors = [(e.get("layer.weight") - models.base.get("layer.weight")).double().numpy() for e in models.experts]
    transcribed = {"tsv_m": tsv_m_transcribed, "iso_c": iso_c_transcribed}
    expected = transcribed[method](vectors) if method in transcribed else iso_cts_transcribed(vectors, 0.8)
    change = (result["layer.weight"] - models.base.get("layer.weight")).double().numpy()
    theirs = models.base.get("layer.weight").double().numpy() + expected
    compared(
        method, FORMULA, result["layer.weight"], theirs, options="common_fraction=0.8" if method == "iso_cts" else ""
    )
    np.testing.assert_allclose(change, expected, rtol=0, atol=4e-7)  # float32 rounding of entries up to 4


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("key", ["layer.bias", "gate"])
def test_tensors_that_are_no_matrices_get_the_mean_task_vector(method: str, key: str) -> None:
    models = toy_models(3, dtype=torch.float64)
    vectors = [task_vector(models, expert, key) for expert in range(3)]
    expected = models.base.get(key) + 0.7 * torch.stack(vectors).mean(0)
    torch.testing.assert_close(merged(method, models, **{"lambda": 0.7})[key], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_lambda_scales_the_merged_task_vector(method: str) -> None:
    vectors = drawn((30, 20), 3)
    whole = merged_matrices(method, vectors)
    np.testing.assert_allclose(merged_matrices(method, vectors, **{"lambda": 1.7}), 1.7 * whole, rtol=1e-13)


def test_all_singular_values_of_iso_c_are_their_mean() -> None:
    vectors = drawn((50, 30), 4)
    mean = np.linalg.svd(sum(vectors), compute_uv=False).mean()
    spectrum = np.linalg.svd(merged_matrices("iso_c", vectors), compute_uv=False)
    np.testing.assert_allclose(spectrum, mean, rtol=1e-12)


def test_the_mean_of_the_spectrum_counts_singular_values_that_are_0() -> None:
    vectors = drawn((50, 30), 2)
    for vector in vectors:
        vector[:, 20:] = 0
    mean = np.linalg.svd(sum(vectors), compute_uv=False).sum() / 30
    spectrum = np.linalg.svd(merged_matrices("iso_c", vectors), compute_uv=False)
    np.testing.assert_allclose(spectrum[:20], mean, rtol=1e-12)
    np.testing.assert_allclose(spectrum[20:], 0, atol=1e-15)


def test_one_expert_comes_out_of_tsv_m_unchanged() -> None:
    (vector,) = drawn((50, 30), 1)
    np.testing.assert_allclose(merged_matrices("tsv_m", [vector]), vector, rtol=0, atol=1e-14)


def test_equal_experts_come_out_of_tsv_m_cut_to_their_share_of_the_rank() -> None:
    (vector,) = drawn((50, 30), 1)
    u, s, v = np.linalg.svd(vector, full_matrices=False)
    result = merged_matrices("tsv_m", [vector, vector, vector])
    np.testing.assert_allclose(result, (u[:, :10] * s[:10]) @ v[:10], rtol=0, atol=1e-13)


def test_experts_on_other_rows_and_columns_come_out_of_tsv_m_each_in_its_place() -> None:
    (a, b), vectors = drawn((12, 12), 2), np.zeros((2, 24, 24))
    vectors[0, :12, :12], vectors[1, 12:, 12:] = a, b
    np.testing.assert_allclose(merged_matrices("tsv_m", list(vectors)), vectors.sum(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(2, 40), (40, 2), (1, 7), (1, 1)])
def test_matrices_of_fewer_directions_than_experts_are_merged(method: str, shape: tuple[int, int]) -> None:
    vectors = drawn(shape, 5)
    result = merged_matrices(method, vectors)
    assert np.isfinite(result).all()
    assert np.linalg.norm(result) > 0.1 * np.linalg.norm(vectors[0])


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_directions_that_no_expert_moved_in_stay_as_they_are(method: str) -> None:
    vectors = drawn((40, 30), 3)
    for vector in vectors:
        vector[:, 20:] = 0
        vector[10:15] = 0
    result = merged_matrices(method, vectors)
    assert np.abs(result[:, 20:]).max() == 0
    assert np.abs(result[10:15]).max() < 1e-16
    assert np.linalg.norm(result) > 0.1 * np.linalg.norm(vectors[0])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
def test_a_task_whose_directions_are_all_common_has_none_of_its_own_in_iso_cts(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    vectors = [generator.standard_normal((shape[0], 10)) @ generator.standard_normal((10, shape[1]))] * 2
    u, s, v = np.linalg.svd(vectors[0] + vectors[1])
    expected = s.sum() / 30 * u[:, :10] @ v[:10]  # what is left of either beside the common ten is rounding
    np.testing.assert_allclose(merged_matrices("iso_cts", vectors), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("turned", [False, True])
def test_own_directions_much_weaker_than_the_common_ones_are_found(turned: bool) -> None:
    generator = np.random.default_rng(0)
    bases = [np.linalg.qr(generator.standard_normal((size, 30)))[0] for size in (40, 30)]
    spectra = np.zeros((2, 30))
    spectra[:, :20] = generator.uniform(0.5, 1, (2, 20))
    spectra[0, 20:25] = spectra[1, 25:] = 1e-7 * np.arange(10, 5, -1)
    vectors = [(bases[0] * spectrum) @ bases[1].T for spectrum in spectra]
    vectors = [vector.T for vector in vectors] if turned else vectors
    expected = iso_cts_transcribed(vectors, 0.67)  # 20 common split_rank, and 5 for each
    result = merged_matrices("iso_cts", vectors, common_fraction=0.67)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_an_expert_equal_to_the_base_takes_no_direction(method: str) -> None:
    vectors = [*drawn((40, 30), 2), np.zeros((40, 30))]
    result = merged_matrices(method, vectors)
    assert np.isfinite(result).all()
    assert np.linalg.norm(result) > 0.5 * np.linalg.norm(vectors[0])


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_the_transpose_gives_the_transpose_but_for_the_side_iso_cts_projects_on(method: str) -> None:
    vectors = drawn((40, 30), 3)
    result, turned = merged_matrices(method, vectors), merged_matrices(method, [vector.T for vector in vectors])
    close = np.abs(result - turned.T).max() < 1e-10
    assert close == (method != "iso_cts")


def test_iso_cts_projects_on_the_side_of_the_outputs_where_conv1d_stores_them_last() -> None:
    names = ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.0.attn.c_proj.weight", "wte.weight")
    shapes = ((10, 30), (10, 40), (10, 10), (50, 10))
    vectors = {name: drawn(shape, 3, seed) for seed, (name, shape) in enumerate(zip(names, shapes, strict=True))}

    def run(turned: bool) -> dict[str, torch.Tensor]:
        def stored(name: str, matrix: Matrix) -> torch.Tensor:
            return torch.from_numpy(matrix.T.copy() if turned and name != "wte.weight" else matrix)

        experts = [{name: stored(name, vectors[name][i]) for name in names} for i in range(3)]
        base = {name: torch.zeros_like(tensor) for name, tensor in experts[0].items()}
        return merged("iso_cts", aligned(base, experts))

    conv1d, linear = run(turned=False), run(turned=True)
    for name in names[:3]:
        torch.testing.assert_close(conv1d[name], linear[name].T, rtol=0, atol=1e-10)
        expected = iso_cts_transcribed([vector.T for vector in vectors[name]], 0.8)
        np.testing.assert_allclose(linear[name].numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        conv1d["wte.weight"].numpy(), iso_cts_transcribed(vectors["wte.weight"], 0.8), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("method", [tsv_m, iso_c, iso_cts])
def test_matrices_read_in_several_blocks_are_the_same(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergelab.ops.site import Site

    options = {"site": Site("x", (), (120, 40))} if method is iso_cts else {}
    vectors = [torch.from_numpy(vector) for vector in drawn((120, 40), 3)]
    whole = method([vector.clone() for vector in vectors], vectors, **options)
    monkeypatch.setattr(svd, "ROWS", 17)
    monkeypatch.setattr(rounding, "ROWS", 17)
    torch.testing.assert_close(method(vectors, vectors, **options), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (50, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_what_rounding_alone_adds_to_experts_of_low_rank_is_no_direction_of_theirs(
    method: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = np.random.default_rng(0)
    base = torch.from_numpy(0.04 * generator.standard_normal(shape)).to(dtype)
    parts = [(generator.standard_normal((shape[0], 3)), generator.standard_normal((3, shape[1]))) for _ in range(3)]
    changes = [0.05 * a @ b for a, b in parts]
    stored = [(base.double() + torch.from_numpy(change)).to(dtype) for change in changes]
    exact = {"tsv_m": tsv_m_low_rank, "iso_c": iso_c_low_rank, "iso_cts": iso_cts_low_rank}[method](changes)
    method_, experts = get_method(method), [{"x": each} for each in stored]
    models = aligned({"x": base}, experts)
    result = dict(merge(method_, {}, models, dtype=torch.float64))["x"].numpy() - base.double().numpy()
    spans = np.linalg.qr(np.concatenate([a for a, _ in parts], axis=1))[0]
    outside = np.linalg.norm(result - spans @ (spans.T @ result)) / np.linalg.norm(result)
    unit = torch.finfo(dtype).eps
    assert outside < 5 * unit
    np.testing.assert_allclose(result, exact, rtol=0, atol=20 * unit * np.abs(exact).max())


def low_rank(vector: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    u, s, v = np.linalg.svd(vector, full_matrices=False)
    rank = min(rank, int((s > 1e-10 * s[0]).sum()))
    return u[:, :rank], s[:rank], v[:rank]


def tsv_m_low_rank(vectors: Sequence[Matrix]) -> Matrix:
    """As `tsv_m_transcribed`, of the directions that there are."""
    parts = [low_rank(vector, min(vector.shape) // len(vectors)) for vector in vectors]
    u, v = (np.concatenate(each, axis=1) for each in ([p[0] for p in parts], [p[2].T for p in parts]))
    return procrustes(u) @ np.diag(np.concatenate([p[1] for p in parts])) @ procrustes(v).T


def iso_c_low_rank(vectors: Sequence[Matrix]) -> Matrix:
    u, s, v = low_rank(sum(vectors[1:], vectors[0]), 10**6)
    return s.sum() / min(vectors[0].shape) * u @ v


def iso_cts_low_rank(vectors: Sequence[Matrix]) -> Matrix:
    """The common directions are all that there are, so that the tasks have none of their own."""
    return iso_c_low_rank(vectors)


@pytest.mark.parametrize("rows", [1, 1000])
def test_the_norm_of_rounding_errors_bounds_them_closely(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    exact[0] *= rows  # one row much larger than the others
    stored = exact.to(torch.bfloat16)
    found = rounding_norm([stored])
    largest = float(torch.linalg.matrix_norm(stored.double() - exact, 2))
    assert largest < found < 2.5 * largest
    twice = rounding_norm([stored, stored])
    assert twice == pytest.approx(found * 2**0.5)


def test_a_self_product_of_more_columns_than_are_multiplied_at_once_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "COLUMNS", 7)
    matrix = torch.from_numpy(drawn((12, 30), 1)[0])
    torch.testing.assert_close(svd.self_product(matrix), matrix.T @ matrix, rtol=1e-13, atol=1e-18)


def test_small_singular_values_are_not_lost_by_squaring() -> None:
    generator = np.random.default_rng(0)
    u, v = (np.linalg.qr(generator.standard_normal((rows, 20)))[0] for rows in (60, 20))
    spectrum = np.logspace(0, -11, 20)
    matrix = tall_matrix(torch.from_numpy((u * spectrum) @ v.T))
    for triplets in (decompose(matrix), decompose_leading(matrix, 20)):
        np.testing.assert_allclose(triplets.values.numpy(), spectrum, rtol=1e-4)
    few = decompose_leading(matrix, 6)
    np.testing.assert_allclose(few.values.numpy(), spectrum[:6], rtol=1e-6)
    np.testing.assert_allclose(np.abs(few.left(slice(0, 60)).numpy().T @ u[:, :6]), np.eye(6), atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "tasks", "fraction", "expected"),
    [(768, 8, 0.8, (616, 19)), (768, 5, 0.8, (613, 31)), (10, 3, 1.0, (10, 0)), (2, 3, 0.0, (2, 0)), (9, 3, 0, (0, 3))],
)
def test_common_and_own_directions_fill_the_rank(
    rank: int, tasks: int, fraction: float, expected: tuple[int, int]
) -> None:
    common, own = split_rank(rank, tasks, fraction)
    assert (common, own) == expected
    assert common + tasks * own == rank
