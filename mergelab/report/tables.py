"""The tables of a report: for a terminal, a page, a paper or a program; each group of comparable runs has its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.console.formats import Format, for_a_page, for_a_program
from mergelab.console.progress import say
from mergelab.console.tables import print_fitting
from mergelab.errors import listed
from mergelab.report.significance import EXPERT, SOUP, untested
from mergelab.tracking import names

if TYPE_CHECKING:
    from rich.table import Table

    from mergelab.report.commands import Commands
    from mergelab.report.comparison import Group, Row, ScoreColumn
    from mergelab.report.significance import PairedTest
    from mergelab.report.trials import Trial

_TESTS = ["Δ best expert", "p", "p (Holm)"]
COSTS = {"merge s": names.MERGE_SECONDS, "eval s": names.EVAL_SECONDS, "peak MB": names.PEAK_MB}


@dataclass(frozen=True)
class Ranking:
    """A group with the tests of its merged models."""

    group: Group
    tests: Sequence[PairedTest]

    def test(self, row: Row, other: str) -> PairedTest | None:
        """Return the test of a merged model against the best expert, or against the soup; None in a suite."""
        if len(self.group.tasks) > 1:
            return None
        return next((test for test in self.tests if test.row is row and test.other == other), None)

    @property
    def has_tests(self) -> bool:
        """Whether models of a single task were tested."""
        return any(self.test(row, EXPERT) for row in self.group.merged)


def header(
    ranking: Ranking, *, costs: int = len(COSTS), metrics: int | None = None, tests: int = len(_TESTS)
) -> list[str]:
    """Name the columns of a group's table; of those of the paired test the last ``tests``."""
    tested = _TESTS[len(_TESTS) - tests :] if ranking.has_tests else []
    return ["model", *(_title(column) for column in ranking.group.columns[:metrics]), *tested, *list(COSTS)[:costs]]


def cells(
    ranking: Ranking,
    row: Row,
    *,
    intervals: bool = True,
    costs: int = len(COSTS),
    metrics: int | None = None,
    tests: int = len(_TESTS),
) -> list[str]:
    """Write a model's row of that table."""
    found = [row.label]
    for column in ranking.group.columns[:metrics]:
        score = row.scores.get(column.name)
        best = score is not None and score.value == column.best(ranking.group.rows)
        shown = "" if score is None else " ".join(filter(None, [score.text, score.interval if intervals else ""]))
        found.append(shown + " *" * best)
    if ranking.has_tests:
        found += _tested(ranking.test(row, EXPERT))[len(_TESTS) - tests :]
    return found + [cost(row, name) for name in list(COSTS)[:costs]]


def _tested(test: PairedTest | None) -> list[str]:
    if test is None:
        return [""] * len(_TESTS)
    return [f"{test.difference:+.4f}", p_text(test.p_value), p_text(test.adjusted)]


def p_text(value: float | None) -> str:
    """Write a p-value."""
    return "" if value is None else "<0.001" if value < 0.0005 else f"{value:.3f}"


def cost(row: Row, name: str) -> str:
    """Write seconds or MB."""
    value = row.logged.get(COSTS[name])
    return "" if value is None else f"{value:.0f}" if name == "peak MB" else f"{value:.2f}"


def caption(ranking: Ranking) -> str:
    """Say what is shown, what was tested and corrected, and what is missing."""
    group, lines = ranking.group, [ranking.group.note]
    arrow = " (↓: less is better)" if any(column.less for column in group.columns) else ""
    lines.append(f"* best of its column{arrow}; [95 % bootstrap interval]; ranked by {group.primary}")
    lines += correction(ranking)
    if group.protocol == "holdout":
        lines.append("examples: those that select and those that report")
    if group.protocol == "oracle" and group.trials:
        lines.append("oracle: the winner was chosen on the examples that report, so its score and p-value flatter it")
    return "\n".join(filter(None, lines))


def correction(ranking: Ranking) -> list[str]:
    """Say how many tests were made, against what, and how they are corrected."""
    lines = []
    for other in (EXPERT, SOUP):
        made = [test for test in ranking.tests if test.other == other and test.p_value is not None]
        if made:
            against = listed_labels(made)
            families = sorted({test.family for test in made})
            number = " and ".join(map(str, families))
            how = f"Holm's correction for {number} tests" if families[-1] > 1 else "one test, no correction"
            lines.append(f"p: paired bootstrap against the {other} ({against}), two-sided; {how}")
    group = ranking.group
    without = [row.label for row in group.merged if group.experts_of(row) and group.missing_experts(row)]
    if without:
        lines.append(f"some experts of {listed(without, 3)} have no run here: tested against the best of the others")
    return [*lines, *filter(None, [untested(ranking.tests)])]


def listed_labels(tests: Sequence[PairedTest]) -> str:
    """Name the models that were tested against, each once."""
    return listed(dict.fromkeys(f"{test.label} on {test.task}" if _several(tests) else test.label for test in tests), 4)


def _several(tests: Sequence[PairedTest]) -> bool:
    return len({test.task for test in tests}) > 1


def _title(column: ScoreColumn) -> str:
    return f"{column.name} ↓" if column.less else column.name


# ------------------------------------------------------------------------------------------------------------ printing


def print_rankings(rankings: Sequence[Ranking], form: Format, commands: Commands) -> None:
    """Print the tables of all groups; for a program one table, a row for each model."""
    if form in ("csv", "json"):
        rows = [record for ranking in rankings for record in records(ranking, commands)]
        sys.stdout.write(for_a_program(form, rows))
        return
    for ranking in rankings:
        if form != "table":
            sys.stdout.write(page_table(ranking, form) + "\n")
        elif ranking.group.rows:
            print_fitting(_tables(ranking))
        for row, reason in ranking.group.unranked if form == "table" else ():
            say(f"not ranked: {row.label} {reason}", result=True)


def page_table(ranking: Ranking, form: Format) -> str:
    """Write a group's table in Markdown or LaTeX."""
    rows = [cells(ranking, row) for row in ranking.group.rows]
    return for_a_page(form, header(ranking), rows, f"{ranking.group.title}\n{caption(ranking)}")


def _tables(ranking: Ranking) -> Iterator[Table]:
    """Yield the table in the layouts that come into question, the fullest first."""
    several = len(ranking.group.columns)
    for metrics in dict.fromkeys((several, 1)):
        for costs in range(len(COSTS), -1, -1):
            yield _table(ranking, True, costs, metrics, len(_TESTS))
    for tests, intervals in [(len(_TESTS), False), (1, True), (1, False), (0, False)]:
        yield _table(ranking, intervals, 0, 1, tests)


def _table(ranking: Ranking, intervals: bool, costs: int, metrics: int, tests: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    shape: dict[str, Any] = {"costs": costs, "metrics": metrics, "tests": tests}
    group = ranking.group
    hidden = [column.name for column in group.columns[metrics:]] + list(COSTS)[costs:] + ["intervals"] * (not intervals)
    hidden += _TESTS[: len(_TESTS) - tests] if ranking.has_tests else []
    narrow = f"\ntoo narrow for {', '.join(hidden)}; --format=csv has everything" if hidden else ""
    table = Table(
        title=Text(group.title), title_justify="left", title_style="bold", caption=Text(caption(ranking) + narrow)
    )
    table.caption_justify = "left"
    for place, name in enumerate(header(ranking, **shape)):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for row in group.rows:
        label, *rest = cells(ranking, row, intervals=intervals, **shape)
        style = "bold" if row.role == "merged" else ""
        table.add_row(Text(label, style=style), *(Text(cell, style="bold green" * (" *" in cell)) for cell in rest))
    return table


# -------------------------------------------------------------------------------------------------------- for programs


def records(ranking: Ranking, commands: Commands) -> list[dict[str, Any]]:
    """List a group's models as plain values, the best first; those that are not ranked follow, with the reason."""
    group, found = ranking.group, []
    reasons = {id(row): reason for row, reason in group.unranked}
    reasons |= {id(row): f"has no {group.primary}" for row in group.beside}
    about = {"task": group.title, "source": group.source, "protocol": group.protocol}
    for place, row in enumerate([*group.rows, *(row for row, _ in group.unranked)], start=1):
        tags = row.run.record.tags
        record: dict[str, Any] = {**about, "rank": place if id(row) not in reasons else None, "model": row.label}
        record |= {names.ROLE: row.role, "method": tags.get(names.METHOD) if row.own_run else None}
        for column in group.columns:
            score = row.scores.get(column.name)
            record |= {column.name: score and score.value}
            if any(other.scores[column.name].low is not None for other in group.rows if column.name in other.scores):
                record |= {names.low(column.name): score and score.low, names.high(column.name): score and score.high}
        for other in (EXPERT, SOUP):
            test, key = ranking.test(row, other), other.replace(" ", "_")
            record |= {
                f"vs_{key}": test and test.label,
                f"vs_{key}_difference": test and test.difference,
                f"vs_{key}_p": test and test.p_value,
                f"vs_{key}_p_holm": test and test.adjusted,
                f"vs_{key}_tests": test.family if test and test.p_value is not None else None,
            }
        record |= {name.replace(" ", "_"): row.logged.get(metric) for name, metric in COSTS.items()}
        record |= {"examples": row.run.examples, "not_ranked": reasons.get(id(row)), "run_id": row.run.record.id}
        found.append(record | {"command": command_of(row, commands)})
    return found


def command_of(row: Row, commands: Commands) -> str | None:
    """Return the command that repeats a model's row; None for those that are only measured beside a merge."""
    return commands.of(row.run) if row.own_run and row.role == "merged" else None


def trial_records(group: Group, parents: Mapping[str, str], commands: Commands) -> list[dict[str, Any]]:
    """List the trials of a group's sweeps as plain values; ``parents`` has the sweeps' names."""
    return [
        {
            "task": group.title,
            "sweep": parents.get(parent, ""),
            "trial": trial.number,
            "state": "stopped" if trial.stopped else "complete",
            **trial.point,
            **{f"select {name}": value for name, value in trial.objectives.items()},
            **_estimated(trial),
            "examples": trial.run.record.metrics.get(names.SELECT_EXAMPLES),
            **{name.replace(" ", "_"): trial.run.record.metrics.get(metric) for name, metric in COSTS.items()},
            "run_id": trial.run.record.id,
            "command": commands.of(trial.run),
        }
        for parent, trials in group.trials.items()
        for trial in trials
    ]


def _estimated(trial: Trial) -> dict[str, float | None]:
    cell = trial.cell
    if cell is None:
        return dict.fromkeys(("estimate", names.low("estimate"), names.high("estimate")))
    return {"estimate": cell.value, names.low("estimate"): cell.low, names.high("estimate"): cell.high}
