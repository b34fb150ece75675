"""Open the models of one merge, for the command line and the library alike.

They get one architecture, one set of names and tokens, and the tensors that skip the merge.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.errors import ConfigError, KeyMismatch, MergeWarning, ModelError, ShapeMismatch, did_you_mean, listed
from mergelab.experiment.agreement import check_configs, say_whose
from mergelab.experiment.label_orders import Labels, Order, in_order, label_orders
from mergelab.experiment.tying import with_ties
from mergelab.models.architecture import Architecture, head_names
from mergelab.models.encoder_decoder import PAIRED
from mergelab.models.heads import mean_of
from mergelab.models.rows import in_own_rows
from mergelab.models.skipping import left_out, set_aside
from mergelab.models.vocabulary import MergedVocabulary, check_vocabularies, merged_vocabulary
from mergelab.weights.align import AlignedModels, align, check_finite
from mergelab.weights.conversion import as_in, check_readable
from mergelab.weights.naming import matches_any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergelab.config import LeaveOut, VocabConfig
    from mergelab.experiment.sources import ModelSource
    from mergelab.weights.checkpoint import Checkpoint
    from mergelab.weights.source import TensorSource


@dataclass(frozen=True)
class MergeScope:
    """Which tensors are merged, and what the merged model has in the place of the others.

    Attributes:
        passthrough: patterns of names that skip the merge: the experts' mean is taken.
        leave_out: layers that stay the base's.
        merge_new: whether tensors that no checkpoint had are merged like any other; else they are set aside.
        vocab: whose tokens the merged model has, where the models' differ; None: they must not differ.
        separate_heads: whether classifiers' heads are no part of the merge; else they are merged like the backbone,
            their outputs in the order of the last expert's labels.
        any_config: whether the configs may differ.
        owner: the model whose config the merged one has; None: the last expert.
        tokenizer: the model whose tokenizer it has; None: the same.
        dtype: what merged tensors are rounded to, once; None: the models' own.
        untie: whether tensors that some models tie and others do not are merged apart, in all of them.
        module_names: whether tensors have the names of transformers' modules in any case, as methods need them that
            run the models; else only where the models' stored names differ.
        key: what the configuration's keys begin with in messages.
    """

    passthrough: Sequence[str] = ()
    leave_out: LeaveOut = field(default_factory=list)
    merge_new: bool = False
    vocab: VocabConfig | None = None
    separate_heads: bool = True
    any_config: bool = False
    owner: ModelSource | None = None
    tokenizer: ModelSource | None = None
    dtype: torch.dtype | None = None
    untie: bool = False
    module_names: bool = False
    key: str = "models."


@dataclass(frozen=True)
class OpenedModels:
    """The models of one merge.

    Attributes:
        base: the base, or None.
        experts: the experts, in the order given.
        architecture: the experts'; None where nothing is known of it, as of state dicts.
        label_orders: for each expert the outputs that its head is read with, in the order of the last expert's labels;
            None: as they stand. Separate heads are read in a task's order, by `mergelab.experiment.heads`.
        head_names: the tensors of the experts' heads.
        vocabulary: the merged model's tokens; None where it has those that all models have, row by row.
        aligned: the models under common names, without what skips the merge.
        passed_through: what skips the merge, as the merged model has it; separate heads aside.
        dtype: what merged tensors are rounded to, once; None: the models' own.
        untied: whether the merged model has tensors apart that the config of some model ties.
        all_names: whether tied tensors have to be stored under all their names, as some model's config ties nothing.
    """

    base: ModelSource | None
    experts: tuple[ModelSource, ...]
    architecture: Architecture | None
    label_orders: tuple[Order | None, ...]
    head_names: tuple[str, ...]
    vocabulary: MergedVocabulary | None
    aligned: AlignedModels
    passed_through: dict[str, Tensor]
    dtype: torch.dtype | None
    untied: bool = False
    all_names: bool = False

    @property
    def models(self) -> tuple[ModelSource, ...]:
        """All models, the base first."""
        return (*([self.base] if self.base is not None else []), *self.experts)

    @property
    def folders(self) -> list[Path]:
        """The folders of the models that have one, the base's first."""
        return [model.folder for model in self.models if model.folder is not None]

    def content(self, name: str) -> str:
        """Return the content hash of the weights of a model in a folder, by its name."""
        return next(model.checkpoint.content_hash() for model in self.models if model.name == name and model.checkpoint)

    def base_backbone(self, *, in_merged_rows: bool = False) -> dict[str, Tensor]:
        """Read the base's own tensors; what it does not have is the experts' mean, as in the merged model.

        ``in_merged_rows``: as for `expert_backbone`.
        """
        base = self.aligned.base
        assert base is not None
        return {**self.passed_through, **self._read(base if in_merged_rows else in_own_rows(base))}

    def expert_backbone(self, index: int, *, in_merged_rows: bool = False) -> dict[str, Tensor]:
        """Read an expert's own tensors without its head.

        ``in_merged_rows``: with a row for each of the merged model's tokens, not of its own.
        """
        expert = self.aligned.experts[index]
        return self._read(expert if in_merged_rows else in_own_rows(expert))

    def _read(self, source: TensorSource) -> dict[str, Tensor]:
        """Read what a model has of the backbone, checked for NaN and infinity."""
        available = {*source.keys(), *source.aliases()} - set(self.head_names)
        wanted = dict.fromkeys([*self.aligned.names, *self.aligned.aliases, *self.passed_through])
        tensors = {name: source.get(name) for name in wanted if name in available}
        for name, tensor in tensors.items():
            check_finite(source, name, tensor)
        return tensors


def open_models(base: ModelSource | None, experts: Sequence[ModelSource], scope: MergeScope) -> OpenedModels:
    """Check that models can be merged, and bring them under one set of names, tokens and labels.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch: the models do not fit together.
        NonFinite: a tensor that skips the merge holds NaN or infinity.
        ConfigError: the scope does not fit the models.
    """
    if not experts:
        raise ConfigError("there is no expert besides the base")
    if scope.leave_out and base is None:
        raise ConfigError(f"{scope.key}leave_out: there is no base model whose layers the merged model could have")
    models = [*([base] if base is not None else []), *experts]
    kind = _common_architecture(base, experts, scope)
    owner = scope.owner or experts[-1]
    if not scope.any_config:
        choice = f"{scope.key}config={owner.name}" if scope.owner else "config='last'"
        way_out = f"{choice} merges them all the same, under that model's config"
        check_configs(base, experts, separate_heads=scope.separate_heads, way_out=way_out)
    vocabulary = _merged_vocabulary(base, experts, scope)
    heads, unused = _heads(experts)
    orders: list[Order | None] = [None] * len(models) if scope.separate_heads else _label_orders(base, experts, scope)
    sources = [in_order(model, order) for model, order in zip(models, orders, strict=True)]
    ties = with_ties(models, sources, untie=scope.untie, key=f"{scope.key}untie")
    aligned, heads = _aligned(models, ties.sources, heads, unused, vocabulary, kind, scope, has_base=base is not None)
    means = _means(aligned, heads, scope)
    new = [] if scope.merge_new else [model.new_names for model in models]
    layers = left_out(aligned.names, scope.leave_out, key=f"{scope.key}leave_out")
    aligned, others = set_aside(aligned, layers, new, scope.dtype)
    say_whose(models, owner, tokenizer=scope.tokenizer)
    return OpenedModels(
        base=base,
        experts=tuple(experts),
        architecture=kind,
        label_orders=tuple(orders[-len(experts) :]),
        head_names=heads,
        vocabulary=vocabulary,
        aligned=aligned,
        passed_through={**means, **others},
        dtype=scope.dtype,
        untied=ties.untied,
        all_names=ties.all_names,
    )


def _heads(experts: Sequence[ModelSource]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tensors of the experts' heads, and those that some experts store and their class does not read."""
    found = [(expert, head_names(expert.tensors.keys(), kind)) for expert in experts if (kind := expert.architecture)]
    if not found:
        return (), ()
    common = {name for name in found[0][1] if all(name in names for _, names in found)}
    unused: list[str] = []
    for expert, names in found:
        if not (further := [name for name in names if name not in common]):
            continue
        if expert.skeleton is None or expert.skeleton.state_dict().keys() & set(further):
            return found[0][1], ()  # a head that another expert does not have, or has under other names
        warnings.warn(
            f"{expert.name}: its class does not read {listed(further)}, which are left out", MergeWarning, stacklevel=3
        )
        unused += further
    return tuple(name for name in found[0][1] if name in common), tuple(unused)


def _aligned(
    models: Sequence[ModelSource],
    sources: Sequence[TensorSource],
    heads: Sequence[str],
    unused: Sequence[str],
    vocabulary: MergedVocabulary | None,
    kind: Architecture | None,
    scope: MergeScope,
    *,
    has_base: bool,
) -> tuple[AlignedModels, tuple[str, ...]]:
    """Bring models under common names: those that they store, or where these differ, transformers' own.

    Args:
        models: as they were given, the base first where there is one.
        sources: their tensors, in the same order.
        heads: the stored names of the experts' heads.
        unused: names of tensors that no class reads.
        vocabulary, kind, scope: as in `open_models`.
        has_base: whether the first model is the base.

    Returns:
        The aligned models, and the names of the heads' tensors.
    """

    def aligned(sources: Sequence[TensorSource], heads: Sequence[str]) -> AlignedModels:
        return align(
            sources[0] if has_base else None,
            sources[1:] if has_base else sources,
            ignore=[*(heads if scope.separate_heads else ()), *unused, *scope.passthrough],
            backbone_prefix=f"{kind.prefix}." if kind is not None and kind.is_classifier and kind.prefix else None,
            adapt=None if vocabulary is None else partial(vocabulary.adapt, heads=heads),
        )

    if not scope.module_names:
        try:
            return aligned(sources, heads), tuple(heads)
        except (KeyMismatch, ShapeMismatch):
            converted = _converted(models, sources)
            if converted is None:
                raise
    elif (converted := _converted(models, sources)) is None:
        return aligned(sources, heads), tuple(heads)
    heads = () if kind is None else head_names(converted[-1].keys(), kind)
    return aligned(converted, heads), tuple(heads)


def _converted(models: Sequence[ModelSource], sources: Sequence[TensorSource]) -> list[TensorSource] | None:
    """Return the models' tensors under the names of the last expert's module in transformers; None where they are so.

    Raises:
        ModelError: transformers would not read them once they are stored under these names.
    """
    module = next((found for model in reversed(models) if (found := model.skeleton) is not None), None)
    if module is None:
        return None
    converted = [as_in(module, source) for source in sources]
    if all(new is old for new, old in zip(converted, sources, strict=True)):
        return None
    for source in converted:
        check_readable(module, source)
    return converted


def _common_architecture(
    base: ModelSource | None, experts: Sequence[ModelSource], scope: MergeScope
) -> Architecture | None:
    """Return the experts' architecture, where any of them has one.

    Raises:
        ModelError: theirs differ, or the base is no encoder-decoder and they are.
    """
    kinds = [(expert.name, kind) for expert in experts if (kind := expert.architecture) is not None]
    if not kinds:
        return None
    name, first = kinds[0]
    if odd := [f"{other} is a {kind.name}" for other, kind in kinds if kind.name != first.name]:
        raise ModelError(f"experts must be of one architecture: {name} is a {first.name}, {listed(odd)}")
    if base is not None and first.name == PAIRED and PAIRED not in (own := base.class_names or [PAIRED]):
        raise ModelError(
            f"{scope.key}base: {base.label or base.name} is a {listed(own)}, and the experts are encoder-decoders; "
            "give a pair {encoder: …, decoder: …} or a saved encoder-decoder"
        )
    return first


def _merged_vocabulary(
    base: ModelSource | None, experts: Sequence[ModelSource], scope: MergeScope
) -> MergedVocabulary | None:
    """Plan the merged model's tokens; None where it has those that all models have, row by row."""
    models = [*([base] if base is not None else []), *experts]
    if scope.vocab is None:
        known = [tokens for model in models if (tokens := model.tokens) is not None]
        check_vocabularies(known, has_base=base is not None, key=f"{scope.key}vocab")
        return None
    checkpoints: list[Checkpoint] = []
    for model in models:
        if model.checkpoint is None:
            raise ConfigError(
                f"{scope.key}vocab={scope.vocab.source!r}: {model.name} has no tokenizer; models are merged by token "
                "where all are hub ids or folders"
            )
        checkpoints.append(model.checkpoint)
    names = [model.name for model in models]
    return merged_vocabulary(scope.vocab, checkpoints, names, key=f"{scope.key}vocab")


def _label_orders(base: ModelSource | None, experts: Sequence[ModelSource], scope: MergeScope) -> list[Order | None]:
    """Find the order in which each model's outputs are read; the base's head counts where it is merged."""
    labels = [Labels(expert.name, expert.labels) for expert in experts]
    if base is None:
        return label_orders(labels).orders
    heads = () if base.architecture is None else head_names(base.tensors.keys(), base.architecture)
    if all(matches_any(name, scope.passthrough) for name in heads):
        return [None, *label_orders(labels).orders]
    return label_orders([Labels(base.name, base.labels), *labels]).orders


def _means(aligned: AlignedModels, heads: Sequence[str], scope: MergeScope) -> dict[str, Tensor]:
    """Average, over the experts, the tensors that skip the merge or that the base does not have."""
    ignored = dict.fromkeys(aligned.ignored)
    in_experts = [name for expert in aligned.experts for name in (*expert.keys(), *expert.aliases())]
    matched = [name for name in dict.fromkeys(in_experts) if name in ignored and matches_any(name, scope.passthrough)]
    for pattern in scope.passthrough:
        if not any(matches_any(name, [pattern]) for name in matched):
            near = did_you_mean(pattern, dict.fromkeys(in_experts))
            raise ConfigError(f"{scope.key}passthrough: no tensor matches {pattern!r}{near}")
    separate = set(heads) if scope.separate_heads else set()
    chosen = (set(matched) | set(aligned.experts_only)) - separate
    return {name: mean_of(aligned.experts, name, scope.dtype) for name in sorted(chosen)}
