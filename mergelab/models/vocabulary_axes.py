"""Which tensors have an entry for each token, and along which dimension.

A dimension of the vocabulary's length shows nothing by itself: in a small model the hidden size can be the same. Where
models' vocabularies differ in size, the dimensions that differ alike are the vocabulary's. Otherwise names that all
architectures use alike decide, and then the model's class: built without memory, once with the vocabulary's size and
once with a larger one, it shows which dimensions grow.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import ModelError
from mergelab.models.architecture import quiet_transformers

if TYPE_CHECKING:
    from mergelab.weights.source import TensorSource

# Names of embeddings and output layers, and of output layers' biases, in all architectures that have them.
_MATRIX = re.compile(
    r"(^|\.)(word_embeddings?|embed_tokens|wte|shared|embed_in|embed_out|lm_head|shared_head\.head)\.weight$"
)
_BIAS = re.compile(r"(^|\.)(lm_head\.(decoder\.)?bias|cls\.predictions\.(decoder\.)?bias|final_logits_bias)$")
# Has a row for each token of a part of the vocabulary.
_SHORTER = re.compile(r"(^|\.)embed_tokens_per_layer\.weight$")
_GROWTH = 64


@dataclass(frozen=True, eq=False)
class TokenModel:
    """A model under common names, its number of tokens, and where it lies."""

    source: TensorSource
    size: int
    folder: Path

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of its tensors, those of tied ones too."""
        return frozenset([*self.source.keys(), *self.source.aliases()])

    @cached_property
    def grown(self) -> Mapping[str, tuple[int, ...]]:
        """The dimensions of its class's tensors that grow with the vocabulary."""
        return grown_dimensions(self.folder, self.size)


def vocabulary_axes(models: Sequence[TokenModel], *, skip: Collection[str] = (), moved: bool = True) -> dict[str, int]:
    """Find the tensors that have an entry for each token, each with the dimension.

    Args:
        models: the models, the base first where there is one.
        skip: names that are not considered.
        moved: whether some token has another place in some model. If not, tensors of equal shapes need not be found.

    Raises:
        ModelError: it cannot be decided for a tensor that is merged.
    """
    merged = frozenset[str].intersection(*(model.names for model in models[1:] or models))
    axes: dict[str, int] = {}
    for name in sorted(frozenset[str]().union(*(model.names for model in models)).difference(skip)):
        holders = [model for model in models if name in model.names]
        found = _axes_of(name, holders)
        if found is None or len(found) > 1:
            if moved and name in merged:
                shape = list(holders[0].source.shape(name))
                raise ModelError(
                    f"{holders[0].source.name}: {name} of shape {shape} cannot be merged by token, as it does not show "
                    f"which of its entries belong to which of the {holders[0].size} tokens; merge models of the same "
                    "tokens"
                )
        elif found:
            axes[name] = found[0]
    return axes


def _axes_of(name: str, holders: Sequence[TokenModel]) -> tuple[int, ...] | None:
    """Return a tensor's dimensions that have an entry for each token; None where that cannot be decided."""
    shapes = [model.source.shape(name) for model in holders]
    first = shapes[0]
    if any(len(shape) != len(first) for shape in shapes):
        return ()
    sizes = [model.size for model in holders]
    found = tuple(d for d in range(len(first)) if [shape[d] for shape in shapes] == sizes)
    if _SHORTER.search(name) and 0 not in found:
        return None
    if not found or len(set(sizes)) > 1:
        return found
    if _MATRIX.search(name) and found == (0,) and len(first) == 2:
        return found
    if _BIAS.search(name) and len(found) == 1:
        return found
    for model in holders:
        if (known := _in_class(name, len(first), model.grown)) is not None:
            return known
    return (0,) if _MATRIX.search(name) and 0 in found else None  # as an embedding and a linear layer have it


def _in_class(name: str, dimensions: int, grown: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Look a tensor up by the longest end of its name that one of a class's tensors has; None where none has one.

    Prefixes differ between a bare model and one with a head.
    """
    parts = name.split(".")
    for length in range(len(parts), min(2, len(parts)) - 1, -1):
        end = ".".join(parts[-length:])
        known = {axes for other, axes in grown.items() if other == end or other.endswith(f".{end}")}
        if known:
            axes = known.pop()
            return axes if not known and all(axis < dimensions for axis in axes) else None
    return None


def grown_dimensions(folder: Path, size: int) -> dict[str, tuple[int, ...]]:
    """Return, for each tensor of the class of the model in ``folder``, the dimensions that grow with the vocabulary.

    Nothing is known of a model whose class transformers does not have or cannot build without memory.
    """
    import torch
    import transformers

    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            cls: Any = getattr(transformers, str((config.architectures or [""])[0]), transformers.AutoModel)
            shapes = []
            for growth in (0, _GROWTH):
                changed = copy.deepcopy(config)
                for part in _parts(changed):
                    for key in ("vocab_size", *(key for key in vars(part) if key.endswith("vocab_size"))):
                        if getattr(part, key, None) == size:
                            setattr(part, key, size + growth)
                with torch.device("meta"):
                    module = cls.from_config(changed) if hasattr(cls, "from_config") else cls(changed)
                shapes.append({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    except Exception:  # a config can be wrong, and a class can fail without memory, in any way
        return {}
    before, after = shapes
    return {
        name: tuple(axis for axis, length in enumerate(shape) if after[name][axis] == length + _GROWTH)
        for name, shape in before.items()
        if len(after.get(name, ())) == len(shape)
    }


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration of transformers and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict"):
            yield from _parts(value)
