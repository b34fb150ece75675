"""What every evaluation takes: where and in what precision to compute, how large batches and inputs are, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mergelab.config import EvalConfig
from mergelab.errors import ConfigError
from mergelab.evaluation.spread import Limits, device_of

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, Any]

# Larger batches make a CPU no faster: the matrix products fill it, the caches overflow, padding grows.
_CPU_BATCH_TOKENS = 512


class TextEngine(Protocol):
    """Something else than transformers that generates texts with a module's weights."""

    @property
    def name(self) -> str:
        """The engine with its version."""
        ...

    def generate(self, prompts: Any, module: nn.Module, options: EvaluationOptions, watch: Any = None) -> Array:
        """Return what `mergelab.evaluation.generation.EncodedPrompts.run` does."""
        ...


@dataclass(frozen=True)
class EvaluationOptions:
    """How models are run over examples; the defaults are `mergelab.config.EvalConfig`'s where that has the key.

    Attributes:
        device: where to compute; None: where the model is.
        dtype: to compute in (``"float32"``, ``"bfloat16"``); None: the model's own.
        batch_tokens: upper bound of one batch in tokens, padding included; one longer example is a batch alone.
        max_length: upper bound of one input in tokens; None: what the model allows.
        seed: draws the order of the batches, so that what is done by any moment is a fair sample; None: the longest
            examples come first.
        rounds: (n,) the round of each example: rounds come in ascending order, and no batch has examples of two. Within
            a round the longest examples come first, whatever the seed.
        max_memory: bytes of weights that a device may hold (`mergelab.evaluation.spread.placed`).
        progress: called with the fraction done.
        engine: what generates texts; None: transformers.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | str | None = None
    batch_tokens: int = EvalConfig.model_fields["batch_tokens"].default
    max_length: int | None = EvalConfig.model_fields["max_length"].default
    seed: int | None = None
    rounds: Array | None = None
    max_memory: Limits | None = None
    progress: Callable[[float], None] | None = None
    engine: TextEngine | None = None

    def device_for(self, model: nn.Module) -> torch.device:
        """Return the device to run ``model`` on."""
        return device_of(model) if self.device is None else torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to compute in; None for the model's own."""
        dtype: torch.dtype | None = getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return dtype

    def batch_budget(self, device: torch.device) -> int:
        """Return the tokens of one batch on ``device``, padding included."""
        return min(self.batch_tokens, _CPU_BATCH_TOKENS) if device.type == "cpu" else self.batch_tokens

    def report(self, fraction: float) -> None:
        """Call ``progress``, where there is one, with the fraction done."""
        if self.progress is not None:
            self.progress(fraction)


DEFAULTS = EvaluationOptions()


def options_from_config(config: EvalConfig, device: str) -> EvaluationOptions:
    """Return the options that a configuration asks for.

    Raises:
        ConfigError: the device that ``device`` names is not there.
    """
    options = EvaluationOptions(best_device(device), config.dtype, config.batch_tokens, config.max_length)
    return replace(options, max_memory=config.max_bytes)


def best_device(name: str = "auto") -> torch.device:
    """Choose where to compute: ``auto`` takes a CUDA GPU, else Apple's, else the CPU.

    Raises:
        ConfigError: the device that ``name`` asks for is not there.
    """
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: must be auto, cpu, cuda, cuda:<number> or mps") from None
    if counts.get(device.type, 0) <= (device.index or 0):
        there = ", ".join(f"{kind}:{i}" if kind == "cuda" else kind for kind, n in counts.items() for i in range(n))
        raise ConfigError(f"device={name}: not on this machine (there is {there})")
    return device
