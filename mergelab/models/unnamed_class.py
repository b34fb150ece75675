"""The class of a model whose config does not name one, told by its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergelab.errors import ModelError
from mergelab.weights.conversion import as_in
from mergelab.weights.skeleton import skeleton

if TYPE_CHECKING:
    from mergelab.weights.checkpoint import Checkpoint

# The first that fits is taken: of classes with tensors of the same names and shapes, the more usual one.
_MAPPINGS = (
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


def class_by_tensors(checkpoint: Checkpoint) -> str | None:
    """Return transformers' class for the config's ``model_type`` that has exactly the checkpoint's tensors, by shape.

    None where there is none.
    """
    from transformers.models.auto import modeling_auto

    kind = checkpoint.config.get("model_type")
    looks_back = bool(checkpoint.config.get("is_decoder"))  # else BERT and its like are masked language models
    for mapping in sorted(_MAPPINGS, key=lambda name: looks_back and "MASKED_LM" in name):
        names = getattr(modeling_auto, mapping, {}).get(kind, ())
        for name in (names,) if isinstance(names, str) else names:
            if _fits(checkpoint, name):
                return str(name)
    return None


def _fits(checkpoint: Checkpoint, name: str) -> bool:
    module = skeleton(checkpoint.folder, {**checkpoint.config, "architectures": [name]})
    if module is None:
        return False
    try:
        source = as_in(module, checkpoint)
    except ModelError:
        return False
    names = {*source.keys(), *source.aliases()}
    parameters = dict(module.named_parameters())
    return names <= module.state_dict().keys() and all(
        key in names and source.shape(key) == tuple(tensor.shape) for key, tensor in parameters.items()
    )
