r"""Text that Hydra's grammar of overrides cannot read, or reads as something else: paths above all.

A value that the grammar cannot read and that has none of its marks (``,[]{}()'"\`` and ``${``) can only be meant as
text, and is quoted here. Any other is an error that shows the quoted form.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString, Sweep
from hydra.errors import HydraException

from mergelab.config import says_what_it_is
from mergelab.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_OVERRIDE = re.compile(r"(?P<key>\+{0,2}[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)
_MARKS = re.compile(r"[,\[\]{}()'\"\\]|\$\{")
# Keys that hold one path; and those that may also hold a list or a mapping of them.
_PATH = re.compile(r"\+{0,2}(output|task\.data_dir|models\.base\.(encoder|decoder))")
_PATHS = re.compile(rf"{_PATH.pattern}|\+{{0,2}}models\.(base|experts(\.[^.]+(\.reference)?)?)")
_BRACKETS = {"[": "]", "{": "}"}
# Keys of an expert or of a pair that hold numbers.
_NUMBERS = ("weight", "seed", "decoder_start_token_id", "pad_token_id", "eos_token_id")
_MISSING = "???"  # OmegaConf's mark of a value that is still to be set


def parsed(argument: str) -> Override | None:
    """Parse an override; None for a flag, and for what Hydra is going to refuse."""
    if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def as_text(arguments: Sequence[str]) -> list[str]:
    """Quote the values that can only be text; check that no path is read as something else.

    Raises:
        ConfigError: a path is read as something else, or a key is set that says which method or task this is.
    """
    return [_as_text(argument) for argument in arguments]


def _as_text(argument: str) -> str:
    found = _OVERRIDE.fullmatch(argument)
    if found is None:
        return argument
    if (reason := says_what_it_is(found["key"].lstrip("+"))) is not None:
        raise ConfigError(reason)
    override, value = parsed(argument), found["value"]
    if override is None:
        quoted = quoted_form(argument)
        if quoted is not None and not any(_MARKS.search(piece) for piece in _pieces(value)):
            return quoted
        return argument  # for Hydra to refuse
    if _PATHS.fullmatch(found["key"]) and (read := _read_otherwise(value, override)):
        raise ConfigError(f"{argument}: {read}")
    return argument


def _read_otherwise(text: str, override: Override) -> str | None:
    """Say what a path is read as by the grammar, and how to write it; None where it is read as written, or quoted."""
    value, quoted = override.value(), isinstance(override._value, QuotedString)
    if value is None:
        return None
    if value == _MISSING or (isinstance(value, list) and _MISSING in value):
        return f"{_MISSING} marks a missing value; write ./{_MISSING}"
    how = instead(str(override.input_line))
    if isinstance(value, list | dict) and _PATH.fullmatch(override.get_key_element()):
        return f"is read as a list or a mapping; {how}"
    if any(isinstance(one, bool | int | float) for one in _values(value)):
        return f"is read as a number, or as true or false; {how}"
    if "${" in text and not quoted and _exists(text):
        return f"${{...}} is read as a reference to another key; {how}"
    return f"is the name of a file, but is read as something else; {how}" if value != text and _exists(text) else None


def _values(value: Any) -> Iterator[Any]:
    """Yield the values in a list, a mapping or a choice: those of paths alone, not an expert's weight."""
    if isinstance(value, Sweep):
        value = getattr(value, "list", None)
    if isinstance(value, list):
        for one in value:
            yield from _values(one)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if str(key) not in _NUMBERS:
                yield from _values(one)
    elif not isinstance(value, Glob):
        yield value


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def instead(argument: str) -> str:
    """Say how to write an override in a shell so that its value is text."""
    quoted = quoted_form(argument)
    if quoted is None:
        key = argument.partition("=")[0]
        return f"""quote each text, as in '{key}="..."'"""
    return f"for that text write {shlex.quote(quoted)}"


def quoted_form(argument: str) -> str | None:
    """Return an override with its text quoted, each piece of a list or mapping by itself; None where that is not read.

    Text whose first and last letters are brackets is taken for a list or mapping if no file has that name.
    """
    found = _OVERRIDE.fullmatch(argument)
    if found is None:
        return None
    key, value = found["key"], found["value"]
    closing = _BRACKETS.get(value[:1])
    several = closing is not None and value.endswith(closing) and not (_PATH.fullmatch(key) or _exists(value))
    candidate = f"{key}={_quoted_pieces(value) if several else quoted_text(value)}"
    override = parsed(candidate)
    return None if override is None or (not several and _plain(override.value()) != value) else candidate


def _plain(value: Any) -> Any:
    r"""Return a text as the configuration has it: OmegaConf reads ``\${`` as ``${``."""
    return value.replace(r"\${", "${") if isinstance(value, str) else value


def quoted_text(text: str) -> str:
    """Quote a text in Hydra's way; ``${`` is no reference then."""
    return QuotedString(text.replace("${", r"\${"), _quote_mark(text)).with_quotes()


def _quote_mark(text: str) -> Any:
    from hydra.core.override_parser.types import Quote

    # A shell shows text with double quotes better than text with single ones.
    return Quote.single if '"' in text and "'" not in text else Quote.double


def _quoted_pieces(value: str) -> str:
    return value[0] + ",".join(_quoted_piece(piece, value[0] == "{") for piece in _split(value[1:-1])) + value[-1]


def _quoted_piece(piece: str, of_mapping: bool) -> str:
    name, colon, text = piece.partition(":") if of_mapping else ("", "", piece)
    text = text.strip()
    if _BRACKETS.get(text[:1]) == text[-1:]:
        text = _quoted_pieces(text)
    elif (override := parsed(f"x={text}")) is None or isinstance(override.value(), bool | int | float):
        text = quoted_text(text)
    return f"{name}{colon}{text}"


def _split(text: str) -> list[str]:
    """Split at the commas that are not within brackets or quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += letter in "[{" and not quote
        depth -= letter in "]}" and not quote
        if letter == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _pieces(value: str) -> list[str]:
    """List the texts of a value: those of a list, or the value itself."""
    if value.startswith("[") and value.endswith("]"):
        return _split(value[1:-1])
    return [value]
