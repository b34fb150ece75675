"""Parameters with a number for each expert: weights, and others that may be given by the expert's name.

A method declares by the annotation of its parameter ``weights`` which numbers it can take: `Weights` where models or
task vectors are added up, `MeanWeights` where a weighted mean is taken over some of the experts, `NormalizedWeights`
where the weights are divided by their sum. What an annotation is marked with has a method ``check``; the engine calls
it for every method, before a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator

from mergelab.errors import ConfigError

CANCELLED = 2.0**-23  # float32's epsilon
SMALLEST = 1e-30  # the product with an entry of 1e-8 is about float32's smallest normal number


def one_number_each(value: object) -> object:
    """Take one finite number per expert, in a list or by name; return a tuple, a dict, or None for None.

    Raises:
        ValueError: it is anything else.
    """
    numbers = value.values() if isinstance(value, Mapping) else value
    if value is None:
        return None
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise ValueError
    taken = list(numbers)
    if not all(is_number(number) and math.isfinite(number) for number in taken):
        raise ValueError
    if isinstance(value, Mapping):
        return {str(name): float(number) for name, number in value.items()}
    return tuple(float(number) for number in taken)


def is_number(value: object) -> bool:
    """Return whether ``value`` is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class OfExperts:
    """Marks a parameter that may be given for each expert, by name; the function gets a tuple in their order then.

    Attributes:
        number: the type of each.
        one_where: a parameter and a value of it with which there must be one number for all.
    """

    number: Any
    one_where: tuple[str, Any] | None = None

    def check(self, key: str, value: object, settings: Mapping[str, Any], experts: Sequence[str]) -> None:
        """Raise `ConfigError` for numbers by expert where there must be one."""
        if self.one_where is None or not isinstance(value, Mapping | Sequence):
            return
        other, only = self.one_where
        if settings.get(other) == only:
            raise ConfigError(f"{key}: must be one number for all experts where {other}={only} ranks them together")


@dataclass(frozen=True)
class OfMean:
    """Marks weights of a mean over those experts that agree, or that count, at an entry."""

    ge = 0.0  # the range that the catalogue shows

    def check(self, key: str, weights: Sequence[float], settings: Mapping[str, Any], experts: Sequence[str]) -> None:
        """Raise `ConfigError` for a negative weight, for one that float32 cannot hold, or where none is above 0."""
        for name, weight in zip(experts, weights, strict=True):
            if weight < 0:
                raise ConfigError(
                    f"{key}: must be at least 0 for a weighted mean, and that of {name} is {weight:g} "
                    "(task_arithmetic takes negative weights)"
                )
            if 0 < weight < SMALLEST:
                raise ConfigError(f"{key}: must be 0 or at least {SMALLEST:g}, and that of {name} is {weight:g}")
        if not any(weights):
            raise ConfigError(f"{key}: at least one must be above 0 for a weighted mean")


@dataclass(frozen=True)
class DividedBySum:
    """Marks weights that are divided by their sum.

    Attributes:
        when: the parameter that has to be true for that; "" where they always are.
    """

    when: str = ""

    def check(self, key: str, weights: Sequence[float], settings: Mapping[str, Any], experts: Sequence[str]) -> None:
        """Raise `ConfigError` where the sum is 0, or no more than float32 rounding of the weights.

        With |Σ w| ≤ ε Σ |w|, ε being float32's, the rounding of Σ w_t x_t is as large as what it is divided by, so that
        no digit of the quotient is right.
        """
        if self.when and not settings.get(self.when, True):
            return
        total = abs(math.fsum(weights))
        if total <= max(SMALLEST, CANCELLED * math.fsum(map(abs, weights))):
            allowed = f"; {self.when}=false only adds them up" if self.when else ""
            raise ConfigError(f"{key}: {list(weights)} add up to 0, and they are divided by their sum{allowed}")


Weights = Annotated[Sequence[float] | Mapping[str, float] | None, PlainValidator(one_number_each)]
MeanWeights = Annotated[Weights, OfMean()]
NormalizedWeights = Annotated[Weights, DividedBySum()]
SumWeights = Annotated[Weights, DividedBySum(when="normalize")]
