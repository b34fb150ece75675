"""Adapters, such as LoRA's: recognised in folders, names and modules, and refused where a whole model is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mergelab.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
# In the order in which PEFT looks for them.
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Of the Adapters library, which loads the first by default; and those of a prediction head beside it.
LIBRARY_WEIGHTS = ("pytorch_adapter.bin", "adapter.safetensors")
HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS = ("pytorch_model_head.bin", "model_head.safetensors")
# Files of PEFT, the Adapters library, Diffusers and MLX.
ADAPTER_WEIGHTS = (
    *PEFT_WEIGHTS,
    *LIBRARY_WEIGHTS,
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
)
# Parts of the names that PEFT gives to an adapter's tensors, and to the modules that it replaces.
_NAMES = re.compile(
    r"(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|ranknum|hada_((w1|w2)_[ab]|t[12])"
    r"|lokr_((w1|w2)(_[ab])?|t2)|vera_(lambda_[bd]|[AB])|ln_tuning_layers|ia3_l|oft_[rRs]|boft_[Rs]|modules_to_save"
    r"|original_module)"
)
_WHAT_TO_DO = (
    "adapters of PEFT and the Adapters library are merged as experts, from their folders, on their base; where a whole "
    "model is needed, merge it into its base first (PeftModel.merge_and_unload) and save that"
)


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether a folder with files of these names, or a repository, is an adapter."""
    return not {ADAPTER_CONFIG, *ADAPTER_WEIGHTS}.isdisjoint(names)


def is_adapter_tensor(name: str) -> bool:
    """Return whether a part of a tensor's name is one that PEFT gives to adapters' tensors."""
    return any(_NAMES.fullmatch(part) for part in name.split("."))


def refuse_adapter(name: str, folder: Path) -> None:
    """Raise `ModelError` for a folder that is an adapter, also where a tokenizer or a base's config is with it.

    Transformers loads the adapter's base from such a folder, whatever other weights are there.
    """
    if is_adapter(path.name for path in folder.iterdir()):
        raise ModelError(adapter_refusal(name, _described(folder / ADAPTER_CONFIG)))


def refuse_adapted(name: str, tensors: Iterable[str], module: nn.Module | None = None) -> None:
    """Raise `ModelError` for a model whose tensors' names, or whose class, show that an adapter is in it."""
    classes = () if module is None else type(module).__mro__
    names = list(tensors)
    parts = {part for name in names for part in name.split(".")}  # few, where layers and experts are many
    adapted = {part for part in parts if _NAMES.fullmatch(part)}
    found = next((name for name in names if not adapted.isdisjoint(name.split("."))), None) if adapted else None
    if found is None and not any(cls.__name__ in ("PeftModel", "PeftMixedModel") for cls in classes):
        return
    configs: Any = getattr(module, "peft_config", None)
    first = next(iter(configs.values()), None) if isinstance(configs, Mapping) else None
    described = {key: getattr(first, key, None) for key in ("peft_type", "base_model_name_or_path")}
    described["peft_type"] = getattr(described["peft_type"], "value", described["peft_type"])
    if module is not None:
        raise ModelError(adapter_refusal(name, described, "has"))
    raise ModelError(f"{name}: {found} belongs to an adapter (LoRA or the like): {_WHAT_TO_DO}")


def adapter_refusal(name: str, config: Mapping[str, Any], verb: str = "is") -> str:
    """Return the line that refuses an adapter, by its ``adapter_config.json``."""
    inner = config.get("config")
    kind = config.get("peft_type") or config.get("fine_tune_type") or config.get("architecture")
    if kind is None and isinstance(inner, Mapping):
        kind = inner.get("architecture")
    kind = "" if kind is None else str(kind)
    base = config.get("base_model_name_or_path") or config.get("model_name") or config.get("model")
    what = f"{verb} a LoRA adapter" if kind.lower() in ("", "lora") else f"{verb} an adapter"
    of_base = f" of {base}" if base else ""
    said = f" (peft_type {kind})" if config.get("peft_type") else f" ({kind})" if kind else ""
    return f"{name}: {what}{of_base}{said}: {_WHAT_TO_DO}"


def _described(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
