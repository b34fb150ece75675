"""What there is to say of every merge method, read from its function and its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import key_of
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.value_ranges import allowed_values, range_of
from mergelab.ops.layout import inputs_first

COLUMNS = ("method", "family", "needs", "cost", "what it does", "parameters", "paper")


@dataclass(frozen=True)
class Entry:
    """A method as the catalogue shows it."""

    method: MergeMethod

    @property
    def name(self) -> str:
        """Its name in configs."""
        return self.method.name

    @property
    def family(self) -> str:
        """The heading it stands under."""
        return self.method.family

    @property
    def paper(self) -> str:
        """Authors, year, arXiv id."""
        return self.method.paper

    @property
    def needs(self) -> str:
        """What it needs beside experts: B a base, D data, G gradients, S examples that select; 2 for exactly two.

        L: experts that are LoRA adapters.
        """
        method = self.method
        letters = ["B"] * method.needs_base + ["D"] * ("data" in method.needs) + ["G"] * ("gradients" in method.needs)
        letters += ["S"] * ("selection" in method.needs) + ["L"] * method.takes_adapters
        return " ".join([*letters, *(["2"] if method.min_experts == method.max_experts == 2 else [])])

    @property
    def cost(self) -> str:
        """How the work goes through the models."""
        method = self.method
        if "selection" in method.needs:
            return "measures averages, then one pass"
        if method.kind == "models":
            return f"{'runs the experts' if method.needs else 'whole models'}, then another method"
        if method.needs:
            return "runs the experts, then one pass" + (f"; {method.work}" if method.work else "")
        reads = method.prepare not in (None, inputs_first)  # the latter looks at names and shapes alone
        passes = "statistics, then one pass" if reads else "one pass"
        way = "in blocks" if method.elementwise else "tensor by tensor"
        return f"{passes}, {way}{', for each expert' * method.one_model_per_expert}" + (
            f"; {method.work}" if method.work else ""
        )

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.method.function.__doc__ or "").strip().splitlines()[0] if self.method.function.__doc__ else ""

    @property
    def parameters(self) -> list[tuple[str, str, str]]:
        """Name, default and what is allowed, of each parameter."""
        fields = self.method.parameters.model_fields
        return [
            (key_of(name), _shown(field.get_default()), allowed_values(field.annotation, field.metadata))
            for name, field in fields.items()
        ]

    @property
    def settings(self) -> str:
        """The parameters with their defaults and ranges, in short."""
        fields = self.method.parameters.model_fields
        ranges = [range_of(field.annotation, field.metadata) for field in fields.values()]
        named = [f"{name}={default}" for name, default, _ in self.parameters]
        return ", ".join(f"{each} ({limits})" if limits else each for each, limits in zip(named, ranges, strict=True))

    def cells(self) -> list[str]:
        """Return the row of the table."""
        return [self.name, self.family, self.needs, self.cost, self.summary, self.settings, self.paper]


def entry(name: str) -> Entry:
    """Look up one method; raises `ConfigError` where there is none."""
    return Entry(get_method(name))


def entries() -> list[Entry]:
    """List all built-in methods, family by family."""
    return sorted((entry(name) for name in method_names()), key=lambda each: (each.family, each.name))


def markdown(found: Sequence[Entry]) -> str:
    """Write the table for a page."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in each.cells()) + " |" for each in found]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
