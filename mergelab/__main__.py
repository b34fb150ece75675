"""The command line: ``mergelab method=ties task=rte``, or ``python -m mergelab method=ties task=rte``."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import logging
import os
import runpy
import sys
import traceback

from mergelab.errors import MergelabError, did_you_mean, listed, one_line

_HELP = frozenset({"-h", "--help"})
_FULL_ERROR = "HYDRA_FULL_ERROR"
# Trouble of the machine, not of a program: there is one line about it whoever met it.
_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE})


def main() -> None:
    """Run what the command line asks for; bad input is one line and exit code 2, Ctrl-C one line and 130."""
    logging.raiseExceptions = False  # what a log file cannot take is no reason for a traceback
    try:
        _open_streams()
        _main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", code=130))
    except BrokenPipeError:  # the reader of the output has ended
        _discard_output()
    except OSError as error:
        if error.errno not in _MACHINE or (line := _of_output()) is None:
            raise
        sys.exit(_fail(line))


def _open_streams() -> None:
    """Take the places of closed standard streams, so that no file that is opened gets their numbers."""
    closed = sys.stdout is None
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "r" if stream == "stdin" else "w"))  # noqa: SIM115
    if closed:
        sys.exit(_fail("standard output is closed; >/dev/null discards what is shown"))


def _of_output() -> str | None:
    """Return one line where what is shown can no longer be written, as to a full disk; None where it can."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:
        _discard_output()
        return f"standard output cannot be written to ({error.strerror})"
    return None


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main() -> None:
    from mergelab.cli.help import commands, help_text, version_text

    arguments = sys.argv[1:]
    atexit.register(gc.freeze)  # the last collection would walk over all that was imported, to free what ends anyway
    if arguments and arguments[0] in commands():
        sys.argv = [f"mergelab {arguments[0]}", *arguments[1:]]
        runpy.run_module(f"mergelab.{arguments[0]}", run_name="__main__", alter_sys=True)
    elif not _HELP.isdisjoint(arguments):
        sys.stdout.write(help_text(arguments))
    elif "--version" in arguments:
        sys.stdout.write(version_text())
    elif arguments and arguments[0].isidentifier():
        there_are = f"there {'is' if len(commands()) == 1 else 'are'} {listed(commands())}"
        hint = did_you_mean(arguments[0], commands()) or f" ({there_are}; settings are GROUP=OPTION and KEY=VALUE)"
        sys.exit(_fail(f"{arguments[0]}: no such command{hint}"))
    else:
        _experiment(arguments)


def _experiment(arguments: list[str]) -> None:
    from mergelab.cli.run import run
    from mergelab.mergekit.commands import expanded
    from mergelab.tracking.secrets import without_password
    from mergelab.weights import truncated_file

    before = os.environ.get(_FULL_ERROR)
    gc.disable()  # until the job starts: imports make objects that stay
    os.environ[_FULL_ERROR] = "1"  # Hydra then lets its errors through instead of printing them over many lines
    try:
        with truncated_file.reported():
            run(expanded(arguments))
    except KeyboardInterrupt as interrupt:
        _close_grid("KILLED")
        sys.exit(_fail("; ".join(["interrupted", *getattr(interrupt, "__notes__", ())]), code=130))
    except BrokenPipeError:
        raise
    except Exception as error:
        _close_grid("FAILED")
        line = _one_line(error)
        if before == "1" or line is None:
            sys.stderr.write(without_password(traceback.format_exc()))
            sys.exit(1)
        sys.exit(_fail(line))
    finally:
        gc.enable()
        os.environ.pop(_FULL_ERROR, None)
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _fail(line: str, code: int = 2) -> int:
    # Whatever has read an address has imported this; an interrupted import must not begin again.
    if (secrets := sys.modules.get("mergelab.tracking.secrets")) is not None and hasattr(secrets, "without_password"):
        line = secrets.without_password(line)
    with contextlib.suppress(OSError):  # standard error may be full or gone; the code still says it
        sys.stderr.write(f"error: {one_line(line)}\n")
        sys.stderr.flush()
    return code


def _close_grid(status: str) -> None:
    """Close a grid's parent run; without a grid there is nothing to close, and nothing to import."""
    if (tracking := sys.modules.get("mergelab.tracking")) is not None:
        tracking.close_open_parents(status)
    if (grids := sys.modules.get("mergelab.cli.grid_table")) is not None:
        with contextlib.suppress(MergelabError):  # what ended the grid is the news
            grids.show_open_grids()


def _one_line(error: BaseException) -> str | None:
    """Return the line for an error that the user can correct; None for other errors."""
    from mergelab.cli.overrides import refusal

    if isinstance(error, MergelabError):
        return str(error)
    if (line := refusal(error)) is not None:
        return line
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return _of_output() or f"{error.strerror}, while a file was written below {os.getcwd()}"
    return None


if __name__ == "__main__":
    main()
