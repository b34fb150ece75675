"""Names that stand twice in one pair of braces: Hydra takes the last value and says nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from mergelab.errors import ConfigError, listed


class _NamesOnce(HydraOverrideVisitor):
    """Hydra's reading of an override, but for a name that is repeated."""

    def visitDictContainer(self, ctx: Any) -> dict[str, Any]:
        counts = Counter(str(self.visitDictKey(pair.dictKey())) for pair in ctx.dictKeyValuePair())
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise ConfigError(f"{listed(repeated)} is there twice, and only the last would count")
        return super().visitDictContainer(ctx)


def refuse_repeated(arguments: Iterable[str]) -> None:
    """Check that no override such as ``models.experts={x: A, x: B}`` gives one name two values.

    Raises:
        ConfigError: one does.
    """
    for argument in arguments:
        if "{" not in argument:
            continue
        lexer = OverrideLexer(InputStream(argument))
        parser = OverrideParser(CommonTokenStream(lexer))
        for reader in (lexer, parser):
            reader.removeErrorListeners()
            reader.addErrorListener(HydraErrorListener())
        try:
            _NamesOnce(create_functions()).visit(parser.override())
        except ConfigError as error:
            raise ConfigError(f"{argument.partition('=')[0]}: {error}") from None
        except HydraException:
            continue  # Hydra's own reading refuses it
