"""The command line: ``python -m mergelab method=ties task=rte``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from mergelab.cli import overrides
from mergelab.config import CONF_DIR
from mergelab.errors import ConfigError, MergelabError, did_you_mean
from mergelab.weights import truncated_file

_MULTIRUN = frozenset({"-m", "--multirun"})
_FULL_ERROR = "HYDRA_FULL_ERROR"
# Keys that a ready config need not have: parameters of a method, settings of a task, experts of the user's own, how
# models are merged, options of Ray's. What is unknown there is found out, with a better message, when the part of
# mergelab that owns it looks.
_OPEN_KEYS = re.compile(
    r"^(method\.[\w.]+|task\.[\w.\-]+|models\.(vocab|leave_out|merge_new|base\.\w+|experts\.[\w.\-]+)"
    r"|hydra\.launcher\.ray\.(init|remote)\.[\w.]+)="
)
_WHOLE = re.compile(r"^(models\.experts)=|^(models\.base)=\s*\{")


def main() -> None:
    """Run what the command line asks for; bad input is one line and exit code 2."""
    arguments = [spelled for argument in sys.argv[1:] for spelled in _for_hydra(argument, sys.argv[1:])]
    # Hydra's parser takes flags only before the overrides.
    given, sys.argv = sys.argv[1:], ["mergelab", *sorted(arguments, key=lambda argument: argument not in _MULTIRUN)]
    traceback_wanted = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra then lets its errors through instead of printing them over many lines
    try:
        overrides.check_named(given)
        with truncated_file.reported():
            _compose_and_run()
    except KeyboardInterrupt as interrupt:
        _close_grid("KILLED")
        sys.exit(_fail("; ".join(["interrupted", *getattr(interrupt, "__notes__", ())]), code=130))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        _close_grid("FAILED")
        line = _one_line(error)
        if traceback_wanted or line is None:
            raise
        sys.exit(_fail(line))


def _for_hydra(argument: str, arguments: Sequence[str]) -> list[str]:
    """Spell an override for Hydra: open keys may be new; a whole set of experts, or a pair, replaces the old one."""
    if match := _WHOLE.match(argument):
        return [f"~{match[1] or match[2]}", f"+{argument}"]
    multirun = not _MULTIRUN.isdisjoint(arguments)
    if (spelled := overrides.spelled(argument, arguments, multirun=multirun)) is not None:
        return [spelled]
    return [f"++{argument}" if _OPEN_KEYS.match(argument) else argument]


def _compose_and_run() -> None:
    import hydra

    failures: list[MergelabError] = []

    def job(config: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        if OmegaConf.select(config, "sweep.job") is not None:
            from mergelab.sweep.trial import run_job

            return run_job(config)
        from mergelab.experiment.run import run_experiment

        try:
            if config.get("sweep") is not None and HydraConfig.get().mode == RunMode.RUN:
                chosen = HydraConfig.get().runtime.choices.get("sweep")
                raise ConfigError(
                    f"sweep={chosen}: a sweep is started with -m: python -m mergelab -m sweep={chosen} ...; "
                    "without -m this is one experiment: leave sweep out"
                )
            return run_experiment(config)
        except MergelabError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra says which job it was, and goes on with the next
            failures.append(error)
            return None

    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
    if failures:
        raise failures[0]


def _fail(line: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {line}\n")
    return code


def _close_grid(status: str) -> None:
    """Do not leave a grid's parent run open; without a grid there is nothing to close, and nothing to import."""
    if (tracking := sys.modules.get("mergelab.tracking")) is not None:
        tracking.close_open_parents(status)
    if (grids := sys.modules.get("mergelab.cli.grid_table")) is not None:
        grids.show_open_grids()


def _one_line(error: BaseException) -> str | None:
    """Say in one line what the user can mend; ``None`` for errors that are nobody's input."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MergelabError):
        return " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]
        return f"{group}={name}: no such option{did_you_mean(name, options)} (there are {', '.join(options)})"
    if isinstance(error, HydraException | OmegaConfBaseException):
        text = str(error)
        if unknown := re.match(r"Could not override '([^']+)'.*(?:\s+To append to your config use \+(.*))?", text):
            if (refusal := overrides.refusal(unknown[2] or "", error)) is not None:
                return refusal
            return f"{unknown[1]}: no such key{did_you_mean(unknown[1].lstrip('+'), _known_keys())}"
        return " ".join(text.split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def _known_keys() -> list[str]:
    """List every key and group of the default configuration, a sweep's among them."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", ["sweep=ties"])

    def walk(node: Any, prefix: str) -> list[str]:
        names = []
        for key in node if OmegaConf.is_dict(node) else ():
            names += [f"{prefix}{key}", *walk(node._get_node(key), f"{prefix}{key}.")]
        return names

    return [*walk(config, ""), "experiment"]


if __name__ == "__main__":
    main()
