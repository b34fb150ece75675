"""Search spaces in Hydra's sweep syntax, as Optuna's distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import says_what_it_is
from mergelab.errors import SweepError

_MOST_VALUES = 1_000_000

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override, RangeSweep
    from optuna.distributions import BaseDistribution

Array = np.ndarray[Any, Any]
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Space:
    """What a sweep varies, by config key, and the overrides that all of its jobs share."""

    distributions: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Spell a point of the space as overrides for a job."""
        return [*self.fixed, *(_spelled(key, value) for key, value in params.items())]

    def edges(self) -> list[dict[str, Value]]:
        """List points that show whether every value is allowed: all lowest, all highest, and each choice."""
        lows = {key: _values(one)[0] for key, one in self.distributions.items()}
        highs = {key: _values(one)[-1] for key, one in self.distributions.items()}
        inner = [{**lows, key: value} for key, one in self.distributions.items() for value in _values(one)[1:-1]]
        return [lows, highs, *inner]

    def grid(self) -> dict[str, list[Value]]:
        """List every value of every dimension.

        Raises:
            SweepError: a dimension is continuous.
        """
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, list[Value]] = {}
        for key, one in self.distributions.items():
            if isinstance(one, FloatDistribution) and one.step is None:
                raise SweepError(
                    f"sweep.sampler=grid: {key} is an interval; a grid needs values: "
                    f"{key}=range({one.low:g},{one.high:g},<step>) or {key}=choice(...)"
                )
            if isinstance(one, CategoricalDistribution):
                found[key] = list(one.choices)
            else:
                assert isinstance(one, FloatDistribution | IntDistribution)
                steps = round((one.high - one.low) / (one.step or 1))
                if steps >= _MOST_VALUES:
                    raise SweepError(f"sweep.sampler=grid: {key} has {steps + 1} values; at most {_MOST_VALUES} fit")
                found[key] = [_tidy(one.low + index * (one.step or 1)) for index in range(steps + 1)]
        return found

    def grid_size(self) -> int:
        """Count the points of the grid."""
        return math.prod(len(values) for values in self.grid().values())

    def without_number(self, point: Mapping[str, Any]) -> str | None:
        """Say which value of a point is no finite number where the space has an interval; None if all are."""
        from optuna.distributions import CategoricalDistribution

        for key, value in point.items():
            numeric = key in self.distributions and not isinstance(self.distributions[key], CategoricalDistribution)
            if numeric and not _is_number(value):
                return f"{key}={value} is not a finite number"
        return None

    def check_point(self, point: Mapping[str, Any]) -> str | None:
        """Say what keeps a point from being one of the space's; None if nothing does."""
        if unknown := [key for key in point if key not in self.distributions]:
            return f"{unknown[0]} is not swept"
        if lacking := [key for key in self.distributions if key not in point]:
            return f"it has no {lacking[0]}"
        for key, one in self.distributions.items():
            try:
                inside = one._contains(one.to_internal_repr(point[key]))
            except (TypeError, ValueError):
                inside = False
            if not inside:
                return f"{key}={point[key]} is outside of {described(one)}"
        return None


def space_from(params: Mapping[str, Any], arguments: Sequence[str], loader: Any = None) -> Space:
    """Read a search space from a config's ``params`` and the command line, which has the last word on a key.

    Args:
        params: config key to Hydra's sweep syntax: ``interval(0.1,0.9)``, ``tag(log,interval(1e-3,1))``,
            ``int(interval(1,8))``, ``range(0.1,1.0,0.1)`` (the end is left out, as in Hydra's grids), ``choice(a,b)``.
        arguments: overrides; those without sweep syntax are the same for all jobs.
        loader: Hydra's config loader, for ``glob``.

    Raises:
        SweepError: nothing is swept, or a range has no values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=loader)
    own = parser.parse_overrides([f"{key}={_text(value)}" for key, value in params.items() if value is not None])
    told = parser.parse_overrides(list(arguments))
    distributions: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in [*own, *told]:
        key = str(override.key_or_group)
        if (reason := says_what_it_is(key)) is not None:
            raise SweepError(f"sweep.params: {reason}")
        if override.is_sweep_override():
            distributions[key] = _distribution(key, override)
            fixed.pop(key, None)
        else:
            distributions.pop(key, None)
            line = str(override.input_line) if override in told else _spelled(key, override.value())
            # A removed key (~models.experts) may be set anew by the next override.
            fixed[f"~{key}" if override.is_delete() else key] = line
    if not distributions:
        raise SweepError(
            "sweep: the search space is empty; say what varies, such as 'method.lambda=interval(0.1,1.5)', or choose a "
            "method's own with sweep=ties"
        )
    return Space(distributions, tuple(fixed.values()))


def described(distribution: BaseDistribution) -> str:
    """Write a distribution as Hydra's sweep syntax does."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return f"choice({','.join(map(_text, distribution.choices))})"
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None or step == 1:
        text = f"interval({low:.12g},{high:.12g})"
        text = f"int({text})" if isinstance(distribution, IntDistribution) else text
        return f"tag(log,{text})" if distribution.log else text
    return f"range({low:.12g},{high + step:.12g},{step:.12g})"  # the end is left out


def in_cube(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> Array:
    """Return a point's place (d,) in the unit cube: logarithmic where its distribution is, choices at distance 1."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: list[float] = []
    for key, one in sorted(distributions.items()):
        if isinstance(one, CategoricalDistribution):
            chosen = int(one.to_internal_repr(params[key]))
            found += [math.sqrt(0.5) * (index == chosen) for index in range(len(one.choices))]
            continue
        assert isinstance(one, FloatDistribution | IntDistribution)
        low, high, value = (math.log(x) if one.log else float(x) for x in (one.low, one.high, params[key]))
        found.append((value - low) / (high - low) if high > low else 0.0)
    return np.array(found)


def _distribution(key: str, override: Override) -> BaseDistribution:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    tags = getattr(sweep, "tags", None) or set()
    if odd := sorted(tags - {"log"}):
        raise SweepError(f"sweep: {key}: no tag {odd[0]!r} (there is log)")
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        assert low is not None
        assert high is not None
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SweepError(f"sweep: {key}=interval({low:g},{high:g}): the ends must be finite numbers")
        if not low < high:
            raise SweepError(f"sweep: {key}=interval({low:g},{high:g}): the first number must be less than the second")
        if "log" in tags and low <= 0:
            raise SweepError(f"sweep: {key}=tag(log,interval({low:g},{high:g})): must start above 0")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log="log" in tags)
        return FloatDistribution(low, high, log="log" in tags)
    if isinstance(sweep, RangeSweep):
        return _range(key, override, sweep)
    values: list[Any] = list(override.sweep_iterator())
    spelled = list(override.sweep_string_iterator())
    plain = [
        _tidy(value) if isinstance(value, int | float | bool) else text
        for value, text in zip(values, spelled, strict=True)
    ]
    if not plain:
        raise SweepError(f"sweep: {override.input_line}: there is nothing to choose among")
    return CategoricalDistribution(plain)


def _range(key: str, override: Override, sweep: RangeSweep) -> BaseDistribution:
    """Return what Hydra's grid would go through, without what adding up the steps leaves at the end of a float."""
    from optuna.distributions import FloatDistribution, IntDistribution

    assert sweep.start is not None
    assert sweep.stop is not None
    if not all(map(_is_number, (sweep.start, sweep.stop, sweep.step))):
        raise SweepError(f"sweep: {override.input_line}: the limits and the step must be finite numbers")
    count = math.ceil(_tidy((sweep.stop - sweep.start) / sweep.step)) if sweep.step else 0
    if count < 1:
        raise SweepError(f"sweep: {key}: {str(override.input_line).partition('=')[2]} has no values")
    low, high = sorted((sweep.start, _tidy(sweep.start + (count - 1) * sweep.step)))
    if isinstance(low, int) and isinstance(high, int) and isinstance(sweep.step, int):
        return IntDistribution(low, high, step=abs(sweep.step))
    return FloatDistribution(low, high, step=abs(sweep.step))


def _values(distribution: BaseDistribution) -> list[Value]:
    """List all choices, or the two ends."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]  # type: ignore[attr-defined]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tidy(value: Any) -> Any:
    """Take from a float what adding up steps has put at its end."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _spelled(key: str, value: Any) -> str:
    """Spell an override; a key may be new (a method's parameter), a group may not."""
    text = "null" if value is None else _text(value)
    return f"++{key}={text}" if "." in key else f"{key}={text}"
