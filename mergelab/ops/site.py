"""Where a tensor, or a part of one, belongs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Where in the models a method is working.

    Attributes:
        name: the tensor's name.
        experts: the experts' names, in the order of the ``experts`` argument.
        shape: the whole tensor's shape, also when the method is given a part of it.
        offset: index of the part's first entry in the flattened tensor.
        seed: the run's seed.
    """

    name: str
    experts: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int = 0
    seed: int = 0
