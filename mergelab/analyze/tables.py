"""An analysis in the terminal: tables that fit it, or the format that was asked for."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mergelab.analyze.ranks import mean_rank
from mergelab.analyze.result import Analysis, rows
from mergelab.console.formats import chosen_format, for_a_page, for_a_program
from mergelab.console.progress import is_silenced
from mergelab.console.tables import print_fitting

if TYPE_CHECKING:
    from rich.table import Table

    from mergelab.analyze.measures import Sums
    from mergelab.analyze.paths import Path, Point

UNDEFINED = "–"
LEGEND = (
    "sign conflict: the share of Σ|τ| where experts' signs differ; after trim: of the entries that trimming keeps, the "
    f"share where they do; {UNDEFINED}: undefined, as the angle to a task vector that is 0"
)


def print_analysis(analysis: Analysis) -> None:
    """Print the figures of the whole, of each layer and of each path; with a ``--format``, all but single tensors'."""
    if is_silenced():
        return
    form = chosen_format()
    if form in ("csv", "json"):
        found = [row for row in rows(analysis) if row["scope"] != "tensor"]
        sys.stdout.write(for_a_program(form, found, title=_title(analysis), note=analysis.note))
        return
    if form in ("markdown", "latex"):
        for title, header, body in _plain(analysis):
            header = [name.replace("\n", " ") for name in header]
            sys.stdout.write(for_a_page(form, header, body, title) + "\n")
        return
    print_fitting(_experts_tables(analysis))
    if analysis.pairs:
        print_fitting(_overlap_tables(analysis))
    print_fitting(_layer_tables(analysis))
    for path in (analysis.line, analysis.plane):
        if path is not None:
            print_fitting(iter([_table(_path_title(path), *_path_rows(path, _shown(path)))]))


def _title(analysis: Analysis) -> str:
    return f"task vectors of {analysis.models}"


def _plain(analysis: Analysis) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    yield _title(analysis), *_expert_rows(analysis, cosines=True)
    if analysis.pairs:
        yield f"overlap of the largest {analysis.density:g}", *_matrix_rows(analysis, "overlap")
    yield "layers", *_layer_rows(analysis, each=True)
    for path in (analysis.line, analysis.plane):
        if path is not None:
            yield _path_title(path), *_path_rows(path, path.points)


# ------------------------------------------------------------------------------------------------------ the experts


def _experts_tables(analysis: Analysis) -> Iterator[Table]:
    if analysis.pairs:
        caption = f"{analysis.note}\ncolumns 1, 2, …: the cosine with that expert's task vector\n{LEGEND}"
        yield _table(_title(analysis), *_expert_rows(analysis, cosines=True), caption)
    fullest, caption = _expert_rows(analysis, cosines=False), f"{analysis.note}\n{LEGEND}"
    yield from _narrower(_title(analysis), *fullest, caption, fewest=2)


def _expert_rows(analysis: Analysis, *, cosines: bool) -> tuple[list[str], list[list[str]]]:
    sums, several = analysis.whole, bool(analysis.pairs)
    header = ["expert", "norm", *["sign\nconflict"] * several, "rms"]
    numbers = range(len(analysis.labels))
    if cosines and several:
        header += [str(number + 1) for number in numbers]
    body = []
    for index, (label, norm) in enumerate(zip(analysis.labels, sums.norms, strict=True)):
        row = [
            f"{index + 1} {label}" if several else label,
            _number(norm),
            _number(norm / math.sqrt(sums.entries or 1)),
        ]
        row += [_share(sums.conflict_of(index))] * several
        if cosines and several:
            row += [_share(sums.cosine(index, other)) for other in numbers]
        body.append(row)
    return header, body


def _overlap_tables(analysis: Analysis) -> Iterator[Table]:
    chance = f"two sets chosen at random have {analysis.chance_overlap:.3f}"
    title = f"overlap of the largest {analysis.density:g}"
    yield _table(title, *_matrix_rows(analysis, "overlap"), chance)
    yield _table(f"cosine and {title}", *_pair_rows(analysis), chance)


def _matrix_rows(analysis: Analysis, quantity: str) -> tuple[list[str], list[list[str]]]:
    read, count = getattr(analysis.whole, quantity), range(len(analysis.labels))
    header = ["expert", *(str(number + 1) for number in count)]
    return header, [
        [f"{one + 1} {analysis.labels[one]}", *(_share(read(one, other)) for other in count)] for one in count
    ]


def _pair_rows(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    sums = analysis.whole
    return ["experts", "cosine", "overlap"], [
        [f"{one + 1}, {other + 1}", _share(sums.cosine(one, other)), _share(sums.overlap(one, other))]
        for one, other in analysis.pairs
    ]


# ------------------------------------------------------------------------------------------------------- the layers


def _layer_tables(analysis: Analysis) -> Iterator[Table]:
    caption = "columns 1, 2, …: the norm of that expert's task vector" if len(analysis.labels) > 1 else ""
    yield _table("layers", *_layer_rows(analysis, each=True), caption)
    yield from _narrower("layers", *_layer_rows(analysis, each=False), "norm: the mean of the experts'", fewest=2)


def _layer_rows(analysis: Analysis, *, each: bool) -> tuple[list[str], list[list[str]]]:
    several, ranks = bool(analysis.pairs), analysis.ranks_of_layers()
    numbered = [str(number + 1) for number in range(len(analysis.labels))] if several else ["norm"]
    header = ["layer", *(numbered if each else ["norm"])]
    header += ["mean\ncosine", "mean\noverlap", "sign\nconflict", "after\ntrim"] if several else []
    header += ["effective\nrank"] * bool(ranks)
    body = []
    for layer, sums in analysis.layers.items():
        norms = sums.norms if each else [math.fsum(sums.norms) / len(sums.norms)]
        row = [layer, *map(_number, norms), *(_between(analysis, sums) if several else [])]
        if ranks:
            found = [rank.effective for own in ranks.get(layer, ()) for rank in own]
            row.append(_number(mean_rank(found)))
        body.append(row)
    return header, body


def _between(analysis: Analysis, sums: Sums) -> list[str]:
    """Return the cells that say how the experts' task vectors stand to each other."""
    cosines = [sums.cosine(one, other) for one, other in analysis.pairs]
    overlaps = [sums.overlap(one, other) for one, other in analysis.pairs]
    return [_share(each) for each in (mean_rank(cosines), mean_rank(overlaps), sums.conflict, sums.kept_conflict)]


# -------------------------------------------------------------------------------------------------------- the paths


def _path_title(path: Path) -> str:
    where = "line" if len(path.models) == 2 else "plane"
    metrics = ", ".join(sorted(set(filter(None, path.metrics.values()))))
    note = "; the models, and the point of the least loss" if where == "plane" else ""
    return f"{where} {' – '.join(path.models)}: {metrics}{note}"


def _shown(path: Path) -> list[Point]:
    """Return all points of a line; of a plane its models and the point of the least loss."""
    if len(path.models) == 2:
        return list(path.points)
    found = []
    for task in path.metrics:
        own = [point for point in path.points if point.task == task]
        found += [point for point in own if point.model]
        lossy = [point for point in own if point.loss is not None]
        if lossy:
            found.append(min(lossy, key=lambda point: point.loss or 0.0))
    return found


def _path_rows(path: Path, points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    several = len(path.metrics) > 1
    header = [*["task"] * several, *path.models, "score", "interval", "loss"]
    body = []
    for point in points:
        score = point.score
        interval = "" if score is None else f"[{_number(score.low)}, {_number(score.high)}]"
        shares = [f"{share:.2f}" for share in point.coefficients]
        value = UNDEFINED if score is None else _number(score.value)
        body.append([*[point.task] * several, *shares, value, interval, _number(point.loss)])
    return header, body


def _table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], caption: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", caption=caption or None)
    table.caption_justify = "left"
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(Text, row))
    return table


def _narrower(
    title: str, header: Sequence[str], body: Sequence[Sequence[str]], caption: str, *, fewest: int
) -> Iterator[Table]:
    """Yield a table, and the same without its last columns, one after another; the caption says which are left out."""
    for count in range(len(header), fewest - 1, -1):
        left_out = ", ".join(name.replace("\n", " ") for name in header[count:])
        said = f"{caption}\ntoo narrow for {left_out}; --format=csv has everything" if left_out else caption
        yield _table(title, header[:count], [row[:count] for row in body], said)


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"
