"""Quantised checkpoints: FP8 weights and their scales are read as the weights they stand for, all others are refused.

An FP8 checkpoint stores ``weight`` in an 8-bit float format and scales next to it, one for the whole matrix, for each
row, or for each block (``weight_scale``, ``weight_scale_inv``). The weight that it stands for is their product.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import ModelError
from mergelab.weights.source import TensorInfo

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
# Keys of a config that say how its weights are quantised, and files that say it apart from the config.
QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Methods that can store FP8 weights with scales; the tensors show whether a checkpoint does.
_FP8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp8", "quark"})
_HINTS = {
    "bitsandbytes": "load it in transformers and save model.dequantize()",
    "mxfp4": "load it with transformers' Mxfp4Config(dequantize=True) and save that",
}
# What is appended to the name of a weight, or takes the place of its last component, in the name of its scale.
_SCALE_ENDINGS = ("_scale_inv", "_scale", "_weight_scale", "_weight_scale_inv")
_SCALES_BESIDE_WEIGHT = (".scale", ".qscale_weight", ".scale_weight")
# Scales of activations and of the cache of keys and values, which an unquantised model does not have.
_OF_ACTIVATIONS = re.compile(
    r"(^|[._])((input|output|activation|input_activation|output_activation)_scale(_inv|_ub)?|qscale_act|scale_input"
    r"|(q|k|v|kv|prob|k_cache|v_cache|kv_cache)_scale|kv_cache_scaling_factor|k_zero_point|v_zero_point)$"
)
# Names that only quantised checkpoints have, and the method that writes them.
_NAMES = (
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\."), "bitsandbytes"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes"),
    (re.compile(r"\.g_idx$"), "gptq"),
    (re.compile(r"\.(qweight|qzeros)$"), "gptq or awq"),
    (re.compile(r"\.pre_quant_scale$"), "awq"),
    (re.compile(r"\.(weight_packed|weight_zero_point|bitmask|row_offsets)$"), "compressed-tensors"),
    (re.compile(r"\.W_q$"), "hqq"),
    (re.compile(r"\.(codebooks|codes)$"), "aqlm"),
    (re.compile(r"\.(dense_weights|row_offsets|in_perm)$"), "spqr"),
    (re.compile(r"\.(centroids|res_centroids)(\.|$)"), "vptq"),
    (re.compile(r"\.weight\._(data|scale)$"), "quanto"),
    (re.compile(r"[._]weight(_qdata|\.qdata|\.int_data)$"), "torchao"),
)
# Packages whose tensors are quantised inside.
_PACKAGES = {
    "torchao": "torchao",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
}
_MXFP4 = ("_blocks", "_scales")
_ONE_BYTE = frozenset({torch.int8, torch.uint8})
# Masks and indices, which old checkpoints store as bytes.
_NO_WEIGHT = re.compile(r"(^|\.)(bias|masked_bias|causal_mask|\w*mask|\w*_ids)$")
_CHUNK = 1 << 22  # entries that are in float32 at a time


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config says of how the weights are quantised, also where a nested config says it."""
    for key in QUANTISATION_KEYS:
        if isinstance(found := config.get(key), Mapping) and found:
            return found
    inner = (value for value in config.values() if isinstance(value, Mapping))
    return next((found for each in inner if (found := quantisation(each)) is not None), None)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of the same model, unquantised."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in QUANTISATION_KEYS
    }


def refuse_quantised(name: str, infos: Iterable[TensorInfo]) -> None:
    """Raise `ModelError` for tensors that are quantised in any way, such as those of a module or a state dict.

    ``name`` is what the error calls the model.
    """
    by_name = {info.name: info for info in infos}
    scaled = _scales(by_name)
    if (method := _shown_method(by_name, frozenset(scaled.values()))) is not None:
        raise ModelError(_refusal(name, method))
    if scaled:
        raise ModelError(_refusal(name, "fp8", f"{next(iter(scaled))} has a scale: give the folder, or"))


def refuse_quantised_class(name: str, key: str, kind: type) -> None:
    """Raise `ModelError` for a tensor of a class that is quantised inside, whatever dtype it shows."""
    for cls in kind.__mro__:
        for package, method in _PACKAGES.items():
            if f"{cls.__module__}.".startswith(f"{package}."):
                raise ModelError(_refusal(name, method, f"{key} is a {kind.__name__}:"))


def refuse_quantised_folder(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `ModelError` when a folder says that its weights are quantised, and not as FP8; no weights are read."""
    if (method := _said_method(folder, config)) is not None and method not in _FP8_METHODS:
        raise ModelError(_refusal(name, method))


def open_quantised(
    name: str, folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], get: Callable[[str], Tensor]
) -> DequantisedWeights | None:
    """Return the weights of an FP8 checkpoint; None for a checkpoint that is not quantised.

    Args:
        name: what errors call the model.
        folder: where it lies.
        config: its ``config.json``.
        infos: its stored tensors.
        get: reads a stored tensor.

    Raises:
        ModelError: it is quantised in another way, or its scales do not belong to its weights.
    """
    method, scales = _said_method(folder, config), _scales(infos)
    shown = _shown_method(infos, frozenset(scales.values()))
    if shown is not None:
        raise ModelError(_refusal(name, shown))
    if method is None and not scales:
        return None
    weights = [key for key, info in infos.items() if info.dtype in FLOAT8]
    if not weights and not scales:
        raise ModelError(_refusal(name, str(method), "its tensors are not:"))
    if odd_ones := sorted({*weights} ^ scales.keys()):
        what = "has no scale" if odd_ones[0] in weights else f"has a scale, but is {_dtype_name(infos[odd_ones[0]])}"
        raise ModelError(_refusal(name, method or "fp8", f"{odd_ones[0]} {what}:"))
    lasts = {last for last in {key.rpartition(".")[2] for key in infos} if _OF_ACTIVATIONS.search(last)}
    hidden = {*scales.values(), *(key for key in infos if key.rpartition(".")[2] in lasts)}
    block = _block(quantisation(config) or {})
    made = DequantisedWeights(name, scales, frozenset(hidden), _stored_dtype(config), block, get)
    kinds = {(*infos[key][1:], *infos[scale][1:]): (infos[key], infos[scale]) for key, scale in scales.items()}
    for weight, scale in kinds.values():  # few, where layers and experts are many
        made.check(weight, scale)
    return made


@dataclass(frozen=True, eq=False)
class DequantisedWeights:
    """The weights that an FP8 checkpoint's tensors stand for: each weight times its scale, rounded once.

    Attributes:
        name: what errors call the model.
        scales: the name of each FP8 weight's scale.
        hidden: names of stored tensors that an unquantised model does not have.
        dtype: what the weights are rounded to.
        block: the rows and columns of a block, where the config says them.
        get: reads a stored tensor.
    """

    name: str
    scales: Mapping[str, str]
    hidden: frozenset[str]
    dtype: torch.dtype
    block: tuple[int, int] | None
    get: Callable[[str], Tensor]
    _kept: dict[str, Tensor] = field(default_factory=dict)  # threads read one tensor again and again, for its parts
    _lock: Any = field(default_factory=Lock)

    def read(self, key: str) -> Tensor:
        """Return a weight; it is held until two others have been read."""
        with self._lock:
            if key not in self._kept:
                while len(self._kept) > 1:
                    del self._kept[next(iter(self._kept))]
                weight, scale = self.get(key), _as_factors(self.get(self.scales[key]))
                self._kept[key] = _product(weight, scale, self._blocks(weight.shape, scale.shape), self.dtype)
            return self._kept[key]

    def check(self, weight: TensorInfo, scale: TensorInfo) -> None:
        """Raise `ModelError` when a scale is not one of its weight."""
        if not scale.dtype.is_floating_point and scale.dtype != torch.uint8:
            raise ModelError(f"{self.name}: {scale.name} is {_dtype_name(scale)}, which is no scale of an FP8 weight")
        try:
            self._blocks(weight.shape, scale.shape)
        except ValueError:
            of_blocks = "" if self.block is None else f" with blocks of {self.block[0]}×{self.block[1]}"
            raise ModelError(
                f"{self.name}: {scale.name} of shape {list(scale.shape)} is no scale of {weight.name} of shape "
                f"{list(weight.shape)}{of_blocks}: merge the unquantised checkpoint"
            ) from None

    def _blocks(self, shape: Sequence[int], scale: Sequence[int]) -> tuple[int, int]:
        """Return how many rows and columns of a matrix share a scale.

        Raises:
            ValueError: the shapes do not fit.
        """
        *_, rows, columns = 1, 1, *shape
        *lead, height, width = _grid_shape(shape, scale)
        if math.prod(lead) not in (1, math.prod(shape[:-2])):
            raise ValueError
        said = self.block or (128, 128)  # the usual one, where the config does not say it
        if (height, width) == (math.ceil(rows / said[0]), math.ceil(columns / said[1])):
            return said
        if rows % height or columns % width:
            raise ValueError
        return rows // height, columns // width


def _grid_shape(shape: Sequence[int], scale: Sequence[int]) -> tuple[int, ...]:
    """Return a scale's shape with a last dimension for rows and one for columns.

    Raises:
        ValueError: the shapes do not fit.
    """
    if math.prod(scale) == 1:
        return (1, 1)
    if len(scale) == 1 and len(shape) > 2 and scale[0] == math.prod(shape[:-2]):  # one for each expert
        return (scale[0], 1, 1)
    if len(scale) == 1 and len(shape) == 2 and scale[0] == shape[0]:
        return (scale[0], 1)
    if len(scale) < 2 or len(scale) > max(2, len(shape)):
        raise ValueError
    return tuple(scale)


def _as_factors(scale: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents of two with a bias of 127 (E8M0)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def _product(weight: Tensor, scale: Tensor, blocks: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Multiply a weight (…, rows, columns) with the scales of its blocks in float32, and round to ``dtype``.

    At most `_CHUNK` entries are in float32 at a time.
    """
    result = torch.empty(weight.shape, dtype=dtype)
    if weight.numel() == 0:
        return result
    rows, columns = (1, 1, *weight.shape)[-2:]
    grid = scale.reshape(_grid_shape(weight.shape, scale.shape))
    grid = grid.reshape(-1, *grid.shape[-2:])
    step = max(1, _CHUNK // max(columns, 1) // blocks[0]) * blocks[0]
    matrices = zip(weight.reshape(-1, rows, columns), result.view(-1, rows, columns), strict=True)
    for at, (matrix, target) in enumerate(matrices):
        own = grid[at if len(grid) > 1 else 0]
        for start in range(0, rows, step):
            part = matrix[start : start + step].float()
            factors = own[start // blocks[0] : math.ceil((start + len(part)) / blocks[0])]
            factors = factors.repeat_interleave(blocks[0], 0)[: len(part)]
            whole = columns // blocks[1]  # blocks across; what remains is narrower
            part[:, : whole * blocks[1]].unflatten(1, (whole, blocks[1])).mul_(factors[:, :whole, None])
            part[:, whole * blocks[1] :].mul_(factors[:, whole:])
            target[start : start + step] = part
    return result


def _scales(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Find the weights that have a scale, each with its scale's name."""
    found: dict[str, str] = {}
    for scale in infos:
        if "scale" not in scale.rpartition(".")[2]:
            continue
        for ending in _SCALE_ENDINGS:
            key = scale.removesuffix(ending)
            likely = ending.endswith("_inv") or key.endswith("weight") or (key in infos and infos[key].dtype in FLOAT8)
            if key != scale and key in infos and likely:
                found.setdefault(key, scale)
        for ending in _SCALES_BESIDE_WEIGHT:
            key = f"{scale.removesuffix(ending)}.weight"
            if scale.endswith(ending) and key in infos and infos[key].dtype in FLOAT8:
                found.setdefault(key, scale)
    return found


def _shown_method(infos: Mapping[str, TensorInfo], scales: Collection[str]) -> str | None:
    """Return the method of quantisation that names and dtypes show, FP8 aside; None where they show none."""
    ends = {f".{'.'.join(key.rsplit('.', 2)[-2:])}" for key in infos}  # few, where layers and experts are many
    for pattern, method in _NAMES:
        if any(pattern.search(end) for end in ends):
            return method
    blocks = (key.removesuffix(_MXFP4[0]) for key, info in infos.items() if info.dtype in _ONE_BYTE)
    if any(f"{key}{_MXFP4[0]}" in infos and f"{key}{_MXFP4[1]}" in infos for key in blocks):
        return "mxfp4"
    for key, info in infos.items():
        if info.dtype in _ONE_BYTE and len(info.shape) > 1 and key not in scales and not _NO_WEIGHT.search(key):
            return f"8-bit or packed integers ({key} is {_dtype_name(info)})"
    return None


def _said_method(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the method that a folder's config, or a file next to it, names; None for an unquantised model."""
    if (said := quantisation(config)) is None:
        files = [_read_json(folder / file) for file in QUANTISATION_FILES if (folder / file).is_file()]
        said = next(iter(files), None)
    return None if said is None else _method(said) or "an unknown method"


def _method(said: Mapping[str, Any]) -> str | None:
    """Return the method that a quantisation config names."""
    if isinstance(inner := said.get("quantization"), Mapping):  # as ModelOpt writes it
        said = inner
    if said.get("quant_algo") is not None and str(said["quant_algo"]).upper() not in (
        "FP8",
        "MXFP8",
        "MIXED_PRECISION",
    ):
        return str(said["quant_algo"]).lower()
    if said.get("quant_algo") is not None or "kv_cache_quant_algo" in said:
        return "modelopt"
    if "load_in_4bit" in said or "load_in_8bit" in said:
        return "bitsandbytes"
    method = said.get("quant_method") or said.get("quant_type")
    if method is None:
        if "config_groups" in said or "sparsity_config" in said:
            return "compressed-tensors"
        return "gptq or awq" if "bits" in said or "w_bit" in said else None
    text = str(method).lower().replace("compressed_tensors", "compressed-tensors")
    return {"fbgemm": "fbgemm_fp8"}.get(text, text)


def _block(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a block that a quantisation config says."""
    groups = said.get("config_groups")
    candidates = [said.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        candidates.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    for size in candidates:
        if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
            return int(size[0]), int(size[1])
    return None


def _stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that the unquantised model is stored in by its config; bfloat16 where it says none."""
    for said in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(said.get(key)).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    return torch.bfloat16


def _refusal(name: str, method: str, why: str = "") -> str:
    hint = f", or {_HINTS[method]}" if method in _HINTS else ""
    return f"{name}: quantised with {method}: {f'{why} ' if why else ''}merge the unquantised checkpoint{hint}"


def _dtype_name(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
