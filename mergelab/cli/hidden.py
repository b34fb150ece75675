"""Passwords and tokens that are typed: Hydra, which writes and shows what it is given, gets a reference instead."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from mergelab.cli.quoting import parsed
from mergelab.tracking.secrets import MASK, has_secret, remember, without_password

VARIABLE = "MERGELAB_ADDRESS"
# Launchers whose workers have this process's environment.
_LOCAL = ("basic", "joblib")


def references(arguments: Sequence[str]) -> list[str]:
    """Put each address that has a password into an environment variable, and a reference to it into the override.

    Workers on other machines have another environment: for their launchers the overrides stay as they are.
    """
    secret = [argument for argument in arguments if has_secret(argument)]
    for argument in secret:
        remember(argument)
    if not secret:
        return list(arguments)
    _hide_from_process_list(secret)
    launchers = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra/launcher=")]
    if not set(launchers) <= set(_LOCAL):
        return list(arguments)
    shows_only = any(argument in ("--cfg", "-c") for argument in arguments)
    found: list[str] = []
    for argument in arguments:
        override = parsed(argument) if argument in secret else None
        value = override.value() if override is not None else None
        if isinstance(value, str) and "${" not in value:
            name = f"{VARIABLE}_{uuid4().hex[:8]}"  # no worker that still has an older command's may take it for this
            os.environ[name] = without_password(value) if shows_only else value
            argument = f"{argument.partition('=')[0]}=${{oc.env:{name}}}"
        found.append(argument)
    return found


def _hide_from_process_list(secret: Sequence[str]) -> None:
    """Overwrite arguments of this process, where the system shows them to everybody (Linux)."""
    try:
        shown = Path("/proc/self/cmdline").read_bytes()
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45])
    except (OSError, IndexError, ValueError):
        return
    for argument in map(os.fsencode, secret):
        at = shown.find(b"\0" + argument + b"\0")
        key = argument.partition(b"=")[0] + b"="
        if start and at >= 0:
            masked = (key + MASK.encode()).ljust(len(argument), b" ")[: len(argument)]
            ctypes.memmove(start + at + 1, masked, len(argument))
