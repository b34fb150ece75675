"""Overrides that Hydra reads in one of several ways without a word."""

from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer  # type: ignore[attr-defined]
from hydra.grammar.gen.OverrideParser import OverrideParser

from mergelab.errors import ConfigError, listed

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Groups of which an experiment has one option: Hydra would merge several into one.
_ONE_OF = ("method", "models", "task", "eval", "save", "tracking", "sweep")


class _Flags(ArgumentParser):
    """Hydra's flags, about which its own parser writes many lines."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help shows what there is)")


def check_flags(arguments: Sequence[str]) -> None:
    """Check that all flags are known.

    Raises:
        ConfigError: one is not, or lacks its value.
    """
    own = get_args_parser()
    _Flags(parents=[own], add_help=False, conflict_handler="resolve").parse_args(list(arguments))


class _NamesOnce(HydraOverrideVisitor):
    """Hydra's reading of an override, but for a name that is repeated."""

    def visitDictContainer(self, ctx: Any) -> dict[str, Any]:
        counts = Counter(str(self.visitDictKey(pair.dictKey())) for pair in ctx.dictKeyValuePair())
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise ConfigError(f"{listed(repeated)} is there twice, and only the last would count")
        return super().visitDictContainer(ctx)


# Where a job's model goes: what that is, and what may stand before a job's number in its name.
_OF_ONE_JOB = {"output": ("folder", "/"), "save.push_to_hub": ("repository", "-")}


def refuse_ambiguous(arguments: Sequence[str], *, multirun: bool) -> None:
    """Check that no override means one thing to its writer and another to Hydra.

    Args:
        arguments: the overrides.
        multirun: whether they are those of a grid or a sweep.

    Raises:
        ConfigError: a name is given two values in braces, as ``models.experts={x: A, x: B}``; a group several options,
            as ``method=[ties,dare]``; the jobs of a grid one folder or repository.
    """
    read = [(argument, override) for argument in arguments if (override := _read(argument)) is not None]
    for argument, override in read:
        key, value = override.key_or_group, override._value
        if key in _ONE_OF and isinstance(value, list):
            several = ",".join(map(str, value)) or "NAME"
            raise ConfigError(
                f"{argument}: one option is chosen, {key}=NAME; -m {key}={several} tries one after another"
            )
    chosen = {override.key_or_group for _, override in read}
    swept = [argument for argument, override in read if override.is_sweep_override()]
    if not (multirun and swept) or chosen & {"sweep", "hydra/sweeper"}:  # a sweep writes its winner alone
        return
    for argument, override in read:
        constant = not override.is_sweep_override() and override.value() is not None and "${" not in argument
        if override.key_or_group in _OF_ONE_JOB and constant:
            what, mark = _OF_ONE_JOB[override.key_or_group]
            raise ConfigError(
                f"{argument}: all jobs of {swept[0]} would write into one {what}; "
                f"'{argument}{mark}${{hydra:job.num}}' is one for each"
            )


def _read(argument: str) -> Override | None:
    """Parse an override; None for what is none, and for what Hydra is going to refuse.

    Raises:
        ConfigError: a name is given two values in braces.
    """
    lexer = OverrideLexer(InputStream(argument))
    parser = OverrideParser(CommonTokenStream(lexer))
    for reader in (lexer, parser):
        reader.removeErrorListeners()
        reader.addErrorListener(HydraErrorListener())
    try:
        override: Override = _NamesOnce(create_functions()).visit(parser.override())  # type: ignore[no-untyped-call]
    except ConfigError as error:
        raise ConfigError(f"{argument.partition('=')[0]}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{argument.partition('=')[0]}: is nested too deeply") from None
    except HydraException:
        return None
    return override
