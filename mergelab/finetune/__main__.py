"""``python -m mergelab.finetune task=… base=… seeds=[…]`` and ``mergelab finetune …``."""

from __future__ import annotations

import sys

from mergelab.cli.command import fail, guarded, through_hydra
from mergelab.config import CONF_DIR

USAGE = """\
mergelab finetune: experts for one task, each from the same base

Usage: mergelab finetune [GROUP=OPTION] [KEY=VALUE] ...        (also: python -m mergelab.finetune ...)

Trains on the task's training split alone: a part of it is held out and chooses the best epoch. Each expert is a model
folder (with lora.r an adapter's) with card and provenance, which models.experts takes. The same command makes the same
weights; started again after it was killed, it goes on from the last epoch.

Examples:
  mergelab finetune task=rte source=mini
  mergelab finetune task=sst2 base=ORG/BASE 'seeds=[0,1,2]' output=experts
  mergelab finetune task=sst2 base=./folder shards=3 train.epochs=5 train.learning_rate=3e-5
  mergelab finetune task=samsum base=google-t5/t5-small lora.r=8 task.data_dir=data

Keys (KEY=VALUE), each with its default; task, source and tracking are those of mergelab --help:
"""


def main() -> None:
    """Run what the command line asks for; bad input is one line and exit code 2."""
    guarded(_main)


def _main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        from mergelab.cli.help import settings_of

        files = {"finetune": "", "train/standard": "train.", "lora/standard": "lora."}
        settings = [line for name, prefix in files.items() for line in settings_of(CONF_DIR / f"{name}.yaml", prefix)]
        sys.stdout.write(USAGE + "\n".join(settings) + "\n")
        return
    if {"-m", "--multirun"} & set(arguments):
        sys.exit(fail("mergelab finetune: one recipe is trained at a time, for several seeds or shards; leave -m out"))
    through_hydra(arguments, _run)


def _run(arguments: list[str]) -> None:
    from mergelab.cli.run import compose_and_run
    from mergelab.finetune.run import run_finetuning

    compose_and_run(arguments, "finetune", run_finetuning)


if __name__ == "__main__":
    main()
