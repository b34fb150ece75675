"""NearSwap: move one model towards another, at each entry by a bounded step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.methods import MERGEKIT
from mergelab.ops.pair import check_pair, pair_of


@merge_method(
    experts=(1, 2),
    elementwise=True,
    check=check_pair,
    order_matters=True,
    family="pairwise",
    paper=MERGEKIT,
    use="two models of which the second is to count where they are near each other",
)
def nearswap(
    experts: Sequence[Tensor], *, base: Tensor | None = None, t: Annotated[float, Field(ge=0)] = 0.0001
) -> Tensor:
    """Move one model towards another, at each entry by at most ``t``: entries that are near are swapped.

    s·b + (1−s)·a with s = min(t / |a − b|, 1), which is b where |a − b| ≤ t, else a ± t. a and b are the two experts in
    their order, or the base and the only expert. As in mergekit (Goddard et al. 2024, arXiv:2403.13257), where a is the
    base model. Departures: mergekit raises |a − b| to at least 1e-6, so that with t < 1e-6 closer entries are not
    swapped. mergekit's ``t`` has no default; ours is that of QuartetAnemoi-70B-t0.0001, the model that it refers to.

    Args:
        experts: blocks of two experts, or of one.
        base: block of the pretrained model; a when there is one expert, unused when there are two.
        t: the largest change of an entry.

    Returns:
        Block, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: one expert and no base.
    """
    a, b = pair_of(base, experts)
    return torch.minimum(torch.maximum(b, a - t), a + t)
