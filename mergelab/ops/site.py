"""Describe which tensor, or which part of one, a method is working on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mergelab.ops.philox import stream_key


@dataclass(frozen=True)
class Site:
    """The tensor, or part of one, that a method is working on.

    Attributes:
        name: the tensor's name.
        experts: the experts' names, in the order of the ``experts`` argument.
        shape: the whole tensor's shape, also when the method receives a part of it.
        offset: index of the part's first entry in the flattened tensor.
        seed: the run's seed.
        digests: returns, for each expert, a digest of the values that it has in the whole tensor.
    """

    name: str
    experts: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int = 0
    seed: int = 0
    digests: Callable[[], Sequence[str]] = field(default=tuple, repr=False, compare=False)

    @property
    def keys(self) -> tuple[int, ...]:
        """The key of each expert's random numbers in this tensor, for `mergelab.ops.philox`.

        It follows from the seed, the values that the expert has in the tensor, and the tensor's name. What the experts
        are called, where they lie and in which order they are given have no part in it. Experts that have the same
        values there have the same numbers.
        """
        return tuple(stream_key(self.seed, digest, self.name) for digest in self.digests())


SiteOf = Callable[[str], Site]  # returns the site of a whole tensor, by the tensor's name
