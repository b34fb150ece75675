"""Read PEFT's adapters: LoRA and its relatives, IA³ and trained tokens, from their configuration and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergelab.adapters.canonical import Adapter, Factors
from mergelab.adapters.files import AdapterFiles
from mergelab.adapters.peft_types import TYPES, layer_parts, scale_of, way_out
from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch, listed
from mergelab.weights.adapters import is_adapter_tensor

KINDS = ("LORA", "IA3", "TRAINABLE_TOKENS", *TYPES)
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<site>.+)\.lora_(?P<factor>[AB])\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<site>.+)\.lora_embedding_(?P<factor>[AB])")
_MAGNITUDE = re.compile(r"(?P<site>.+)\.lora_magnitude_vector(\.weight)?")
_IA3 = re.compile(r"(?P<site>.+)\.ia3_l")
_TOKENS = re.compile(r"(?P<site>.+?)(\.token_adapter)?\.trainable_tokens_delta")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save)(?=\.(weight|bias)$)")

# Settings that the tensors show, that matter in training alone, or that are read by name below; `TYPES` has others.
_KNOWN = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias"),
        *("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "modules_to_save", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
        *("target_parameters",),
        *("ensure_weight_tying", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config", "ephemeral_gpu_offload"),
        *("feedforward_modules", "init_ia3_weights", "token_indices", "init_weights"),
    }
)
# Initialisations that leave the base's weights as they are, and one whose change of them is computed again.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_PISSA = "pissa"


def read_peft(files: AdapterFiles) -> Adapter:
    """Bring a PEFT adapter into canonical form.

    Raises:
        ModelError: its type, a setting or a tensor is none that can be merged; the line names it.
        KeyMismatch: a factor is without its counterpart. ShapeMismatch: the two do not fit together.
    """
    config, name = files.config, files.name
    check_settings(config, name)
    kind = str(config["peft_type"])
    found = Adapter(
        name=name,
        kind=kind,
        base=_text(config, "base_model_name_or_path", name),
        revision=_text(config, "revision", name),
        task_type=_text(config, "task_type", name),
        class_name=_class_name(config),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        keeps_ties=bool(config.get("ensure_weight_tying")),
        layer_classes=TYPES[kind].layers if kind in TYPES else (),
        residual=config.get("init_lora_weights") == _PISSA,
        target_parameters=_target_parameters(config, name),
        settings=config,
    )
    others = dict(files.tensors)
    if kind in TYPES:
        layers, others = layer_parts(TYPES[kind], files.tensors, _PREFIX)
        TYPES[kind].read(found, layers, config)
    _read_others(found, others, config)
    _check_complete(found, config)
    return found


def _read_others(found: Adapter, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Read LoRA's factors, IA³'s vectors, rows of tokens and whole tensors."""
    name, is_lora = found.name, found.kind == "LORA"
    halves: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in tensors.items():
        key = stored.removeprefix(_PREFIX)
        if is_lora and (match := _LORA.fullmatch(key) or _EMBEDDING.fullmatch(key)):
            factor, leaf = match["factor"], match.groupdict().get("leaf", "embedding")
            if leaf == "bias" and factor == "B":
                found.biases[match["site"]] = tensor
            elif leaf == "bias":
                raise ModelError(f"{name}: {stored} is a bias of A, which no adapter of PEFT has")
            else:
                halves.setdefault(match["site"], {})[factor] = tensor
                halves[match["site"]].setdefault(leaf, tensor)
        elif is_lora and (match := _MAGNITUDE.fullmatch(key)):
            found.magnitudes[match["site"]] = tensor.reshape(-1)
        elif found.kind == "IA3" and (match := _IA3.fullmatch(key)):
            found.vectors[match["site"]] = tensor
        elif match := _TOKENS.fullmatch(key):
            found.rows[match["site"]] = _rows(match["site"], tensor, config, name)
        else:
            _add_whole(found, key, stored, tensor)
    for site, parts in halves.items():
        found.factors[site] = _factors(site, parts, config, name)


def check_settings(config: Mapping[str, Any], name: str) -> None:
    """Check that an ``adapter_config.json`` describes what can be merged.

    Raises:
        ModelError: it does not; the line names the type or the setting.
    """
    kind = config.get("peft_type")
    if kind not in KINDS:
        what = "names no peft_type" if kind is None else f"is of peft_type {kind!r}"
        raise ModelError(
            f"{name}: its adapter_config.json {what}; adapters of type {', '.join(KINDS)} can be merged{way_out(kind)}"
        )
    init = config.get("init_lora_weights")
    accepted = (*_PLAIN_INITIALISATIONS, *((_PISSA,) if kind == "LORA" else ()))
    if not any(init is each or (isinstance(each, str) and init == each) for each in accepted):
        raise ModelError(
            f"{name}: init_lora_weights={init!r} changed the base's weights when it was made, so that it does not fit "
            "the base as stored; save it again with path_initial_model_for_weight_conversion, which converts it"
        )
    known = TYPES[kind].settings if kind in TYPES else _KNOWN
    if unknown := [key for key, value in config.items() if key not in known and value not in (None, False, {}, [])]:
        raise ModelError(
            f"{name}: {listed(f'{key}={config[key]!r:.60}' for key in unknown)} in its adapter_config.json cannot be "
            "merged; merge it into its base (PeftModel.merge_and_unload) and save that"
        )


def _factors(site: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Factors:
    if {"A", "B"} - parts.keys():
        (lacking,) = {"A", "B"} - parts.keys()
        raise KeyMismatch(f"{name}: {site} has lora_{'B' if lacking == 'A' else 'A'} without lora_{lacking}")
    a, b, embedding = parts["A"], parts["B"], "embedding" in parts
    if embedding and "weight" in parts:
        raise ModelError(f"{name}: {site} has factors of an embedding and of a linear layer")
    if a.dim() < 2 or b.dim() < 2 or 0 in (*a.shape, *b.shape):
        raise ShapeMismatch(
            f"{name}: the factors of {site} must be matrices; A is {list(a.shape)} and B is {list(b.shape)} (weights "
            "that were saved before their parts were gathered look so)"
        )
    if a.shape[0] != b.shape[1] or b[0, 0].numel() != 1:
        raise ShapeMismatch(
            f"{name}: the ranks of {site} differ: A is {list(a.shape)} (r, inputs) and B is {list(b.shape)} "
            "(outputs, r)"
        )
    scale = scale_of(site, a.shape[0], config, name)
    return Factors(a.flatten(1), b.flatten(1), scale, embedding)


def _rows(site: str, values: Tensor, config: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Return which rows of an embedding were trained, and their values."""
    given = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(given, Mapping):
        given = next((numbers for layer, numbers in given.items() if f".{site}".endswith(f".{layer}")), None)
    if not isinstance(given, list) or not all(isinstance(each, int) and each >= 0 for each in given):
        raise ModelError(f"{name}: its adapter_config.json does not say which tokens the rows of {site} belong to")
    if values.dim() != 2 or len(given) != values.shape[0] or len(set(given)) != len(given):
        raise ShapeMismatch(f"{name}: {site} has trained rows of shape {list(values.shape)} for {len(given)} tokens")
    return torch.tensor(given), values


def _add_whole(found: Adapter, key: str, stored: str, tensor: Tensor) -> None:
    """Add a whole tensor; a second spelling of one that is there must be equal, and PEFT's unused copies are left."""
    if ".original_module." in key:
        return
    plain = _WRAPPED.sub("", key)
    if is_adapter_tensor(plain) or not plain.endswith((".weight", ".bias")):
        raise ModelError(f"{found.name}: the tensor {stored} is none that an adapter of type {found.kind} should have")
    if plain in found.tensors and not torch.equal(found.tensors[plain], tensor):
        raise ModelError(f"{found.name}: it holds two different tensors for {plain}")
    found.tensors[plain] = tensor


def _check_complete(found: Adapter, config: Mapping[str, Any]) -> None:
    """Check that magnitudes and biases belong to low-rank changes, and that the type's own tensors are there."""
    for what, layers in (("a magnitude", found.magnitudes), ("a bias of B", found.biases)):
        if odd := [layer for layer in layers if layer not in found.factors]:
            raise KeyMismatch(f"{found.name}: {listed(odd, 3)} has {what} without lora_A and lora_B")
    if config.get("use_dora") and (odd := [layer for layer in found.factors if layer not in found.magnitudes]):
        raise KeyMismatch(f"{found.name}: use_dora is set, and {listed(odd, 3)} has no lora_magnitude_vector")
    own = {"LORA": found.factors or found.rows, "IA3": found.vectors, "TRAINABLE_TOKENS": found.rows}
    if not own.get(found.kind, True):
        raise ModelError(f"{found.name}: it is of type {found.kind} and has no tensors of this type")


def _target_parameters(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = config.get("target_parameters") or []
    if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given):
        raise ModelError(f"{name}: target_parameters in its adapter_config.json is no list of names: {given!r:.60}")
    if given and (trained_otherwise := [key for key in ("use_dora", "lora_bias") if config.get(key)]):
        raise ModelError(f"{name}: target_parameters cannot go with {trained_otherwise[0]}")
    if given and config.get("init_lora_weights") == _PISSA:
        raise ModelError(f"{name}: target_parameters cannot go with init_lora_weights={_PISSA!r}")
    return tuple(given)


def _class_name(config: Mapping[str, Any]) -> str | None:
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, Mapping) or not str(mapping.get("parent_library")).startswith("transformers."):
        return None
    return str(mapping.get("base_model_class"))


def _text(config: Mapping[str, Any], key: str, name: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{name}: {key} in its adapter_config.json must be text, and is {value!r:.60}")
    return value or None
