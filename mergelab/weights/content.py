"""Name a tensor by its values: equal values give the same name, however and wherever they are stored."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 17  # entries that are hashed at a time; the digest does not depend on it


def content_digest(tensor: Tensor) -> str:
    """Return the XXH3 digest of 128 bits of a floating-point tensor's values, as hex digits.

    What is hashed are the entries in their logical order, as little-endian float32; as float64 where float32 does not
    have all the values. So the digest does not depend on the file's layout, the device, strides or a wider dtype
    (bfloat16 read as float32 has the same values), and does depend on every entry. XXH3 is about as fast as memory;
    SHA-256 takes tens of times as long.
    """
    flat = tensor.detach().reshape(-1)
    double = flat.dtype == torch.float64 and not _fits_float32(flat)
    digest = xxhash.xxh3_128(b"float64" if double else b"float32")
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK].cpu().to(torch.float64 if double else torch.float32)
        digest.update(block.numpy().astype("<f8" if double else "<f4", copy=False).data)
    return digest.hexdigest()


def _fits_float32(flat: Tensor) -> bool:
    parts = (flat[start : start + BLOCK] for start in range(0, flat.numel(), BLOCK))
    return all(torch.equal(part.float().double(), part) for part in parts)
