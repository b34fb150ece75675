"""A folder's tokenizer: which row is which token's, the tokenizer with further tokens, and its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import ModelError, listed, shortened
from mergelab.models.architecture import quiet_transformers, tokenizer_folder
from mergelab.weights.companions import companion_files, copy_files
from mergelab.weights.json_files import read_json
from mergelab.weights.writer import DECODER_TOKENIZER

if TYPE_CHECKING:
    from tokenizers import AddedToken

CHAT_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens.json"
# The first of these that a folder has holds its tokens.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.spm", "*.tiktoken")
# What of a model's companions belongs to its tokenizer, by the first part of a path; chat templates are looked for by
# themselves.
_TOKENIZER = (
    *("tokenizer*", "tokenization_*.py", "tekken.json", _ADDED, "special_tokens_map.json", "vocab.*", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.codes", "normalizer.json", "additional_chat_templates", DECODER_TOKENIZER),
)


def decoder_tokenizer(folder: Path) -> Path:
    """Return where the tokenizer is that belongs to what a model writes: for most models the only one."""
    own = folder / DECODER_TOKENIZER
    return own if own.is_dir() else folder


def tokenizer_content(folder: Path) -> bytes | None:
    """Read what a folder's tokens are made from; None where it has no tokenizer.

    Where two folders have the same content, they have the same tokens.
    """
    main = _vocabulary_file(folder)
    if main is None:
        return None
    try:
        return b"\0".join(file.read_bytes() for file in (main, folder / _ADDED) if file.is_file())
    except OSError as error:
        raise ModelError(f"{main} cannot be read: {error.strerror or error}") from error


def read_tokens(folder: Path) -> dict[str, int] | None:
    """Read the id of each token of a folder's tokenizer, added ones too; None where it has no tokenizer.

    Raises:
        ModelError: it cannot be read.
    """
    main = _vocabulary_file(folder)
    if main is None:
        return None
    try:
        tokens = _tokens_in(main)
        added = _added_tokens(folder)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ModelError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
    taken = set(tokens.values())
    return tokens | {token: at for token, at in added.items() if token not in tokens and at not in taken}


def load_tokenizer(folders: Sequence[Path], model: str) -> Any:
    """Load the first tokenizer that one of ``folders`` has.

    Raises:
        ModelError: none has one, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(folders)
    if folder is None:
        raise ModelError(f"models {model}: none of the folders has a tokenizer")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length={shortened(tokenizer.model_max_length)} is no number")
        return tokenizer
    except Exception as error:  # a damaged tokenizer can raise any
        if (code := _json(folder / _CONFIG).get("auto_map")) and "trust_remote_code" in str(error):
            raise ModelError(
                f"models {model}: the tokenizer in {folder} needs code that comes with it ({code}); mergelab runs no "
                "model code, so that it cannot be used here; evaluate=false merges without it"
            ) from error
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"models {model}: the tokenizer in {folder} cannot be read: {why}") from error


def extended_tokenizer(folder: Path, added: Sequence[AddedToken]) -> Any:
    """Load the tokenizer in ``folder`` and add tokens; a new one gets the next free id."""
    tokenizer = load_tokenizer([folder], str(folder))
    if added:
        tokenizer.add_tokens(list(added))
    return tokenizer


def ids_after_adding(folder: Path, added: Sequence[AddedToken], *, key: str = "models.vocab=union") -> dict[str, int]:
    """Return the ids that added tokens have in `extended_tokenizer`; ``key`` is what messages call the setting.

    Raises:
        ModelError: the tokenizer does not take one of them.
    """
    ids: dict[str, int] = extended_tokenizer(folder, added).get_vocab()
    names = [token.content for token in added]
    holders = Counter(ids.values())
    if refused := [repr(name) for name in names if name not in ids or holders[ids[name]] > 1]:
        raise ModelError(f"{key}: the tokenizer in {folder} has no free id for {listed(refused)}")
    return {name: ids[name] for name in names}


def as_added(folder: Path, names: Iterable[str]) -> dict[str, AddedToken]:
    """Describe tokens of the tokenizer in ``folder`` for another one: special ones stay special.

    Those that its own training made are found as whole words only, so that others' words are not cut apart.
    """
    from tokenizers import AddedToken

    own = {token.content: token for token in load_tokenizer([folder], str(folder)).added_tokens_decoder.values()}
    return {name: own.get(name) or AddedToken(name, single_word=True) for name in names}


def copy_companions(source: Path, folder: Path, *, tokenizer: bool) -> None:
    """Copy the files of a model's tokenizer, or its other companions; neither config nor chat template."""

    def wanted(name: str) -> bool:
        of_tokenizer = any(fnmatch(name.partition("/")[0], pattern) for pattern in _TOKENIZER)
        return of_tokenizer == tokenizer and name != CHAT_TEMPLATE

    copy_files(source, companion_files(source, wanted), folder)


def drop_stale(folder: Path) -> None:
    """Remove the files that say in addition to the tokenizer's own what its added and special tokens are."""
    for name in (_ADDED, "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def chat_template(folder: Path) -> str | None:
    """Read the chat template of the tokenizer in ``folder``, if it has one."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    found = _json(folder / _CONFIG).get("chat_template")
    return found if isinstance(found, str) else None


def _vocabulary_file(folder: Path) -> Path | None:
    return next((path for pattern in _VOCABULARIES for path in sorted(folder.glob(pattern))), None)


def _tokens_in(file: Path) -> dict[str, int]:
    if file.name == "tokenizer.json":
        from tokenizers import Tokenizer

        return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    if file.name == "vocab.txt":
        with file.open(encoding="utf-8") as lines:
            return {line.rstrip("\n"): row for row, line in enumerate(lines)}
    if file.name == "vocab.json":
        return {str(token): int(row) for token, row in json.loads(file.read_text(encoding="utf-8")).items()}
    return dict(load_tokenizer([file.parent], str(file.parent)).get_vocab())


def _added_tokens(folder: Path) -> dict[str, int]:
    """Read the added tokens that are stored apart from the vocabulary."""
    listed_apart = {str(token): int(row) for token, row in _json(folder / _ADDED).items()}
    in_config = _json(folder / _CONFIG).get("added_tokens_decoder") or {}
    return {str(token["content"]): int(row) for row, token in in_config.items()} | listed_apart


def _json(file: Path) -> Mapping[str, Any]:
    return read_json(file, str(file.parent)) if file.is_file() else {}
