"""A sweep's jobs in other processes and on other machines: what the sweeper sets up, and what each job sets up."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import MergelabError, SweepError, TrackingError
from mergelab.sweep.config import TrialJob
from mergelab.sweep.storage import redacted, storage_file
from mergelab.tracking.secrets import mask_passwords
from mergelab.tracking.sqlite_urls import is_sqlite
from mergelab.tracking.values import one_line

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from optuna.storages import BaseStorage
    from optuna.study import Study

    from mergelab.tracking import Tracker, TrackingConfig

# ----------------------------------------------------------------------------------------------------- in the sweeper


def fit_launcher(launcher: Launcher, retries: int) -> None:
    """Give launcher settings that the user did not set the values that a sweep needs.

    Ray itself restarts a job whose worker died: as often as the sweep would. (Its launcher asks for a size of the
    object store, which Ray refuses where it joins a running cluster.)
    """
    settings = getattr(launcher, "ray_cfg", None)
    if settings is None:
        return
    from omegaconf import open_dict

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with open_dict(settings):
        settings.remote.setdefault("max_retries", retries)
        if (settings.init.get("address") or os.environ.get("RAY_ADDRESS") or "local") != "local":
            settings.init.setdefault("object_store_memory", None)
        else:
            settings.init.setdefault("include_dashboard", False)


def launch(launcher: Launcher, jobs: Sequence[Sequence[str]], first: int) -> list[Any]:
    """Run jobs in parallel and return what each returned, or the exception that it raised.

    Raises:
        MergelabError: a job raised it: further jobs are of no use.
        Exception: the launcher raised it, for all jobs: a worker died.
    """
    from hydra.core.utils import JobStatus

    found: list[Any] = []
    for result in launcher.launch(jobs, initial_job_idx=first):
        if result.status == JobStatus.COMPLETED:
            found.append(result.return_value)
            continue
        with contextlib.redirect_stderr(io.StringIO()):  # Hydra repeats the whole command
            try:
                found.append(result.return_value)
            except MergelabError:
                raise
            except Exception as error:
                found.append(error)
    return found


def end_workers() -> None:
    """End what a failed or interrupted launch still runs in Ray; joblib ends its jobs itself."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()


# ---------------------------------------------------------------------------------------------------------- in a job


@contextlib.contextmanager
def worker_context(job: TrialJob) -> Iterator[None]:
    """Make a worker's process like the sweeper's: in its folder, and deaf to Ctrl-C, which the sweeper handles.

    Passwords are masked in the files that Hydra has written about the job.

    Raises:
        SweepError: the sweeper's folder is not on this machine.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    mask_passwords(Path(hydra.runtime.output_dir, str(hydra.output_subdir or ".hydra")))
    if _is_sweeper(job):
        yield
        return
    if not hydra.job.chdir and Path.cwd() != Path(job.folder):
        try:
            os.chdir(job.folder)
        except OSError as error:
            raise SweepError(
                f"sweep: the folder {job.folder}, where it was started on {job.host}, cannot be used on "
                f"{socket.gethostname()} ({error.strerror}); start it in a folder that all machines share"
            ) from None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to all of its processes
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_study(url: str, job: TrialJob) -> tuple[BaseStorage, Study]:
    """Open the study that a job reports to.

    Raises:
        SweepError: it is not to be reached from this machine.
    """
    from mergelab.sweep.study import load

    here = socket.gethostname()
    if is_sqlite(url) and job.host != here:
        raise SweepError(
            f"sweep.storage={redacted(url)}: is a file of {job.host}, and a trial runs on {here}; sweeps over several "
            "machines need sweep.storage=postgresql+psycopg://…, or journal:FILE in a folder that all share"
        )
    if not is_sqlite(url) and (file := storage_file(url)) is not None and not file.exists():
        raise SweepError(f"sweep.storage={url}: is not there on {here}; the folder must be shared with {job.host}")
    try:
        return load(url, job.study)
    except KeyError:
        raise SweepError(f"sweep.storage={redacted(url)}: has no study {job.study}, seen from {here}") from None


def open_tracker(config: TrackingConfig, job: TrialJob) -> Tracker:
    """Open the store that the sweep records in, also where the worker has another environment than the sweeper.

    Raises:
        TrackingError: it is not to be reached from this machine.
    """
    from mergelab.tracking import open_tracking
    from mergelab.tracking.store import locate

    config = config.model_copy(update={"uri": job.tracking} if job.tracking else {})
    if not config.enabled or _is_sweeper(job):
        return open_tracking(config)
    store, here = locate(config), socket.gethostname()
    if store.file is not None and job.host != here:
        raise TrackingError(
            f"the tracking store {store.shown} is a file of {job.host}, and a trial runs on {here}; sweeps over "
            "several machines need a tracking server: set tracking.uri or MLFLOW_TRACKING_URI to its address"
        )
    tracker = open_tracking(config)
    if job.parent is not None:
        from mlflow.exceptions import MlflowException

        try:
            tracker.client.get_run(job.parent)
        except MlflowException as error:
            raise TrackingError(
                f"the tracking store {store.shown}, seen from {here}, does not have the sweep's run "
                f"({one_line(str(error))}); set tracking.uri or MLFLOW_TRACKING_URI for the workers too"
            ) from None
    return tracker


def _is_sweeper(job: TrialJob) -> bool:
    return job.pid == os.getpid() and job.host == socket.gethostname()
