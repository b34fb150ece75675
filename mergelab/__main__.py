"""The command line: ``mergelab method=ties task=rte``, or ``python -m mergelab method=ties task=rte``."""

from __future__ import annotations

import atexit
import gc
import runpy
import sys

from mergelab.cli.command import fail, guarded, through_hydra
from mergelab.errors import did_you_mean, listed

_HELP = frozenset({"-h", "--help"})


def main() -> None:
    """Run what the command line asks for; bad input is one line and exit code 2, Ctrl-C one line and 130."""
    guarded(_main)


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
        sys.exit(fail(f"{arguments[0]}: no such command{hint}"))
    else:
        through_hydra(arguments, _experiment)


def _experiment(arguments: list[str]) -> None:
    from mergelab.cli.run import run
    from mergelab.mergekit.commands import expanded
    from mergelab.sweep.method_space import searched_keys

    run(expanded(arguments, searched_keys))


if __name__ == "__main__":
    main()
