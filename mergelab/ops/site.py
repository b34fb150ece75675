"""Describe which tensor, or which part of one, a method is working on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """The tensor, or part of one, that a method is working on.

    Attributes:
        name: the tensor's name.
        experts: the experts' names, in the order of the ``experts`` argument.
        shape: the whole tensor's shape, also when the method receives a part of it.
        offset: index of the part's first entry in the flattened tensor.
        seed: the run's seed.
    """

    name: str
    experts: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int = 0
    seed: int = 0
