"""The tracking store as the rest of mergelab sees it: experiments, runs, and finding them again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.errors import TrackingError
from mergelab.tracking import names, processes, signs, views
from mergelab.tracking.config import TrackingConfig
from mergelab.tracking.logged_models import LoggedFolder, log_models
from mergelab.tracking.moved import adapt_locations, bring, location_today
from mergelab.tracking.run import Run, Status, copy_artifacts, outcome, tag_values
from mergelab.tracking.secrets import without_password
from mergelab.tracking.store import (
    Store,
    connect,
    exclusively,
    has_saved_views,
    locate,
    mlflow_calls,
    restore_command,
    ui_command,
    ui_page,
)

# An experiment of models, not of language-model applications: it changes what the UI shows first.
_MODEL_VIEW = {names.EXPERIMENT_KIND: "custom_model_development"}

_PAGE = 1000


@dataclass(frozen=True)
class RunRecord:
    """A run as the store has it; times in seconds since the epoch, ``ended`` None while it runs."""

    id: str
    name: str
    experiment: str
    status: str
    started: float
    ended: float | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class GridParent:
    """The run that a grid's jobs belong under: they log to its experiment and take models from its source."""

    id: str
    experiment: str
    source: str | None


class Tracker:
    """An open tracking store; with tracking off, one that records and finds nothing."""

    def __init__(self, client: Any, store: Store | None) -> None:
        self.client = client
        self.store = store
        self._experiments: dict[str, str] = {}
        self._parents: dict[str, GridParent] = {}

    @property
    def enabled(self) -> bool:
        """Whether anything is recorded."""
        return self.client is not None

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, creating it at first use; processes may do so at the same time.

        Raises:
            TrackingError: an experiment of that name was deleted, or the name is not allowed.
        """
        if self.client is None:
            return ""
        if name not in self._experiments:
            with mlflow_calls(f"open experiment {name}"):
                found = self.client.get_experiment_by_name(name) or self._create(name)
            if found.lifecycle_stage == "deleted":
                restore = restore_command(self.store, found.experiment_id) if self.store else ""
                raise TrackingError(
                    f"experiment {name} was deleted; restore it with `{restore}` or set tracking.experiment"
                )
            if names.OURS not in found.tags:
                with mlflow_calls(f"tag experiment {name}"):
                    self.client.set_experiment_tag(found.experiment_id, names.OURS, "true")
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _create(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        root = self.store.artifact_root if self.store else None
        folder = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
        location = (root / folder).as_uri() if root else None
        try:
            self.client.create_experiment(name, artifact_location=location, tags={names.OURS: "true", **_MODEL_VIEW})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.client.get_experiment_by_name(name)

    def start_run(
        self,
        name: str,
        *,
        experiment: str,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        parent: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Run:
        """Open a run, with its environment as an artifact.

        Args:
            name: the run's.
            experiment: the name of the experiment that it belongs to.
            tags, params: what is recorded of it.
            parent: id of the run that it is shown under.
            about: what is recorded with the environment.

        Raises:
            TrackingError: the store does not take it.
        """
        if self.client is None:
            return Run(None, None, name, experiment)
        name = without_password(name)
        experiment_id = self.experiment(experiment)
        own = processes.environment_tags() | signs.now_tag()
        all_tags = own | tag_values(tags or {}) | ({names.PARENT: parent} if parent else {})
        try:
            with mlflow_calls(f"start run {name}"):
                created = self.client.create_run(experiment_id, tags=all_tags, run_name=name)
        except TrackingError:
            del self._experiments[experiment]
            self.experiment(experiment)  # raises where it was deleted since
            raise
        run = Run(self.client, created.info.run_id, name, experiment, location=self._location(created.info))
        try:
            if params:
                run.log_params(params)
            run.log_dict({**processes.environment(), **(about or {})}, names.ENVIRONMENT)
        except BaseException as error:
            run.end(*outcome(error))
            raise
        return run

    def resume_run(self, run_id: str) -> Run:
        """Open again a run that has ended, as this process's own."""
        if self.client is None:
            return Run(None, None, run_id, "")
        with mlflow_calls(f"resume run {run_id}"):
            found = self.client.get_run(run_id)
            info = found.info
            if names.ERROR in found.data.tags:  # of what ended it before
                self.client.delete_tag(run_id, names.ERROR)
            for name, value in (processes.process_tag() | signs.now_tag()).items():
                self.client.set_tag(run_id, name, value)
            self.client.update_run(run_id, status="RUNNING")
            if self.store is not None and self.store.file is not None:
                bring(self.store.file, run_id)
            experiment = self.client.get_experiment(info.experiment_id).name
            location = self._location(info)
            return Run(self.client, run_id, info.run_name, experiment, frozenset(found.data.metrics), location)

    def _location(self, info: Any) -> Path | None:
        """Return the folder of a run's artifacts; None where MLflow's client knows better."""
        if self.store is None or self.store.file is None:
            return None
        with mlflow_calls(f"find the artifacts of run {info.run_name}"):
            return location_today(self.store.file, info.artifact_uri)

    def log_models(self, run_id: str, folder: Path, register: str | None) -> list[LoggedFolder]:
        """Log the model of a folder, or each task's, with a run, be it another process's.

        Args:
            run_id: of a run that has its metrics and datasets.
            folder: as `mergelab.experiment.saving.Saving` writes it.
            register: the registered model that it becomes a version of, if any.
        """
        with mlflow_calls(f"log the model of run {run_id}"):
            return log_models(self.client, run_id, folder, register)

    def log_artifacts(self, run_id: str, folder: Path, path: str) -> None:
        """Copy a folder into a run that another process recorded, into ``path`` of its artifacts."""
        with mlflow_calls(f"log artifacts {path} of run {run_id}"):
            location = self._location(self.client.get_run(run_id).info)
            copy_artifacts(self.client, run_id, location, folder, path)

    def tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a run that has ended."""
        from mlflow.entities import RunTag

        with mlflow_calls(f"tag run {run_id}"):
            self.client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tag_values(tags).items()])

    def copy_datasets(self, run: Run, *of: str | None) -> None:
        """Record with a run the datasets that other runs have recorded, each once."""
        from mlflow.entities import DatasetInput

        if self.client is None:
            return
        with mlflow_calls(f"copy datasets to run {run.name}"):
            found: dict[tuple[str, str], DatasetInput] = {}
            for one in filter(None, of):
                for own in self.client.get_run(one).inputs.dataset_inputs:
                    found.setdefault((own.dataset.name, own.dataset.digest), own)
            if found:
                self.client.log_inputs(run.id, list(found.values()))

    def reopened(self, run_id: str) -> Run | None:
        """Open again a run that may be gone; None when this store does not have it, or only among the deleted."""
        if self.client is None:
            return Run(None, None, run_id, "")
        return self.resume_run(run_id) if self._is_active(run_id) else None

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def adopt(self, run: Run, tags: Mapping[str, str]) -> None:
        """Show, under ``run``, the runs that have all of ``tags`` and whose own parent was deleted."""
        found = self.runs(tags, experiment=run.experiment)
        parents = {record.tags[names.PARENT] for record in found if names.PARENT in record.tags} - {run.id}
        with mlflow_calls(f"find the runs under {run.name}"):
            gone = {parent for parent in parents if not self._is_active(parent)}
            for record in found:
                if record.tags.get(names.PARENT) in gone:
                    self.client.set_tag(record.id, names.PARENT, run.id)

    def runs(
        self, tags: Mapping[str, str] | None = None, *, experiment: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """Find the runs that have all of ``tags``, newest first, in one experiment or in all that mergelab wrote to."""
        if self.client is None:
            return []
        with mlflow_calls("search runs"):
            experiments = {
                found.experiment_id: found.name
                for found in pages(self.client.search_experiments, f"tags.{names.OURS} = 'true'")
            }
            ids = [key for key, name in experiments.items() if experiment in (None, name)]
            if not ids:
                return []
            found = pages(
                self.client.search_runs,
                _filter(tags or {}, status),
                experiment_ids=ids,
                order_by=["attributes.start_time DESC"],
            )
            records = [_record(run, experiments) for run in found]
        return [
            record for record in records if all(record.tags.get(key) == value for key, value in (tags or {}).items())
        ]

    def find_run(
        self, tags: Mapping[str, str], *, experiment: str | None = None, status: str | None = "FINISHED"
    ) -> str | None:
        """Return the id of the newest run that has all of ``tags`` (a baseline by its key, say), or None."""
        return next((record.id for record in self.runs(tags, experiment=experiment, status=status)), None)

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Let one process at a time do what is inside: find a run and, if there is none, record it. Keep it short."""
        if self.store is None:
            yield
        else:
            with exclusively(self.store):
                yield

    def grid_parent(self, sweep_dir: str | os.PathLike[str]) -> GridParent | None:
        """Find the grid that a job of the sweep folder ``sweep_dir`` belongs to; None when there is none."""
        folder = os.path.abspath(sweep_dir)
        if folder not in self._parents:
            found = self.runs({names.SWEEP_DIR: folder, names.KIND: "grid"})
            if not found:
                return None
            self._parents[folder] = GridParent(found[0].id, found[0].experiment, found[0].tags.get(names.SOURCE))
        return self._parents[folder]

    def reconcile(self) -> list[str]:
        """Close as killed the runs whose process ended without closing them; return their ids.

        Of a process here that is known at once; one elsewhere has given no sign of life for long.
        """
        closed = []
        for run in self.runs(status="RUNNING"):
            of = processes.process_of(run.tags)
            process = f"process {of.get(names.PID)}"
            if processes.has_ended(of):
                why = f"{process} ended without closing the run"
            elif not processes.is_here(of) and signs.is_silent(run.tags):
                why = f"{process} on {of.get(names.HOST)} gave no more sign of life"
            else:
                continue
            if self._is_running(run.id):  # it may have closed the run and ended since the runs were listed
                self.close(run.id, "KILLED", why)
                closed.append(run.id)
        return closed

    def _is_running(self, run_id: str) -> bool:
        with mlflow_calls(f"look at run {run_id}"):
            return bool(self.client.get_run(run_id).info.status == "RUNNING")

    def close(self, run_id: str, status: Status, error: str | None = None) -> None:
        """Give a run that another process opened its final status."""
        with mlflow_calls(f"close run {run_id}"):
            run = self.client.get_run(run_id)
            # Its last sign of life, so that a run that died last week does not seem to have taken a week.
            sign = int(1000 * (signs.last_sign(run.data.tags) or 0))
            last = max([run.info.start_time, sign, *self._metric_times(run)])
            if error:
                self.client.set_tag(run_id, names.ERROR, error)
            self.client.set_terminated(run_id, status, end_time=last)

    def _metric_times(self, run: Any) -> list[int]:
        one = list(run.data.metrics)[:1]
        return [metric.timestamp for name in one for metric in self.client.get_metric_history(run.info.run_id, name)]

    def ui_command(self) -> str:
        """Return the command that opens the UI, to be typed in the working folder; for a server its address."""
        return ui_command(self.store) if self.store else ""

    def ui_page(self, experiment: str, run_ids: Sequence[str] = (), view: str | None = None) -> str:
        """Return the address, in the UI that ``ui_command`` opens, of an experiment's runs or of their comparison.

        Args:
            experiment: its name.
            run_ids: the runs to compare; none: all runs are listed.
            view: the key of the saved view that lists them, if the experiment has it.
        """
        if self.store is None:
            return ""
        known = view is not None and names.saved_view(view) in self._tags(experiment)
        return ui_page(self.store, self.experiment(experiment), run_ids, view if known else None)

    def save_views(self, experiment: str, wanted: Sequence[views.View]) -> None:
        """Give an experiment views of its runs, where MLflow's UI has such."""
        if self.store is None or not has_saved_views(self.store):
            return
        number = self.experiment(experiment)
        with self.exclusively(), mlflow_calls(f"save views of experiment {experiment}"):
            fresh, gone = views.changes(self._tags(experiment), wanted)
            for tag, value in fresh.items():
                self.client.set_experiment_tag(number, tag, value)
            for tag in gone:
                self.client.delete_experiment_tag(number, tag)

    def _tags(self, experiment: str) -> Mapping[str, str]:
        with mlflow_calls(f"read experiment {experiment}"):
            found: Mapping[str, str] = self.client.get_experiment(self.experiment(experiment)).tags
            return found


def _filter(tags: Mapping[str, str], status: str | None) -> str:
    # MLflow's filter has no escapes: a value with both kinds of quotes is compared afterwards only.
    parts = [f"attributes.status = '{status}'"] if status else []
    for name, value in tags.items():
        quote = next((mark for mark in ("'", '"') if mark not in value), None)
        if quote:
            parts.append(f"tags.`{name}` = {quote}{value}{quote}")
    return " and ".join(parts)


def pages(search: Any, filter_string: str, **arguments: Any) -> Iterator[Any]:
    """Yield all that a search of MLflow's client finds, page by page."""
    token = None
    while True:
        page = search(filter_string=filter_string, max_results=_PAGE, page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return


def _record(run: Any, experiments: Mapping[str, str]) -> RunRecord:
    info = run.info
    return RunRecord(
        id=info.run_id,
        name=info.run_name,
        experiment=experiments[info.experiment_id],
        status=info.status,
        started=info.start_time / 1000,
        ended=info.end_time / 1000 if info.end_time else None,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
    )


_trackers: dict[tuple[int, str], Tracker] = {}


def open_tracking(config: TrackingConfig) -> Tracker:
    """Open the store that ``config`` means, once per process; runs that died here unclosed are closed as killed.

    ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else SQLite under ``outputs/`` of the folder where the user started.

    Raises:
        TrackingError: the store cannot be reached or used.
    """
    if not config.enabled:
        return Tracker(None, None)
    store = locate(config)
    key = (os.getpid(), store.uri)
    if key not in _trackers:
        tracker = Tracker(connect(store), store)
        tracker.reconcile()
        _trackers[key] = tracker
    elif store.file is not None and not store.file.exists():
        # What is written through the open connection would be lost without a word.
        raise TrackingError(f"{store.file} was deleted while this process had it open; start again")
    elif store.file is not None:  # it may have been moved away and back
        with mlflow_calls(f"use the tracking store {store.shown}"):
            adapt_locations(store.file)
    return _trackers[key]
