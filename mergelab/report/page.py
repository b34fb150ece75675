"""The report as one HTML page that needs no network: tables, figures and Plotly itself are inside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from typing import TYPE_CHECKING, Any

from mergelab.report.charts import figures, normalised_scores
from mergelab.report.figure import Figure, short
from mergelab.report.significance import EXPERT, SOUP, PairedTest
from mergelab.report.tables import COSTS, Ranking, caption, command_of, cost, p_text
from mergelab.report.trials import judged_by
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.report.analyses import ShownAnalysis
    from mergelab.report.commands import Commands
    from mergelab.report.comparison import Row
    from mergelab.report.selection import LoggedRun
    from mergelab.report.trials import Trial

_LEVEL = 0.05
_WHOLE_WIDTH = 16  # from how many models on their chart has the page's width


@dataclass(frozen=True)
class Content:
    """What a page shows.

    Attributes:
        title, about: of the page.
        notices: what has to be said first, such as that a sweep is unfinished.
        rankings: the groups.
        parents: sweeps and grids by id, each with its name and the command that started it.
        without_result: runs that have none, with how they ended.
        analyses: what was found about the models that are merged.
        pages: the address of each experiment's runs in the MLflow UI.
        files: the names of the files beside the page.
    """

    title: str
    about: str
    notices: Sequence[str]
    rankings: Sequence[Ranking]
    parents: Mapping[str, tuple[str, str | None]]
    without_result: Sequence[tuple[LoggedRun, str]]
    analyses: Sequence[ShownAnalysis]
    pages: Mapping[str, str]
    files: Sequence[str]


def render_page(content: Content, commands: Commands) -> str:
    """Write the page. Whatever comes from the store is escaped, and no script but the page's own may run."""
    from jinja2 import Environment, FunctionLoader

    plots: dict[str, Any] = {}
    sections = [_section(content, ranking, commands, plots) for ranking in content.rankings]
    analysed = [_analysis(content, each, plots) for each in content.analyses]
    plotly = (package_files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8") if plots else ""
    script = _own("page.js")
    environment = Environment(autoescape=True, loader=FunctionLoader(_own), trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.j2").render(
        **vars(content),
        sections=sections,
        analysed=analysed,
        costs=list(COSTS),
        p_text=p_text,
        policy=_policy([plotly, script]),
        style=_trusted(_own("page.css")),
        script=_trusted(script),
        plotly=_trusted(plotly),
        plots=_trusted(_json(plots)),
    )


def _own(name: str) -> str:
    return (package_files("mergelab.report") / name).read_text(encoding="utf-8")


def _trusted(text: str) -> Any:
    """Mark text of this package's files, or JSON without marks of HTML, as not to be escaped."""
    from markupsafe import Markup

    return Markup(text)  # nosec B704


def _json(value: Any) -> str:
    """Write JSON that cannot end the element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: the page asks nobody for anything, and runs these scripts alone."""
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts if each]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


# ------------------------------------------------------------------------------------------------------------- content


def _section(content: Content, ranking: Ranking, commands: Commands, plots: dict[str, Any]) -> dict[str, Any]:
    group = ranking.group
    lines = [_line(content, ranking, row, commands) for row in group.rows]
    drawn = [{**_drawn(figure, plots), "whole": _is_wide(figure, ranking)} for figure in figures(group)]
    tests = [test for test in ranking.tests if len(group.tasks) > 1]
    return {
        "group": group,
        "findings": findings(ranking),
        "best": {column.name: column.best(group.rows) for column in group.columns},
        "lines": lines,
        "caption": caption(ranking).removeprefix(group.note).strip().splitlines(),
        "against_base": any(line["over_base"] is not None for line in lines),
        "against_expert": any(line["expert"] for line in lines),
        "against_soup": any(line["soup"] for line in lines),
        "task_tests": tests,
        "figures": drawn,
        "sweeps": [_sweep(content, parent, trials, commands) for parent, trials in group.trials.items()],
        "trial_count": sum(map(len, group.trials.values())),
        "commands": [(line["row"].label, line["command"]) for line in lines if line["command"]],
    }


def _drawn(figure: Figure, plots: dict[str, Any]) -> dict[str, Any]:
    """Add a figure to the page's plots, and return what its place needs."""
    name = f"plot-{len(plots)}"
    plots[name] = {"data": figure.data, "layout": figure.layout}
    return {**vars(figure), "id": name}


def _analysis(content: Content, analysis: ShownAnalysis, plots: dict[str, Any]) -> dict[str, Any]:
    record = analysis.run.record
    return {
        **vars(analysis),
        "page": run_page(content.pages.get(record.experiment, ""), record.id),
        "figures": [_drawn(figure, plots) for figure in analysis.figures],
    }


def _is_wide(figure: Figure, ranking: Ranking) -> bool:
    return figure.title.startswith("Merged") and len(ranking.group.ranked) >= _WHOLE_WIDTH


def _line(content: Content, ranking: Ranking, row: Row, commands: Commands) -> dict[str, Any]:
    group = ranking.group
    base = group.base_of(row) if row.role == "merged" else None
    over_base = None
    if base is not None and group.primary in base.scores:
        over_base = row.scores[group.primary].value - base.scores[group.primary].value
    return {
        "row": row,
        "page": run_page(content.pages.get(row.run.record.experiment, ""), row.run.record.id),
        "over_base": over_base,
        "expert": ranking.test(row, EXPERT),
        "soup": ranking.test(row, SOUP),
        "costs": [cost(row, name) for name in COSTS],
        "examples": row.run.examples,
        "command": command_of(row, commands),
    }


def run_page(experiment: str, run: str) -> str | None:
    """Return the address of a run in the UI, from that of its experiment's runs; None without one."""
    above, runs, options = experiment.partition("/runs?")
    return f"{above}/runs/{run}?{options}" if runs and above.startswith(("http://", "https://")) else None


def _sweep(content: Content, parent: str, trials: Sequence[Trial], commands: Commands) -> dict[str, Any]:
    metric, less = judged_by([trial.run for trial in trials])
    keys = list(dict.fromkeys(key for trial in trials for key in trial.point))
    name, command = content.parents.get(parent, ("trials without a sweep", None))
    sign = 1 if less else -1
    order = sorted(trials, key=lambda trial: (trial.cell is None, sign * trial.cell.value if trial.cell else 0))
    stopped = sum(bool(trial.stopped) for trial in trials)
    unknown = sum(bool(trial.stopped) and trial.estimate is None for trial in trials)
    note = "Scores of the selecting examples; the winner is measured on others, in the leaderboard above."
    note += " ≈: estimate of a stopped trial, with its bounds; it is no score." * (stopped > unknown)
    note += f" {unknown} stopped trials have no estimate." * bool(unknown)
    return {
        "title": name,
        "command": command,
        "summary": f"{len(trials)} trials, {len(trials) - stopped} complete, {stopped} stopped early",
        "swept": [short(key) for key in keys],
        "metric": f"{metric} ↓" if less else metric,
        "trials": [_trial_line(trial, keys, commands) for trial in order],
        "caption": note,
    }


def _trial_line(trial: Trial, keys: Sequence[str], commands: Commands) -> dict[str, Any]:
    metrics = trial.run.record.metrics
    examples = metrics.get(names.SELECT_EXAMPLES)
    costs = [metrics.get(name) for name in COSTS.values()]
    shown = ["" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in costs]
    point = [trial.point.get(key, "") for key in keys]
    return {
        "number": trial.number,
        "point": [f"{value:.4g}" if isinstance(value, float) else value for value in point],
        "cell": trial.cell,
        "stopped": trial.stopped,
        "examples": "" if examples is None else f"{examples:.0f}",
        "costs": shown,
        "command": commands.of(trial.run),
    }


# ------------------------------------------------------------------------------------------------------------ findings


def findings(ranking: Ranking) -> list[str]:
    """Say in sentences what a group shows: its best merge against base, experts and soup, and how sure that is."""
    group = ranking.group
    if not group.merged:
        return []
    best = group.merged[0]
    cell = best.scores[group.primary]
    score, count = " ".join(filter(None, [cell.text, cell.interval])), len(group.merged)
    flattered = f" The best of {count} was chosen on these examples, which flatters its score." if count > 1 else ""
    found = [f"Best merge: {best.label}, {group.primary} {score}.{flattered}"]
    if (base := group.base_of(best)) is not None and group.primary in base.scores:
        found.append(f"Against the base ({base.label}): {cell.value - base.scores[group.primary].value:+.4f}.")
    for other in (EXPERT, SOUP):
        if (test := ranking.test(best, other)) is not None:
            found.append(f"Against the {other} ({test.label}): {test.difference:+.4f}, {_verdict(test, ranking)}.")
    for other in (EXPERT, SOUP):
        made = [test for test in ranking.tests if test.other == other and test.adjusted is not None]
        if len(made) > 1:
            found.append(_count(made, other, ranking))
    if relative := normalised_scores(group, best):
        worst = min(relative, key=lambda task: relative[task])
        mean = sum(relative.values()) / len(relative)
        found.append(
            f"Relative to each task's best expert it reaches {mean:.3f} on average, least on {worst} "
            f"({relative[worst]:.3f})."
        )
    return found


def _verdict(test: PairedTest, ranking: Ranking) -> str:
    if test.p_value is None or test.adjusted is None:
        return "not tested"
    adjusted = f", {p_text(test.adjusted)} after Holm's correction for {test.family} tests" if test.family > 1 else ""
    sure = "better" if _gain(test, ranking) > 0 else "worse"
    said = sure if test.adjusted < _LEVEL else "no difference is shown"
    return f"p {p_text(test.p_value)}{adjusted}: {said} at {_LEVEL:g}"


def _count(tests: Sequence[PairedTest], other: str, ranking: Ranking) -> str:
    sure = [test for test in tests if test.adjusted is not None and test.adjusted < _LEVEL]
    better = sum(_gain(test, ranking) > 0 for test in sure)
    what = "comparisons" if len(ranking.group.tasks) > 1 else "merges"
    return (
        f"Of {len(tests)} {what} with the {other}, {better} are better and {len(sure) - better} worse at {_LEVEL:g} "
        "after Holm's correction; the others show no difference."
    )


def _gain(test: PairedTest, ranking: Ranking) -> float:
    """Return the difference with the sign that more is better."""
    group = ranking.group
    column = next((c for c in group.columns if len(group.tasks) == 1 or c.name.startswith(f"{test.task}/")), None)
    return -test.difference if column is not None and column.less else test.difference
