"""The canonical form of an adapter: what it changes in each layer and tensor of its base, by its own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergelab.adapters.changes import Change, LowRank, Product, Stacked

if TYPE_CHECKING:
    from mergelab.weights.stored_rows import StoredRows


@dataclass(frozen=True, eq=False)
class Factors:
    """The low-rank change ``scale · B · A`` of one layer, as it was trained.

    Attributes:
        a: (r, inputs), of a convolution (r, channels · height · width), of an embedding (r, tokens).
        b: (outputs, r).
        scale: α/r, or α/√r for rsLoRA.
        embedding: whether the layer is an embedding, whose stored weight is (tokens, width).
    """

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class Stack:
    """The low-rank change of one parameter, in the layout in which the module has it.

    Attributes:
        left: (experts, rows, r); of a matrix (1, rows, r).
        right: (experts, r, columns).
        scale: as of `Factors`.
        is_stacked: whether the parameter has a dimension of experts.
    """

    left: Tensor
    right: Tensor
    scale: float
    is_stacked: bool

    def change(self) -> Change:
        """Return the change of the parameter as the module has it."""
        if self.is_stacked:
            return Stacked(self.left, self.right, self.scale)
        return LowRank(self.left[0], self.right[0], self.scale)

    def change_of(self, part: StoredRows) -> LowRank:
        """Return the change of a stored matrix, rows of which are a part of the parameter."""
        left, right = self.left[part.matrix], self.right[part.matrix]
        if part.transposed:
            left, right = right.T, left.T
        rows = left.new_zeros(part.count, left.shape[1]).index_copy_(0, part.rows, left[part.places])
        return LowRank(rows, right, self.scale)


@dataclass(frozen=True, eq=False)
class Projections:
    """What all layers of VeRA share.

    Attributes:
        a: (r, most inputs); None: it is drawn.
        b: (most outputs, r); None: it is drawn.
        seed: what they are drawn from.
    """

    a: Tensor | None
    b: Tensor | None
    seed: int


@dataclass(frozen=True, eq=False)
class Projected:
    """The low-rank change ``diag(b) · B · diag(d) · A`` of one layer of VeRA.

    Attributes:
        by_output: b (outputs,).
        by_rank: d (r,).
        shared: A and B, of which the layer takes the first columns and the first rows.
    """

    by_output: Tensor
    by_rank: Tensor
    shared: Projections


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in canonical form, by the names that it gives to the layers and tensors of its base.

    Attributes:
        name: what errors call it.
        kind: its ``peft_type``.
        base: the base that it names, if it does, and at which revision.
        task_type: as PEFT calls it ("SEQ_CLS"); None where it says nothing.
        class_name: the class of its base, where it says so.
        fan_in_fan_out: whether it was made for (inputs, outputs) weights, where the base's modules do not tell.
        keeps_ties: whether what it changes at one end of tied embeddings holds for both.
        layer_classes: the classes of the layers that its type adapts; empty: all.
        residual: whether its base is what PiSSA leaves of the one that it names.
        target_parameters: ends of the names of parameters that are no layer's weight, as PEFT was told them.
        settings: its configuration.
        model_type: the type of its base (``model_type`` in configs), where it says so.
        label2id: the numbers of its head's labels, by name, where it has them.
        factors: low-rank changes, by layer.
        stacks: low-rank changes of such parameters, by their names.
        products: changes that are products of matrices of any rank, by layer: LoHa and LoKr.
        projected: low-rank changes whose factors follow from the layers' sizes, by layer: VeRA.
        magnitudes: DoRA's lengths, by layer.
        biases: the bias of B, by layer; it is scaled as the product is.
        vectors: IA³'s factors, by layer: (outputs, 1) or (1, inputs).
        rows: the numbers of the trained tokens and their rows, by layer.
        tensors: whole tensors, by name: trained biases, heads, other modules.
    """

    name: str
    kind: str
    base: str | None
    revision: str | None
    task_type: str | None
    class_name: str | None
    fan_in_fan_out: bool
    keeps_ties: bool
    layer_classes: tuple[str, ...] = ()
    residual: bool = False
    target_parameters: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    label2id: Mapping[str, int] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    products: dict[str, Product] = field(default_factory=dict)
    projected: dict[str, Projected] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def factor_kind(self) -> str:
        """What its low-rank changes are called: by its type, and those of parameters apart from LoRA of layers."""
        return f"{self.kind} of parameters (target_parameters)" if self.target_parameters else self.kind

    @property
    def names(self) -> list[str]:
        """The names of the tensors that it changes, in its own spelling."""
        layers = dict.fromkeys([*self.factors, *self.products, *self.projected, *self.vectors, *self.rows])
        return [*(f"{layer}.weight" for layer in layers), *self.stacks, *self.tensors]
