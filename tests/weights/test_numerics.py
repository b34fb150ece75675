from __future__ import annotations

import math

import pytest
import torch

from mergelab.errors import ShapeMismatch
from mergelab.weights.numerics import cast_like, cosine, dot, norm, total


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def vectors(n: int = 1_000_003) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize("reduce", [dot, cosine, lambda a, _: norm(a), lambda a, _: total(a)])
def test_the_result_has_the_same_bits_for_any_number_of_threads(threads, reduce):
    a, b = vectors()
    results = set()
    for count in (1, 2, 4):
        threads(count)
        results.add(reduce(a, b))
    assert len(results) == 1


def test_products_and_sums_are_taken_in_float64():
    a, b = vectors()
    x, y = a.double(), b.double()
    exact, left, right = (math.fsum(terms.tolist()) for terms in (x * y, x * x, y * y))
    assert dot(a, b) == pytest.approx(exact, rel=1e-13)
    assert norm(a) == pytest.approx(math.sqrt(left), rel=1e-14)
    assert total(a) == pytest.approx(math.fsum(x.tolist()), rel=1e-13)
    assert cosine(a, b) == pytest.approx(exact / math.sqrt(left * right), rel=1e-13)


def test_small_entries_beside_a_large_one_are_not_lost():
    a = torch.cat([torch.tensor([2.0**24]), torch.ones(100_000)])
    assert total(a) == 2.0**24 + 100_000
    assert norm(torch.full((4_000_000,), 1e-3)) == pytest.approx(2.0, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_any_layout_in_memory_is_taken(dtype):
    a = torch.arange(6.0, dtype=dtype).reshape(2, 3)
    assert dot(a, a) == 55
    assert dot(a.T, a.T) == 55
    assert norm(a.T) == math.sqrt(55)


def test_half_precision_sums_do_not_overflow():
    assert total(torch.full((10,), 60_000.0, dtype=torch.float16)) == pytest.approx(600_000, rel=1e-3)


def test_nothing_sums_to_zero_and_a_zero_vector_has_cosine_zero():
    empty = torch.empty(0)
    assert (dot(empty, empty), norm(empty), total(empty)) == (0, 0, 0)
    assert cosine(torch.zeros(3), torch.ones(3)) == 0
    assert cosine(torch.full((7,), 0.1), torch.full((7,), 0.3)) <= 1


def test_infinities_are_passed_on():
    assert math.isnan(total(torch.tensor([math.inf, -math.inf])))
    assert norm(torch.tensor([math.inf, 1])) == math.inf


def test_inputs_stay_as_they_are():
    a, b = torch.ones(5, requires_grad=True), torch.ones(5)
    dot(a, b)
    norm(a)
    assert torch.equal(a, torch.ones(5))
    assert a.grad is None


def test_dot_of_different_shapes_is_an_error():
    with pytest.raises(ShapeMismatch, match=r"\[3\] and \[4\]"):
        dot(torch.ones(3), torch.ones(4))


def test_casting_rounds_once_to_nearest_even():
    values = torch.tensor([1.00390625, 1.01171875, -3.14159])  # two halfway cases between bfloat16 neighbours
    assert torch.equal(cast_like(values, torch.ones(1, dtype=torch.bfloat16)), values.bfloat16())
    assert cast_like(values, torch.ones(1)) is values
