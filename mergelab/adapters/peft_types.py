"""PEFT's types of adapters beside LoRA: AdaLoRA, LoHa, LoKr, VeRA and tuned norms, as changes of the base's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergelab.adapters.canonical import Adapter, Factors, Projected, Projections
from mergelab.adapters.changes import Product, wide
from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch, listed

Parts = Mapping[str, Tensor]
_SHARED = "base_model"  # the module that VeRA's projections belong to
_RANK_OFFSET = 1e-5  # PEFT adds it to the rank by which it divides AdaLoRA's α


@dataclass(frozen=True)
class PeftType:
    """How adapters of one type are read.

    Attributes:
        parts: the names of its tensors, without PEFT's prefix: ``site`` is the layer and ``part`` what is stored of it.
        settings: keys of its configuration that are read, that the tensors show, or that matter in training alone.
        layers: the classes of the layers that PEFT adapts with it; empty: all.
        read: puts what a layer's tensors stand for into the adapter.
    """

    parts: re.Pattern[str]
    settings: frozenset[str]
    layers: tuple[str, ...]
    read: Callable[[Adapter, Mapping[str, Parts], Mapping[str, Any]], None]


def layer_parts(
    kind: PeftType, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Divide an adapter's tensors.

    Args:
        kind: its type.
        tensors: by their names.
        prefix: what PEFT puts before the names of a base.

    Returns:
        The type's own tensors, by layer and part; and the others, by name.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := kind.parts.fullmatch(name.removeprefix(prefix)):
            layers.setdefault(match["site"], {})[match["part"]] = tensor
        else:
            others[name] = tensor
    return layers, others


def pattern_value(config: Mapping[str, Any], key: str, pattern_key: str, site: str, default: object) -> Any:
    """Return a setting of one layer by PEFT's rule: that of the first pattern which fits its name, else the general.

    Raises:
        ValueError: a pattern is no regular expression, or there are no patterns under the key but something else.
    """
    patterns = config.get(pattern_key) or {}
    try:
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{patterns!r:.60}")
        fitting = next((each for each in patterns if re.match(rf"(.*\.)?({each})$", site)), None)
    except re.error as error:
        raise ValueError(str(error)) from error
    return config.get(key, default) if fitting is None else patterns[fitting]


def scale_of(site: str, rank: int, config: Mapping[str, Any], name: str, key: str = "lora_alpha") -> float:
    """Return the scale of a layer by PEFT's rule: α by the first pattern that fits its name, r by the tensor.

    Args:
        site: the layer.
        rank: r.
        config: the adapter's.
        name: what errors call the adapter.
        key: what the configuration calls α.

    Raises:
        ModelError: α is no number, or a pattern is no regular expression.
    """
    try:
        alpha = pattern_value(config, key, "alpha_pattern", site, 8)
    except ValueError as error:
        raise ModelError(f"{name}: alpha_pattern in its adapter_config.json is no set of patterns ({error})") from error
    alpha = _number(alpha, f"the {key} of {site}", name)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


def _read_adalora(found: Adapter, layers: Mapping[str, Parts], config: Mapping[str, Any]) -> None:
    """Read ``B · diag(E) · A``, scaled by α over the rank at the start (Zhang et al. 2023, arXiv:2303.10512)."""
    start = config.get("init_r", 12)
    if not isinstance(start, int) or isinstance(start, bool) or start < 1:
        raise ModelError(
            f"{found.name}: init_r in its adapter_config.json must be a positive integer, and is {start!r}"
        )
    for site, parts in layers.items():
        _check_parts(found, site, parts, [{"lora_A", "lora_B", "lora_E"}], optional={"ranknum"})
        a, b, e = parts["lora_A"], parts["lora_B"], parts["lora_E"]
        if a.dim() != 2 or b.dim() != 2 or tuple(e.shape) != (a.shape[0], 1) or b.shape[1] != a.shape[0]:
            raise ShapeMismatch(
                f"{found.name}: the factors of {site} do not fit together: A is {list(a.shape)} (r, inputs), "
                f"E is {list(e.shape)} (r, 1) and B is {list(b.shape)} (outputs, r)"
            )
        if "ranknum" in parts and not bool((parts["ranknum"] == start).all()):
            raise ModelError(f"{found.name}: the ranknum of {site} is not init_r={start}, which PEFT divides α by")
        if (rank := len(a)) == 0:
            continue  # the whole layer was pruned
        alpha = _number(config.get("lora_alpha", 8), f"the lora_alpha of {site}", found.name)
        scale = (alpha if alpha > 0 else rank) / (start + _RANK_OFFSET)
        found.factors[site] = Factors(wide(a) * wide(e), b, scale)


# -------------------------------------------------------------------------------------------------------- LoHa and LoKr


def _read_loha(found: Adapter, layers: Mapping[str, Parts], config: Mapping[str, Any]) -> None:
    """Read the entrywise product of two low-rank matrices (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""
    plain = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    for site, parts in layers.items():
        _check_parts(found, site, parts, [plain, plain | {"hada_t1", "hada_t2"}])
        first, second = (
            tuple(parts[part] for part in (f"hada_t{at}", f"hada_w{at}_a", f"hada_w{at}_b") if part in parts)
            for at in (1, 2)
        )
        rank, other = _rank(found, site, first), _rank(found, site, second)
        if rank != other:
            raise ShapeMismatch(f"{found.name}: the two products of {site} have ranks {rank} and {other}")
        product = Product(first, second, scale_of(site, rank, config, found.name, "alpha"), kronecker=False)
        shapes = [list(shape) for shape in product.factor_shapes]
        if shapes[0] != shapes[1]:
            raise ShapeMismatch(f"{found.name}: the two products of {site} have shapes {shapes[0]} and {shapes[1]}")
        found.products[site] = product


def _read_lokr(found: Adapter, layers: Mapping[str, Parts], config: Mapping[str, Any]) -> None:
    """Read the Kronecker product of two matrices, each whole or in factors (Yeh et al. 2024, arXiv:2309.14859)."""
    firsts = [{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}]
    seconds = [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "lokr_w2_a", "lokr_w2_b"}]
    for site, parts in layers.items():
        _check_parts(found, site, parts, [first | second for first in firsts for second in seconds])
        first = tuple(parts[part] for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if part in parts)
        second = tuple(parts[part] for part in ("lokr_w2", "lokr_t2", "lokr_w2_a", "lokr_w2_b") if part in parts)
        ranks = {_rank(found, site, each) for each in (first, second) if len(each) > 1}
        if len(ranks) > 1:
            raise ShapeMismatch(f"{found.name}: the factors of {site} have ranks {sorted(ranks)}")
        if first[0].dim() != 2 or second[0].dim() not in (2, 3, 4):
            raise ShapeMismatch(
                f"{found.name}: the factors of {site} must be matrices, or kernels of a convolution; they are "
                f"{list(first[0].shape)} and {list(second[0].shape)}"
            )
        rank = ranks.pop() if ranks else _configured_rank(found, site, config)
        found.products[site] = Product(first, second, scale_of(site, rank, config, found.name, "alpha"), kronecker=True)


def _rank(found: Adapter, site: str, factors: tuple[Tensor, ...]) -> int:
    """Return the rank of a matrix that is given as (X, Y), or with a core as (T, X, Y), and check their shapes."""
    *core, x, y = factors
    fits = x.dim() == y.dim() == 2 and 0 not in (*x.shape, *y.shape)
    fits = fits and y.shape[0] == x.shape[0 if core else 1]
    if not fits or any(each.dim() != 4 or each.shape[:2] != (len(y), len(y)) for each in core):
        shapes = listed(str(list(each.shape)) for each in factors)
        raise ShapeMismatch(f"{found.name}: the factors of {site} do not fit together: {shapes}")
    return len(y)


def _configured_rank(found: Adapter, site: str, config: Mapping[str, Any]) -> int:
    """Return the rank of a layer whose tensors do not show it."""
    try:
        rank = pattern_value(config, "r", "rank_pattern", site, 8)
    except ValueError as error:
        raise ModelError(
            f"{found.name}: rank_pattern in its adapter_config.json is no set of patterns ({error})"
        ) from error
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelError(f"{found.name}: the r of {site} must be a positive integer, and is {rank!r}")
    return rank


# ---------------------------------------------------------------------------------------------------------------- VeRA


def _read_vera(found: Adapter, layers: Mapping[str, Parts], config: Mapping[str, Any]) -> None:
    """Read two vectors for each layer, and the projections that all layers share."""
    scalings: dict[str, tuple[Tensor, Tensor]] = {}
    for site, parts in layers.items():
        if site != _SHARED:
            _check_parts(found, site, parts, [{"vera_lambda_b", "vera_lambda_d"}])
            scalings[site] = parts["vera_lambda_b"], parts["vera_lambda_d"]
    shared, saved = layers.get(_SHARED, {}), config.get("save_projection", True)
    if shared or saved:
        _check_parts(found, "the model", shared, [{"vera_A", "vera_B"}])
    if shared and not saved:
        raise ModelError(
            f"{found.name}: it holds vera_A and vera_B, and save_projection=false in its adapter_config.json, by which "
            "PEFT draws others; set it to true"
        )
    a, b = shared.get("vera_A"), shared.get("vera_B")
    vectors = [(each, scaling) for each, pair in scalings.items() for scaling in pair]
    if odd := [each for each, scaling in vectors if scaling.dim() != 1 or not scaling.numel()]:
        raise ShapeMismatch(f"{found.name}: vera_lambda_b and vera_lambda_d of {listed(odd, 3)} must be vectors")
    if not scalings:
        raise ModelError(f"{found.name}: it is of type VERA and has no tensors of this type")
    ranks = {pair[1].numel() for pair in scalings.values()}
    if a is not None and b is not None:
        if a.dim() != 2 or b.dim() != 2:
            raise ShapeMismatch(f"{found.name}: vera_A is {list(a.shape)} and vera_B {list(b.shape)}: no matrices")
        ranks |= {a.shape[0], b.shape[1]}
    else:
        ranks |= {config.get("r", 256)}
    if len(ranks) > 1:
        raise ShapeMismatch(f"{found.name}: the ranks of its vera tensors differ: {listed(map(str, ranks))}")
    seed = config.get("projection_prng_key", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ModelError(f"{found.name}: projection_prng_key in its adapter_config.json is no integer, but {seed!r}")
    shared_by_all = Projections(a, b, seed)
    for site, (by_output, by_rank) in scalings.items():
        found.projected[site] = Projected(by_output, by_rank, shared_by_all)


# --------------------------------------------------------------------------------------------------------- tuned layers


def _read_tuned(found: Adapter, layers: Mapping[str, Parts], config: Mapping[str, Any]) -> None:
    """Read layers that were trained whole, such as norms (Zhao et al. 2024, arXiv:2312.11420)."""
    del config
    for site, parts in layers.items():
        _check_parts(found, site, parts, [{"weight"}, {"weight", "bias"}])
        found.tensors.update({f"{site}.{part}": tensor for part, tensor in parts.items()})


# ----------------------------------------------------------------------------------------------------------- the table

_COMMON = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "bias", "target_modules", "exclude_modules", "modules_to_save", "init_weights"),
        *("layers_to_transform", "layers_pattern"),
    }
)
_LYCORIS = frozenset(
    {"alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "use_effective_conv2d"}
)
# Of LoRA's settings that AdaLoRA has too, PEFT does not use use_rslora and alpha_pattern.
_ADALORA = frozenset(
    {
        *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("lora_alpha", "lora_dropout", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("init_lora_weights", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
        *("ephemeral_gpu_offload", "trainable_token_indices", "ensure_weight_tying"),
    }
)

TYPES: Mapping[str, PeftType] = {
    "ADALORA": PeftType(
        re.compile(r"(?P<site>.+)\.(?P<part>lora_[ABE]|ranknum)"),
        _COMMON | _ADALORA,
        ("Linear", "Conv1D", "Conv2d"),
        _read_adalora,
    ),
    "LOHA": PeftType(
        re.compile(r"(?P<site>.+)\.(?P<part>hada_(w[12]_[ab]|t[12]))"),
        _COMMON | _LYCORIS,
        ("Linear", "Conv1d", "Conv2d"),
        _read_loha,
    ),
    "LOKR": PeftType(
        re.compile(r"(?P<site>.+)\.(?P<part>lokr_(w[12](_[ab])?|t2))"),
        _COMMON | _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
        ("Linear", "Conv1d", "Conv2d"),
        _read_lokr,
    ),
    "VERA": PeftType(
        re.compile(rf"(?P<site>{_SHARED}(?=\.vera_[AB]$)|.+(?=\.vera_lambda))\.(?P<part>vera_(lambda_[bd]|[AB]))"),
        _COMMON | {"fan_in_fan_out", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"},
        ("Linear", "Conv1D"),
        _read_vera,
    ),
    "LN_TUNING": PeftType(
        re.compile(r"(?P<site>.+)\.ln_tuning_layers\.(?P<part>weight|bias)"), _COMMON, (), _read_tuned
    ),
}
# Types that leave the base's weights as they are: what they learn is put before, beside or between its layers.
_BESIDE = frozenset(
    {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"),
        *("CARTRIDGE", "XLORA", "POLY"),
    }
)
# Types whose linear layers PEFT can fit by LoRA.
_CONVERTIBLE = frozenset(
    {
        *("TINYLORA", "VBLORA", "UNILORA", "FOURIERFT", "SHIRA", "HIRA", "PSOFT", "RANDLORA", "C3A", "MISS"),
        *("GRALORA", "DELORA", "WAVEFT"),
    }
)


def way_out(kind: object) -> str:
    """Return how an adapter of another type can be merged, to append to a line."""
    if str(kind) in _BESIDE:
        return "; this type has no weights of the base to merge"
    convert = ", or peft's convert_to_lora, which fits it by LoRA" if str(kind) in _CONVERTIBLE else ""
    return f", others after PeftModel.merge_and_unload{convert}"


def _check_parts(
    found: Adapter,
    site: str,
    parts: Parts,
    possible: list[set[str]],
    optional: Collection[str] = (),
) -> None:
    """Check that a layer's tensors are one of the sets that its type stores.

    Raises:
        KeyMismatch: some are missing. ModelError: some are there that do not go together.
    """
    given = parts.keys() - set(optional)
    if any(given == each for each in possible):
        return
    larger = [each for each in possible if given <= each]
    if not larger:
        raise ModelError(f"{found.name}: {site} has {listed(sorted(given))}, which do not go together")
    lacking = min(larger, key=len) - given
    there = listed(sorted(given)) if given else "no projections,"
    raise KeyMismatch(f"{found.name}: {site} has {there} without {listed(sorted(lacking))}")


def _number(value: object, what: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{name}: {what} must be a number, and is {value!r}")
    return value
