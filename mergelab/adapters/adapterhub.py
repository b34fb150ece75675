"""Read adapters of the Adapters library (AdapterHub): LoRA, IA³ and unions of them, with their prediction heads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergelab.adapters.adapterhub_heads import read_head
from mergelab.adapters.canonical import Adapter, Factors
from mergelab.adapters.files import AdapterFiles
from mergelab.adapters.locations import FUSED, place_of
from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch, listed

MODULES = {None: "a bottleneck", "prefix_tuning": "a prefix-tuning"}  # architectures that change no weight of the base
_ADDED = re.compile(r"(?P<layer>.+)\.loras\.(?P<name>[^.]+)\.(?P<leaf>lora_A|lora_B)")
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)(\.0\.?(a|b|rc|dev))?")
# Settings of LoRA that the tensors show, that matter in training alone, or that are read by name below.
_KNOWN = frozenset(
    {
        *("architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "dropout"),
        *("attn_matrices", "composition_mode", "init_weights", "init_weights_seed", "dtype"),
    }
)
_ELSEWHERE = "merge it into its base in the library (model.merge_adapter) and save that"


def is_of_library(config: Mapping[str, Any]) -> bool:
    """Return whether an ``adapter_config.json`` is the Adapters library's, not PEFT's."""
    return "peft_type" not in config and isinstance(config.get("config"), Mapping)


def parts_of(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the configurations that an adapter consists of: one, or those of a union.

    Raises:
        ModelError: the file describes none.
    """
    inner = config.get("config")
    if not isinstance(inner, Mapping):
        raise ModelError(f"{name}: config in its adapter_config.json must describe the adapter, and is {inner!r:.60}")
    if inner.get("architecture") != "union":
        return [inner]
    parts = inner.get("configs")
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(part, Mapping) for part in parts):
        raise ModelError(f"{name}: the union in its adapter_config.json has no configurations")
    return list(parts)


def check_library_settings(config: Mapping[str, Any], name: str) -> None:
    """Check that an adapter of the library changes weights of its base in a way that can be merged.

    Raises:
        ModelError: it does not; the line names what it is.
    """
    for part in parts_of(config, name):
        kind = part.get("architecture")
        if kind in MODULES:
            raise ModelError(
                f"{name}: it has {MODULES[kind]} part of the Adapters library, which changes no weight of its base; "
                "adapters like it are averaged with save.form=module_average (method=soup, evaluate=false)"
            )
        if kind != "lora":
            raise ModelError(
                f"{name}: it is of architecture {kind!r:.40} of the Adapters library; its LoRA and IA³ adapters can be "
                "merged"
            )
        _check_lora(part, name)
    if len(parts_of(config, name)) > 1:
        raise ModelError(f"{name}: it is a union of several LoRA parts, which the Adapters library itself cannot load")
    (part,) = parts_of(config, name)
    if part is not config["config"] and _scales_by_rank(config) and part.get("alpha") != part.get("r"):
        raise ModelError(
            f"{name}: it is a union of version {config['version']}, where LoRA was trained without its scale "
            f"(alpha={part.get('alpha')}, r={part.get('r')}), which the library does not heed in unions; save it again "
            "without the union"
        )


def _check_lora(part: Mapping[str, Any], name: str) -> None:
    if part.get("use_gating"):
        raise ModelError(
            f"{name}: use_gating=true in its adapter_config.json: its gates depend on the input, so that it is no "
            "change of weights; no merge can hold it"
        )
    if part.get("use_dora"):
        raise ModelError(
            f"{name}: use_dora=true in its adapter_config.json: DoRA of the Adapters library computes something else "
            "than its own merge_adapter (scale and biases), and cannot be merged; DoRA of PEFT can"
        )
    if part.get("composition_mode", "add") not in ("add", "scale"):
        raise ModelError(f"{name}: composition_mode={part['composition_mode']!r:.60} must be add or scale")
    odd = [key for key, value in part.items() if key not in _KNOWN and value not in (None, False, {}, [])]
    if odd:
        shown = listed(f"{key}={part[key]!r:.60}" for key in odd)
        raise ModelError(f"{name}: {shown} in its adapter_config.json cannot be merged; {_ELSEWHERE}")


def read_library(files: AdapterFiles) -> Adapter:
    """Bring LoRA and IA³ of the Adapters library into canonical form.

    The rank is the tensors', and the scale α/r; an IA³ vector is multiplied by α. Of versions before 1.1.0 α counts as
    r, as the library itself reads them. A fused projection's B has rows for those of q, k and v that are adapted: B
    becomes (outputs, n · r), with a block for each of them.

    Raises:
        ModelError: its type, a setting, a head or a tensor is none that can be merged; the line names it.
        KeyMismatch: a factor is without its counterpart. ShapeMismatch: the two do not fit together.
    """
    config, name = files.config, files.name
    check_library_settings(config, name)
    head = read_head(files.head_config, files.head_tensors, name)
    found = Adapter(
        name=name,
        kind="LORA",
        base=named_base(config),
        revision=None,
        task_type=head.task_type,
        class_name=head.class_name,
        fan_in_fan_out=False,
        keeps_ties=True,
        model_type=str(config["model_type"]) if config.get("model_type") else None,
        label2id=head.label2id,
        tensors=dict(head.tensors),
    )
    halves: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in files.tensors.items():
        match = _ADDED.fullmatch(stored)
        if match is None or match["name"] != config.get("name"):
            raise ModelError(f"{name}: the tensor {stored} is none that LoRA {config.get('name')!r:.60} should have")
        halves.setdefault(match["layer"], {})[match["leaf"]] = tensor
    for layer, parts in halves.items():
        _add(found, layer, parts, config)
    return found


def named_base(config: Mapping[str, Any]) -> str | None:
    """Return the base that an adapter of the library names, if it does."""
    base = config.get("model_name")
    return base if isinstance(base, str) and base else None


def _add(found: Adapter, layer: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Add what changes in one layer."""
    name, b = found.name, tensors.get("lora_B")
    if b is None:
        raise KeyMismatch(f"{name}: {layer} has lora_A without lora_B")
    (part,), old = parts_of(config, name), _scales_by_rank(config)
    mode = part.get("composition_mode", "add")
    if (mode == "add") != ("lora_A" in tensors):
        has = "without" if mode == "add" else "with"
        raise KeyMismatch(f"{name}: {layer} has lora_B {has} lora_A, and its composition_mode is {mode}")
    fused = _enabled(part, layer, tensors)
    if b.dim() != 2 or 0 in b.shape or (fused and b.shape[0] % len(fused)):
        raise ShapeMismatch(f"{name}: lora_B of {layer} is {list(b.shape)}, which is no (outputs, r)")
    if mode == "scale":
        if b.shape[1] != 1:
            raise ShapeMismatch(f"{name}: the IA³ vector of {layer} is {list(b.shape)}, and must be (outputs, 1)")
        vector = _padded(b, fused, 1.0)
        found.vectors[layer] = vector if old else vector * _alpha(part, layer, name)
        return
    a, rank = tensors["lora_A"], int(b.shape[1])
    groups = len(fused) or 1
    if a.dim() != 2 or a.shape[0] != rank * groups:
        raise ShapeMismatch(
            f"{name}: the ranks of {layer} differ: A is {list(a.shape)} (r, inputs) and B is {list(b.shape)} "
            f"(outputs, r)" + (f", of {groups} fused projections" if fused else "")
        )
    scale = 1.0 if old else _alpha(part, layer, name) / rank
    if fused:
        b = _padded(torch.block_diag(*b.chunk(groups)), fused, 0.0)  # type: ignore[no-untyped-call]
    found.factors[layer] = Factors(a, b, scale)


def _scales_by_rank(config: Mapping[str, Any]) -> bool:
    """Return whether α counts as r: in versions before 1.1.0 of the library, under its present name."""
    match = _VERSION.match(str(config.get("version")))
    if match is None:
        return False
    release = int(match[1]), int(match[2])
    return release < (1, 1) or (release == (1, 1) and match[3] is not None)


def _alpha(part: Mapping[str, Any], layer: str, name: str) -> float:
    alpha = part.get("alpha", 8 if part.get("composition_mode", "add") == "add" else 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{name}: alpha of {layer} must be a number, and is {alpha!r:.60}")
    return float(alpha)


def _enabled(part: Mapping[str, Any], layer: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """Return which thirds of a fused projection are adapted, of 0, 1 and 2; nothing for other layers."""
    thirds = [at for at, matrix in enumerate(FUSED) if matrix in (part.get("attn_matrices") or ())]
    place, a, b = place_of(layer), tensors.get("lora_A"), tensors["lora_B"]
    if place is not None:
        return thirds if place.matrices == FUSED else []
    grouped = a is not None and len(thirds) > 1 and a.shape[0] == len(thirds) * b.shape[-1]
    return thirds if grouped else []


def _padded(b: Tensor, fused: Sequence[int], fill: float) -> Tensor:
    """Return B with rows for the thirds of a fused projection that are not adapted."""
    if not fused:
        return b
    whole = b.new_full((3, b.shape[0] // len(fused), b.shape[1]), fill)
    whole[list(fused)] = b.view(len(fused), -1, b.shape[1])
    return whole.flatten(0, 1)
