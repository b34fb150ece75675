"""Tell from names and shapes of matrices whether they are embeddings, and along which axis a layer's inputs lie."""

from __future__ import annotations

import re

from torch import Tensor

from mergelab.weights.align import AlignedModels

CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
EMBEDDINGS = re.compile(
    r"(^|[._])(embed|embeddings?|embed_\w+|wte|wpe|relative_attention_bias)(\.weight)?$|^(\w+\.)?shared\.weight$"
)


def is_embedding(name: str) -> bool:
    """Return whether the name is that of an embedding matrix."""
    return EMBEDDINGS.search(name) is not None


def inputs_first(models: AlignedModels) -> frozenset[str]:
    """Return the names of weights of shape (in, out): those of GPT-2's Conv1D, a transposed ``nn.Linear``.

    Other models have ``nn.Linear`` layers of the same names. So the shapes decide: an MLP's ``c_fc`` has more outputs
    than inputs.
    """
    reference = models.experts[0]
    named = [name for name in models.names if CONV1D.search(name)]
    widening = [reference.shape(name) for name in named if name.endswith(".c_fc.weight")]
    return frozenset(named if widening and all(shape[0] < shape[1] for shape in widening) else ())


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor has two dimensions and at least one entry."""
    return tensor.ndim == 2 and tensor.numel() > 0
