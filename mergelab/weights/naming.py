"""What the names of a transformer's tensors mean: the backbone's prefix, its heads, old spellings, stale buffers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from mergelab.weights.source import TensorSource

# TensorFlow-era BERT checkpoints, among them google-bert/bert-base-uncased, spell LayerNorm's parameters this way.
_OLD_LAYER_NORM = re.compile(r"(^|\.)LayerNorm\.(gamma|beta)$")
_NEW_SPELLING = {"gamma": "weight", "beta": "bias"}

# What checkpoints carried before transformers made it non-persistent or stopped using it; each with the number of
# dimensions that tells it from a parameter of the same name (None: the name says it all).
_STALE = (
    (re.compile(r"(^|\.)(attn|attention)\.(attention\.)?(bias|causal_mask)$"), 4),
    (re.compile(r"(^|\.)(attn|attention)\.(attention\.)?masked_bias$"), 0),
    (re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"), None),
    (re.compile(r"(^|\.)decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"), None),
)
_POSITION_BUFFER = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
# Parts of a backbone that some heads switch off (`add_pooling_layer`), so either side may lack them.
_OPTIONAL = re.compile(r"(^|\.)pooler\.")
# A sequence-to-sequence model's halves hold most of its tensors, but what is outside one is no head.
_NO_BACKBONE = {"encoder", "decoder", "shared"}


def modern_name(key: str) -> str:
    """Return today's spelling of a stored name: ``LayerNorm.gamma`` and ``beta`` are ``weight`` and ``bias``."""
    match = _OLD_LAYER_NORM.search(key)
    return key if match is None else key[: match.start(2)] + _NEW_SPELLING[match[2]]


def is_stale(source: TensorSource, key: str) -> bool:
    """Tell attention masks, their fill values, rotary frequencies and the like, which every model makes anew."""
    for pattern, dimensions in _STALE:
        if pattern.search(key):
            return dimensions is None or len(source.shape(key)) == dimensions
    return False


def is_position_buffer(source: TensorSource, key: str) -> bool:
    """Tell the integer ``position_ids`` and ``token_type_ids`` that old checkpoints carry."""
    return _POSITION_BUFFER.search(key) is not None and not source.dtype(key).is_floating_point


def is_optional(key: str) -> bool:
    """Tell parts of a backbone that models of one architecture may leave out (the pooler)."""
    return _OPTIONAL.search(key) is not None


def matches_any(key: str, patterns: Iterable[str]) -> bool:
    """Return whether ``key`` fits one of the shell-style patterns (``classifier.*``), upper and lower case distinct."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def backbone_prefix(keys: Collection[str]) -> str:
    """Find the prefix (``"bert."``) that the backbone's tensors share, or answer ``""`` when the names show none.

    The prefix is a first part with several named modules under it, which at least 16 tensors and 70 % of all have;
    the others, 16 at most, are heads. Models whose names do not show a backbone this way (T5, bare encoders, toy
    modules) have no heads as far as names tell.
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


def head_names(source: TensorSource, prefix: str | None = None) -> list[str]:
    """List the tensors outside the backbone: the task head, or a base's pretraining heads.

    Args:
        source: any source, e.g. a checkpoint or one of `AlignedModels`' views.
        prefix: what the backbone's names start with (``"bert."``); default: found by `backbone_prefix`; "" means that
            there is no head.
    """
    keys = [*source.keys(), *source.aliases()]
    prefix = backbone_prefix(keys) if prefix is None else prefix
    return [key for key in keys if not key.startswith(prefix)]


def missing_prefix(keys: Collection[str], target: Collection[str]) -> str:
    """Find the prefix that ``keys`` lack to agree with ``target`` (``wte.weight``, ``transformer.wte.weight``).

    Answers "" unless the prefix makes more names agree than agree already, and at least half of ``keys``.
    """
    best, most = "", sum(key in target for key in keys)
    for prefix in _leading_parts(target):
        agreeing = sum(prefix + key in target for key in keys)
        if agreeing > most and 2 * agreeing >= len(keys):
            best, most = prefix, agreeing
    return best


def _leading_parts(keys: Iterable[str]) -> Sequence[str]:
    """List the first one and the first two dotted parts that names start with, each with its dot, in stable order."""
    parts: dict[str, None] = {}
    for key in keys:
        pieces = key.split(".")
        for depth in (1, 2):
            if len(pieces) > depth:
                parts[".".join(pieces[:depth]) + "."] = None
    return list(parts)


# The number of a layer, after what it is a layer of: encoder.layer.3., transformer.h.3., decoder.block.3.
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_PART = re.compile(r"(^|\.)(encoder|decoder)(\.|$)")
_BEFORE_LAYERS = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)(\.|$)")


def depths(names: Sequence[str]) -> dict[str, float]:
    """Say how deep in the model each tensor is: ℓ/(L−1) in layer ℓ of L, counted for each stack of layers alone.

    0 for embeddings and for the only layer of a stack; 1 for what else is in no layer: final norms, poolers, heads.
    """
    layers = {name: (match[1], int(match[2])) for name in names if (match := _LAYER.match(name))}
    last: dict[str, int] = {}
    for stack, number in layers.values():
        last[stack] = max(last.get(stack, 0), number)
    found = {}
    for name in names:
        if name in layers:
            stack, number = layers[name]
            found[name] = number / last[stack] if last[stack] else 0.0
        else:
            found[name] = 0.0 if _BEFORE_LAYERS.search(name) else 1.0
    return found


def layer_of(name: str) -> tuple[str, int] | None:
    """Return in which part's stack ("encoder", "decoder", or "" where the name does not say) a tensor lies, and where.

    Layers are counted from 0 in each stack; None for what is in no layer.
    """
    match = _LAYER.match(name)
    if match is None:
        return None
    part = _PART.search(match[1])
    return (part[2] if part else "", int(match[2]))
