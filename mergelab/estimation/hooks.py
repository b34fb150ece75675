"""Record the inputs and outputs of a module's layers, and compute each example's gradient of their parameters.

Nothing here depends on an architecture. Forward hooks record inputs and outputs of the layers whose gradients have a
closed form: linear layers (including transformers' ``Conv1D``), embeddings, layer norms and RMS norms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

LayerKind = Literal["linear", "conv1d", "embedding", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in a forward pass.

    Attributes:
        layer, kind: the layer and its kind.
        input, output: (b, …).
        in_decoder: whether the input belongs to the decoder's tokens, in a sequence-to-sequence model.
    """

    layer: nn.Module
    kind: LayerKind
    input: Tensor
    output: Tensor
    in_decoder: bool = False


@dataclass
class _Recording(threading.local):
    """The calling thread's forward pass: its number of examples, its layer calls so far, and the encoder's outputs."""

    size: int = 0
    calls: list[LayerCall] = field(default_factory=list)
    encoded: list[Tensor] = field(default_factory=list)


def layer_kind(layer: nn.Module) -> LayerKind | None:
    """Return which closed form the gradients of a layer of this class have; None when they have none."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return None if layer.sparse or layer.max_norm is not None or layer.scale_grad_by_freq else "embedding"
    if isinstance(layer, nn.LayerNorm):
        return "layer_norm"
    name = type(layer).__name__
    if isinstance(layer, nn.RMSNorm) or name.endswith("RMSNorm") or name == "T5LayerNorm":
        return "rms_norm" if _epsilon(layer) is not None else None
    if name == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return None


class Recorder:
    """Runs a module and records the calls of its layers; several threads may run it at once.

    Args:
        module: the module to run.
        kinds: the layers to record, with their kinds.
        until: submodule before which a forward pass stops.
    """

    def __init__(self, module: nn.Module, kinds: dict[nn.Module, LayerKind], until: nn.Module | None = None) -> None:
        self._module, self._kinds, self._until = module, kinds, until
        self._recording = _Recording()
        self._encoder = encoder_of(module)
        self._in_encoder = frozenset(self._encoder.modules()) if self._encoder is not None else frozenset()
        self._projection = getattr(module, "enc_to_dec_proj", None)

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Register the hooks on the layers, and remove them at the end."""
        handles: list[Any] = []
        try:
            if self._until is not None:
                handles.append(self._until.register_forward_pre_hook(_stop))
            for part in (self._encoder, self._projection):
                if part is not None:
                    handles.append(part.register_forward_hook(self._record_encoded))
            for layer, kind in self._kinds.items():
                if kind == "embedding":
                    handles.append(layer.register_forward_pre_hook(self._expand_indices))
                handles.append(layer.register_forward_hook(self._record_call))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: dict[str, Tensor]) -> tuple[Any, list[LayerCall]]:
        """Run the module on a batch.

        Returns:
            The module's output (None when the pass stopped at ``until``), and the layers' calls in their order.
        """
        self._recording.size, self._recording.calls, self._recording.encoded = len(next(iter(batch.values()))), [], []
        try:
            output = self._module(**batch)
        except _StopForward:
            output = None
        calls, self._recording.calls, self._recording.encoded = self._recording.calls, [], []
        return output, calls

    def _expand_indices(self, layer: nn.Module, arguments: tuple[Any, ...]) -> Any:
        """Expand shared indices (positions) to a row per example, so that the examples' gradients stay separate."""
        indices = arguments[0] if arguments else None
        if isinstance(indices, Tensor) and indices.dim() == 2 and len(indices) == 1 < self._recording.size:
            return (indices.expand(self._recording.size, -1), *arguments[1:])
        return None

    def _record_call(self, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if not arguments or not isinstance(output, Tensor):
            return None
        recorded = output
        if torch.is_grad_enabled() and not output.requires_grad:  # the first layer, as parameters require no gradients
            recorded = output.detach().requires_grad_()
            output = recorded.clone()  # the next layer may write into it
        given = arguments[0].detach()
        in_decoder = self._is_in_decoder(layer, given)
        self._recording.calls.append(LayerCall(layer, self._kinds[layer], given, recorded, in_decoder))
        return output

    def _record_encoded(self, part: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._recording.encoded.append(output if isinstance(output, Tensor) else output[0])

    def _is_in_decoder(self, layer: nn.Module, given: Tensor) -> bool:
        """Return whether an input belongs to the decoder's tokens, as that of cross-attention's keys does not."""
        if self._encoder is None or layer in self._in_encoder:
            return False
        encoded = [(tensor.data_ptr(), tensor.shape) for tensor in self._recording.encoded]
        return (given.data_ptr(), given.shape) not in encoded


def encoder_of(module: nn.Module) -> nn.Module | None:
    """Return the encoder of a sequence-to-sequence model; None for other models."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    paths = [path for path, _ in module.named_modules() if path.rpartition(".")[2] == "encoder"]
    return module.get_submodule(min(paths, key=lambda path: path.count("."))) if paths else None


class _StopForward(Exception):
    """Ends a forward pass before the submodule ``until``."""


def _stop(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _StopForward


# ------------------------------------------------------------------------------------------- gradients of each example

Gradient = tuple[LayerCall, Tensor]  # a call, and the gradient of its output, of the output's shape


@dataclass(frozen=True)
class MatrixGradients:
    """Per-example gradients of a matrix: example b's is leftᵇᵀ·rightᵇ, with left (b, l, m) and right (b, l, n)."""

    left: Tensor
    right: Tensor

    def magnitude(self) -> MatrixGradients:
        """Return the same with the absolute values of all terms."""
        return MatrixGradients(self.left.abs(), self.right.abs())

    def total(self) -> Tensor:
        """Return the sum of the examples' gradients: (m, n)."""
        return self.left.flatten(0, 1).T @ self.right.flatten(0, 1)


@dataclass(frozen=True)
class VectorGradients:
    """Per-example gradients of a vector (n,): sums over the tokens of terms (b, l, n)."""

    terms: Tensor

    def magnitude(self) -> VectorGradients:
        """Return the same with the absolute values of all terms."""
        return VectorGradients(self.terms.abs())

    def total(self) -> Tensor:
        """Return the sum of the examples' gradients: (n,)."""
        return self.terms.sum((0, 1))


@dataclass(frozen=True)
class EmbeddingGradients:
    """Per-example gradients of an embedding (m, n): sums of values (b, l, n) over equal row indices (b, l)."""

    indices: Tensor
    values: Tensor
    shape: torch.Size

    def magnitude(self) -> EmbeddingGradients:
        """Return the same with the absolute values of all terms."""
        return EmbeddingGradients(self.indices, self.values.abs(), self.shape)

    def total(self) -> Tensor:
        """Return the sum of the examples' gradients: (m, n)."""
        total = self.values.new_zeros(self.shape)
        return total.index_add_(0, self.indices.flatten(), self.values.flatten(0, 1))

    def of_each_example(self) -> tuple[Tensor, Tensor]:
        """Return each example's gradient of each row that it uses: row indices (k,) and gradients (k, n)."""
        examples = torch.arange(len(self.indices), device=self.indices.device)[:, None]
        pairs, group = torch.unique(examples * self.shape[0] + self.indices, return_inverse=True)
        sums = self.values.new_zeros(len(pairs), self.shape[1])
        sums.index_add_(0, group.flatten(), self.values.flatten(0, 1))
        return pairs % self.shape[0], sums


ExampleGradients = MatrixGradients | VectorGradients | EmbeddingGradients


def example_gradients(name: str, gradients: Sequence[Gradient]) -> ExampleGradients | None:
    """Compute each example's gradient of the parameter that the layers call ``name``, over all calls together.

    Returns:
        The gradients; None when the calls are of kinds whose gradients have no common form.
    """
    parts = [_FORMS[call.kind](call, gradient, name) for call, gradient in gradients]
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(part, VectorGradients) for part in parts):
        return VectorGradients(torch.cat([part.terms for part in parts if isinstance(part, VectorGradients)], 1))
    if all(isinstance(part, MatrixGradients) for part in parts):
        pairs = [(part.left, part.right) for part in parts if isinstance(part, MatrixGradients)]
        return MatrixGradients(torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 1))
    tables = [part for part in parts if isinstance(part, EmbeddingGradients)]
    if len(tables) == len(parts):
        indices, values = torch.cat([t.indices for t in tables], 1), torch.cat([t.values for t in tables], 1)
        return EmbeddingGradients(indices, values, tables[0].shape)
    return None


def normalised_input(call: LayerCall) -> Tensor:
    """Return what a norm's weight multiplies: the input of a call of a layer norm or an RMS norm, normalised."""
    layer: Any = call.layer
    if call.kind == "layer_norm":
        return functional.layer_norm(call.input, layer.normalized_shape, eps=layer.eps)
    mean_square = call.input.square().mean(-1, keepdim=True)
    return call.input * torch.rsqrt(mean_square + (_epsilon(layer) or 0.0))


def _linear(call: LayerCall, gradient: Tensor, name: str) -> ExampleGradients:
    if name == "bias":
        return VectorGradients(_tokens(gradient))
    return MatrixGradients(_tokens(gradient), _tokens(call.input))


def _conv1d(call: LayerCall, gradient: Tensor, name: str) -> ExampleGradients:
    if name == "bias":
        return VectorGradients(_tokens(gradient))
    return MatrixGradients(_tokens(call.input), _tokens(gradient))


def _embedding(call: LayerCall, gradient: Tensor, name: str) -> ExampleGradients:
    table: Any = call.layer
    indices = call.input.reshape(len(call.input), -1)
    values = gradient.reshape(*indices.shape, -1)
    if table.padding_idx is not None:  # that row is never trained
        values = values * (indices != table.padding_idx)[..., None]
    return EmbeddingGradients(indices, values, table.weight.shape)


def _norm(call: LayerCall, gradient: Tensor, name: str) -> ExampleGradients:
    return VectorGradients(_tokens(gradient * normalised_input(call) if name == "weight" else gradient))


_FORMS: dict[LayerKind, Callable[[LayerCall, Tensor, str], ExampleGradients]] = {
    "linear": _linear,
    "conv1d": _conv1d,
    "embedding": _embedding,
    "layer_norm": _norm,
    "rms_norm": _norm,
}


def _tokens(values: Tensor) -> Tensor:
    """Reshape (b, …, n) to (b, l, n)."""
    return values.reshape(len(values), -1, values.shape[-1])


def _epsilon(layer: Any) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if (value := getattr(layer, name, None)) is not None:
            return float(value)
    return None
