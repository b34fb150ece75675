"""A model as it was given, opened: a folder, a hub id, a pair of these, a module, a pipeline or a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergelab.config import PairConfig, ReferenceConfig, Schema, check
from mergelab.errors import ConfigError, ModelError
from mergelab.models.adapted import (
    base_reference,
    in_part,
    is_adapter_folder,
    on_base,
    open_model,
    saved_adapter,
)
from mergelab.models.architecture import Architecture, architecture, architecture_of
from mergelab.models.encoder_decoder import newly_initialised
from mergelab.models.parts import ModelPart
from mergelab.models.references import local_folder, parse_reference
from mergelab.models.stacked import is_stack, open_stack
from mergelab.models.unnamed_class import class_by_tensors
from mergelab.models.vocabulary import LoadedTokens
from mergelab.weights.checkpoint import Checkpoint
from mergelab.weights.conversion import is_transformers_model
from mergelab.weights.module import mergeable, module_of
from mergelab.weights.source import DictSource, TensorSource


@dataclass(frozen=True)
class ModelSource:
    """A model's tensors, and what else is known of it.

    Attributes:
        name: what errors call it.
        tensors: its weights; a `Checkpoint` for a model in a folder.
        given: as the user gave it.
        label: what tables call it; by default its name.
    """

    name: str
    tensors: TensorSource
    given: Any = None
    label: str = ""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The model's folder, opened; None for a model in memory."""
        return self.tensors if isinstance(self.tensors, Checkpoint) else None

    @property
    def folder(self) -> Path | None:
        """Where the model lies; None for a model in memory."""
        return self.checkpoint.folder if self.checkpoint else None

    @cached_property
    def architecture(self) -> Architecture | None:
        """Its class, prefix and labels; None for a state dict, and for a module that is not transformers'.

        Raises:
            ModelError: the folder's config names no class that transformers has.
        """
        if self.checkpoint is not None:
            label, config = self.label or self.name, self.checkpoint.config
            return architecture(self.checkpoint.folder, label, self.tensors.keys(), config)
        module = module_of(self.given)
        return None if module is None else architecture_of(module, self.tensors.keys())

    @cached_property
    def skeleton(self) -> nn.Module | None:
        """Its module in transformers, for the names of its tensors; None where transformers has none."""
        if self.checkpoint is not None:
            return self.checkpoint.skeleton
        module = module_of(self.given)
        return module if is_transformers_model(module) else None

    @property
    def class_names(self) -> list[str]:
        """The class names that its config says, whether transformers has them or not."""
        config = {} if self.tokens is None else self.tokens.config
        return [str(name) for name in config.get("architectures") or []]

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's label names in the order of its outputs; empty for other models."""
        if self.architecture is None or not self.architecture.is_classifier:
            return ()
        return tuple(self.architecture.id2label[index] for index in sorted(self.architecture.id2label))

    @property
    def tokens(self) -> Checkpoint | LoadedTokens | None:
        """What says which row of its embedding is which token's; None where nothing does, as of a state dict."""
        if self.checkpoint is not None:
            return self.checkpoint
        config: Any = getattr(module_of(self.given), "config", None)
        if not hasattr(config, "to_dict"):
            return None
        return LoadedTokens(self.name, config.to_dict(), getattr(self.given, "tokenizer", None))

    @property
    def new_names(self) -> frozenset[str]:
        """The tensors that no checkpoint had, as of a warm start's cross-attention."""
        return newly_initialised(self.folder) if self.folder else frozenset()


class _PartConfig(Schema):
    """An expert for one part of an encoder-decoder base."""

    reference: ReferenceConfig
    part: ModelPart


def from_folder(folder: Path, name: str, *, label: str = "", given: Any = None) -> ModelSource:
    """Open a model folder; see `mergelab.models.adapted.open_model` for the errors.

    Where its config names no class, it is the one that has the folder's tensors.
    """
    checkpoint = open_stack(folder, name) if is_stack(folder) else open_model(folder, name)
    if not checkpoint.config.get("architectures") and (found := class_by_tensors(checkpoint)) is not None:
        checkpoint.config["architectures"] = [found]
    return ModelSource(name, checkpoint, given, label)


def from_list(models: Sequence[Any], base_index: int | None) -> list[ModelSource]:
    """Open models of any kind; the base first, since an expert for one part of it has the base's other part."""
    at = None if base_index is None else base_index % len(models)
    base = None if at is None else from_given(models[at], f"models[{at}]", is_base=True)
    return [
        base if base is not None and index == at else from_given(model, f"models[{index}]", base)
        for index, model in enumerate(models)
    ]


def from_given(given: Any, name: str, base: ModelSource | None = None, *, is_base: bool = False) -> ModelSource:
    """Open a model: a hub id, a folder, a pair, a part of an encoder-decoder, a module, a pipeline or a state dict.

    A `peft.PeftModel` is the adapter that it would save, on the merge's base or on the one that it names.

    Args:
        given: the model.
        name: what errors call it where it has no name; a key of the user's.
        base: the model that has the other part, for ``{"reference": …, "part": "encoder"}``; an adapter's base.
        is_base: whether it is the base of a merge, which no adapter can be.

    Raises:
        ModelError, HubError: it cannot be had, or is nothing of this kind. ConfigError: it is not fully described.
    """
    if isinstance(given, str | Path):
        return _from_reference(given, str(given), name, base, is_base=is_base)
    if isinstance(given, Mapping) and isinstance(given.get("part"), str):
        return _from_part(given, name, base)
    if isinstance(given, Mapping) and any(isinstance(value, str | Path) for value in given.values()):
        return _from_reference(given, check(PairConfig, _as_text(given), name), name)
    if type(given).__name__.startswith("PeftModel") and hasattr(given, "active_adapters") and not is_base:
        folder = saved_adapter(given, name)
        return from_folder(on_base(_base_folder(folder, name, base), folder, where=name), name, given=given)
    if (module := module_of(given)) is not None:
        _check_not_wrapped(module, name)
        config: Any = getattr(module, "config", None)
        own = config.to_dict() if hasattr(config, "to_dict") else None
        return ModelSource(name, DictSource(name, mergeable(name, _weights(module), module), own), given)
    if isinstance(given, Mapping):
        return ModelSource(name, DictSource(name, mergeable(name, dict(given))), given)
    raise ModelError(
        f"{name} is a {type(given).__name__}; it must be a hub id, a local folder, a pair of these, a module, a "
        "pipeline or a state dict"
    )


def _check_not_wrapped(module: nn.Module, name: str) -> None:
    """Raise `ModelError` for a module around the model, whose tensors have other names than the model's."""
    kind = type(module).__name__
    inner = "_orig_mod" if kind == "OptimizedModule" else "module"
    if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        raise ModelError(f"{name} is a {kind}; give the model inside it: model.{inner}")
    if kind.startswith("Peft"):
        raise ModelError(
            f"{name} is a {kind}, which can be an expert, on a base that is a hub id or a folder; give the model with "
            "the adapter merged into it: model.merge_and_unload()"
        )


def _from_reference(
    given: Any, reference: str | PairConfig, name: str, base: ModelSource | None = None, *, is_base: bool = False
) -> ModelSource:
    parsed = parse_reference(reference)
    folder = local_folder(parsed, name)
    if is_adapter_folder(folder) and not is_base:
        folder = on_base(_base_folder(folder, name, base), folder, where=parsed.text)
    return from_folder(folder, parsed.text, given=given)


def _base_folder(adapter: Path, name: str, base: ModelSource | None) -> Path:
    """Return the folder of an adapter's base: the merge's base, or else the one that the adapter names."""
    if base is None:
        return local_folder(parse_reference(base_reference(adapter, name)), name)
    if base.folder is None:
        raise ModelError(f"{name} is an adapter, and the base is a model in memory; give a hub id or a folder as base")
    return base.folder


def _from_part(given: Mapping[str, Any], name: str, base: ModelSource | None) -> ModelSource:
    """Open the base with a checkpoint in the place of its encoder or decoder."""
    wanted = check(_PartConfig, _as_text(given), name)
    if base is None or base.folder is None:
        raise ConfigError(
            f"{name} has part={wanted.part}, and there is no base model (base_index) that is a hub id, a folder or a "
            "pair for the other part"
        )
    reference = parse_reference(wanted.reference)
    folder = in_part(base.folder, local_folder(reference, name), wanted.part, where=name)
    return from_folder(folder, f"{reference.text} ({wanted.part})", given=given)


def _as_text(value: Any) -> Any:
    """Write paths in a reference as text."""
    if isinstance(value, Mapping):
        return {key: _as_text(each) for key, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of the module would have of its weights: parameters and floating-point buffers."""
    stored = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in stored and buffer.is_floating_point()}
    return {**dict(module.named_parameters()), **buffers}
