"""What the tensors' names and shapes tell about the layers that matrices belong to."""

from __future__ import annotations

import re

from torch import Tensor

from mergelab.weights.align import AlignedModels

CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
EMBEDDINGS = re.compile(
    r"(^|[._])(embed|embeddings?|embed_\w+|wte|wpe|relative_attention_bias)(\.weight)?$|^(\w+\.)?shared\.weight$"
)


def is_embedding(name: str) -> bool:
    """Return whether a matrix is a table that is looked up, by its name."""
    return EMBEDDINGS.search(name) is not None


def inputs_first(models: AlignedModels) -> frozenset[str]:
    """Name the matrices with a layer's inputs along their rows: those of GPT-2's Conv1D, a transposed ``nn.Linear``.

    Other models have ``nn.Linear`` layers of these names, so the shapes decide: an MLP's ``c_fc`` has more outputs than
    inputs.
    """
    reference = models.experts[0]
    named = [name for name in models.names if CONV1D.search(name)]
    widening = [reference.shape(name) for name in named if name.endswith(".c_fc.weight")]
    return frozenset(named if widening and all(shape[0] < shape[1] for shape in widening) else ())


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor has two dimensions, and entries."""
    return tensor.ndim == 2 and tensor.numel() > 0
