"""One run: what it records, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self

from omegaconf import OmegaConf

from mergelab.errors import TrackingError
from mergelab.tracking import interrupts, names, signs
from mergelab.tracking.secrets import without_password
from mergelab.tracking.store import mlflow_calls
from mergelab.tracking.values import MAX_TAG, flatten, one_line, shortened, tidy_name

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Run:
    """A run being recorded; as a context manager it ends ``FINISHED``, ``FAILED`` with its error, or ``KILLED``.

    Opened by ``Tracker.start_run``. Where tracking is off, ``id`` is None and nothing is recorded. ``recorded`` has the
    names of the metrics that a resumed run had before. ``location`` is the folder of the run's artifacts, None where
    MLflow's client finds the place.
    """

    def __init__(
        self,
        client: Any,
        run_id: str | None,
        name: str,
        experiment: str,
        recorded: frozenset[str] = frozenset(),
        location: Path | None = None,
    ) -> None:
        self.id, self.name, self.experiment, self.recorded = run_id, name, experiment, recorded
        self._location = location
        self._client = client
        self._open = client is not None
        if self._open:
            signs.begin(client, str(run_id))
            interrupts.hold()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
            return
        status, reason = outcome(error)
        try:
            self.end(status, reason)
        except TrackingError as second:  # the first error is the one to be seen
            log.warning("%s", second)

    def end(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """Close the run; a run that is closed already stays as it is."""
        if not self._open:
            return
        self._open = False
        signs.end(str(self.id))
        try:
            with mlflow_calls(f"close run {self.name}"):
                if error:
                    self._client.set_tag(self.id, names.ERROR, error)
                self._client.set_terminated(self.id, status)
        finally:
            interrupts.release()

    def abandon(self) -> None:
        """Leave the run, as it is, to the process that has opened it again since."""
        if self._open:
            self._open = False
            signs.end(str(self.id))
            interrupts.release()

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record a nested config as ``method.density`` and the like; numbers stay numbers, null is ``null``."""
        if self._client is None:
            return
        from mlflow.entities import Param

        params = [Param(name, text) for name, text in flatten(values).items()]
        with mlflow_calls(f"log the parameters of run {self.name}"):
            self._client.log_batch(self.id, params=params)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers under their names (``report/accuracy``)."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tidy_name(name), float(value), now, step) for name, value in values.items()]
        with mlflow_calls(f"log the metrics of run {self.name}"):
            self._client.log_batch(self.id, metrics=metrics)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag that is there gets the new value."""
        if self._client is None:
            return
        from mlflow.entities import RunTag

        entities = [RunTag(name, text) for name, text in tag_values(tags).items()]
        with mlflow_calls(f"tag run {self.name}"):
            self._client.log_batch(self.id, tags=entities)

    def log_dataset(
        self,
        name: str,
        *,
        origin: str,
        location: str,
        fingerprint: str,
        rows: int,
        split: str | None = None,
        config: str | None = None,
        columns: Mapping[str, str] | None = None,
        context: str = "evaluation",
    ) -> None:
        """Record which data were used.

        Args:
            name: what the UI calls it, ``rte`` or ``mini/rte``.
            origin: ``hub``, ``folder`` or ``mini``.
            location: hub id or path.
            fingerprint: hash of the content; the UI shows its first 16 characters, the profile the whole.
            rows: examples used.
            split: split used.
            config: the hub dataset's configuration (``rte`` of ``nyu-mll/glue``).
            columns: column name to type (``string``, ``long``, ``float``).
            context: what the data were used for.
        """
        if self._client is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        where = {"path": location, "config_name": config} if origin == "hub" else {"uri": location}
        schema = [{"name": column, "type": kind, "required": True} for column, kind in (columns or {}).items()]
        dataset = Dataset(
            name=name,
            digest=fingerprint[:16],
            source_type={"hub": "hugging_face", "folder": "local"}.get(origin, origin),
            source=json.dumps({key: value for key, value in (where | {"split": split}).items() if value is not None}),
            schema=json.dumps({"mlflow_colspec": schema}) if schema else None,
            profile=json.dumps({"num_rows": rows, "fingerprint": fingerprint}),
        )
        with mlflow_calls(f"log the dataset of run {self.name}"):
            inputs = [DatasetInput(dataset, [InputTag(names.DATASET_CONTEXT, context)])]
            try:
                self._client.log_inputs(self.id, inputs)
            except MlflowException:
                # MLflow looks for the dataset and then adds it: of two runs that do so at once, one is refused.
                self._client.log_inputs(self.id, inputs)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copy a file into the run, into ``folder`` of its artifacts."""
        if self._client is not None:
            with mlflow_calls(f"log artifact {Path(path).name} of run {self.name}"):
                self._log_file(str(path), folder)

    def log_artifacts(self, folder: Path | str, path: str | None = None) -> None:
        """Copy a whole folder into the run, into ``path`` of its artifacts."""
        if self._client is not None:
            with mlflow_calls(f"log artifacts {Path(folder).name} of run {self.name}"):
                copy_artifacts(self._client, self.id, self._location, folder, path)

    def log_text(self, text: str, path: str) -> None:
        """Write ``text`` as the artifact ``path`` (``config.yaml``, ``plots/history.html``)."""
        if self._client is None:
            return
        target = PurePosixPath(path)
        with mlflow_calls(f"log artifact {path} of run {self.name}"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / target.name
            file.write_text(without_password(text), encoding="utf-8")
            self._log_file(str(file), str(target.parent) if len(target.parts) > 1 else None)

    def _log_file(self, path: str, folder: str | None) -> None:
        if self._location is None:
            self._client.log_artifact(self.id, path, folder)
        else:
            _local_artifacts(self._location).log_artifact(path, folder)

    def log_dict(self, values: dict[str, Any] | list[Any], path: str) -> None:
        """Write ``values`` as a ``.json`` or ``.yaml`` artifact."""
        if path.endswith((".yaml", ".yml")):
            self.log_text(OmegaConf.to_yaml(OmegaConf.create(values)), path)
        else:
            self.log_text(json.dumps(values, indent=1, ensure_ascii=False), path)

    def log_table(self, rows: Sequence[Mapping[str, Any]], path: str) -> None:
        """Write rows as a ``.csv`` (the UI shows it as a table) or ``.json`` artifact; a missing cell is empty."""
        if path.endswith(".json"):
            self.log_dict([dict(row) for row in rows], path)
            return
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        self.log_text(text.getvalue(), path)


def copy_artifacts(
    client: Any, run_id: str | None, location: Path | None, folder: Path | str, path: str | None
) -> None:
    """Copy a folder into ``path`` of a run's artifacts, in ``location`` or where MLflow's client says."""
    if location is None:
        client.log_artifacts(run_id, str(folder), path)
    else:
        _local_artifacts(location).log_artifacts(str(folder), path)


def _local_artifacts(folder: Path) -> Any:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    return LocalArtifactRepository(folder.as_uri())


def tag_values(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return tags as MLflow takes them: strings, not too long, without passwords, nothing for None."""
    return {name: shortened(without_password(str(value)), MAX_TAG) for name, value in tags.items() if value is not None}


def outcome(error: BaseException) -> tuple[Status, str | None]:
    """Say what an exception that leaves a run makes of it: its status, and the error in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "interrupted"
    if isinstance(error, interrupts.Terminated):
        return "KILLED", "terminated by SIGTERM"
    if isinstance(error, SystemExit):
        return ("FINISHED", None) if not error.code else ("FAILED", f"exited with {error.code}")
    return "FAILED", one_line(error)
