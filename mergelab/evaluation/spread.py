"""Models that one device cannot hold: accelerate runs their layers on several GPUs, and the rest from memory or disk.

The weights of a layer stay where they are placed. Those of a layer without a GPU are held in the CPU's memory, or in
files that are mapped into it, and are sent to the main device while the layer computes. Other weights are written where
these lie (`mergelab.weights.module.load_into`), so that a sweep places a model once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mergelab.cache import cache_dir
from mergelab.errors import ConfigError, ModelError
from mergelab.weights.module import OFFLOADED

if TYPE_CHECKING:
    from torch import Tensor, nn

# The share of a GPU's free memory that weights may have; activations and what a generation keeps need the rest.
_SHARE = 0.85
CPU, DISK = "cpu", "disk"
Limits = Mapping[int | str, int]


def placed(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None = None, limits: Limits | None = None
) -> nn.Module:
    """Bring a module to ``device``, and what that cannot hold to others.

    Args:
        module: on the CPU; it is changed.
        device: where it computes. A GPU without a number stands for all of them.
        dtype: that it will be run in; None: its own.
        limits: how many bytes of weights a device may hold, by the number of a GPU or ``"cpu"``; the disk has the rest.
            None: a module that does not fit on the first GPU is divided among all, and the CPU has the rest.

    Raises:
        ConfigError: accelerate is not installed; a limit is of a GPU that is not there, or leaves no room.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    if limits is None:
        if not gpus or _needed(module, dtype) <= _free(0):
            return module.to(device)
        free: dict[int | str, int] = {number: _free(number) for number in range(gpus)}
        return _spread(module, dtype, {**free, CPU: _needed(module, dtype)}, evenly=True)
    if odd := [number for number in limits if number != CPU and int(number) >= gpus]:
        there = f"{gpus} GPUs" if gpus else "no GPUs"
        hint = "; device=cuda has all" if device.index is not None else " (they are numbered from 0)"
        raise ConfigError(f"eval.max_memory={{{odd[0]}: ...}}: device={device} has {there}{hint}")
    return _spread(module, dtype, limits)


def is_spread(module: nn.Module) -> bool:
    """Return whether accelerate runs a module's layers on several devices or from disk, whoever placed them there."""
    places = set(getattr(module, "hf_device_map", {}).values())
    return len(places) > 1 or DISK in places


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module's inputs are for."""
    if not is_spread(module):
        return next(module.parameters()).device
    places: Any = module.hf_device_map
    return torch.device(_main(places))


def division(module: nn.Module) -> str:
    """Say how many of a divided module's parts are where."""
    places: Any = list(module.hf_device_map.values())  # type: ignore[operator]
    said = [f"{f'cuda:{at}' if isinstance(at, int) else at} ({places.count(at)})" for at in dict.fromkeys(places)]
    return f"{type(module).__name__}: its parts are divided among {', '.join(said)}"


def check_whole(module: nn.Module, what: str) -> None:
    """Check that a module is on one device, which gradients and statistics of its layers need.

    Raises:
        ModelError: it is not.
    """
    if is_spread(module):
        raise ModelError(f"{what}: a {type(module).__name__} on several devices cannot learn from examples; device=cpu")


def _main(places: Mapping[str, Any]) -> Any:
    return next((place for place in places.values() if place not in (CPU, DISK)), CPU)


def _needed(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Return the bytes of a module's weights, and of their copy where they are run in another dtype."""
    own = sum(each.numel() * each.element_size() for each in module.parameters())
    return own + sum(each.numel() * dtype.itemsize for each in module.parameters() if dtype and each.dtype != dtype)


def _free(number: int) -> int:
    return int(torch.cuda.mem_get_info(number)[0] * _SHARE)


def _spread(module: nn.Module, dtype: torch.dtype | None, limits: Limits, *, evenly: bool = False) -> nn.Module:
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ModuleNotFoundError:
        raise ConfigError(
            f"{type(module).__name__}: {_needed(module, dtype) / 1e9:.1f} GB are to be divided among devices, which "
            "needs accelerate: pip install 'mergelab[devices]'"
        ) from None

    for parameter in module.parameters():  # one copy alone, in the dtype of inference
        parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else None)
    opened: Any = module
    whole = sorted(getattr(opened, "_no_split_modules", None) or ())
    with _quiet():
        memory: dict[int | str, int] = dict(limits)
        if evenly:
            memory = get_balanced_memory(opened, memory, no_split_module_classes=whole)
        places = infer_auto_device_map(opened, memory, no_split_module_classes=whole)
        held = _held(module, places)
        if next(iter(module.named_parameters()))[0] in held:
            given = "the free memory" if evenly else f"eval.max_memory={dict(limits)!r}:"
            raise ConfigError(f"{given} leaves the first layer of {type(module).__name__} no room on {_main(places)}")
        skipped = getattr(opened, "_skip_keys_device_placement", None)
        dispatch_model(opened, places, state_dict=held, offload_index={}, skip_keys=skipped)
    OFFLOADED[module] = held
    return module


def _held(module: nn.Module, places: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights that are sent to the main device when they are needed, by every name that they have."""
    held: dict[str, Tensor] = {}
    by_parameter: dict[int, Tensor] = {}
    away = {DISK} if _main(places) == CPU else {CPU, DISK}
    with contextlib.ExitStack() as stack:
        folder = None
        for name, parameter in module.named_parameters(remove_duplicate=False):
            place = places[max((at for at in places if at == "" or f"{name}.".startswith(f"{at}.")), key=len)]
            if place not in away:
                continue
            if id(parameter) not in by_parameter and place == DISK:
                folder = folder or stack.enter_context(_folder())
                by_parameter[id(parameter)] = _mapped(parameter.detach(), os.path.join(folder, name))
            held[name] = by_parameter.setdefault(id(parameter), parameter.detach())
    return held


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Make a folder for files to map: they are removed with it, and live on as long as they are mapped."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="offload-", dir=cache_dir(), ignore_cleanup_errors=True) as folder:
        yield folder


def _mapped(tensor: Tensor, file: str) -> Tensor:
    """Return a copy of a tensor in a file that is mapped into memory.

    Raises:
        ConfigError: there is no room for it.
    """
    size = max(tensor.numel() * tensor.element_size(), 1)
    try:
        with open(file, "wb") as made:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(made.fileno(), 0, size)
            else:
                made.truncate(size)
    except OSError as error:
        raise ConfigError(f"eval.max_memory: cannot hold weights in {cache_dir()}: {error.strerror}") from None
    mapped = torch.from_file(file, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep accelerate from saying that parameters are on the meta device."""
    loggers = [logging.getLogger(f"accelerate.{name}") for name in ("big_modeling", "utils.modeling")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
