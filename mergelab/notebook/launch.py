"""Start what the command line starts from a program that goes on afterwards, and leave its process as it was."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mergelab.cli.ambiguous import refuse_ambiguous
from mergelab.cli.command import line_of
from mergelab.cli.hidden import VARIABLE, references
from mergelab.cli.overrides import in_jobs
from mergelab.cli.quoting import as_text
from mergelab.cli.run import VERSION_BASE, Refused, check_working_folder, mask_what_hydra_wrote, no_exit
from mergelab.config import CONF_DIR
from mergelab.errors import ConfigError, MergelabError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

Found = TypeVar("Found")


def run_one(overrides: Sequence[str], work: Callable[[DictConfig], Found]) -> Found:
    """Compose the configuration as the command line does, and return what ``work`` makes of it.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
    """
    found: list[Found] = []
    failures: list[Exception] = []

    def job(config: Any) -> None:
        mask_what_hydra_wrote()
        try:
            with no_exit():
                found.append(work(config))
        except Exception as error:  # Hydra would write about it before it raises it again
            failures.append(error)

    with _hydra() as hydra, _as_errors():
        hydra.run("config", job, _arguments(overrides, multirun=False), with_log_configuration=False)
        if failures:
            raise failures[0]
    return found[0]


def run_many(overrides: Sequence[str], work: Callable[[DictConfig], Any]) -> Any:
    """Compose the configuration as the command line does with ``-m``, and return what the sweeper returns.

    Raises:
        MergelabError: something in the configuration, the models, the data or the study is not usable.
        KeyboardInterrupt: the user interrupted it.
    """
    with _hydra() as hydra, _as_errors(), no_exit():
        return hydra.multirun("config", work, _arguments(overrides, multirun=True), with_log_configuration=False)


def _arguments(overrides: Sequence[str], *, multirun: bool) -> list[str]:
    """Prepare overrides as the command line's are.

    Raises:
        ConfigError: one is a flag, or can be read in several ways.
    """
    for override in overrides:
        if not isinstance(override, str) or override.startswith("-"):
            raise ConfigError(f"{override!r}: must be an override such as 'method.density=0.3'")
    check_working_folder()
    arguments = references(as_text(overrides))
    refuse_ambiguous(arguments, multirun=multirun)
    # What a program logs, and where, is its own affair.
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    return [*quiet, *(in_jobs(arguments) if multirun else arguments)]


@contextlib.contextmanager
def _as_errors() -> Iterator[None]:
    """Raise as `MergelabError` what the command line answers with one line, and ends with."""
    try:
        yield
    except Refused as stop:
        _raise(stop.error)
    except SystemExit as stop:
        if stop.code == 130:
            raise KeyboardInterrupt from None
        raise ConfigError(f"stopped with exit code {stop.code}") from stop
    except Exception as error:
        _raise(error)


def _raise(error: Exception) -> None:
    from hydra.errors import HydraException

    of_the_machine = isinstance(error, OSError) and not isinstance(error, HydraException)
    line = None if isinstance(error, MergelabError) or of_the_machine else line_of(error)
    raise error if line is None else ConfigError(line) from error


@contextlib.contextmanager
def _hydra() -> Iterator[Hydra]:
    """Set Hydra up, beside one that the program may have set up itself; restore what it had.

    Threads' number, signal handlers, logging and environment are those of before, whatever happens.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import JobRuntime

    instance, runtime = GlobalHydra.instance(), JobRuntime.instance()
    before = instance.hydra, HydraConfig.instance().cfg, version.getbase(), runtime.get("name")
    collecting = gc.isenabled()
    instance.clear()
    HydraConfig.instance().cfg = None
    version.setbase(VERSION_BASE)
    try:
        with _backend_kept():
            yield Hydra.create_main_hydra2("mergelab", create_config_search_path(str(CONF_DIR)))
    finally:
        instance.hydra, HydraConfig.instance().cfg, base, name = before
        version.VersionBase.instance().version_base = base
        runtime.set("name", name)
        if not collecting:
            gc.disable()
        for variable in [each for each in os.environ if each.startswith(f"{VARIABLE}_")]:
            del os.environ[variable]


@contextlib.contextmanager
def _backend_kept() -> Iterator[None]:
    """Keep the way in which matplotlib shows plots: those of a sweep are drawn for files."""
    had = _backend()
    try:
        yield
    finally:
        if had != _backend() and "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].switch_backend(had or _default_backend())


def _backend() -> Any:
    """Return the backend that matplotlib has or will choose; None where it is not imported."""
    if (matplotlib := sys.modules.get("matplotlib")) is None:
        return None
    return dict.__getitem__(matplotlib.rcParams, "backend")


def _default_backend() -> Any:
    return dict.__getitem__(sys.modules["matplotlib"].rcParamsDefault, "backend")
