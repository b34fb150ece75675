"""The figures of an analysis, as rows, as JSON and as Parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from mergelab.analyze.measures import Sums, TensorSums, by_layer, whole
from mergelab.analyze.paths import Path as MeasuredPath
from mergelab.analyze.paths import Point
from mergelab.analyze.ranks import MatrixRanks, mean_rank

Scope = Literal["model", "layer", "tensor"]
SCHEMA = 1  # of the JSON

DEFINITIONS: Mapping[str, str] = {
    "norm": "‖τ‖, the Euclidean length of an expert's task vector τ = θ_expert − θ_base",
    "rms": "‖τ‖/√n, the root mean square change of an entry",
    "cosine": "⟨τ_a, τ_b⟩ / (‖τ_a‖·‖τ_b‖); undefined where one of them is 0",
    "conflict": "the share of Σ|τ| that is in entries where one expert's change is above 0 and another's below",
    "conflict_count": "the share of the changed entries where experts disagree in sign",
    "kept_conflict": "the share of the largest entries where the experts that have them among theirs disagree in sign",
    "overlap": "|A∩B| / |A∪B| of two experts' largest entries (those of at least the threshold that leaves the share "
    "`density` of the whole task vector, as TIES trims)",
    "effective_rank": "exp(−Σ p ln p) with p = σ/Σσ of a matrix's task vector (Roy & Vetterli 2007); of a layer the "
    "mean over its matrices",
    "stable_rank": "‖τ‖_F² / ‖τ‖_2² of a matrix's task vector; of a layer the mean over its matrices",
}


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
        models: what is analysed.
        base: the base's label.
        experts: the experts' names, in the order of every index here.
        labels: what tables call them.
        density: the share of entries that count as the largest.
        note: what is left out of it, and where the models come from.
        tensors: the sums of each tensor.
        ranks: the ranks of each matrix; None where they were not computed.
        line, plane: what was measured between models; None where nothing was.
    """

    models: str
    base: str
    experts: tuple[str, ...]
    labels: tuple[str, ...]
    density: float
    note: str
    tensors: tuple[TensorSums, ...]
    ranks: tuple[MatrixRanks, ...] | None = None
    line: MeasuredPath | None = None
    plane: MeasuredPath | None = None

    @property
    def whole(self) -> Sums:
        """The sums over all tensors."""
        return whole(self.tensors, len(self.experts))

    @property
    def layers(self) -> dict[str, Sums]:
        """The sums over each layer."""
        return by_layer(self.tensors)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The indices of each two experts."""
        return list(combinations(range(len(self.experts)), 2))

    @property
    def chance_overlap(self) -> float:
        """The overlap that two sets of entries have on average that are chosen at random: d/(2−d)."""
        return self.density / (2 - self.density)

    def ranks_of_layers(self) -> dict[str, list[list[MatrixRanks]]]:
        """Return for each layer the ranks of its matrices, for each expert; empty where ranks were not computed."""
        layer_of = {tensor.name: tensor.layer for tensor in self.tensors}
        found: dict[str, list[list[MatrixRanks]]] = {}
        for rank in self.ranks or ():
            layer = found.setdefault(layer_of[rank.name], [[] for _ in self.experts])
            layer[rank.expert].append(rank)
        return {layer: found[layer] for layer in self.layers if layer in found}


def rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """Yield each figure: its scope and place, the quantity, the expert or experts, and the value (None: undefined)."""
    yield from _rows_of(analysis, "model", "", analysis.whole)
    for layer, sums in analysis.layers.items():
        yield from _rows_of(analysis, "layer", layer, sums)
    for tensor in analysis.tensors:
        yield from _rows_of(analysis, "tensor", tensor.name, tensor.sums)
    for layer, each in analysis.ranks_of_layers().items():
        for expert, own in zip(analysis.experts, each, strict=True):
            yield _row("layer", layer, "effective_rank", mean_rank([rank.effective for rank in own]), expert)
            yield _row("layer", layer, "stable_rank", mean_rank([rank.stable for rank in own]), expert)
    for rank in analysis.ranks or ():
        expert = analysis.experts[rank.expert]
        yield _row("tensor", rank.name, "effective_rank", rank.effective, expert)
        yield _row("tensor", rank.name, "stable_rank", rank.stable, expert)


def _rows_of(analysis: Analysis, scope: Scope, place: str, sums: Sums) -> Iterator[dict[str, Any]]:
    experts = analysis.experts
    for index, (expert, norm) in enumerate(zip(experts, sums.norms, strict=True)):
        yield _row(scope, place, "norm", norm, expert)
        yield _row(scope, place, "rms", norm / sums.entries**0.5 if sums.entries else None, expert)
        yield _row(scope, place, "conflict", sums.conflict_of(index), expert)
    for name in ("conflict", "conflict_count", "kept_conflict"):
        yield _row(scope, place, name, getattr(sums, name))
    for one, other in analysis.pairs:
        yield _row(scope, place, "cosine", sums.cosine(one, other), experts[one], experts[other])
        yield _row(scope, place, "overlap", sums.overlap(one, other), experts[one], experts[other])


def _row(
    scope: Scope, place: str, quantity: str, value: float | None, expert: str = "", other: str = ""
) -> dict[str, Any]:
    return {"scope": scope, "place": place, "quantity": quantity, "expert": expert, "other": other, "value": value}


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Return the figures of the whole and of each layer by name; what is undefined is None, never NaN."""
    ranks = analysis.ranks_of_layers()
    layers = [
        {"layer": layer, **_summary(analysis, sums), **_ranks(analysis, ranks.get(layer))}
        for layer, sums in analysis.layers.items()
    ]
    return {
        "schema": SCHEMA,
        "models": analysis.models,
        "base": analysis.base,
        "experts": dict(zip(analysis.experts, analysis.labels, strict=True)),
        "density": analysis.density,
        "chance_overlap": analysis.chance_overlap,
        "note": analysis.note,
        "definitions": dict(DEFINITIONS),
        "whole": _summary(analysis, analysis.whole),
        "layers": layers,
        "line": None if analysis.line is None else _path(analysis.line),
        "plane": None if analysis.plane is None else _path(analysis.plane),
    }


def _summary(analysis: Analysis, sums: Sums) -> dict[str, Any]:
    experts, count = analysis.experts, range(len(analysis.experts))

    def matrix(read: Any) -> list[list[float | None]]:
        return [[read(one, other) for other in count] for one in count]

    return {
        "entries": sums.entries,
        "norm": dict(zip(experts, sums.norms, strict=True)),
        "cosine": matrix(sums.cosine),
        "conflict": sums.conflict,
        "conflict_of": {expert: sums.conflict_of(index) for index, expert in enumerate(experts)},
        "conflict_count": sums.conflict_count,
        "kept_conflict": sums.kept_conflict,
        "overlap": matrix(sums.overlap),
    }


def _ranks(analysis: Analysis, found: Sequence[Sequence[MatrixRanks]] | None) -> dict[str, Any]:
    if found is None:
        return {}
    named = dict(zip(analysis.experts, found, strict=True))
    return {
        "effective_rank": {name: mean_rank([rank.effective for rank in own]) for name, own in named.items()},
        "stable_rank": {name: mean_rank([rank.stable for rank in own]) for name, own in named.items()},
    }


def _path(path: MeasuredPath) -> dict[str, Any]:
    return {
        "models": list(path.models),
        "corners": [list(corner) for corner in path.corners],
        "metrics": dict(path.metrics),
        "points": [_point(point) for point in path.points],
    }


def _point(point: Point) -> dict[str, Any]:
    score = None if point.score is None else [_finite(getattr(point.score, key)) for key in ("value", "low", "high")]
    return {
        "task": point.task,
        "place": list(point.place),
        "coefficients": list(point.coefficients),
        "model": point.model,
        "score": score,
        "loss": _finite(point.loss),
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def write_json(analysis: Analysis, file: Path) -> None:
    """Write `as_json`."""
    file.write_text(json.dumps(as_json(analysis), ensure_ascii=False, allow_nan=False, indent=1), encoding="utf-8")


def write_parquet(analysis: Analysis, file: Path) -> None:
    """Write `rows`, those of single tensors included."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = [(name, pa.string()) for name in ("scope", "place", "quantity", "expert", "other")]
    pq.write_table(pa.Table.from_pylist(list(rows(analysis)), schema=pa.schema([*text, ("value", pa.float64())])), file)
