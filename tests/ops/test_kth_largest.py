"""The k-th largest entry is exact, whatever the vectors look like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from mergelab.ops import kth_largest as module
from mergelab.ops.kth_largest import Array, Open, kth_largest, rank_of

LENGTH = 200_000


def opened(vectors: Sequence[Array], sizes: dict[str, int]) -> Open:
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))

    def open_(name: str):  # type: ignore[no-untyped-def]
        parts = [vector[starts[name] : starts[name] + sizes[name]] for vector in vectors]
        rows = np.empty((len(parts), sizes[name]), dtype=vectors[0].dtype)

        def read(part: slice) -> list[Array]:
            """Return a part in the room that the last one was answered in."""
            rows.fill(np.nan)
            found = []
            for row, entries in zip(rows, parts, strict=True):
                wanted = entries[part]
                row[: len(wanted)] = wanted
                found.append(row[: len(wanted)])
            return found

        return read

    return open_


def expected(vector: Array, density: float) -> float:
    return float(np.sort(vector)[::-1][max(1, int(density * len(vector))) - 1])


@cache
def made(kind: str, length: int = LENGTH) -> Array:
    """Magnitudes of a kind that could mislead a sample."""
    random = np.random.default_rng(5)
    normal = np.abs(random.standard_normal(length)).astype(np.float32)
    if kind == "few values":
        return (normal * 4).round().astype(np.float32) / 4
    if kind == "mostly zero":
        return normal * (random.random(length) < 0.1)
    if kind == "all equal":
        return np.full(length, 0.25, dtype=np.float32)
    if kind == "sorted":
        return np.sort(normal)
    if kind == "periodic":  # every entry that the stride visits is large
        normal[:: module._stride(length)] += 100
        return normal
    if kind == "tiny":
        return normal * np.float32(1e-42)
    if kind == "wide":
        return np.exp(40 * random.standard_normal(length)).clip(0, 3e38).astype(np.float32)
    return normal.astype(np.float64) if kind == "double" else normal


KINDS = ["normal", "double", "few values", "mostly zero", "all equal", "sorted", "periodic", "tiny", "wide"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [1e-9, 1e-5, 0.001, 0.2, 0.5, 0.77, 0.9999, 1.0])
def test_the_entry_is_that_of_a_sort(kind: str, density: float) -> None:
    vectors = [made(kind), made("normal").astype(made(kind).dtype) * 3]
    sizes = {"a": 100_001, "b": 3, "empty": 0, "c": LENGTH - 100_004}
    answer = kth_largest(opened(vectors, sizes), sizes, density, 2)
    assert answer == tuple(expected(vector, density) for vector in vectors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.9])
def test_pooled_vectors_count_as_one(kind: str, density: float) -> None:
    vectors = [made(kind), made("normal").astype(made(kind).dtype) * 3]
    sizes = {"a": LENGTH}
    answer = kth_largest(opened(vectors, sizes), sizes, density, 2, pooled=True)
    assert answer == (expected(np.concatenate(vectors), density),) * 2


@pytest.mark.parametrize(("larger", "answer"), [(0, 1.0), (39_999, 1.0), (40_000, 2.0), (40_001, 2.0)])
def test_a_sample_of_equal_entries_is_not_taken_for_the_whole(larger: int, answer: float) -> None:
    vector = np.ones(LENGTH, dtype=np.float32)
    vector[np.flatnonzero(np.arange(LENGTH) % module._stride(LENGTH))[:larger]] = 2  # never on the stride
    assert kth_largest(opened([vector], {"a": LENGTH}), {"a": LENGTH}, 0.2, 1) == (answer,)


@pytest.mark.parametrize("length", [1, 2, 7, 65_535, 65_536, 70_001])
def test_short_vectors_are_selected_from_directly(length: int) -> None:
    vector = made("normal")[:length]
    for density in (0.01, 0.5, 1.0):
        assert kth_largest(opened([vector], {"a": length}), {"a": length}, density, 1) == (expected(vector, density),)


def test_the_digits_alone_find_the_entry_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_within", lambda data, brackets, *_: [None] * len(brackets))
    for kind in KINDS:
        vectors = [made(kind), made(kind)[::-1] / 2]
        answer = kth_largest(opened(vectors, {"a": LENGTH}), {"a": LENGTH}, 0.2, 2)
        assert answer == tuple(expected(vector, 0.2) for vector in vectors), kind


def test_what_a_pass_gathers_is_a_small_part(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    ranked = module._ranked
    monkeypatch.setattr(module, "_ranked", lambda entries, rank: gathered.append(len(entries)) or ranked(entries, rank))
    length = 4_000_000
    vector = made("normal", length)
    assert kth_largest(opened([vector], {"a": length}), {"a": length}, 0.2, 1) == (expected(vector, 0.2),)
    assert len(gathered) == 1
    assert gathered[0] < 0.05 * length


def test_at_least_one_entry_is_kept() -> None:
    assert rank_of(0.2, 3) == 1
    assert rank_of(0.2, 5) == 1
    assert rank_of(0.2, 10) == 2
    assert rank_of(1.0, 3) == 3


def test_nothing_to_select_from_is_zero() -> None:
    assert kth_largest(opened([np.zeros(0, dtype=np.float32)], {}), {"a": 0}, 0.5, 2) == (0.0, 0.0)
