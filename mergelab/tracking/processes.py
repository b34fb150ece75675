"""Which process, on which machine, in which environment a run belongs to."""

from __future__ import annotations

import functools
import getpass
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HOST = "mergelab.host"
PID = "mergelab.pid"
STARTED = "mergelab.process_start"
NAMESPACE = "mergelab.pid_namespace"

_LIBRARIES = ("mergelab", "torch", "transformers", "datasets", "evaluate", "mlflow")
# A process's start is computed from the boot time, which moves a little when the clock is set.
_START_TOLERANCE_S = 10.0


def process_tags() -> dict[str, str]:
    """Name this process so that another can later tell whether it still lives: host, pid, when it started."""
    import psutil

    tags = {
        HOST: socket.gethostname(),
        PID: str(os.getpid()),
        STARTED: f"{psutil.Process().create_time():.2f}",
    }
    return tags | ({NAMESPACE: namespace} if (namespace := _pid_namespace()) else {})


def has_ended(tags: Mapping[str, str]) -> bool:
    """Return whether the process that ``tags`` name ran here and is no more; False when that cannot be known."""
    import psutil

    if tags.get(HOST) != socket.gethostname() or tags.get(NAMESPACE, "") != _pid_namespace():
        return False
    try:
        pid, started = int(tags[PID]), float(tags[STARTED])
    except (KeyError, ValueError):
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
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


def environment_tags() -> dict[str, str]:
    """Describe what a result depends on beside its config: code version, libraries, Python, machine, user, command."""
    return _fixed_tags(os.getcwd()) | process_tags()


@functools.lru_cache(maxsize=8)
def _fixed_tags(folder: str) -> dict[str, str]:
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": _command(),
        "mlflow.source.type": "LOCAL",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for library in _LIBRARIES:
        try:
            tags[f"version.{library}"] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _git_commit(folder):
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["mlflow.source.git.dirty"] = "true" if commit.endswith("-dirty") else "false"
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
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=5, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
