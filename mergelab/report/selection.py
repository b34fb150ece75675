"""Which runs a report is about: named by experiment, tag or id, with what belongs to them; one search for each kind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import TrackingError, did_you_mean, listed, shortened
from mergelab.tracking import RunRecord, names
from mergelab.tracking.moved import location_today
from mergelab.tracking.store import mlflow_calls
from mergelab.tracking.tracker import pages

if TYPE_CHECKING:
    from mergelab.tracking import Tracker

_PARENTS = ("sweep", "grid")
_BASELINES = ("base", "expert")
_ANALYSIS = "analysis"
_ID_DIGITS = frozenset("0123456789abcdef")
_ID_LENGTH = 32
_PROGRESS_BAR = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"  # one for each file, in the midst of the output
_AT_ONCE = 100  # ids in one filter


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """A run of the store, with the data that it was measured on and the place of its artifacts.

    Attributes:
        record: its parameters, metrics and tags.
        datasets: name, digest and split of each dataset, sorted.
        examples: how many examples the datasets have.
        artifact_uri: where the store has its artifacts.
    """

    record: RunRecord
    datasets: tuple[tuple[str, str, str], ...] = ()
    examples: int | None = None
    artifact_uri: str = ""

    @property
    def kind(self) -> str:
        """What the run is of: a merge, a trial, a report, a base, an expert, a sweep or a grid."""
        return self.record.tags.get(names.KIND, "")

    @property
    def parent(self) -> str | None:
        """The id of the run that it is shown under."""
        return self.record.tags.get(names.PARENT)


@dataclass(frozen=True)
class RunSelection:
    """The runs of a report.

    Attributes:
        title: what they are, in words.
        runs: merges, trials and reports; the bases and experts that were asked for.
        parents: their sweeps and grids, by id.
        baselines: bases and experts of the same experiments.
        analyses: analyses of task vectors in the same experiments, of whatever models.
        pages: the address of each experiment's runs in the MLflow UI, by the experiment's name.
    """

    title: str
    runs: tuple[LoggedRun, ...]
    parents: Mapping[str, LoggedRun]
    baselines: tuple[LoggedRun, ...]
    analyses: tuple[LoggedRun, ...] = ()
    pages: Mapping[str, str] = field(default_factory=dict)


def select_runs(tracker: Tracker, wanted: Sequence[str]) -> RunSelection:
    """Find the runs that a report is about.

    Args:
        tracker: the store.
        wanted: experiments by name, runs by id, tags as ``key=value``. Runs have to have all tags; experiments and ids
            add up. The runs below a sweep or a grid belong to it. Nothing: the newest sweep, grid or single run.

    Raises:
        TrackingError: the store has no such runs, or cannot be searched.
    """
    with mlflow_calls("search runs"):
        store = _Search(tracker)
        chosen, title = _chosen(store, list(dict.fromkeys(wanted)))
        parents = {run.record.id: run for run in chosen if run.kind in _PARENTS}
        found = {run.record.id: run for run in chosen if run.kind not in _PARENTS}
        for parent in parents.values():
            below = store.search({names.PARENT: parent.record.id}, [parent.record.experiment])
            found |= {run.record.id: run for run in below}
        above = {run.parent for run in found.values()} - {None, *parents}
        parents |= {run.record.id: run for run in store.by_id([str(each) for each in above])}
        experiments = list(dict.fromkeys(run.record.experiment for run in (*found.values(), *parents.values())))
        baselines = [run for kind in _BASELINES for run in store.search({names.KIND: kind}, experiments)]
        analyses = store.search({names.KIND: _ANALYSIS}, experiments)
    if not found:
        raise TrackingError(f"{title}: has no runs below it yet; there is nothing to report")
    pages = {name: tracker.ui_page(name) for name in experiments}
    return RunSelection(title, tuple(found.values()), parents, tuple(baselines), tuple(analyses), pages)


def artifact(tracker: Tracker, run: LoggedRun, path: str, folder: Path) -> Path | None:
    """Return a local file with the artifact ``path`` of a run; None where the run has none.

    Args:
        tracker: the store.
        run: the run.
        path: as it was logged.
        folder: where it is written if the store is on a server.

    Raises:
        TrackingError: the server does not give it.
    """
    if tracker.store is not None and tracker.store.file is not None:
        location = location_today(tracker.store.file, run.artifact_uri)
        if location is not None:
            return file if (file := location / path).exists() else None
    os.environ.setdefault(_PROGRESS_BAR, "false")
    with mlflow_calls(f"read {path} of run {run.record.name}"):
        above = path.rpartition("/")[0] or None
        if all(one.path != path for one in tracker.client.list_artifacts(run.record.id, above)):
            return None
        own = folder / run.record.id
        own.mkdir(parents=True, exist_ok=True)
        return Path(tracker.client.download_artifacts(run.record.id, path, str(own)))


# ------------------------------------------------------------------------------------------------------- what is meant


def _chosen(store: _Search, wanted: Sequence[str]) -> tuple[list[LoggedRun], str]:
    if not wanted:
        newest = store.newest()
        return [newest], newest.record.name
    experiments = [each for each in wanted if each in store.experiments.values()]
    rest = [each for each in wanted if each not in experiments]
    tags = [each for each in rest if "=" in each]
    ids = [each for each in rest if each not in tags]
    for each in ids:
        if not (len(each) == _ID_LENGTH and _ID_DIGITS.issuperset(each)):
            known = store.experiments.values()
            hint = did_you_mean(each, known) or f" (there are {listed(sorted(known))})"
            raise TrackingError(f"{shortened(each)}: neither an experiment, nor a tag key=value, nor a run's id{hint}")
    found = store.by_id(ids)
    if missing := [each for each in ids if each not in {run.record.id for run in found}]:
        raise TrackingError(f"{missing[0]}: {store.shown} has no run of mergelab's with this id")
    if experiments or tags:
        found += _tagged(store, tags, experiments or list(store.experiments.values()))
    if not found:
        raise TrackingError(f"{listed(wanted)}: no runs match in {store.shown}")
    title = found[0].record.name if len(ids) == len(wanted) == 1 else ", ".join([*experiments, *tags, *ids])
    return found, title


def _tagged(store: _Search, tags: Sequence[str], experiments: Sequence[str]) -> list[LoggedRun]:
    """Search runs with all tags; a key may leave out the beginning that mergelab's own tags share."""
    asked = dict(each.split("=", 1) for each in tags)
    found = store.search(asked, experiments)
    if not found and asked:
        own = {key if key.startswith(f"{names.OURS}.") else f"{names.OURS}.{key}": asked[key] for key in asked}
        found = store.search(own, experiments)
    return found


class _Search:
    """Searches the experiments that mergelab wrote to, page by page."""

    def __init__(self, tracker: Tracker) -> None:
        self.client, self.shown = tracker.client, tracker.store.shown if tracker.store else ""
        found = pages(self.client.search_experiments, f"tags.{names.OURS} = 'true'")
        self.experiments: dict[str, str] = {one.experiment_id: one.name for one in found}
        if not self.experiments:
            raise TrackingError(f"{self.shown}: has no runs of mergelab's; --tracking-uri names another store")

    def search(self, tags: Mapping[str, str], experiments: Iterable[str]) -> list[LoggedRun]:
        """Return the runs of some experiments that have all of ``tags``, the newest first."""
        wanted = set(experiments)
        ids = [key for key, name in self.experiments.items() if name in wanted]
        found = self._runs(" and ".join(filter(None, map(_condition, tags, tags.values()))), ids) if ids else []
        return [run for run in found if all(run.record.tags.get(key) == value for key, value in tags.items())]

    def by_id(self, ids: Sequence[str]) -> list[LoggedRun]:
        """Return the runs with these ids."""
        found = []
        for start in range(0, len(ids), _AT_ONCE):
            named = ",".join(f"'{each}'" for each in ids[start : start + _AT_ONCE])
            found += self._runs(f"attributes.run_id IN ({named})", list(self.experiments))
        return found

    def newest(self) -> LoggedRun:
        """Return the newest sweep, grid or single run."""
        found = []
        for kind in ("sweep", "grid", "merge"):
            page = self.client.search_runs(
                list(self.experiments),
                filter_string=_condition(names.KIND, kind),
                max_results=1,
                order_by=["attributes.start_time DESC"],
            )
            found += [self._logged(run) for run in page]
        if not found:
            raise TrackingError(f"{self.shown}: has no merges yet; --tracking-uri names another store")
        newest = max(found, key=lambda run: run.record.started)
        above = self.by_id([newest.parent]) if newest.parent else []
        return above[0] if above else newest

    def _runs(self, condition: str, experiments: list[str]) -> list[LoggedRun]:
        order = ["attributes.start_time DESC"]
        found = pages(self.client.search_runs, condition, experiment_ids=experiments, order_by=order)
        return [self._logged(run) for run in found]

    def _logged(self, run: Any) -> LoggedRun:
        info = run.info
        record = RunRecord(
            id=info.run_id,
            name=info.run_name or info.run_id,
            experiment=self.experiments[info.experiment_id],
            status=info.status,
            started=info.start_time / 1000,
            ended=info.end_time / 1000 if info.end_time else None,
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
            tags=dict(run.data.tags),
        )
        inputs = [one.dataset for one in run.inputs.dataset_inputs] if run.inputs is not None else []
        datasets = {(one.name, one.digest, str(_json(one.source).get("split", ""))) for one in inputs}
        rows = [_json(one.profile).get("num_rows") for one in inputs]
        counts = [each for each in rows if isinstance(each, int)]
        count = sum(counts) if counts and len(counts) == len(rows) else None
        return LoggedRun(record, tuple(sorted(datasets)), count, info.artifact_uri or "")


def _condition(key: str, value: str) -> str:
    """Return MLflow's filter for a tag; it has no escapes, and what it cannot say is compared afterwards."""
    mark = next((mark for mark in ("'", '"') if mark not in value), None)
    return f"tags.`{key}` = {mark}{value}{mark}" if mark and "`" not in key else ""


def _json(text: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
