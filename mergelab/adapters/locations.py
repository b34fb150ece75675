"""Where the Adapters library puts LoRA: the names that it has for layers, by transformers' names for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Location = Literal["selfattn", "intermediate", "output"]
LOCATIONS: tuple[Location, ...] = get_args(Location)
FUSED = "qkv"  # the matrices of a layer that holds queries, keys and values, a third each

_MATRICES = {
    **dict.fromkeys(("query", "q_proj", "query_proj", "q_lin", "q"), "q"),
    **dict.fromkeys(("key", "k_proj", "key_proj", "k_lin", "k"), "k"),
    **dict.fromkeys(("value", "v_proj", "value_proj", "v_lin", "v"), "v"),
    **dict.fromkeys(("c_attn", "in_proj"), FUSED),
}
# The ends of layers' names. In gated feed-forward networks down_proj counts as "intermediate" and up_proj as "output".
_INTERMEDIATE = re.compile(r"(.*\.)?(intermediate\.dense|fc1|lin1|c_fc|fc_in|wi|wi_1|ffn|down_proj)")
_OUTPUT = re.compile(
    r"(?!.*attention\.output\.dense)(.*\.)?(output\.dense|fc2|lin2|mlp\.c_proj|fc_out|wo|ffn_output|up_proj)"
)
# What the library has built in, as `model_type` in configs.
MODEL_TYPES = frozenset(
    {
        *("albert", "bart", "beit", "bert", "bert-generation", "clip", "deberta", "deberta-v2", "distilbert"),
        *("electra", "encoder-decoder", "gpt2", "gptj", "llama", "mbart", "mistral", "mt5", "plbart", "roberta"),
        *("t5", "vit", "whisper", "xlm-roberta", "xmod"),
    }
)


@dataclass(frozen=True)
class Place:
    """What the library calls a layer.

    Attributes:
        location: its flag in a LoRA configuration is ``<location>_lora``.
        matrices: of attention, which of q, k and v it holds.
    """

    location: Location
    matrices: str = ""


def place_of(layer: str) -> Place | None:
    """Return what the library calls a layer; None for one that it puts no LoRA into."""
    if (matrices := _MATRICES.get(layer.rpartition(".")[2])) is not None:
        return Place("selfattn", matrices)
    if _INTERMEDIATE.fullmatch(layer):
        return Place("intermediate")
    return Place("output") if _OUTPUT.fullmatch(layer) else None
