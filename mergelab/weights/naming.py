"""Read the names of a transformer's tensors: backbone prefix, heads, layers, old spellings, stale buffers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mergelab.weights.source import TensorSource

# TensorFlow-era BERT checkpoints, among them google-bert/bert-base-uncased, spell LayerNorm's parameters this way.
_OLD_LAYER_NORM = re.compile(r"(^|\.)LayerNorm\.(gamma|beta)$")
_NEW_SPELLING = {"gamma": "weight", "beta": "bias"}

# Buffers that transformers has made non-persistent or does not use. The number of dimensions tells a buffer from a
# parameter of the same name (None: the name is enough).
_STALE = (
    (re.compile(r"(^|\.)(attn|attention)\.(attention\.)?(bias|causal_mask)$"), 4),
    (re.compile(r"(^|\.)(attn|attention)\.(attention\.)?masked_bias$"), 0),
    (re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"), None),
    (re.compile(r"(^|\.)decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"), None),
)
_POSITION_BUFFER = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
# Parts of a backbone that some heads switch off (`add_pooling_layer`), so either model may lack them.
_OPTIONAL = re.compile(r"(^|\.)pooler\.")
# Encoder and decoder hold most tensors of a sequence-to-sequence model, but the tensors outside one are no head.
_NO_BACKBONE = {"encoder", "decoder", "shared"}


def modern_name(key: str) -> str:
    """Return the current spelling of a stored name: ``LayerNorm.gamma`` and ``beta`` become ``weight`` and ``bias``."""
    match = _OLD_LAYER_NORM.search(key)
    return key if match is None else key[: match.start(2)] + _NEW_SPELLING[match[2]]


def is_stale(source: TensorSource, key: str) -> bool:
    """Return whether ``key`` is a buffer that models recompute: a causal mask, its fill value, rotary frequencies."""
    for pattern, dimensions in _STALE:
        if pattern.search(key):
            return dimensions is None or len(source.shape(key)) == dimensions
    return False


def is_position_buffer(source: TensorSource, key: str) -> bool:
    """Return whether ``key`` is an integer ``position_ids`` or ``token_type_ids`` buffer, as old checkpoints have."""
    return _POSITION_BUFFER.search(key) is not None and not source.dtype(key).is_floating_point


def is_optional(key: str) -> bool:
    """Return whether ``key`` belongs to a part that models of one architecture may lack: the pooler."""
    return _OPTIONAL.search(key) is not None


def is_token_embedding(key: str) -> bool:
    """Return whether ``key`` may name an embedding of tokens: ``wte.weight``, ``model.embed_tokens.weight``."""
    return _BEFORE_LAYERS.search(key) is not None and _OTHER_EMBEDDING.search(key) is None


def matches_any(key: str, patterns: Iterable[str]) -> bool:
    """Return whether ``key`` matches one of the shell-style patterns (``classifier.*``); case matters."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def backbone_prefix(keys: Collection[str]) -> str:
    """Find the prefix (``"bert."``) that the backbone's tensors share; return ``""`` when the names show none.

    The prefix is a first name component with several named modules below it. At least 16 tensors and 70 % of all have
    it; the others, at most 16, are heads. Models whose names show no backbone this way (T5, bare encoders, toy modules)
    count as models without heads.
    """
    modules: dict[str, set[str]] = {}
    for key in keys:
        first, *rest = key.split(".")
        if len(rest) > 1 and not rest[0].isdigit():
            modules.setdefault(first, set()).add(rest[0])
    for first, inner in modules.items():
        outside = sum(not key.startswith(first + ".") for key in keys)
        inside = len(keys) - outside
        if first in _NO_BACKBONE or len(inner) < 2:
            continue
        if inside >= max(16, 0.7 * len(keys)) and outside <= 16:
            return first + "."
    return ""


def names_outside_backbone(source: TensorSource, prefix: str | None = None) -> list[str]:
    """List the tensors outside the backbone: the task head, or a base's pretraining heads.

    Args:
        source: a checkpoint, or a source of `AlignedModels`.
        prefix: the backbone's prefix (``"bert."``); default: found by `backbone_prefix`; ``""`` for a model without a
            head.
    """
    keys = [*source.keys(), *source.aliases()]
    prefix = backbone_prefix(keys) if prefix is None else prefix
    return [key for key in keys if not key.startswith(prefix)]


def missing_prefix(keys: Collection[str], target: Collection[str]) -> str:
    """Find the prefix that ``keys`` lack to match ``target`` (``wte.weight``, ``transformer.wte.weight``).

    Returns:
        ``""`` unless with the prefix more names match than without it, and at least half of ``keys``.
    """
    best, most = "", sum(key in target for key in keys)
    for prefix in _leading_parts(target):
        matching = sum(prefix + key in target for key in keys)
        if matching > most and 2 * matching >= len(keys):
            best, most = prefix, matching
    return best


def _leading_parts(keys: Iterable[str]) -> Sequence[str]:
    """List the prefixes of one and of two dotted components that names start with, each with its dot, in order."""
    parts: dict[str, None] = {}
    for key in keys:
        pieces = key.split(".")
        for depth in (1, 2):
            if len(pieces) > depth:
                parts[".".join(pieces[:depth]) + "."] = None
    return list(parts)


# A stack's name and the number of a layer in it: encoder.layer.3., transformer.h.3., decoder.block.3.
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_PART = re.compile(r"(^|\.)(encoder|decoder)(\.|$)")
_OTHER_EMBEDDING = re.compile(r"position|token_type|segment|wpe|[Nn]orm")
_BEFORE_LAYERS = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)(\.|$)")


@dataclass(frozen=True)
class LayerPlace:
    """Where a tensor lies along the layers.

    Attributes:
        layer: the number of its layer in its stack, from 0; −inf for embeddings, +inf for what follows the layers
            (final norms, poolers, heads).
        count: how many layers the stack has; 0 for tensors outside the layers.
    """

    layer: float
    count: int = 0

    def depth(self) -> float:
        """Return ℓ/(L−1) in layer ℓ of L; 0 before the layers and in an only layer, 1 after the layers."""
        if not self.count:
            return 0.0 if self.layer < 0 else 1.0
        return self.layer / (self.count - 1) if self.count > 1 else 0.0


def places(names: Sequence[str]) -> dict[str, LayerPlace]:
    """Return where each tensor lies; layers are counted separately for each stack (encoder, decoder)."""
    layers = {name: (match[1], int(match[2])) for name in names if (match := _LAYER.match(name))}
    last: dict[str, int] = {}
    for stack, number in layers.values():
        last[stack] = max(last.get(stack, 0), number)
    found = {}
    for name in names:
        if name in layers:
            stack, number = layers[name]
            found[name] = LayerPlace(number, last[stack] + 1)
        else:
            found[name] = LayerPlace(-math.inf if _BEFORE_LAYERS.search(name) else math.inf)
    return found


def depths(names: Sequence[str]) -> dict[str, float]:
    """Return the relative depth of each tensor, as `LayerPlace.depth` says it."""
    return {name: place.depth() for name, place in places(names).items()}


def layer_of(name: str) -> tuple[str, int] | None:
    """Return a tensor's stack ("encoder", "decoder", or "" where the name shows neither) and its layer in that stack.

    Layers are counted from 0 in each stack. None for tensors outside the layers.
    """
    match = _LAYER.match(name)
    if match is None:
        return None
    part = _PART.search(match[1])
    return (part[2] if part else "", int(match[2]))
