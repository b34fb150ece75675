"""Models whose vocabularies differ: their embeddings and output projections brought to one set of rows, by token.

Fine-tuning often adds tokens (a chat model's ``<|im_end|>``), and training pads embeddings to a round number of rows,
so that row 50257 is one token in one model and another, or none, in the next. ``models.vocab`` says what is merged:

    base    the base's rows; a token of the base that a model lacks is read as the base's row (its task vector is 0)
    union   also the tokens that experts alone have; who lacks one is read as the mean of the models that have it
    NAME    an expert's rows

`VocabConfig` has settings for the rows that models lack, and for padding.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from mergelab.errors import ModelError
from mergelab.models.architecture import quiet_transformers, tokenizer_folder
from mergelab.models.rows import Reader, RowPlan, RowSource
from mergelab.models.tokens import (
    CHAT_TEMPLATE,
    as_added,
    chat_template,
    copy_companions,
    decoder_tokenizer,
    drop_stale,
    extended_tokenizer,
    ids_after_adding,
    load_tokenizer,
    read_tokens,
    tokenizer_content,
)
from mergelab.models.vocabulary_axes import TokenModel, vocabulary_axes
from mergelab.weights.checkpoint import CONFIG

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from torch import nn

    from mergelab.config import VocabConfig
    from mergelab.weights.checkpoint import Checkpoint
    from mergelab.weights.source import TensorSource

Policy = Literal["base", "union"]

# Keys of a config whose values are numbers of rows.
_NUMBER_OF_ROWS = re.compile("((encoder|decoder|src|tgt|text|padded)_)?vocab_size")
# What the keys of a config end with whose values are token ids.
_TOKEN_ID = ("_token_id", "_token_index")


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens.

    Attributes:
        size: the number of rows of its embedding.
        tokens: row by token; a token that the embedding has no row for is not among them.
        folder: where its tokenizer is; another model's folder where it has none.
    """

    size: int
    tokens: Mapping[str, int]
    folder: Path


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of rows of a model's embedding by its ``config.json``; None for models without just one."""
    if is_encoder_decoder_pair(config):
        return None
    inner = config.get("text_config")
    for said in (inner if isinstance(inner, Mapping) else {}, config):
        if isinstance(size := said.get("vocab_size"), int):
            return size
    nested = {size for value in config.values() if isinstance(value, Mapping) and (size := vocabulary_size(value))}
    return nested.pop() if len(nested) == 1 else None


def is_encoder_decoder_pair(config: Mapping[str, Any]) -> bool:
    """Return whether encoder and decoder have separate embeddings, and may have separate tokenizers."""
    return all(isinstance(config.get(part), Mapping) for part in ("encoder", "decoder"))


@dataclass(frozen=True)
class LoadedTokens:
    """What a model in memory tells of its tokens.

    Attributes:
        name: what errors call the model.
        config: its configuration.
        tokenizer: its pipeline's, where it has one: of what it reads.
    """

    name: str
    config: Mapping[str, Any]
    tokenizer: Any = None


def check_vocabularies(
    models: Sequence[Checkpoint | LoadedTokens], *, has_base: bool, key: str = "models.vocab"
) -> None:
    """Check that models can be merged row by row: that they have as many rows, and the same token in each.

    Tokens are compared where the tokenizers' files differ; a model without a readable tokenizer is taken as it is.
    Encoder and decoder are compared separately. ``key`` is what the choice between policies is called.

    Raises:
        ModelError: they differ; names the models and what can be done.
    """
    ways = f"{key}=union merges by token and keeps every model's tokens"
    if has_base:
        ways = f"{key}=base merges by token and keeps the base's tokens, {ways}"
    if all(is_encoder_decoder_pair(model.config) for model in models):
        ways = (
            "encoder-decoders are merged row by row; merge those of the same tokenizers, or only the part that shares "
            "one (models.experts.<name>.part=encoder or decoder)"
        )
        for part in ("encoder", "decoder"):
            _check_rows([_token_rows(model, part) for model in models], f" of the {part}s", ways)
        return
    _check_rows([_token_rows(model) for model in models], "", ways)


class _TokenRows(NamedTuple):
    """A model, how many rows its embedding has, and the tokens that they stand for.

    Models of equal ``content`` have the same tokens; ``read`` returns these; both None where no tokenizer is known.
    """

    name: str
    size: int | None
    content: bytes | None
    read: Callable[[], Mapping[str, int] | None]


def _token_rows(model: Checkpoint | LoadedTokens, part: str | None = None) -> _TokenRows:
    size = vocabulary_size(model.config if part is None else model.config[part])
    if isinstance(model, LoadedTokens):
        tokens = None if model.tokenizer is None or part == "decoder" else model.tokenizer.get_vocab()
        content = None if tokens is None else json.dumps(sorted(tokens.items())).encode()
        return _TokenRows(model.name, size, content, lambda: tokens)
    folder = decoder_tokenizer(model.folder) if part == "decoder" else model.folder
    content = tokenizer_content(folder) if size is not None else None
    return _TokenRows(model.name, size, content, partial(read_tokens, folder))


def _check_rows(models: Sequence[_TokenRows], whose: str, ways: str) -> None:
    sizes = {model.name: model.size for model in models if model.size is not None}
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ModelError(f"the models' vocabularies{whose} differ in size ({described}): {ways}")
    contents: dict[bytes, _TokenRows] = {}
    for model in models:
        if model.name in sizes and model.content is not None:
            contents.setdefault(model.content, model)
    seen: dict[int, tuple[str, str]] = {}
    for model in contents.values() if len(contents) > 1 else ():
        try:
            tokens = model.read() or {}
        except ModelError:
            continue
        here = {row: (token, model.name) for token, row in tokens.items() if row < sizes[model.name]}
        if odd := sorted(row for row in here.keys() & seen.keys() if here[row][0] != seen[row][0]):
            (token, other), rows = seen[odd[0]], f"{len(odd)} rows" if len(odd) > 1 else "1 row"
            raise ModelError(
                f"the models' tokens{whose} differ in {rows}: {odd[0]} is {token!r} in {other} but {here[odd[0]][0]!r} "
                f"in {model.name}: {ways}"
            )
        seen = here | seen


def merged_vocabulary(
    policy: VocabConfig, models: Sequence[Checkpoint], names: Sequence[str] = (), *, key: str = "models.vocab"
) -> MergedVocabulary:
    """Plan the rows of the merged model.

    Args:
        policy: whose tokens it has, and how rows are made that models lack.
        models: the base first; without one the experts alone.
        names: what the policy calls each model; by default ``base`` is the first.
        key: what messages call the policy.

    Raises:
        ModelError: it is not known which rows of a model are which tokens', or a row that is asked for is not there.
    """
    asked = f"{key}={policy.source}"
    vocabularies = _vocabularies(asked, models)
    places = {name: at for at, name in enumerate(names)}
    start = places.get(policy.first or "", 0) if policy.source == "union" else places.get(policy.source, 0)
    own = vocabularies[start]
    added = _tokens_to_add([own, *vocabularies]) if policy.source == "union" else ()
    added = (*added, *_further(policy, [own, *vocabularies], added))
    tokens = dict(own.tokens) | (ids_after_adding(own.folder, added, key=asked) if added else {})
    count = max(own.size, *(row + 1 for row in tokens.values())) if tokens else own.size
    if policy.padding == "drop":
        count = len(tokens)
        if {*tokens.values()} != {*range(count)}:
            raise ModelError(
                f"{key}.padding=drop: the ids of the tokens in {own.folder} have gaps; padding=keep has not"
            )
    size = -(-count // (policy.pad_to_multiple_of or 1)) * (policy.pad_to_multiple_of or 1)
    rows = [torch.full((size,), -1, dtype=torch.int64) for _ in vocabularies]
    at = torch.tensor(list(tokens.values()), dtype=torch.int64)
    for each, vocabulary in zip(rows, vocabularies, strict=True):
        each[at] = torch.tensor([vocabulary.tokens.get(token, -1) for token in tokens], dtype=torch.int64)
    without_token = torch.arange(size) < min(own.size, count)
    without_token[at] = False
    rows[start][without_token] = without_token.nonzero().flatten()
    chosen = _chosen_rows(policy, tokens, vocabularies, places, key)
    for setting in policy.tokens:
        for each in rows if setting.everywhere else ():
            each[tokens[setting.token]] = -1
    return MergedVocabulary(
        policy,
        tuple(models),
        vocabularies,
        size,
        tokens,
        added,
        tuple(rows),
        start=start,
        first=places.get(policy.first or "", 0) if policy.lacking == "first" else None,
        count=count,
        chosen=chosen,
    )


def _further(
    policy: VocabConfig, vocabularies: Sequence[Vocabulary], added: Sequence[AddedToken]
) -> Iterator[AddedToken]:
    """Describe the tokens that settings add: as a model has them that has them, or else as plain ones."""
    from tokenizers import AddedToken

    known = {*vocabularies[0].tokens, *(token.content for token in added)}
    for token in dict.fromkeys(setting.token for setting in policy.tokens):
        if token not in known:
            holder = next((each.folder for each in vocabularies if token in each.tokens), None)
            yield AddedToken(token) if holder is None else as_added(holder, [token])[token]


def _chosen_rows(
    policy: VocabConfig,
    tokens: Mapping[str, int],
    vocabularies: Sequence[Vocabulary],
    places: Mapping[str, int],
    key: str,
) -> dict[int, tuple[int, int] | None]:
    """Return, by row, the model and its row that settings name; None for zeros."""
    found: dict[int, tuple[int, int] | None] = {}
    for each in policy.tokens:
        token = each.token
        if each.model is None:
            found[tokens[token]] = None
            continue
        at = places[each.model]
        named, size = each.like or token, vocabularies[at].size
        row = vocabularies[at].tokens.get(named) if each.row is None else each.row
        if row is None:
            raise ModelError(f"{key}.tokens: {token!r}: {each.model} has no token {named!r}")
        if row >= size:
            raise ModelError(f"{key}.tokens: {token!r}: row={row}: {each.model} has {size} rows")
        found[tokens[token]] = at, row
    return found


def _vocabularies(asked: str, models: Sequence[Checkpoint]) -> tuple[Vocabulary, ...]:
    """Read the models' tokens; one without tokenizer has those of the first model that has one and as many rows."""
    sizes = []
    for model in models:
        if is_encoder_decoder_pair(model.config):
            raise ModelError(
                f"{asked}: {model.name} is an encoder-decoder, whose vocabularies are not merged by "
                "token; merge models of the same tokenizers without it"
            )
        if (size := vocabulary_size(model.config)) is None:
            raise ModelError(f"{asked}: {model.name} has no vocab_size in its {CONFIG}")
        sizes.append(size)
    found = []
    for model, size in zip(models, sizes, strict=True):
        tokens = read_tokens(model.folder)
        found.append(None if tokens is None else Vocabulary(size, _with_rows(tokens, size), model.folder))
    own = [vocabulary for vocabulary in found if vocabulary is not None]
    for at, (model, size) in enumerate(zip(models, sizes, strict=True)):
        found[at] = found[at] or next((other for other in own if other.size == size), None)
        if found[at] is None:
            raise ModelError(
                f"{asked}: {model.name} has no tokenizer, and no other model with {size} rows has one, "
                "so that it is not known which row is which token's"
            )
    return tuple(vocabulary for vocabulary in found if vocabulary is not None)


def _with_rows(tokens: Mapping[str, int], size: int) -> dict[str, int]:
    return {token: row for token, row in tokens.items() if row < size}


def _tokens_to_add(vocabularies: Sequence[Vocabulary]) -> tuple[AddedToken, ...]:
    """Describe the tokens that the first model lacks, in the order of the models and of their rows."""
    seen = set(vocabularies[0].tokens)
    added: list[AddedToken] = []
    for vocabulary in vocabularies[1:]:
        new = sorted(vocabulary.tokens.keys() - seen, key=vocabulary.tokens.__getitem__)
        if new:
            described = as_added(vocabulary.folder, new)
            added += [described[name] for name in new]
            seen.update(new)
    return tuple(added)


@dataclass(frozen=True)
class MergedVocabulary:
    """The rows of the merged model, and from which row of each model they come.

    Attributes:
        policy: as configured.
        models: the opened models.
        vocabularies: their tokens.
        size: the number of rows.
        tokens: row by token.
        added: the tokens that the tokenizer gets in addition.
        rows: for each model (size,) int64, the row to read, or -1 where it has none.
        start: the model whose tokenizer it is.
        first: the model whose row serves for one that lacks it; None: the mean of the models that have it.
        count: how many rows there are before those that make up a multiple.
        chosen: by row, the model that it is taken of and the row there; None for zeros.
    """

    policy: VocabConfig
    models: tuple[Checkpoint, ...]
    vocabularies: tuple[Vocabulary, ...]
    size: int
    tokens: Mapping[str, int]
    added: tuple[AddedToken, ...]
    rows: tuple[Tensor, ...]
    start: int
    first: int | None
    count: int
    chosen: Mapping[int, tuple[int, int] | None]

    @property
    def own(self) -> Vocabulary:
        """The tokens of the model whose tokenizer it is."""
        return self.vocabularies[self.start]

    @cached_property
    def digest(self) -> str:
        """A hash of the tokens, their rows, and the rows of the models that they come from."""
        digest = hashlib.sha256(json.dumps([self.policy.model_dump(), sorted(self.tokens.items())]).encode())
        for rows in self.rows:
            digest.update(rows.numpy().tobytes())
        return digest.hexdigest()

    def adapt(self, sources: Sequence[TensorSource], heads: Sequence[str] = ()) -> list[TensorSource]:
        """Let the models, in the order of ``models`` and under common names, be read in the merged model's rows.

        ``heads`` are tensors that are left as they are.
        """
        held = [{*source.keys(), *source.aliases()} for source in sources]
        vocabularies = zip(sources, self.vocabularies, self.models, strict=True)
        token_models = [TokenModel(source, own.size, model.folder) for source, own, model in vocabularies]
        moved = not all(torch.equal(rows, torch.arange(self.size)) for rows in self.rows)
        axes = vocabulary_axes(token_models, skip=heads, moved=moved)
        readers = tuple(Reader(*each) for each in zip(sources, held, self.rows, strict=True))
        plan = RowPlan(
            tokens=self.count,
            first=None if self.first is None else readers[self.first],
            zeros=self.policy.unknown == "zero",
            chosen={row: taken and (readers[taken[0]], taken[1]) for row, taken in self.chosen.items()},
        )
        return [RowSource(reader, readers, plan, axes) for reader in readers]

    def tokenizer(self) -> Any:
        """Load the merged model's tokenizer."""
        return extended_tokenizer(self.own.folder, self.added)

    def fit(self, module: nn.Module, folder: Path) -> nn.Module:
        """Give a module that was opened from a model's ``folder`` the merged model's number of rows, and token ids."""
        with quiet_transformers():
            module.resize_token_embeddings(self.size, mean_resizing=False)  # type: ignore[operator]
        configs: list[Any] = [module.config, getattr(module, "generation_config", None)]
        for config in configs:
            values: dict[str, Any] = {} if config is None else config.to_dict()
            ids = {key: value for key, value in values.items() if key.endswith(_TOKEN_ID)}
            for key, value in self._translated(ids, folder).items():
                setattr(config, key, value)
        return module

    @contextmanager
    def companions(self, like: Path, *, template: Path | None = None) -> Iterator[Path]:
        """Make a folder, for as long as the block runs, of all that goes with the merged weights.

        Args:
            like: a model's folder; its config and generation config are taken, with the merged model's token ids.
            template: whose chat template is taken; by default ``like``'s, or without added tokens the tokenizer's own.
        """
        own = self.own.folder
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            copy_companions(like, folder, tokenizer=False)
            copy_companions(own, folder, tokenizer=True)
            if self.added:
                drop_stale(folder)
                self._tokenizer_in_the_roles_of(like).save_pretrained(folder)
            chosen = template or (like if self.added else own)
            if (text := chat_template(chosen) or chat_template(own)) is not None:
                (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
            for name in (CONFIG, "generation_config.json"):
                if (like / name).is_file():
                    content = self._translated(json.loads((like / name).read_text(encoding="utf-8")), like)
                    content = self._resized(content, vocabulary_size(content) or 0) if name == CONFIG else content
                    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            yield folder

    def _tokenizer_in_the_roles_of(self, like: Path) -> Any:
        """Load the tokenizer with the end-of-text, padding and other tokens that ``like``, whose config is taken, has.

        All of them are in the vocabulary.
        """
        tokenizer = self.tokenizer()
        if tokenizer_folder([like]) is not None:
            for role, token in load_tokenizer([like], str(like)).special_tokens_map.items():
                if role.endswith("_token") and str(token) in self.tokens:
                    setattr(tokenizer, role, str(token))
        return tokenizer

    def _resized(self, config: dict[str, Any], size: int) -> dict[str, Any]:
        """Return a config with the merged model's number of rows wherever it says its own, ``size``."""
        return {
            key: self._resized(value, size)
            if isinstance(value, dict)
            else self.size
            if _NUMBER_OF_ROWS.fullmatch(key) and value == size
            else value
            for key, value in config.items()
        }

    def _translated(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return a config of the model in ``folder`` with its token ids as they are in the merged model.

        An id whose token the merged model does not have becomes what the config of its tokenizer's model says.
        """
        at = next((at for at, model in enumerate(self.models) if model.folder == folder), 0)
        token_of = {row: token for token, row in self.vocabularies[at].tokens.items()}
        first = self.models[self.start].config

        def translated(key: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {name: translated(name, inner) for name, inner in value.items()}
            if not key.endswith(_TOKEN_ID):
                return value
            if isinstance(value, list):
                ids = [self.tokens.get(token_of[each]) if each in token_of else each for each in value]
                return [each for each in ids if each is not None] or first.get(key)
            return self.tokens.get(token_of[value], first.get(key)) if value in token_of else value

        return {key: translated(key, value) for key, value in config.items()}
