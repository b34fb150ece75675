"""The study's page: tables with intervals and corrected p-values, λ curves, cosines, costs, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.glue_minilm.curves import Curve, Point, curve_of, draw, table
from experiments.glue_minilm.skill import SKILL
from experiments.glue_minilm.steps import ADAPTERS, EXPERTS, SAME, SEEDS, SEVERAL, Study
from experiments.resumable import Record, Step

FIGURE = "lambda.png"
INTRODUCTION = """\
Scores are of the half of the validation split that reports, with 95 % bootstrap intervals. *p* is of a paired bootstrap
test against the best expert, on the same examples; *Holm* corrects it for the number of merges in the table. *own
skill* is what the base was made for: Spearman's correlation of STS-B's scores with the cosine of two sentences'
embeddings (mean over tokens), on every third pair of STS-B's validation split; it is {skill} for the base. What a merge
has lost of it is forgetting. Of a grid, *holdout* is the point that is best on the other half of the split; *oracle* is
the point that is best on the half that reports, which flatters and is no result."""
GRIDS = """\
Every point of the grids: the score on the half that reports, in brackets that on the half that selects; bold: the
paper's values."""


@dataclass(frozen=True)
class _Row:
    """A line of a table: a merge, and what was measured of it."""

    name: str
    record: Record
    model: Mapping[str, Any]


def write_page(
    work: Path,
    study: Study,
    every: Sequence[Step],
    records: Mapping[Step, Record],
    command: str,
    skills: Mapping[str, float],
    *,
    figure: bool = False,
) -> None:
    """Write ``page.md`` into the study's folder, and with ``figure`` the λ curves beside it.

    Args:
        work: the study's folder.
        study: what was run.
        every: all its steps, in order.
        records: what came of those that were run.
        command: the study's own.
        skills: the base's own skill, in the base and in the experts, by folder.
    """
    curves = {step: curve_of(step, record) for step, record in records.items() if "points" in record}
    if figure and curves:
        draw(list(curves.values()), work / FIGURE)
    title = "GLUE experts from the embedded miniature" if study.mini else "GLUE experts from MiniLM"
    parts = [f"# {title}, merged", f"```bash\n{command}\n```"]
    if study.mini:
        parts.append("**The miniature's figures say nothing about GLUE**: small models on generated examples.")
    base = f"{skills['base']:.3f}" if "base" in skills else "not measured"
    parts += [INTRODUCTION.format(skill=base), *_missing(every, records), *_experts(study, skills)]
    parts += _failed({step: record for step, record in records.items() if step.part == EXPERTS})
    for part in (SAME, SEVERAL, ADAPTERS):
        for of in dict.fromkeys(step.of for step in records if step.part == part):
            own = {step: record for step, record in records.items() if (step.part, step.of) == (part, of)}
            parts += [f"## {part.capitalize()}: {of.replace('+', ', ')}", *_part(own, curves, part == SEVERAL)]
            grids = [table(curves[step]) for step in own if step in curves]
            parts += [*([GRIDS] if grids else []), *grids, *_cosines(work, own)]
    if figure and curves:
        parts += ["## λ curves", f"![Scores over λ; the papers' values are marked]({FIGURE})"]
    parts += ["## Costs", _costs(records), "## Commands"]
    parts.append("```bash\n" + "\n".join(step.command for step in records) + "\n```")
    (work / "page.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _missing(every: Sequence[Step], records: Mapping[Step, Record]) -> list[str]:
    left: dict[str, list[str]] = {}
    for step in every:
        if step not in records:
            left.setdefault(f"{step.part} ({step.of})", []).append(step.name)
    if not left:
        return []
    lines = [f"- {part}: {', '.join(names)}" for part, names in left.items()]
    return ["**Not run**, so that nothing is said of it:\n\n" + "\n".join(lines)]


def _experts(study: Study, skills: Mapping[str, float]) -> list[str]:
    rows = ["| expert | best epoch | held-out loss | held-out scores | own skill |", "| --- | --- | --- | --- | --- |"]
    for lora in (False, True):
        for task in study.tasks:
            for seed in SEEDS:
                place = study.expert(task, seed, lora=lora)
                file = Path(place, "mergelab_training.json")
                if not file.is_file():
                    continue
                best = json.loads(file.read_text(encoding="utf-8"))
                scores = ", ".join(f"{name} {value:.3f}" for name, value in best["held_out"].items() if name != "loss")
                skill = f"{skills[place]:.3f}" if place in skills else ""
                rows.append(f"| `{place}` | {best['epoch']} | {best['held_out']['loss']:.3f} | {scores} | {skill} |")
    said = "Each on a tenth of its training examples, which was held out and chose the epoch:"
    return ["## Experts", said, "\n".join(rows)] if len(rows) > 2 else []


def _part(records: Mapping[Step, Record], curves: Mapping[Step, Curve], several: bool) -> list[str]:
    """Return the table of a part, and the merges that failed."""
    whole = [
        _Row(step.name, record, record["models"][-1])
        for step, record in records.items()
        if "models" in record and step not in curves
    ]
    for step in records:
        if step in curves:
            chosen = {"holdout": curves[step].holdout, "oracle": curves[step].oracle}
            whole += [_Row(_named(curves[step].method, kind, point), records[step], point.model)
                      for kind, point in chosen.items()]  # fmt: skip
    if not whole:
        return _failed(records)
    # Base and experts are the same for all of the part; under holdout and oracle they report on the same half.
    others = whole[0].record["models"]
    found = ["\n".join(_several(whole, others) if several else _one(whole, others))]
    return [*found, *_failed(records)]


def _failed(records: Mapping[Step, Record]) -> list[str]:
    lines = [
        f"- {step.of}, {step.name} failed: {record['error']}" for step, record in records.items() if record["error"]
    ]
    return ["\n".join(lines)] if lines else []


def _named(method: str, kind: str, point: Point) -> str:
    settings = ", ".join(f"{name} {value:g}" for name, value in point.settings.items())
    return f"{method}, {kind}: {settings}"


def _one(rows: Sequence[_Row], models: Sequence[Mapping[str, Any]]) -> list[str]:
    tests = [row for row in rows if row.model.get("p_value") is not None and ", oracle: " not in row.name]
    adjusted = dict(zip([row.name for row in tests], _holm([row.model["p_value"] for row in tests]), strict=True))
    (task,) = rows[0].model["results"]
    metric = rows[0].model["results"][task]["primary"]
    lines = [f"| | {metric} | p | Holm | own skill | merge s |", "| --- | --- | --- | --- | --- | --- |"]
    for model in models:
        if model["role"] in ("base", "expert"):
            lines.append(f"| {model['role']}: {Path(model['label']).name} | {_score(model, task)} | | | | |")
    for row in rows:
        model, test = row.model, row.name in adjusted
        tested = [f"{model['p_value']:.3f}", f"{adjusted[row.name]:.3f}"] if test else ["", ""]
        skill = f"{row.record[SKILL]:.3f}" if SKILL in row.record else ""
        cells = [row.name, _score(model, task), *tested, skill, _seconds(model)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _several(rows: Sequence[_Row], models: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = list(rows[0].model["results"])
    lines = ["| | normalised | " + " | ".join(tasks) + " | own skill | merge s |"]
    lines.append("| --- | --- | " + " | ".join("---" for _ in tasks) + " | --- | --- |")
    for model in models:
        if model["role"] in ("base", "expert"):
            own = [_score(model, task) for task in tasks]
            lines.append(f"| {model['role']}: {_short(model['label'])} | | " + " | ".join(own) + " | | |")
    for row in rows:
        skill = f"{row.record[SKILL]:.3f}" if SKILL in row.record else ""
        cells = [row.name, f"{row.model['normalised']:.3f}", *(_score(row.model, task) for task in tasks)]
        lines.append("| " + " | ".join([*cells, skill, _seconds(row.model)]) + " |")
    return lines


def _short(label: str) -> str:
    return "/".join(Path(label).parts[-2:])


def _score(model: Mapping[str, Any], task: str) -> str:
    result = model["results"].get(task)
    if result is None:
        return ""
    score = result["report"][result["primary"]]
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _seconds(model: Mapping[str, Any]) -> str:
    return f"{model['merge_seconds']:.1f}" if model.get("merge_seconds") is not None else ""


def _holm(p_values: Sequence[float]) -> list[float]:
    from mergelab.report.significance import holm

    return holm(p_values)


def _cosines(work: Path, records: Mapping[Step, Record]) -> list[str]:
    """Return the cosines of the experts' task vectors, as the analysis found them."""
    from mergelab.tracking import names

    found = []
    for step in records:
        file = work / "steps" / step.key / names.ANALYSIS_JSON
        if step.name == "analysis" and file.is_file():
            analysis = json.loads(file.read_text(encoding="utf-8"))
            found += ["Cosines of the experts' task vectors:", matrix(analysis)]
    return found


def matrix(analysis: Mapping[str, Any]) -> str:
    """Return the symmetric matrix of cosines over all tensors as a table."""
    names, cosines = list(analysis["experts"]), analysis["whole"]["cosine"]
    lines = ["| | " + " | ".join(names) + " |", "| --- | " + " | ".join("---" for _ in names) + " |"]
    for name, row in zip(names, cosines, strict=True):
        lines.append(f"| {name} | " + " | ".join("" if value is None else f"{value:.2f}" for value in row) + " |")
    return "\n".join(lines)


def _costs(records: Mapping[Step, Record]) -> str:
    rows = ["| part | steps | seconds of the wall |", "| --- | --- | --- |"]
    for part in dict.fromkeys(step.part for step in records):
        seconds = [record["seconds"] for step, record in records.items() if step.part == part]
        rows.append(f"| {part} | {len(seconds)} | {sum(seconds):.0f} |")
    return "\n".join(rows)
