"""A model's copy for inference: on another device or in another dtype, with CPU matrix products that run at full speed.

PyTorch hands float32 matrix products on a CPU to the BLAS it was built with, which on many processors reaches little
more than half of what oneDNN's kernels do on weights that are laid out for them beforehand. Those kernels are what
PyTorch's own compiler uses for a frozen model; here they serve without compiling anything. Both sum in float32; only
the order of the summands differs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, listed
from mergelab.evaluation.spread import is_spread

# The batch size that weights are laid out for; others are right as well, and hardly slower.
_ROWS = 512
# Smaller layers (a classifier's two outputs) gain nothing.
_SMALLEST = 32
# What is packed, and how far outputs of up to 42 may be from those of the plain layer.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def inference_copy(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None, *, pack: bool = True, hooks: bool = True
) -> nn.Module:
    """Copy a model for inference on ``device``; the given model is left as it is.

    One whose layers are on several devices stays there, and shares all of its weights with the copy.

    Tensors that are already there in ``dtype`` are shared with the model and not copied. Parameters are cast, buffers
    keep their dtype. On a CPU, linear layers get weights laid out for its kernels (as much memory again).

    Args:
        model: any module.
        dtype: of the floating-point parameters; ``None`` keeps each one's own.
        pack: whether to lay out weights, which pays from some hundred tokens on.
        hooks: whether the copy has the model's hooks.

    Raises:
        ConfigError: a model on several devices has other dtypes.
    """
    moved: dict[int, Any] = {}
    spread = is_spread(model)
    if spread:
        _check_dtype(model, dtype)
        # What brings weights to a device knows them by name, so that the copy can use it too.
        moved |= {id(part._hf_hook): part._hf_hook for part in model.modules() if hasattr(part, "_hf_hook")}
        moved |= {id(each): each for each in (*model.parameters(), *model.buffers())}
    for parameter in () if spread else model.parameters():
        changed = parameter.detach().to(device, dtype if parameter.is_floating_point() else None)
        same = changed.data_ptr() == parameter.data_ptr() and changed.dtype == parameter.dtype
        moved[id(parameter)] = parameter if same else nn.Parameter(changed, requires_grad=False)
    for buffer in () if spread else model.buffers():
        moved[id(buffer)] = buffer.to(device)
    for module in () if hooks else model.modules():
        for own in (module._forward_hooks, module._forward_pre_hooks):
            moved[id(own)] = type(own)()
    # What the memo holds is taken instead of being copied, and ties stay ties.
    duplicate = copy.deepcopy(model, moved).eval()
    if pack and device.type == "cpu" and not spread:
        for module in duplicate.modules():
            forward = _fused_activation(module) or _packed_forward(module)
            if forward is not None:
                module.forward = forward
    return duplicate


def _check_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    own = {each.dtype for each in model.parameters() if each.is_floating_point()}
    if dtype is not None and own - {dtype}:
        names = listed(sorted(str(each).removeprefix("torch.") for each in own))
        raise ConfigError(f"{type(model).__name__}: is on several devices in {names}, and is to be run in {dtype}")


def _fused_activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Make the forward function of GPT-2's GELU, which is written as eight passes over its input, as a single one."""
    from transformers.activations import NewGELUActivation

    return functools.partial(nn.functional.gelu, approximate="tanh") if type(module) is NewGELUActivation else None


def _packed_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Make the forward function of a linear layer (or of GPT-2's kind of it) with packed weights, else ``None``."""
    from transformers.pytorch_utils import Conv1D

    # Subclasses may compute something else.
    if type(module) not in (nn.Linear, Conv1D):
        return None
    layer: Any = module
    weight: Tensor = layer.weight.detach() if type(module) is nn.Linear else layer.weight.detach().t()
    if min(weight.shape) < _SMALLEST or weight.dtype not in _TOLERANCES or not _can_pack(weight.dtype):
        return None
    return functools.partial(_linear, _pack(weight), layer.bias)


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Compute x·Wᵀ + b for x (…, in) with a packed W (out, in)."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Try whether this build of PyTorch and this processor have the kernels and they compute a linear layer.

    They are not part of PyTorch's public interface, and those of bfloat16 need a processor with AVX-512 or the like:
    where they are missing or have changed, plain layers do the work.
    """
    x = torch.linspace(-1, 1, 96).reshape(1, 3, 32).to(dtype)
    weight, bias = torch.linspace(-2, 1, 1024).reshape(32, 32).to(dtype), torch.linspace(0, 1, 32).to(dtype)
    try:
        found = _linear(_pack(weight), bias, x)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return found.shape == (1, 3, 32) and torch.allclose(
        found, nn.functional.linear(x, weight, bias), atol=_TOLERANCES[dtype]
    )
