"""What there is to say of every merge method, read from its function and its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined

from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import key_of
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.value_ranges import allowed_values, range_of
from mergelab.ops.layout import inputs_first

FAMILIES = ("averages", "task vectors", "pairwise", "spectral", "alignment", "data", "adapter factors")
COLUMNS = (
    "method",
    "family",
    "needs",
    "cost",
    "memory",
    "data",
    "streaming",
    "what it does",
    "use it for",
    "parameters",
    "authors' values",
    "paper",
)


@dataclass(frozen=True)
class Settable:
    """A parameter as the catalogue shows it.

    Attributes:
        name: its config key.
        default: its default.
        authors: the value in the authors' code; the default where that is the same, or not known to be another.
        tuned: whether the authors choose it on validation data.
        allowed: what is allowed, in words.
    """

    name: str
    default: Any
    authors: Any
    tuned: bool
    allowed: str

    @property
    def shown(self) -> str:
        """The default as text."""
        return _shown(self.default)

    @property
    def departs(self) -> bool:
        """Whether the authors have another value, or none that is fixed."""
        return self.tuned or self.authors != self.default

    @property
    def of_authors(self) -> str:
        """The authors' value as text."""
        value = _shown(self.authors) if self.authors != self.default else ""
        return ", ".join(filter(None, (value, "tuned" if self.tuned else ""))) or self.shown

    def record(self) -> dict[str, Any]:
        """Return it for a program."""
        default = None if self.default is PydanticUndefined else self.default
        authors = None if self.authors is PydanticUndefined else self.authors
        return {
            "name": self.name,
            "default": default,
            "authors": authors,
            "tuned": self.tuned,
            "allowed": self.allowed,
        }


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
        work = f"; {method.work}" if method.work else ""
        if "selection" in method.needs:
            return "measures averages, then one pass"
        if method.kind == "models":
            return f"{'runs the experts' if method.needs else 'whole models'}, then another method{work}"
        if method.needs:
            return f"runs the experts, then one pass{work}"
        reads = method.prepare not in (None, inputs_first)  # the latter looks at names and shapes alone
        passes = "statistics, then one pass" if reads else "one pass"
        way = "in blocks" if method.elementwise else "tensor by tensor"
        return f"{passes}, {way}{', for each expert' * method.one_model_per_expert}{work}"

    @property
    def memory(self) -> str:
        """What is in memory at once while it merges, besides what has been merged."""
        method = self.method
        if method.kind in ("model", "models"):
            merging = "as the method that merges" if method.kind == "models" else "all models"
        else:
            merging = f"{'a block' if method.elementwise else 'the whole'} of one tensor of each model"
        if not method.needs:
            return merging
        running = "a model with its gradients" if "gradients" in method.needs else "a model"
        learnt = ", and what is learnt from it" if "data" in method.needs else ""
        return f"{running}{learnt}; then {merging}"

    @property
    def data(self) -> str:
        """Which examples it takes, and how many by default."""
        samples = self.method.parameters.model_fields.get("samples")
        if "selection" in self.method.needs:
            return "the examples that select"
        return "" if samples is None else f"{samples.get_default()} training examples of each expert"

    @property
    def streaming(self) -> str:
        """Whether a merge from disk to disk, a tensor at a time, gives what a merge in memory gives."""
        if self.method.kind == "model":
            return "none: whole models in memory"
        if "selection" in self.method.needs:
            return "exact, once the experts are chosen"
        first = self.method.kind == "models" or self.method.needs or "statistics" in self.cost
        return "exact, after a first pass" if first else "exact"

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.method.function.__doc__ or "").strip().splitlines()[0] if self.method.function.__doc__ else ""

    @property
    def parameters(self) -> list[tuple[str, str, str]]:
        """Name, default and what is allowed, of each parameter."""
        return [(each.name, each.shown, each.allowed) for each in self.settable]

    @property
    def settable(self) -> list[Settable]:
        """What is to be said of each parameter."""
        method = self.method
        return [
            Settable(
                name=key_of(name),
                default=field.get_default(),
                authors=method.authors.get(name, field.get_default()),
                tuned=name in method.tuned,
                allowed=allowed_values(field.annotation, field.metadata),
            )
            for name, field in method.parameters.model_fields.items()
        ]

    @property
    def authors(self) -> str:
        """The authors' values where they are not the defaults, and what the authors tune, in short."""
        return ", ".join(f"{each.name}={each.of_authors}" for each in self.settable if each.departs)

    @property
    def settings(self) -> str:
        """The parameters with their defaults and ranges, in short."""
        fields = self.method.parameters.model_fields
        ranges = [range_of(field.annotation, field.metadata) for field in fields.values()]
        named = [f"{name}={default}" for name, default, _ in self.parameters]
        return ", ".join(f"{each} ({limits})" if limits else each for each, limits in zip(named, ranges, strict=True))

    def cells(self) -> list[str]:
        """Return the row of the table."""
        method = self.method
        return [
            *(self.name, self.family, self.needs, self.cost, self.memory, self.data, self.streaming),
            *(self.summary, method.use, self.settings, self.authors, self.paper),
        ]

    def record(self) -> dict[str, Any]:
        """Return what the row says, for a program: needs as a list, and the parameters with their values."""
        values: dict[str, Any] = dict(zip(COLUMNS, self.cells(), strict=True))
        values["needs"] = self.needs.split()
        values["parameters"] = [each.record() for each in self.settable]
        values["authors' values"] = {each.name: each.authors for each in self.settable if each.authors != each.default}
        return values


def entry(name: str) -> Entry:
    """Look up one method; raises `ConfigError` where there is none."""
    return Entry(get_method(name))


def entries() -> list[Entry]:
    """List all built-in methods, family by family: what is tried first comes first."""
    return sorted((entry(name) for name in method_names()), key=lambda each: (FAMILIES.index(each.family), each.name))


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
