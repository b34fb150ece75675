"""VeRA: low-rank changes ``diag(b) · B · diag(d) · A`` whose A and B are the same for all layers.

Kopiczko et al. 2024, arXiv:2310.11454. A is as wide as the layer with most inputs, B as high as that with most outputs;
a layer takes the first columns and rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mergelab.adapters.canonical import Factors, Projected
from mergelab.adapters.changes import wide
from mergelab.errors import ModelError, ShapeMismatch, listed


def projected_factors(
    projected: Mapping[str, Projected],
    sizes: Mapping[str, tuple[int, int]],
    dtypes: Collection[torch.dtype],
    name: str,
) -> dict[str, Factors]:
    """Return the low-rank changes of layers.

    Args:
        projected: by layer.
        sizes: each layer's numbers of outputs and inputs, of those that are wanted.
        dtypes: of their weights.
        name: what errors call the adapter.

    Returns:
        By layer; A (r, inputs) is a view of the shared one.

    Raises:
        ShapeMismatch: a layer is larger than the projections. ModelError: they cannot be drawn for certain.
    """
    if not projected:
        return {}
    a, b = _projections(projected, sizes, dtypes, name)
    found: dict[str, Factors] = {}
    for layer, (outputs, inputs) in sizes.items():
        own = projected[layer]
        if own.by_output.numel() != outputs or a.shape[1] < inputs or b.shape[0] < outputs:
            raise ShapeMismatch(
                f"{name}: it was trained for a {layer} of {own.by_output.numel()} outputs and at most {a.shape[1]} "
                f"inputs, and that of the base has {outputs} and {inputs}: it belongs to another base"
            )
        left = wide(b)[:outputs] * wide(own.by_output)[:, None] * wide(own.by_rank)
        found[layer] = Factors(a[:, :inputs], left, 1.0)
    return found


def _projections(
    projected: Mapping[str, Projected],
    sizes: Mapping[str, tuple[int, int]],
    dtypes: Collection[torch.dtype],
    name: str,
) -> tuple[Tensor, Tensor]:
    """Return A and B: as stored, or as PEFT draws them: A first, both uniform within Kaiming He's bounds."""
    first = next(iter(projected.values()))
    if first.shared.a is not None and first.shared.b is not None:
        return first.shared.a, first.shared.b
    advice = "save it again with save_projection=True"
    if sizes.keys() != projected.keys():
        raise ModelError(f"{name}: its projections are not stored, and follow from all its layers; {advice}")
    if any(dtype.itemsize < 4 for dtype in dtypes):
        raise ModelError(
            f"{name}: its projections are not stored, and PEFT rounds what it draws to the dtype in which the base was "
            f"loaded for training, which need not be {listed(str(dtype) for dtype in dtypes)}; {advice}"
        )
    outputs, inputs = (max(size[at] for size in sizes.values()) for at in (0, 1))
    rank, generator = first.by_rank.numel(), torch.Generator().manual_seed(first.shared.seed)
    drawn: list[Tensor] = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]
