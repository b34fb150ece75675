"""Reproduce a published table: the published numbers beside ours, on the same models, with what differs; resumable.

Usage:
    python experiments/published.py experiments/mergecraft_glue/recipe.yaml --work outputs/mergecraft_glue
    python experiments/published.py experiments/fusionbench_gpt2/recipe.yaml --work outputs/fusionbench --rows soup,ties
    python experiments/published.py experiments/mergebench/recipe.yaml --work outputs/mergebench -- device=cuda

A recipe is a YAML file: `title` and `source` of the table, the `scale` of its numbers, the `differences` of the two
protocols, and for each of its `rows` and `measures` the arguments of mergelab and the published number. A row with
lists of values is a grid, of which the best point counts, as in tables with the best λ. What follows ``--`` is given to
every command. The models come from the Hugging Face Hub; a command that fails is on the page with its error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.resumable import Record, Step, recorded, run

SETTINGS = ("eval.preflight=false", "tracking=none")


def steps(recipe: Mapping[str, Any], rows: Sequence[str] | None = None, further: Sequence[str] = ()) -> list[Step]:
    """Return a command for each row and measure of a recipe.

    Args:
        recipe: the YAML file's content.
        rows: names of the rows that are run; None for all.
        further: arguments that every command is given.

    Raises:
        SystemExit: there is no row of such a name.
    """
    if odd := set(rows or ()) - set(recipe["rows"]):
        sys.exit(f"error: --rows: {min(odd)} is none of {', '.join(recipe['rows'])}")
    found = []
    for row, arguments in recipe["rows"].items():
        if rows is not None and row not in rows:
            continue
        for measure, models in recipe["measures"].items():
            own = arguments.get("of", {}).get(measure, [])
            grid = ("-m",) if any(_is_list(each) for each in arguments["arguments"]) else ()
            shared = recipe.get("shared", ())
            every = (*grid, *arguments["arguments"], *shared, *models, *own, *SETTINGS, *further)
            found.append(Step("published", row, measure, every))
    return found


def _is_list(argument: str) -> bool:
    value = argument.partition("=")[2]
    return "," in value and value[0] not in "[{"


def page(recipe: Mapping[str, Any], records: Mapping[Step, Record], every: Sequence[Step]) -> str:
    """Return the page: published and own numbers, what differs, costs and commands."""
    measures = list(recipe["measures"])
    scale = recipe.get("scale", 1)
    head = ["row"] + [f"{measure}: {whose}" for measure in measures for whose in ("published", "here")]
    lines = ["| " + " | ".join(head) + " | merge s |", "| " + " | ".join("---" for _ in range(len(head) + 1)) + " |"]
    for role, published in recipe.get("single", {}).items():
        cells = []
        for measure in measures:
            cells += [_number(published.get(measure), scale), _single(role, measure, records, scale)]
        lines.append(f"| {role} | " + " | ".join(cells) + " | |")
    for row, described in recipe["rows"].items():
        cells, seconds = [], []
        for measure in measures:
            record = next((records[step] for step in records if (step.of, step.name) == (row, measure)), None)
            model = None if record is None or record["error"] else _best(record)
            cells += [_number(described.get("published", {}).get(measure), scale), _score(model, scale)]
            seconds += [model["merge_seconds"]] if model else []
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {f'{max(seconds):.1f}' if seconds else ''} |")
    failed = [f"- {step.of}, {step.name}: {record['error']}" for step, record in records.items() if record["error"]]
    missing = [f"- {step.of}, {step.name}" for step in every if step not in records]
    parts = [f"# {recipe['title']}", recipe["source"], "\n".join(lines), "## What differs"]
    parts.append("\n".join(f"- {text}" for text in recipe["differences"]))
    parts += ["## Failed", "\n".join(failed)] if failed else []
    parts += ["## Not run", "\n".join(missing)] if missing else []
    parts += ["## Commands", "```bash\n" + "\n".join(step.command for step in every) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _best(record: Record) -> Mapping[str, Any]:
    """Return the merged model: of a grid the one with the best score, as tables with the best λ have it."""
    found: list[Mapping[str, Any]] = record.get("points") or [record["models"][-1]]
    return max(found, key=lambda model: _value(model)[0])


def _value(model: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    """Return a model's score and its interval: of several tasks their average, which has none."""
    if model.get("average") is not None:
        return model["average"], None, None
    (result,) = model["results"].values()
    score = result["report"][result["primary"]]
    sign = -1 if result["primary"] in result.get("minimized", ()) else 1
    return sign * score["value"], sign * score["low"], sign * score["high"]


def _score(model: Mapping[str, Any] | None, scale: float) -> str:
    if model is None:
        return "not run"
    value, *bounds = (None if each is None else abs(each) for each in _value(model))
    low, high = bounds
    return _number(value, scale, own=True) + (
        f" [{_number(low, scale, own=True)}, {_number(high, scale, own=True)}]" if low is not None else ""
    )


def _single(role: str, measure: str, records: Mapping[Step, Record], scale: float) -> str:
    """Return what the base, or an expert of that name, has itself."""
    for step, record in records.items():
        for model in record.get("models", ()) if step.name == measure else ():
            if model["role"] == role or (model["role"] == "expert" and role in model["label"].split("/")):
                return _score(model, scale)
    return "not run"


def _number(value: float | None, scale: float, *, own: bool = False) -> str:
    """Return a number as the published table writes it; published ones have its scale already."""
    if value is None:
        return "n/a"
    return f"{value * scale:.1f}" if own and scale != 1 else f"{value:.1f}" if scale != 1 else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None, *, say: Callable[[str], Any] = sys.stderr.write) -> None:
    """Run a recipe, and write its page into the work folder."""
    given, further = _split(sys.argv[1:] if arguments is None else list(arguments))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="keeps the results and the page")
    parser.add_argument("--rows", help="names of rows, with commas between them; default: all")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page of what was run")
    options = parser.parse_args(given)
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    work = options.work.absolute()
    every = steps(recipe, further=further)
    chosen = steps(recipe, options.rows.split(",") if options.rows else None, further)
    work.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(work)
    try:
        records = {step: record for step in every if (record := recorded(work, step)) is not None}
        for step in () if options.page else chosen:
            if step not in records:
                records[step] = run(work, step)
                say(f"{step.of}, {step.name}: {records[step]['error'] or 'done'}\n")
    finally:
        os.chdir(before)
    (work / "page.md").write_text(page(recipe, records, every), encoding="utf-8")
    say(f"page {work / 'page.md'}\n")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    main()
