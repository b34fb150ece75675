"""Map a model to one flat tensor, and back.

mapper = ModelTensorMapper(gpt2.model)
base, legal = mapper.to_tensor(gpt2.model), mapper.from_hf("org/legal-gpt2", "text-generation")
pipe = mapper.to_pipeline(base + 0.5 * (legal - base), base_pipeline=gpt2)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergelab.errors import ModelError, ShapeMismatch
from mergelab.weights.agreement import require_agreement
from mergelab.weights.module import copy_module, load_into, module_of, named_tensors
from mergelab.weights.pretrained import load_model, pipeline_with
from mergelab.weights.source import tied_names

if TYPE_CHECKING:
    from transformers import Pipeline


class ModelTensorMapper:
    """Map models of one architecture to flat tensors and back.

    The flat tensor holds every floating-point parameter in the module's order, a tied one once. Buffers and integer
    parameters are not in it; a model made from a flat tensor has the template's.

    Args:
        model: the template, a module or a transformers pipeline; it is never written to.

    Raises:
        ModelError: ``model`` is neither, or has no floating-point parameters.
    """

    def __init__(self, model: nn.Module | Pipeline) -> None:
        template = module_of(model)
        if template is None:
            raise ModelError(f"a module or a pipeline is needed, not {type(model).__name__}")
        self._template = template
        self._parameters = {name: p.detach() for name, p in template.named_parameters() if p.is_floating_point()}
        if not self._parameters:
            raise ModelError(f"{type(template).__name__} has no floating-point parameters")

    def __len__(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters.values())

    def to_tensor(self, model: nn.Module | Pipeline | Mapping[str, Tensor]) -> Tensor:
        """Flatten a module, a pipeline or a state dict of the template's architecture.

        Returns:
            A new 1-D tensor in the parameters' dtype (the widest, when they differ).

        Raises:
            KeyMismatch, ShapeMismatch: the model is not of the template's architecture.
        """
        tensors = self._matched(model)
        dtype = next(iter(tensors.values())).dtype
        for value in tensors.values():
            dtype = torch.promote_types(dtype, value.dtype)
        device = next(iter(tensors.values())).device
        with torch.no_grad():
            flat = torch.empty(len(self), dtype=dtype, device=device)
            for name, piece in self._pieces(flat).items():
                piece.copy_(tensors[name])
        return flat

    def from_hf(self, name: str | Path, task: str, **kwargs: Any) -> Tensor:
        """Load a model from a hub id or a local folder and flatten it; arguments and errors as for `load_model`."""
        return self.to_tensor(load_model(name, task, **kwargs))

    def to_model(self, tensor: Tensor) -> nn.Module:
        """Write a flat tensor into a copy of the template, in the template's dtypes.

        Raises:
            ShapeMismatch: ``tensor`` is not 1-D of the template's length, or not floating point.
        """
        return self._filled(tensor, self._template)

    def to_pipeline(self, tensor: Tensor, base_pipeline: Pipeline) -> Pipeline:
        """Return a pipeline like ``base_pipeline`` (task, tokenizer, settings) that runs the model of ``tensor``.

        Raises:
            KeyMismatch, ShapeMismatch: the pipeline's model is not of the template's architecture; see also `to_model`.
        """
        module = module_of(base_pipeline)
        if module is None or not hasattr(base_pipeline, "task"):
            raise ModelError(f"base_pipeline must be a transformers pipeline, not {type(base_pipeline).__name__}")
        self._matched(module)
        return pipeline_with(base_pipeline, self._filled(tensor, module))

    def _filled(self, tensor: Tensor, like: nn.Module) -> nn.Module:
        if not isinstance(tensor, Tensor):
            raise ModelError(f"a flat tensor is needed, not {type(tensor).__name__}")
        if tensor.dim() != 1 or len(tensor) != len(self) or not tensor.is_floating_point():
            raise ShapeMismatch(
                f"a floating-point tensor of shape [{len(self)}] is needed for {type(like).__name__}, "
                f"not {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            )
        return load_into(copy_module(like), self._pieces(tensor.detach()), strict=False)

    def _pieces(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat tensor into views of the parameters' shapes."""
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        pieces = torch.split(flat, sizes)
        return {
            name: piece.view(parameter.shape)
            for (name, parameter), piece in zip(self._parameters.items(), pieces, strict=True)
        }

    def _matched(self, model: nn.Module | Pipeline | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the template's parameters with the values of ``model``, under the template's names."""
        given: Mapping[str, Tensor]
        if (module := module_of(model)) is not None:
            label, given = type(module).__name__, dict(module.named_parameters())
        elif isinstance(model, Mapping):
            label, given = "the state dict", model
        else:
            raise ModelError(f"a module, a pipeline or a dict of tensors is needed, not {type(model).__name__}")
        own = named_tensors(self._template)
        ties = tied_names(own)
        tensors = {ties.get(key, key): value.detach() for key, value in given.items()}
        excluded = own.keys() - self._parameters.keys()
        floating = {key: value for key, value in tensors.items() if key not in excluded}
        require_agreement([(type(self._template).__name__, self._parameters), (label, floating)])
        return {name: floating[name] for name in self._parameters}
