"""What the command line starts through Hydra: an experiment, a grid of them, or a sweep."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from mergelab.cli.ambiguous import check_flags, refuse_ambiguous
from mergelab.cli.hidden import references
from mergelab.cli.overrides import in_jobs, no_such_reference
from mergelab.cli.quoting import as_text
from mergelab.cli.workers import ends_with_its_starter
from mergelab.config import CONF_DIR
from mergelab.console.formats import FORMAT, FORMATS, checked_format
from mergelab.console.progress import QUIET
from mergelab.errors import ConfigError, MergelabError, listed
from mergelab.tracking.secrets import in_reach, mask_passwords, private_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

VERSION_BASE = "1.3"  # of Hydra's behaviour
_MULTIRUN = frozenset({"-m", "--multirun"})
# Packages that end the process with good reason.
_OWN = frozenset({"mergelab", "hydra_plugins", "hydra", "argparse", "__main__"})
_QUIET = frozenset({"-q", "--quiet"})
_FORMAT = "--format"


class Refused(SystemExit):
    """Carries an error out of a callback: Hydra turns other exceptions there into warnings."""

    def __init__(self, error: Exception) -> None:
        super().__init__(2)
        self.error = error


def run(arguments: list[str]) -> None:
    """Compose the configuration and run its experiment, or the jobs of its grid or sweep.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
        hydra.errors.HydraException: the configuration cannot be composed.
    """
    compose_and_run(arguments, "config", experiment_or_trial)


def experiment_or_trial(config: DictConfig) -> Any:
    """Run the experiment that ``config`` composes, or the job of a sweep where it is one."""
    from omegaconf import OmegaConf

    if OmegaConf.select(config, "sweep.job") is not None:
        from mergelab.sweep.trial import run_job

        return run_job(config)
    from mergelab.experiment.run import run_experiment

    return run_experiment(config)


def compose_and_run(arguments: list[str], config_name: str, work: Callable[[DictConfig], Any]) -> None:
    """Compose a configuration from ``conf/<config_name>.yaml`` and the command line, and do ``work`` with it.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
        hydra.errors.HydraException: the configuration cannot be composed.
    """
    import hydra

    failures: list[Exception] = []

    def job(config: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf.errors import OmegaConfBaseException

        _collect_garbage()
        mask_what_hydra_wrote()
        try:
            with no_exit(), ends_with_its_starter():
                return work(config)
        except (MergelabError, OmegaConfBaseException, OSError) as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra says which job it was, and goes on with the next
            failures.append(error)
            return None

    check_working_folder()
    before = {name: os.environ.get(name) for name in (QUIET, FORMAT)}
    os.environ |= _of_output(arguments)  # for the jobs in other processes too
    sys.argv = ["mergelab", *_for_hydra(references(as_text([each for each in arguments if not _is_of_output(each)])))]
    try:
        with no_exit():
            hydra.main(version_base=VERSION_BASE, config_path=str(CONF_DIR), config_name=config_name)(job)()
    except Refused as stop:
        raise stop.error from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if failures:
        raise failures[0]


def check_working_folder() -> None:
    """Raise `ConfigError` where Hydra would read the working folder's name as a reference to a key."""
    if "${" in (folder := os.getcwd()):
        raise ConfigError(f"{folder}: Hydra reads ${{ in the working folder's name as a reference; rename the folder")


def _is_of_output(argument: str) -> bool:
    return argument in _QUIET or argument == _FORMAT or argument.startswith(f"{_FORMAT}=")


def _of_output(arguments: list[str]) -> dict[str, str]:
    """Return the variables that flags of the output stand for."""
    variables = {QUIET: "1"} if not _QUIET.isdisjoint(arguments) else {}
    for flag in (each for each in arguments if each.startswith(_FORMAT) and _is_of_output(each)):
        if flag == _FORMAT:
            raise ConfigError(f"{_FORMAT}: needs a format, as in {_FORMAT}=csv (there are {listed(FORMATS)})")
        variables[FORMAT] = checked_format(flag.partition("=")[2])
    return variables


def _for_hydra(arguments: list[str]) -> list[str]:
    """Put the flag of a grid or a sweep first, since Hydra's parser takes flags only before the overrides."""
    flags = [argument for argument in arguments if argument in _MULTIRUN]
    overrides = [argument for argument in arguments if argument not in _MULTIRUN]
    check_flags([*flags, *overrides])
    refuse_ambiguous(overrides, multirun=bool(flags))
    return [*flags, *(in_jobs(overrides) if flags else overrides)]


@contextlib.contextmanager
def no_exit() -> Iterator[None]:
    """Take ``sys.exit``, and what else is no `Exception`, in code of the user's own (a metric, a sampler) for an error.

    Raises:
        ConfigError: names the line.
    """
    try:
        yield
    except BaseException as stop:
        if isinstance(stop, Exception | KeyboardInterrupt):
            raise
        frame, line = list(traceback.walk_tb(stop.__traceback__))[-1]
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _OWN:
            raise
        what = f"calls sys.exit({stop.code})" if isinstance(stop, SystemExit) else f"raises {type(stop).__name__}"
        where = f"{frame.f_code.co_filename}, line {line}"
        raise ConfigError(f"{where}: {what}; raise an error instead") from None


def _collect_garbage() -> None:
    """Turn garbage collection on, which is off during start-up; what was imported stays and is left out of it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def mask_what_hydra_wrote() -> None:
    """Mask the passwords of addresses that came from files of configs, in what Hydra has written about this job."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    mask_passwords(Path(hydra.runtime.output_dir, str(hydra.output_subdir or ".hydra")))
    if hydra.mode == RunMode.MULTIRUN:
        mask_passwords(Path(hydra.sweep.dir))


class CheckedFirst(Callback):
    """Hydra callback that checks every setting of a single experiment before there is a folder for it.

    The folder of a run that has to do with passwords is made so that nobody else can look into it.

    Args:
        plan: dotted path of the function that checks a composed configuration.
    """

    def __init__(self, plan: str = "mergelab.experiment.plan.plan_experiment") -> None:
        self.plan = plan

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder of a grid or a sweep."""
        _collect_garbage()
        _make_private(config, "hydra.sweep.dir")

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Stop the run where a setting is not usable."""
        from hydra.utils import get_method
        from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

        try:
            if config.get("sweep") is not None:
                chosen = config.hydra.runtime.choices.get("sweep")
                raise ConfigError(
                    f"sweep={chosen}: a sweep is started with -m: python -m mergelab -m sweep={chosen} ...; "
                    "without -m this is one experiment: leave sweep out"
                )
            get_method(self.plan)(config)
        except InterpolationKeyError as error:
            raise Refused(ConfigError(no_such_reference(error))) from None
        except OmegaConfBaseException:  # a value refers to the folder, and is checked when there is one
            pass
        except Exception as error:
            raise Refused(error) from None
        _make_private(config, "hydra.run.dir")


def _make_private(config: DictConfig, key: str) -> None:
    """Make the folder that ``key`` names one that nobody else can look into, where a password could come into it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    addresses = [OmegaConf.select(config, name, default=None) for name in ("tracking.uri", "hydra.sweeper.storage")]
    try:
        if in_reach([str(address) for address in addresses if address]):
            private_folder(Path(str(OmegaConf.select(config, key))))
    except (OSError, OmegaConfBaseException):  # Hydra says so when it makes the folder
        return
