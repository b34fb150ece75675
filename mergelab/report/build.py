"""A report from its search in the store to its files."""

from __future__ import annotations

import csv
import hashlib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab import __version__
from mergelab.config import local_path
from mergelab.console.formats import Format, for_a_program
from mergelab.console.progress import console
from mergelab.errors import ConfigError, TrackingError, listed, shortened
from mergelab.report.analyses import ShownAnalysis, of_same_models, shown_analyses
from mergelab.report.commands import Commands, at_point, nested, sweep_command
from mergelab.report.comparison import RunComparison, compare_runs
from mergelab.report.page import Content, render_page
from mergelab.report.selection import LoggedRun, RunSelection, artifact, select_runs
from mergelab.report.significance import paired_tests
from mergelab.report.tables import Ranking, page_table, print_rankings, records, trial_records
from mergelab.report.trials import swept_keys
from mergelab.tracking import TrackingConfig, names, open_tracking
from mergelab.tracking.store import locate
from mergelab.weights.unfinished import unfinished_file

if TYPE_CHECKING:
    from mergelab.console.progress import Progress
    from mergelab.tracking import Tracker

PAGE = "report.html"
_FOLDER = Path("outputs/reports")
_LOGGED = "report"  # the folder among a run's artifacts
_MOST_NOTICES = 12


@dataclass(frozen=True)
class RunReport:
    """What was found, ready to be written and printed."""

    selection: RunSelection
    tracker: Tracker
    rankings: Sequence[Ranking]
    comparison: RunComparison
    notices: Sequence[str]
    commands: Commands
    analyses: Sequence[ShownAnalysis]

    def write(self, output: str | None = None, *, log: bool = False) -> Path:
        """Write page and tables into a folder, by default one named after the runs, and return the page.

        Args:
            output: a new folder, or one with an earlier report, whose files are replaced.
            log: whether the files are added to the artifacts of the one sweep, grid or run that this is about.

        Raises:
            ConfigError: the folder holds something else, or there is not one run to add the files to.
            TrackingError: the store does not take them.
        """
        target = self._logged_to() if log else None
        folder = _FOLDER / self.name if output is None else local_path(output, "--output")
        _check(folder)
        files = self._tables()
        files[PAGE] = self._page(list(files)).encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                with unfinished_file(folder / name) as unfinished:
                    unfinished.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"--output={shortened(folder)}: cannot be written ({error.strerror})") from None
        if target is not None:
            self.tracker.log_artifacts(target, folder, _LOGGED)
        return folder / PAGE

    def print(self, form: Format, page: Path) -> None:
        """Print the tables, and what has to be known about the runs; for a program, that goes to standard error."""
        out = console(error=form != "table")
        for notice in [*self._apart(), *self.notices[:_MOST_NOTICES]]:
            out.print(notice, markup=False, soft_wrap=True)
        print_rankings(self.rankings, form, self.commands)
        sys.stdout.flush()
        out.print(f"report {page}", markup=False, soft_wrap=True)

    @property
    def name(self) -> str:
        """A name that tells: the title, and what no other selection of runs has."""
        ids = sorted(self.selection.parents) or sorted(run.record.id for run in self.selection.runs)
        own = ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(ids).encode()).hexdigest()
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.selection.title).strip("-")
        return f"{words[:60].strip('-')}-{own[:8]}".lstrip("-")

    def _apart(self) -> list[str]:
        groups = self.comparison.groups
        kinds = list(dict.fromkeys(f"{group.title} ({group.protocol}, {group.source})" for group in groups))
        return [f"{len(groups)} groups, each ranked apart: {listed(kinds)}"] if len(groups) > 1 else []

    def _logged_to(self) -> str:
        ids = list(self.selection.parents) or [run.record.id for run in self.selection.runs]
        if len(ids) != 1:
            raise ConfigError(
                f"--log: the report is about {len(ids)} sweeps, grids or runs; name one of them by its id"
            )
        return ids[0]

    def _tables(self) -> dict[str, bytes]:
        models = [record for ranking in self.rankings for record in records(ranking, self.commands)]
        parents = {key: run.record.name for key, run in self.selection.parents.items()}
        trials = [row for ranking in self.rankings for row in trial_records(ranking.group, parents, self.commands)]
        found = {}
        for name, rows in (("models", models), ("trials", trials)):
            if rows:
                found[f"{name}.csv"] = for_a_program("csv", rows).encode()
                found[f"{name}.parquet"] = _parquet(rows)
        ranked = [ranking for ranking in self.rankings if ranking.group.rows]
        forms: tuple[tuple[str, Format], ...] = (("models.md", "markdown"), ("models.tex", "latex"))
        for name, form in forms if ranked else ():
            found[name] = "\n".join(page_table(ranking, form) for ranking in ranked).encode()
        return found

    def _page(self, files: Sequence[str]) -> str:
        runs = self.selection.runs
        store = self.tracker.store.shown if self.tracker.store else ""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        about = f"{len(runs)} runs of {store}; written {now} by mergelab {__version__}"
        parents = {key: (run.record.name, sweep_command(run)) for key, run in self.selection.parents.items()}
        content = Content(
            self.selection.title,
            about,
            self.notices,
            self.rankings,
            parents,
            self.comparison.without_result,
            self.analyses,
            self.selection.pages,
            files,
        )
        return render_page(content, self.commands)


def build_report(wanted: Sequence[str], uri: str | None, metric: str | None, progress: Progress) -> RunReport:
    """Find runs, divide them into groups that may be compared, rank each and test its merges.

    Args:
        wanted: as `mergelab.report.selection.select_runs` takes it.
        uri: of the store; None: that of the environment, or the default one.
        metric: what ranks; None: what the runs are judged by.
        progress: shows how far a long step is.

    Raises:
        MergelabError: the store cannot be reached, or has no such runs, or they have no result.
    """
    config = TrackingConfig(uri=uri)
    store = locate(config)
    if store.file is not None and not store.file.exists():
        raise TrackingError(
            f"{store.shown}: there is no such store, so there are no runs; --tracking-uri names another"
        )
    tracker = open_tracking(config)
    progress("search the store", 0.1)
    selection = select_runs(tracker, wanted)
    artifacts = _Artifacts(tracker, selection.parents)
    comparison = compare_runs(selection, metric, artifacts.table)
    if not comparison.groups:
        raise TrackingError(f"{selection.title}: {_no_result(comparison)}")
    rankings = [
        Ranking(group, paired_tests(group, tracker, artifacts.configuration, progress)) for group in comparison.groups
    ]
    commands = Commands(artifacts.configuration)
    own = of_same_models(selection.analyses, [*selection.runs, *selection.parents.values()])
    analyses = list(shown_analyses(own, artifacts.file))
    return RunReport(selection, tracker, rankings, comparison, _notices(selection, comparison), commands, analyses)


class _Artifacts:
    """Reads what runs have logged in files, as it is asked for, each file once."""

    def __init__(self, tracker: Tracker, parents: Mapping[str, LoggedRun]) -> None:
        self.tracker, self.parents = tracker, parents
        self._folder = tempfile.TemporaryDirectory()
        self._configurations: dict[str, Mapping[str, Any]] = {}

    def file(self, run: LoggedRun, path: str) -> Path | None:
        """Return a local file with an artifact of a run; None where it has none."""
        return artifact(self.tracker, run, path, Path(self._folder.name))

    def table(self, run: LoggedRun) -> list[dict[str, str]]:
        """Return the rows of the table of the models that a run has measured."""
        file = self.file(run, names.TABLE)
        if file is None:
            return []
        with file.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))

    def configuration(self, run: LoggedRun) -> Mapping[str, Any]:
        """Return what a run was composed of: its file, of a trial its sweep's; without one its parameters."""
        if run.record.id not in self._configurations:
            parent = self.parents.get(run.parent or "") if run.kind == "trial" else None
            if parent is None:
                self._configurations[run.record.id] = self._logged(run) or nested(run.record.params)
            else:
                keys = swept_keys(parent)
                self._configurations[run.record.id] = at_point(self.configuration(parent), run.record.params, keys)
        return self._configurations[run.record.id]

    def _logged(self, run: LoggedRun) -> Mapping[str, Any] | None:
        import yaml  # type: ignore[import-untyped]

        file = self.file(run, names.CONFIG)
        if file is None:
            return None
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            found = loader(file.read_text(encoding="utf-8")).get_single_data()
        except (OSError, ValueError, yaml.YAMLError):  # damaged
            return None
        return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------------------------------------- notices


def _notices(selection: RunSelection, comparison: RunComparison) -> list[str]:
    """Say what has to be known before the tables are read."""
    found = []
    for parent in selection.parents.values():
        found += _unfinished(parent, selection)
    for group in comparison.groups:
        if group.unranked and group.ranked:
            total = len(group.merged) + len(group.unranked)
            found.append(f"{group.title}: {len(group.unranked)} of {total} merges have no {group.primary}, and no rank")
    if without := comparison.without_result:
        run, ending = without[0]
        found.append(f"{len(without)} runs have no result; {run.record.name}: {shortened(ending, 160)}")
    return found


def _unfinished(parent: LoggedRun, selection: RunSelection) -> list[str]:
    """Say that a sweep or a grid has not come to its end."""
    record = parent.record
    if record.status == "FINISHED":
        return []
    wanted = record.tags.get(names.N_TRIALS) or record.params.get(names.JOBS) or "?"
    below = [run for run in selection.runs if run.parent == record.id and run.kind in ("trial", "merge")]
    ended = sum(run.record.status == "FINISHED" for run in below)
    what = "trials" if parent.kind == "sweep" else "jobs"
    how = {"RUNNING": "is still running", "KILLED": "was stopped", "FAILED": "failed"}.get(
        record.status, "has not ended"
    )
    why = f" ({shortened(record.tags[names.ERROR], 120)})" if names.ERROR in record.tags else ""
    return [f"unfinished: {record.name} {how}{why}; {ended} of {wanted} {what} have ended"]


def _no_result(comparison: RunComparison) -> str:
    without = comparison.without_result
    if not without:
        return "there is nothing to compare"
    run, ending = without[0]
    count = f"none of its {len(without)} runs has" if len(without) > 1 else "its run has no result: no"
    return f"{count} scores; {run.record.name}: {shortened(ending, 200)}"


# --------------------------------------------------------------------------------------------------------------- files


def _check(folder: Path) -> None:
    """Check that a report may be written into a folder.

    Raises:
        ConfigError: it is a file, or holds something else than a report.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output={shortened(folder)}: is a file; a folder is needed")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).exists():
            raise ConfigError(f"--output={shortened(folder)}: holds files that are no report; choose a new folder")
    except OSError as error:
        raise ConfigError(f"--output={shortened(folder)}: cannot be used ({error.strerror})") from None


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Write rows as Parquet; a column whose values are of several types is text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        if len({type(value) for value in values if value is not None}) > 1:
            numbers = all(isinstance(value, int | float) for value in values if value is not None)
            values = [None if value is None else float(value) if numbers else str(value) for value in values]
        columns[key] = pa.array(values)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())
