"""Tensors that models' configs tie, as an input and an output embedding: one tensor, however often it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergelab.errors import ModelError, listed
from mergelab.weights.align import RenamedSource
from mergelab.weights.conversion import names_in, tied_parameters
from mergelab.weights.naming import is_token_embedding, layer_of
from mergelab.weights.source import TensorSource, layout_of

if TYPE_CHECKING:
    from mergelab.experiment.sources import ModelSource


@dataclass(frozen=True)
class Tying:
    """The models' tensors with each tied one under all of its names.

    Attributes:
        sources: the models' tensors.
        untied: whether the merged model has tensors apart that some model's config ties.
        all_names: whether some model's config does not tie what is equal in it, so that the merged model's may not
            either, and each name has to be stored.
    """

    sources: list[TensorSource]
    untied: bool = False
    all_names: bool = False


@dataclass(frozen=True)
class _Model:
    """One model under the names of its module.

    Attributes:
        label: what errors call it.
        source: its tensors.
        stored: the stored name of each tensor, by its name in the module.
        ties: tied names of the module, each with the first one of its group.
        names: all parameters of the module.
    """

    label: str
    source: TensorSource
    stored: dict[str, str]
    ties: dict[str, str]
    names: frozenset[str]

    def has_tied(self, alias: str, holder: str) -> bool:
        """Return whether its config ties two names, or it lacks one."""
        both = {alias, holder} <= self.names
        return not both or self.ties.get(alias, alias) == self.ties.get(holder, holder)

    def holder(self, name: str) -> str | None:
        """Return the stored name of what the model has as ``name``: its own, or that of a tensor tied to it."""
        if name in self.stored:
            return self.stored[name]
        group = self.ties.get(name, name)
        return next((self.stored[other] for other in self.stored if self.ties.get(other, other) == group), None)


def with_ties(models: Sequence[ModelSource], sources: Sequence[TensorSource], *, untie: bool, key: str) -> Tying:
    """Make each tensor that a config ties one tensor, where it is stored twice or tied in some models alone.

    What a config ties, and what two stored values make of it, is asked of transformers; it is imported only where
    names and first rows show that it may matter.

    Args:
        models: as they were given.
        sources: their tensors.
        untie: whether tensors that are tied in some models and not in others are merged apart.
        key: what the option is called in messages.

    Raises:
        ModelError: a tensor is tied in some models and not in others, or is neither stored nor tied.
    """
    if not _may_matter(models, sources):
        return Tying(list(sources))
    modules = [model.skeleton for model in models]
    known = [module for module in modules if module is not None]
    if not known:
        return Tying(list(sources))
    described = [
        _described(model, source, module if module is not None else known[-1])
        for model, source, module in zip(models, sources, modules, strict=True)
    ]
    for each, module in zip(described, modules, strict=True):
        if module is not None:
            _check_output_embedding(each, module)
    result, apart, all_names = list(sources), [], False
    for alias, holder in {alias: holder for model in described for alias, holder in model.ties.items()}.items():
        states = [_state(model, alias, holder) for model in described]
        if not any(state is False for state in states):
            result = [
                _joined(source, model, alias, holder, described) if state else source
                for source, model, state in zip(result, described, states, strict=True)
            ]
            all_names = all_names or not all(model.has_tied(alias, holder) for model in described)
            continue
        apart.append(alias)
        if any(states):
            _check_may_untie(described, states, alias, holder, known, untie, key)
            result = [
                _joined(source, model, alias, holder, described) if state else source
                for source, model, state in zip(result, described, states, strict=True)
            ]
    return Tying(result, bool(apart), all_names)


def _may_matter(models: Sequence[ModelSource], sources: Sequence[TensorSource]) -> bool:
    """Return whether names, shapes and first rows leave it possible that a tie is stored twice, or not in all models.

    Tensors outside the layers count that have the shape of another one.
    """
    everything = [{*source.keys(), *source.aliases()} for source in sources]
    for at, (model, source) in enumerate(zip(models, sources, strict=True)):
        config = None if model.tokens is None else model.tokens.config
        separate = config is not None and _says_untied(config)
        pairs = list(_pairs(source))
        for a, b in pairs:
            if _first_rows_equal(source, a, b):
                return True
            if len(source.shape(a)) < 2 or not (is_token_embedding(a) or is_token_embedding(b)):
                continue
            if any((a in names) != (b in names) for names in everything[:at] + everything[at + 1 :]):
                return True
            if any(len({other.aliases().get(name, name) for name in (a, b)}) == 1 for other in sources):
                return True
            if config is not None and not separate:
                return True
        names = [str(name) for name in (config or {}).get("architectures") or []]
        if separate and not pairs and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
            return True
    return False


def _pairs(source: TensorSource) -> Iterator[tuple[str, str]]:
    """Yield pairs of floating-point tensors of one shape, outside the layers, that are of different modules."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key, shape, dtype in layout_of(source):
        if layer_of(key) is None and dtype.is_floating_point and shape:
            by_shape.setdefault(shape, []).append(key)
    for names in by_shape.values():
        for a, b in combinations(names, 2):
            if a.rpartition(".")[0] != b.rpartition(".")[0]:
                yield a, b


def _first_rows_equal(source: TensorSource, a: str, b: str) -> bool:
    """Return whether two tensors begin with the same row; a vector counts as one row. Constant rows say nothing."""
    if 0 in source.shape(a):
        return False
    left, right = ((t if t.dim() < 2 else t[0]).reshape(-1) for t in (source.get(a), source.get(b)))
    return bool((left != left[0]).any()) and torch.equal(left, right)


def _says_untied(config: Mapping[str, Any]) -> bool:
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said) and not any(said)


def _described(model: ModelSource, source: TensorSource, module: nn.Module) -> _Model:
    names = frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))
    stored = {name: at for name, at in names_in(module, source).items() if name in names}
    return _Model(model.label or model.name, source, stored, tied_parameters(module), names)


def _check_output_embedding(model: _Model, module: Any) -> None:
    """Check that a model has its output embedding, which transformers would draw at random where it is nowhere.

    Raises:
        ModelError: it is neither stored nor tied to what is stored.
    """
    layer = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    weight = getattr(layer, "weight", None)
    name = next((name for name, own in module.named_parameters(remove_duplicate=False) if own is weight), None)
    if name is not None and model.holder(name) is None:
        raise ModelError(
            f"{model.label}: {name} is not in its weights, and its config does not tie it to another: transformers "
            "would draw it at random; correct tie_word_embeddings in its config.json"
        )


def _state(model: _Model, alias: str, holder: str) -> bool | None:
    """Return whether a model has two names for one tensor (True) or two tensors (False); None: it lacks one.

    Raises:
        ModelError: transformers would not read what is stored.
    """
    if alias not in model.names or holder not in model.names:
        return None
    a, b = model.holder(alias), model.holder(holder)
    if a is None or b is None:
        return None
    if a == b or _equal(model.source, a, b):
        return True
    if model.has_tied(alias, holder) and _always_ties():
        raise ModelError(
            f"{model.label}: its config ties {alias} to {holder}, but stores other values, which transformers 4 "
            "ignores; correct tie_word_embeddings in its config.json, or remove the tensor"
        )
    return False


def _equal(source: TensorSource, a: str, b: str) -> bool:
    aliases = source.aliases()
    if aliases.get(a, a) == aliases.get(b, b):
        return True
    if source.shape(a) != source.shape(b):
        return False
    return torch.equal(source.get(a), source.get(b))


def _always_ties() -> bool:
    """Return whether transformers ties what a config ties even where the stored values differ."""
    from importlib.metadata import version

    return int(version("transformers").partition(".")[0]) < 5


def _check_may_untie(
    models: Sequence[_Model],
    states: Sequence[bool | None],
    alias: str,
    holder: str,
    modules: Sequence[Any],
    untie: bool,
    key: str,
) -> None:
    tied = listed([model.label for model, state in zip(models, states, strict=True) if state])
    apart = listed([model.label for model, state in zip(models, states, strict=True) if state is False])
    what = f"{alias} and {holder} are one tied tensor in {tied} but differ in {apart}"
    if any(getattr(module.config, "is_encoder_decoder", False) for module in modules):
        raise ModelError(f"{what}; encoder-decoders cannot be untied ({key}): merge models that agree in it")
    if not untie:
        raise ModelError(
            f"{what}; merge models that agree in it, or give {key}=true: the merged model then has both, untied"
        )


def _joined(source: TensorSource, model: _Model, alias: str, holder: str, models: Sequence[_Model]) -> TensorSource:
    """Let a source have one tensor under both names, spelled as in this model, or as in the first that stores it."""
    at = model.holder(holder)
    assert at is not None
    stored = {name: name for name in [*source.keys(), *source.aliases()]}
    if isinstance(source, RenamedSource):
        stored, source = dict(source.stored), source.source
        at = stored.get(at, at)
    spelled = [
        next(other.stored[name] for other in (model, *models) if name in other.stored)
        for name in (holder, alias)
        if any(name in other.stored for other in models)
    ]
    first, *_ = spelled  # the name under which it is stored: the one that transformers ties the other to
    ordered: dict[str, str] = {}
    for name, where in stored.items():
        if name in spelled:
            ordered[first] = at
        ordered[name] = where
    return RenamedSource(source, {**ordered, **dict.fromkeys(spelled, at)})
