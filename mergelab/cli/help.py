"""What ``--help`` shows: what a user sets, read from the configs themselves. Nothing heavy is imported here."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from mergelab import __version__
from mergelab.config import CONF_DIR

_PACKAGE = Path(__file__).resolve().parent.parent
_WIDTH = 118

_USAGE = """\
mergelab: merge fine-tuned transformer models in weight space, evaluate the merges, keep track of them

Usage: mergelab [GROUP=OPTION] [KEY=VALUE] ...        one experiment (also: python -m mergelab ...)
       mergelab -m KEY=VALUE,VALUE ...                a grid: every combination
       mergelab -m sweep=OPTION ...                   an Optuna sweep
       mergelab COMMAND ...                           {commands}

Examples:
  mergelab method=ties task=rte method.density=0.3 method.lambda=0.8
  mergelab -m method=soup,task_arithmetic,ties,dare task=rte
  mergelab -m sweep=ties task=rte sweep.n_trials=50
  mergelab models.base=ORG/BASE models.experts=[ORG/A,ORG/B@REVISION,./folder] task=rte
  mergelab '~models.experts.howey'                    leave an expert of a ready set out
  mergelab method=custom method.function=my_module.median
  mergelab method=ties task=rte source=mini evaluate=false output=merged
  mergelab experiment=bert_rte
"""

_FLAGS = """\
Flags:
  -m, --multirun     a grid or a sweep
  -q, --quiet        print the result alone
  --format=FORMAT    print it as markdown, latex, csv or json (table)
  --cfg job          show the composed config, run nothing
  --config-dir DIR   a folder of configs of your own, which add to the groups
  --version          show mergelab's version
  --hydra-help       show Hydra's own flags
"""

_MODELS = """\
  models.base=REFERENCE                   a hub id (ORG/NAME@REVISION) or a folder; null: no base
  models.experts=[REFERENCE,...]          or {NAME: REFERENCE, ...}; takes the place of the whole set
  models.experts.NAME=REFERENCE           add or replace one; '~models.experts.NAME' leaves one out
  models.experts.NAME.weight=1.0          also .task, .labels, .part
  models.head=average                     average, base, expert:NAME or per_task
  models.passthrough=[]                   name patterns of tensors that skip the merge
  models.leave_out=[]                     layers that skip the merge and stay the base's
  models.vocab=null                       base, union or an expert: merge models whose tokens differ by token
  method.PARAMETER=VALUE                  mergelab methods NAME lists a method's
  task.limit=null                         examples per split; task.data_dir: a folder instead of the hub
"""

# The files whose comments say what their keys mean, with the group that the keys have.
_DOCUMENTED = (
    ("config.yaml", ""),
    ("eval/standard.yaml", "eval."),
    ("save/standard.yaml", "save."),
    ("tracking/mlflow.yaml", "tracking."),
    ("sweep/_settings.yaml", "sweep."),
)
_NO_CHOICE = ("hydra", "task/shared")  # folders of configs that other configs use
_SETTING = re.compile(r"^ *(?P<key>\w+): (?P<value>.+?) +# (?P<meaning>.+)$")


def commands() -> list[str]:
    """List the commands other than merging: the folders of the package that run with ``python -m mergelab.NAME``."""
    return sorted(path.parent.name for path in _PACKAGE.glob("*/__main__.py"))


def version_text() -> str:
    """Write the line of ``--version``."""
    return f"mergelab {__version__}\n"


def help_text(arguments: Sequence[str] = ()) -> str:
    """Write the help, with the groups of a ``--config-dir`` among ``arguments``."""
    parts = [
        _USAGE.format(commands=", ".join(commands())),
        "Groups (GROUP=OPTION):\n" + "\n".join(_groups([CONF_DIR, *_config_dirs(arguments)])) + "\n",
        "Keys (KEY=VALUE), each with its default:\n" + _MODELS + "\n".join(_settings(CONF_DIR)) + "\n",
        _FLAGS,
    ]
    return "\n".join(parts)


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    flags = ("--config-dir", "-cd")
    after = [value for flag, value in pairwise(arguments) if flag in flags]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    return [Path(folder) for folder in (*after, *joined)]


def _groups(folders: Sequence[Path]) -> Iterator[str]:
    """Yield the groups that have a choice, each with its options, wrapped."""
    options: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            if not file.stem.startswith("_") and not f"{group}/".startswith(tuple(f"{name}/" for name in _NO_CHOICE)):
                options.setdefault(group, set()).add(file.stem)
    for group, names in sorted(options.items()):
        if len(names) > 1:
            yield _wrapped(f"  {group:16}", ", ".join(sorted(names)))
    yield _wrapped(
        f"  {'hydra/launcher':16}", "where the jobs of -m run: basic; joblib, ray, submitit_slurm where installed"
    )


def _settings(conf: Path) -> Iterator[str]:
    for name, prefix in _DOCUMENTED:
        yield from settings_of(conf / name, prefix)


def settings_of(file: Path, prefix: str) -> Iterator[str]:
    """Yield a line for each key of a file of configs whose comment says what it means; keys begin with ``prefix``."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if found := _SETTING.match(line):
            setting = f"{prefix}{found['key']}={found['value']}"
            yield _wrapped(f"  {setting:40}", found["meaning"])


def _wrapped(heading: str, text: str) -> str:
    """Write ``text`` to the right of ``heading``."""
    return textwrap.fill(
        text, _WIDTH, initial_indent=heading, subsequent_indent=" " * len(heading), break_on_hyphens=False
    )
