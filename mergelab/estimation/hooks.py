"""Layers of a module as they run: what goes in, what comes out, and each example's gradient of their parameters.

Nothing here knows an architecture. Forward hooks note inputs and outputs of the layers whose gradients have a closed
form: linear layers (transformers' ``Conv1D`` among them), embeddings, layer and RMS norms.
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

Kind = Literal["linear", "conv1d", "embedding", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class Use:
    """One run of a layer in a forward pass.

    Attributes:
        layer, kind: which layer.
        input, output: (b, …).
        in_decoder: whether the input stands for the decoder's tokens, in a sequence-to-sequence model.
    """

    layer: nn.Module
    kind: Kind
    input: Tensor
    output: Tensor
    in_decoder: bool = False


@dataclass
class _Notes(threading.local):
    """What the calling thread's forward pass has noted so far, its number of examples, and what the encoder gave."""

    size: int = 0
    uses: list[Use] = field(default_factory=list)
    encoded: list[Tensor] = field(default_factory=list)


def kind_of(layer: nn.Module) -> Kind | None:
    """Return which closed form a layer's gradients have, judged by its class; None for other layers."""
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
    """Run a module and note what its layers do; several threads may run it at once.

    Args:
        module: what runs.
        kinds: the layers that are watched, and what they are.
        until: where a pass may end: when this part of the module is about to run.
    """

    def __init__(self, module: nn.Module, kinds: dict[nn.Module, Kind], until: nn.Module | None = None) -> None:
        self._module, self._kinds, self._until = module, kinds, until
        self._notes = _Notes()
        self._encoder = encoder_of(module)
        self._in_encoder = frozenset(self._encoder.modules()) if self._encoder is not None else frozenset()
        self._projection = getattr(module, "enc_to_dec_proj", None)

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Put the hooks on the layers, and take them off at the end."""
        handles: list[Any] = []
        try:
            if self._until is not None:
                handles.append(self._until.register_forward_pre_hook(_stop))
            for part in (self._encoder, self._projection):
                if part is not None:
                    handles.append(part.register_forward_hook(self._note_encoded))
            for layer, kind in self._kinds.items():
                if kind == "embedding":
                    handles.append(layer.register_forward_pre_hook(self._one_row_each))
                handles.append(layer.register_forward_hook(self._note))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: dict[str, Tensor]) -> tuple[Any, list[Use]]:
        """Run the module on a batch; answer its output and the layers' uses in the order in which they ran.

        The output is None where the pass has ended at ``until``.
        """
        self._notes.size, self._notes.uses, self._notes.encoded = len(next(iter(batch.values()))), [], []
        try:
            output = self._module(**batch)
        except _Enough:
            output = None
        uses, self._notes.uses, self._notes.encoded = self._notes.uses, [], []
        return output, uses

    def _one_row_each(self, layer: nn.Module, arguments: tuple[Any, ...]) -> Any:
        """Give each example its own row of indices: positions that all share would mix the examples' gradients."""
        indices = arguments[0] if arguments else None
        if isinstance(indices, Tensor) and indices.dim() == 2 and len(indices) == 1 < self._notes.size:
            return (indices.expand(self._notes.size, -1), *arguments[1:])
        return None

    def _note(self, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if not arguments or not isinstance(output, Tensor):
            return None
        watched = output
        if torch.is_grad_enabled() and not output.requires_grad:  # the first layer, as no parameter asks for gradients
            watched = output.detach().requires_grad_()
            output = watched.clone()  # what comes next may write into it
        given = arguments[0].detach()
        self._notes.uses.append(Use(layer, self._kinds[layer], given, watched, self._is_in_decoder(layer, given)))
        return output

    def _note_encoded(self, part: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found = output if isinstance(output, Tensor) else output[0]
        self._notes.encoded.append(found)

    def _is_in_decoder(self, layer: nn.Module, given: Tensor) -> bool:
        """Return whether an input stands for the decoder's tokens: cross-attention's keys and values do not."""
        if self._encoder is None or layer in self._in_encoder:
            return False
        places = [(encoded.data_ptr(), encoded.shape) for encoded in self._notes.encoded]
        return (given.data_ptr(), given.shape) not in places


def encoder_of(module: nn.Module) -> nn.Module | None:
    """Find the encoder of a sequence-to-sequence model; None in other models."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    found = [path for path, _ in module.named_modules() if path.rpartition(".")[2] == "encoder"]
    return module.get_submodule(min(found, key=lambda path: path.count("."))) if found else None


class _Enough(Exception):
    """A forward pass has come to where it may end."""


def _stop(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _Enough


# ------------------------------------------------------------------------------------------- gradients of each example

Gradient = tuple[Use, Tensor]  # a use and the gradient of its output, of the output's shape


@dataclass(frozen=True)
class Matrices:
    """Gradients of a matrix: example b's is leftᵇᵀ·rightᵇ, with left (b, l, m) and right (b, l, n)."""

    left: Tensor
    right: Tensor

    def magnitude(self) -> Matrices:
        """Return the same with every term's absolute value."""
        return Matrices(self.left.abs(), self.right.abs())

    def total(self) -> Tensor:
        """Add up the examples' gradients: (m, n)."""
        return self.left.flatten(0, 1).T @ self.right.flatten(0, 1)


@dataclass(frozen=True)
class Vectors:
    """Gradients of a vector (n,): sums over the tokens of terms (b, l, n)."""

    terms: Tensor

    def magnitude(self) -> Vectors:
        """Return the same with every term's absolute value."""
        return Vectors(self.terms.abs())

    def total(self) -> Tensor:
        """Add up the examples' gradients: (n,)."""
        return self.terms.sum((0, 1))


@dataclass(frozen=True)
class TableRows:
    """Gradients of a table (m, n), whose rows are chosen by indices (b, l): sums of values (b, l, n)."""

    indices: Tensor
    values: Tensor
    shape: torch.Size

    def magnitude(self) -> TableRows:
        """Return the same with every term's absolute value."""
        return TableRows(self.indices, self.values.abs(), self.shape)

    def total(self) -> Tensor:
        """Add up the examples' gradients: (m, n)."""
        total = self.values.new_zeros(self.shape)
        return total.index_add_(0, self.indices.flatten(), self.values.flatten(0, 1))

    def of_each_example(self) -> tuple[Tensor, Tensor]:
        """Add up what each example has of one row: the rows' indices (k,), and their gradients (k, n)."""
        examples = torch.arange(len(self.indices), device=self.indices.device)[:, None]
        places, group = torch.unique(examples * self.shape[0] + self.indices, return_inverse=True)
        sums = self.values.new_zeros(len(places), self.shape[1])
        sums.index_add_(0, group.flatten(), self.values.flatten(0, 1))
        return places % self.shape[0], sums


PerExample = Matrices | Vectors | TableRows


def per_example(name: str, gradients: Sequence[Gradient]) -> PerExample | None:
    """Describe each example's gradient of the parameter that the layers call ``name``, all its uses together.

    Returns:
        None where the uses are of kinds whose gradients have no common form.
    """
    parts = [_FORMS[use.kind](use, gradient, name) for use, gradient in gradients]
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(part, Vectors) for part in parts):
        return Vectors(torch.cat([part.terms for part in parts if isinstance(part, Vectors)], 1))
    if all(isinstance(part, Matrices) for part in parts):
        pairs = [(part.left, part.right) for part in parts if isinstance(part, Matrices)]
        return Matrices(torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 1))
    tables = [part for part in parts if isinstance(part, TableRows)]
    if len(tables) == len(parts):
        indices, values = torch.cat([t.indices for t in tables], 1), torch.cat([t.values for t in tables], 1)
        return TableRows(indices, values, tables[0].shape)
    return None


def _linear(use: Use, gradient: Tensor, name: str) -> PerExample:
    if name == "bias":
        return Vectors(_tokens(gradient))
    return Matrices(_tokens(gradient), _tokens(use.input))


def _conv1d(use: Use, gradient: Tensor, name: str) -> PerExample:
    if name == "bias":
        return Vectors(_tokens(gradient))
    return Matrices(_tokens(use.input), _tokens(gradient))


def _embedding(use: Use, gradient: Tensor, name: str) -> PerExample:
    table: Any = use.layer
    indices = use.input.reshape(len(use.input), -1)
    values = gradient.reshape(*indices.shape, -1)
    if table.padding_idx is not None:  # that row is never trained
        values = values * (indices != table.padding_idx)[..., None]
    return TableRows(indices, values, table.weight.shape)


def _layer_norm(use: Use, gradient: Tensor, name: str) -> PerExample:
    layer: Any = use.layer
    if name == "weight":
        gradient = gradient * functional.layer_norm(use.input, layer.normalized_shape, eps=layer.eps)
    return Vectors(_tokens(gradient))


def _rms_norm(use: Use, gradient: Tensor, name: str) -> PerExample:
    epsilon = _epsilon(use.layer) or 0.0
    scale = torch.rsqrt(use.input.square().mean(-1, keepdim=True) + epsilon)
    return Vectors(_tokens(gradient * use.input * scale))


_FORMS: dict[Kind, Callable[[Use, Tensor, str], PerExample]] = {
    "linear": _linear,
    "conv1d": _conv1d,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}


def _tokens(values: Tensor) -> Tensor:
    """Bring (b, …, n) to (b, l, n)."""
    return values.reshape(len(values), -1, values.shape[-1])


def _epsilon(layer: Any) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if (value := getattr(layer, name, None)) is not None:
            return float(value)
    return None
