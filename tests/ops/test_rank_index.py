"""Grouped magnitudes answer what selecting answers."""

from __future__ import annotations

import numpy as np
import pytest

from mergelab.ops.kth_largest import Array, kth_largest
from mergelab.ops.rank_index import Ranked, grouped, kth_of, rank_each, together
from tests.ops.test_kth_largest import KINDS, LENGTH, made, opened


def rank_vectors(vectors: list[Array], sizes: dict[str, int]) -> list[Ranked]:
    parts = rank_each(opened(vectors, sizes), sizes, len(vectors))
    return [together([parts[name][at] for name in sizes]) for at in range(len(vectors))]


DENSITIES = [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_every_density_is_looked_up_exactly(kind: str, pooled: bool) -> None:
    vectors = [made(kind), made(kind)[::-1] / 2]
    sizes = {"a": LENGTH // 3, "b": 0, "c": LENGTH - LENGTH // 3}
    known = rank_vectors(vectors, sizes)
    for density in DENSITIES:
        expected = kth_largest(opened(vectors, sizes), sizes, density, 2, pooled=pooled)
        assert kth_of(known, density, pooled=pooled) == expected, density


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensors_part_is_looked_up_on_its_own(kind: str) -> None:
    vectors = [made(kind), made(kind)[::-1] / 2]
    sizes = {"a": 1, "b": 0, "c": LENGTH - 1}
    parts = rank_each(opened(vectors, sizes), sizes, 2)
    for name, start in (("a", 0), ("b", 1), ("c", 1)):
        own = [vector[start : start + sizes[name]] for vector in vectors]
        expected = kth_largest(opened(own, {name: sizes[name]}), {name: sizes[name]}, 0.3, 2)
        assert kth_of(parts[name], 0.3) == expected, name


def test_a_float32_vector_takes_about_two_bytes_an_entry() -> None:
    run = grouped(np.abs(np.random.default_rng(0).standard_normal(131_072)).astype(np.float32))
    assert run.entries.nbytes == 2 * 131_072
    assert run.starts.nbytes < 0.1 * run.entries.nbytes


def test_float64_keeps_every_bit() -> None:
    vector = np.abs(np.random.default_rng(0).standard_normal(1001))
    known = rank_vectors([vector], {"a": 1001})
    assert kth_of(known, 0.3) == (float(np.sort(vector)[::-1][299]),)


def test_nothing_to_look_up_is_zero() -> None:
    empty = np.zeros(0, dtype=np.float32)
    known = rank_vectors([empty, empty], {"a": 0})
    assert kth_of(known, 0.5) == kth_of(known, 0.5, pooled=True) == (0.0, 0.0)
