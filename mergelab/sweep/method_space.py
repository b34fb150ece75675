"""The search space of a merge method, from the ranges of its parameters: what ``sweep=<method>`` searches.

A file ``conf/sweep/<method>.yaml`` takes its place where a paper has a better space. From a parameter's annotation:

- ``SweepRange`` gives the space, ``NotSwept`` none.
- A float between two bounds, such as a density: from one to the other. A bound that is not allowed itself is moved in
  by a twentieth of the range (less where the default is nearer). Where the upper end is a hundred times the lower one
  or more, the scale is logarithmic.
- A float without bounds, such as λ: from a fifth of its default to twice its default, at least to 1.
- A float with one bound, such as a learning rate: from a tenth to ten times its default, on a logarithmic scale.
- A whole number between two bounds: all from one to the other.

Everything else stays at its default: whole numbers that only cost time (samples, steps), weights, numbers whose default
is null, and choices. ``scope`` or ``estimator`` choose between variants of a method; a sweep that compares them names
them itself, as in ``sweep=<method> 'method.scope=choice(model,tensor)'``. A parameter that may be given for each expert
is searched as one number for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from mergelab.config import CONF_DIR
from mergelab.engine.parameters import key_of
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.sweep_range import NotSwept, SweepRange
from mergelab.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

    from mergelab.engine.method import MergeMethod

_LOG_FROM = 100  # times the lower end


def sweep_config_of(name: str) -> dict[str, Any]:
    """Return what ``conf/sweep/<name>.yaml`` would hold for the method ``name``: its space, its defaults first.

    Raises:
        SweepError: the method has no parameter to search.
    """
    method = get_method(name)
    params = method_space(method)
    if not params:
        raise SweepError(f"sweep={name}: {_nothing_to_search(method)}")
    defaults = {f"method.{key_of(key)}": field.get_default() for key, field in method.parameters.model_fields.items()}
    return {
        "defaults": ["_settings", "_self_", {"override /method": name}, {"override /hydra/sweeper": "mergelab"}],
        "sweep": {"params": params, "enqueue": [{key: defaults[key] for key in params}]},
    }


def searched_keys(name: str) -> list[str]:
    """Return the keys that the ready sweep ``name`` varies or sets; none for a file of the user's own."""
    from omegaconf import OmegaConf

    file = CONF_DIR / "sweep" / f"{name}.yaml"
    if file.is_file():
        content = OmegaConf.load(file)
    elif name in method_names():
        content = OmegaConf.create(sweep_config_of(name))
    else:
        return []
    params = OmegaConf.select(content, "sweep.params") or {}
    return [*map(str, params), *(f"method.{key}" for key in OmegaConf.select(content, "method") or {})]


def method_space(method: MergeMethod) -> dict[str, str]:
    """Return the search space of ``method``, by config key, in Hydra's sweep syntax; empty where there is none."""
    fields = method.parameters.model_fields
    spaces = {f"method.{key_of(name)}": _space_of(field) for name, field in fields.items()}
    return {key: space for key, space in spaces.items() if space}


def _space_of(field: FieldInfo) -> str:
    """Return the space of one parameter; nothing for one that is not searched."""
    default, marks = field.get_default(), field.metadata
    if any(isinstance(mark, NotSwept) for mark in marks):
        return ""
    stated = next((mark for mark in marks if isinstance(mark, SweepRange)), None)
    if field.annotation is int:
        low, high = (stated.low, stated.high) if stated else _whole_bounds(marks)
        return "" if low is None or high is None else f"range({int(low)},{int(high) + 1})"
    if field.annotation is not float or not isinstance(default, float):
        return ""
    return _interval(stated or _float_range(default, marks))


def _float_range(default: float, marks: Sequence[Any]) -> SweepRange | None:
    """Return the range that bounds and default give; None where neither tells a scale."""
    low, high = _bound(marks, "gt", "ge"), _bound(marks, "lt", "le")
    if low is None and high is None:
        first, last = sorted((default / 5, max(2 * default, 1.0) if default > 0 else 2 * default))
        return SweepRange(first, last) if default else None
    if low is None or high is None:
        return SweepRange(default / 10, default * 10, log=True) if default > 0 and high is None else None
    margin = (high - low) / 20
    if _is_open(marks, "gt"):
        low = min(low + margin, (low + default) / 2)
    if _is_open(marks, "lt"):
        high = max(high - margin, (high + default) / 2)
    return SweepRange(low, high, log=low > 0 and high / low >= _LOG_FROM)


def _whole_bounds(marks: Sequence[Any]) -> tuple[float | None, float | None]:
    """Return the smallest and the largest whole number that are allowed."""
    low, high = _bound(marks, "gt", "ge"), _bound(marks, "lt", "le")
    if low is not None and _is_open(marks, "gt"):
        low += 1
    if high is not None and _is_open(marks, "lt"):
        high -= 1
    return low, high


def _bound(marks: Sequence[Any], *names: str) -> float | None:
    return next((getattr(mark, name) for mark in marks for name in names if hasattr(mark, name)), None)


def _is_open(marks: Sequence[Any], name: str) -> bool:
    return _bound(marks, name) is not None


def _interval(found: SweepRange | None) -> str:
    if found is None:
        return ""
    text = f"interval({found.low:.6g},{found.high:.6g})"
    return f"tag(log,{text})" if found.log else text


def _nothing_to_search(method: MergeMethod) -> str:
    """Say in one line why there is no space, and what a sweep of the method's variants would be."""
    if "selection" in method.needs:
        return f"{method.name} chooses by the selecting examples itself; it cannot be swept"
    for name, field in method.parameters.model_fields.items():
        values = ["true", "false"] if field.annotation is bool else get_args(field.annotation)
        if field.annotation is bool or get_origin(field.annotation) is Literal:
            variants = f"'method.{key_of(name)}=choice({','.join(map(str, values))})'"
            return (
                f"{method.name} has no parameter with a range to search; to compare its variants: "
                f"sweep=custom method={method.name} {variants}"
            )
    return f"{method.name} has no parameter to search; to compare methods: -m method={method.name},ties"
