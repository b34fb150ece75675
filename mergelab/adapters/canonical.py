"""The canonical form of an adapter: what it changes in each layer and tensor of its base, by its own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
        model_type: the type of its base (``model_type`` in configs), where it says so.
        label2id: the numbers of its head's labels, by name, where it has them.
        factors: low-rank changes, by layer.
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
    model_type: str | None = None
    label2id: Mapping[str, int] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that it changes, in its own spelling."""
        layers = dict.fromkeys([*self.factors, *self.vectors, *self.rows])
        return [*(f"{layer}.weight" for layer in layers), *self.tensors]
