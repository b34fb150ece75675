"""A tensor's digest is of its values: every entry counts, and how they are stored does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash

from mergelab.weights import content
from mergelab.weights.content import content_digest

VALUES = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.float64]


def expected(kind: str, numbers: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(kind.encode() + numbers.astype(f"<f{int(kind[5:]) // 8}").tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_xxh3_of_the_values_in_float32_whatever_dtype_has_them(dtype: torch.dtype) -> None:
    stored = VALUES.to(dtype)
    wide = stored.float() if dtype != torch.float64 else VALUES
    assert content_digest(stored) == expected("float32", wide.numpy())
    assert content_digest(wide.double()) == content_digest(stored)


def test_it_is_of_float64_where_float32_does_not_have_all_values() -> None:
    for value in (1 + 2.0**-40, 1e300, 1e-300):
        numbers = VALUES.double()
        numbers[6, 999] = value
        assert content_digest(numbers) == expected("float64", numbers.numpy())
        assert content_digest(numbers) != content_digest(numbers.float())


@pytest.mark.parametrize("size", [1, 999, 1000, 7000, 1 << 20])
def test_it_does_not_depend_on_the_blocks_or_the_layout(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content_digest(VALUES)
    monkeypatch.setattr(content, "BLOCK", size)
    padded = torch.zeros(14, 2000)[::2, ::2].copy_(VALUES)
    for stored in (VALUES, VALUES.T.contiguous().T, padded, VALUES.clone().requires_grad_()):
        assert content_digest(stored) == whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_other_entry_or_order_is_another_digest(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BLOCK", 16)
    numbers = torch.linspace(-2, 2, 50).to(dtype)
    changed = [numbers, numbers[range(49, -1, -1)], numbers[:-1], torch.cat([numbers, numbers[:1]])]
    for entry in range(50):
        other = numbers.clone()
        other[entry] = 3.0
        changed.append(other)
    blocks_swapped = torch.cat([numbers[16:32], numbers[:16], numbers[32:]])
    digests = [content_digest(tensor) for tensor in (*changed, blocks_swapped)]
    assert len(set(digests)) == len(digests)


def test_scalars_and_tensors_without_entries_have_one() -> None:
    assert content_digest(torch.tensor(1.5)) == expected("float32", np.array([1.5]))
    assert content_digest(torch.empty(0, 3)) == expected("float32", np.empty(0))
