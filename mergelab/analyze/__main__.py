"""``python -m mergelab.analyze models=…`` and ``mergelab analyze models=…``."""

from __future__ import annotations

import sys

from mergelab.cli.command import fail, guarded, through_hydra
from mergelab.config import CONF_DIR

USAGE = """\
mergelab analyze: what the task vectors of models look like before they are merged

Usage: mergelab analyze [GROUP=OPTION] [KEY=VALUE] ...        (also: python -m mergelab.analyze ...)

Norms by layer, cosines, sign conflicts, the overlap of the largest entries; with settings also effective ranks, and a
task's score and loss between models. Tables in the terminal; a page, a picture, JSON and Parquet in the run's folder
and in MLflow.

Examples:
  mergelab analyze models=bert_base_rte
  mergelab analyze models.base=ORG/BASE models.experts=[ORG/A,./folder,./adapter] analyze.density=0.1
  mergelab analyze task=rte 'analyze.line=[base,howey]'
  mergelab analyze task=rte 'analyze.plane=[base,howey,textattack]' analyze.points=7

Keys (KEY=VALUE), each with its default; models, task, eval, source and tracking are those of mergelab --help:
"""


def main() -> None:
    """Run what the command line asks for; bad input is one line and exit code 2."""
    guarded(_main)


def _main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        from mergelab.cli.help import settings_of

        sys.stdout.write(USAGE + "\n".join(settings_of(CONF_DIR / "analyze.yaml", "analyze.")) + "\n")
        return
    if {"-m", "--multirun"} & set(arguments):
        sys.exit(fail("mergelab analyze: one analysis is made at a time; leave -m out"))
    through_hydra(arguments, _run)


def _run(arguments: list[str]) -> None:
    from mergelab.analyze.run import run_analysis
    from mergelab.cli.run import compose_and_run

    compose_and_run(arguments, "analyze", run_analysis)


if __name__ == "__main__":
    main()
