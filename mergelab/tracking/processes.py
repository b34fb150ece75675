"""Which process, on which machine, in which environment a run belongs to."""

from __future__ import annotations

import functools
import getpass
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.tracking import names

_LIBRARIES = ("mergelab", "torch", "transformers", "datasets", "evaluate", "mlflow")
_NUMBERS = (names.HOST, names.PID, names.STARTED, names.STARTED_TICKS, names.BOOT, names.PID_NAMESPACE)
# A process's start is computed from the boot time, which moves a little when the clock is set.
_START_TOLERANCE_S = 10.0


def process_tags() -> dict[str, str]:
    """Name this process so that another can later find out whether it still lives."""
    import psutil

    tags = {
        names.HOST: socket.gethostname(),
        names.PID: str(os.getpid()),
        names.STARTED: f"{psutil.Process().create_time():.2f}",
        names.STARTED_TICKS: _started_ticks(os.getpid()),
        names.BOOT: _boot(),
        names.PID_NAMESPACE: _pid_namespace(),
    }
    return {name: value for name, value in tags.items() if value}


def is_here(tags: Mapping[str, str]) -> bool:
    """Return whether process numbers mean the same where the process of ``tags`` ran: not in another container.

    The host's name says so only where the system does not tell more: containers change it, and machines share it.
    """
    if (tags.get(names.BOOT, ""), tags.get(names.PID_NAMESPACE, "")) != (_boot(), _pid_namespace()):
        return False
    return bool(_boot() and _pid_namespace()) or tags.get(names.HOST) == socket.gethostname()


def has_ended(tags: Mapping[str, str]) -> bool:
    """Return whether the process that ``tags`` name ran here and is no more; False when that cannot be known."""
    import psutil

    if not is_here(tags):
        return False
    try:
        pid, started = int(tags[names.PID]), float(tags[names.STARTED])
    except (KeyError, ValueError):
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        if names.STARTED_TICKS in tags and (ticks := _started_ticks(pid)):
            return ticks != tags[names.STARTED_TICKS]
        return bool(abs(process.create_time() - started) > _START_TOLERANCE_S)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _pid_namespace() -> str:
    # Two containers may share a host name and a store, but not their process numbers.
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started_ticks(pid: int) -> str:
    try:
        # The second field is the program's name in parentheses, which may have blanks and parentheses of its own.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def process_of(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the numbers of the process that a run's tags name."""
    try:
        packed = json.loads(tags.get(names.PROCESS, "{}"))
    except ValueError:
        packed = {}
    return {name: value for name, value in (packed | dict(tags)).items() if name in _NUMBERS}


def environment_tags() -> dict[str, str]:
    """Return the tags that say who ran what: process, user, command, version of the code."""
    return _fixed_tags(os.getcwd()) | process_tag()


def process_tag() -> dict[str, str]:
    """Return the tag of a run that this process has open."""
    return {names.PROCESS: json.dumps(process_tags())}


def environment() -> dict[str, Any]:
    """Describe what a result depends on besides its config: libraries, Python, machine, process."""
    return {**_libraries(), "process": process_tags()}


@functools.cache
def _libraries() -> dict[str, Any]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "versions": versions}


@functools.lru_cache(maxsize=8)
def _fixed_tags(folder: str) -> dict[str, str]:
    tags = {
        names.USER: _user(),
        names.COMMAND: _command(),
        names.COMMAND_TYPE: "LOCAL",
    }
    if commit := _git_commit(folder):
        tags[names.GIT_COMMIT] = commit.removesuffix("-dirty")
        tags[names.GIT_DIRTY] = "true" if commit.endswith("-dirty") else "false"
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without an entry in passwd
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _command() -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return "python -m " + str(spec.name).removesuffix(".__main__")
    return shlex.quote(Path(sys.argv[0]).name) if sys.argv and sys.argv[0] else "python"


def _git_commit(folder: str) -> str | None:
    """Return the commit that is checked out in a folder, with ``-dirty`` where files were changed; None without one.

    A repository's settings can name programs for git to run (file system monitor, hooks, filters); none is run.
    """
    safe = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    filters = _git(
        [*safe, "config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|smudge|process|required)$"], folder
    )
    for key in (filters or "").split():
        safe += ["-c", f"{key}=false" if key.endswith(".required") else f"{key}="]
    return _git([*safe, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], folder)


def _git(arguments: list[str], folder: str) -> str | None:
    """Return what git writes; None where it is not there, fails or writes nothing."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
