"""``python -m mergelab.prefetch models=… task=…`` and ``mergelab prefetch …``."""

from __future__ import annotations

import sys

from mergelab.cli.command import fail, guarded, through_hydra

USAGE = """\
mergelab prefetch: what an experiment needs from the hub, fetched beforehand

Usage: mergelab prefetch [GROUP=OPTION] [KEY=VALUE] ...        (also: python -m mergelab.prefetch ...)

Fetches the models and the data of an experiment into the hub's cache, as far as they are not there, and says how large
each is. The arguments are those of the experiment itself. A machine without network that has the same cache (HF_HOME)
then runs it with HF_HUB_OFFLINE=1. Metrics come with the package and need nothing.

Examples:
  mergelab prefetch models=bert_base_rte task=rte
  mergelab prefetch models.base=ORG/BASE models.experts=[ORG/A,ORG/B@REVISION] task=sst2
  mergelab prefetch evaluate=false                    models alone
  mergelab prefetch task=rte source=mini              the embedded miniature, which is trained at its first use
"""


def main() -> None:
    """Run what the command line asks for; bad input is one line and exit code 2."""
    guarded(_main)


def _main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return
    if {"-m", "--multirun"} & set(arguments):
        sys.exit(fail("mergelab prefetch: one experiment at a time; leave -m out"))
    through_hydra(arguments, _run)


def _run(arguments: list[str]) -> None:
    from mergelab.cli.run import compose_and_run
    from mergelab.prefetch.run import run_prefetch

    compose_and_run(arguments, "prefetch", run_prefetch)


if __name__ == "__main__":
    main()
