"""Merge as a mergekit config says, without measuring anything.

Usage:
    mergelab mergekit merge.yml OUT                      # the merged model in the new folder OUT
    mergelab mergekit merge.yml OUT method.lambda=0.7    # with a setting changed
    mergelab mergekit stages.yml OUT -I FOLDER           # several documents, as mergekit-multi: stages in FOLDER
    mergelab mergekit merge.yml --config                 # print it as a config of this package, for experiment=

``python -m mergelab.mergekit`` is the same command. mergelab mergekit=merge.yml task=... merges and measures.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence

from mergelab.cli.command import guarded
from mergelab.errors import ConfigError, MergelabError
from mergelab.mergekit.commands import KEY, is_strict, read, text_of

# Flags of mergekit-yaml that choose how it works, where a merge is streamed in any case or nothing of the kind is done.
_WITHOUT_EFFECT = (
    *("lazy-unpickle", "low-cpu-memory", "clone-tensors", "read-to-gpu", "multi-gpu", "async-write", "gpu-rich"),
    *("allow-crimes", "write-model-card", "safe-serialization", "copy-tokenizer", "trust-remote-code", "lazy"),
)
_WITH_VALUE = ("transformers-cache", "lora-merge-cache", "lora-merge-dtype", "write-threads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge, or print the config, and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args([each for each in given if not _is_override(each)])
        own = [each for each in given if _is_override(each)]
        if options.config:
            sys.stdout.write(text_of(read(options.file, strict=is_strict(own)), options.file))
            return 0
        options.output = options.output or options.out_path
        if options.output is None:
            raise ConfigError("the folder for the merged model is missing: mergelab mergekit merge.yml OUT")
        settings = _settings(options)
    except MergelabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    merge = [f"{KEY}={options.file}", "evaluate=false", f"output={options.output}"]
    sys.argv = ["mergelab", *merge, *settings, *own]
    runpy.run_module(
        "mergelab", run_name="__main__", alter_sys=True
    )  # as the command itself: its lines, its exit codes
    return 0


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mergelab mergekit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="a mergekit config")
    parser.add_argument("output", nargs="?", help="a new folder for the merged model; then KEY=VALUE ...")
    parser.add_argument("--out-path", "-o", help=argparse.SUPPRESS)
    parser.add_argument("--intermediate-dir", "-I", help="save.stages=...: the folder for the results of stages")
    parser.add_argument("--config", action="store_true", help="print the config of this package, merge nothing")
    parser.add_argument("--cuda", "--gpu-rich", action="store_true", help="merge on a GPU (device=cuda)")
    parser.add_argument("--device", help="device=...")
    parser.add_argument("--out-shard-size", help="save.max_shard_size=...: 5B and 5GB are the same")
    parser.add_argument("--random-seed", type=int, help="seed=...")
    parser.add_argument("--num-threads", "-j", type=int, help="how many threads compute (OMP_NUM_THREADS)")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    parser.add_argument("-v", dest="verbosity", action="count", help=argparse.SUPPRESS)
    for name in _WITHOUT_EFFECT:
        if name != "gpu-rich":
            parser.add_argument(f"--{name}", f"--no-{name}", action="store_true", help=argparse.SUPPRESS)
    for name in _WITH_VALUE:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


def _settings(options: argparse.Namespace) -> list[str]:
    """Return the overrides that mergekit's flags stand for."""
    import os

    found = []
    if options.cuda or options.device:
        found.append(f"device={options.device or 'cuda'}")
    if options.out_shard_size:
        found.append(f"save.max_shard_size={shard_size(options.out_shard_size)}")
    if options.random_seed is not None:
        found.append(f"seed={options.random_seed}")
    if options.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.num_threads)
    if options.intermediate_dir:
        found.append(f"save.stages={options.intermediate_dir}")
    if options.quiet:
        found.append("--quiet")
    return found


def shard_size(text: str) -> str:
    """Return a size as the config has it: ``5B`` is mergekit's for five billion bytes, ``500M`` for half a billion.

    Raises:
        ConfigError: it is no size.
    """
    number = text.upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in "KMGT" and number[-1:] else "G" if text[-1:] in "bB" else ""
    number = number.rstrip("KMGT")
    if not number.replace(".", "", 1).isdigit():
        raise ConfigError(f"--out-shard-size={text}: must be a number with K, M or B, such as 5B")
    if not unit:
        return f"{float(number) / 1000:.9g}kB"
    return f"{number}{unit.replace('K', 'k')}B"


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
