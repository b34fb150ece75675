"""How long a model's inputs may be: what its configuration says, and what its tables of positions hold."""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import nn

from mergelab.errors import DataError

# Models without a limit on positions still get inputs of at most this many tokens.
_DEFAULT_LENGTH = 512
# What transformers calls the tables of learned (or computed) positions.
_TABLES = ("position_embeddings", "positions_embed", "embed_positions", "wpe")
# Where configurations say how many positions there are; encoder-decoders may have a number for each side.
_KEYS = ("max_position_embeddings", "max_seq_len")


def max_input_length(config: Any, tokenizer: Any, wanted: int | None = None, key: str = "eval.max_length") -> int:
    """Return the longest input in tokens that model and tokenizer allow (512 where neither says), or ``wanted``.

    Args:
        config: the model's configuration, or ``None`` to ask the tokenizer alone.
        tokenizer: the model's.
        wanted: what the user asks for.
        key: of the configuration, that says so.

    Raises:
        DataError: ``wanted`` is more than they allow.
    """
    allowed = int(min(getattr(tokenizer, "model_max_length", None) or 10**9, 10**9))
    if (positions := model_positions(config)) is not None:
        allowed = min(allowed, positions)
    if wanted is None:
        return min(allowed, _DEFAULT_LENGTH)
    if wanted > allowed:
        raise DataError(f"{key}={wanted}: the model allows {allowed} tokens")
    return wanted


def model_positions(config: Any, side: Literal["encoder", "decoder"] = "encoder") -> int | None:
    """Return how many tokens a model of this configuration can take; ``None`` where nothing limits it.

    Args:
        config: a configuration, or ``None``.
        side: of an encoder-decoder whose sides differ, the one that is asked about.
    """
    config = getattr(config, "text_config", None) or config
    # DeBERTa without absolute positions: distances beyond the greatest share one embedding.
    if getattr(config, "relative_attention", False) and not getattr(config, "position_biased_input", True):
        return None
    found = (getattr(config, key, None) for key in (f"max_{side}_position_embeddings", *_KEYS))
    # XLNet says -1 where nothing limits it.
    positions = next((number for number in found if isinstance(number, int) and number > 0), None)
    return positions if positions is None else positions - _unused_positions(config)


def _unused_positions(config: Any) -> int:
    """Return how many positions stay unused: RoBERTa-like models count from the padding token's id on."""
    from transformers import AutoModel

    pad = getattr(config, "pad_token_id", None)
    if pad is None or config.is_encoder_decoder or getattr(config, "position_embedding_type", None) == "rotary":
        return 0
    # The mapping holds classes that are imported at first use.
    model: Any = AutoModel._model_mapping.get(type(config), None)
    if model is None:
        return 0
    found: Any = model[0] if isinstance(model, tuple) else model
    source = vars(sys.modules[found.__module__])
    counting = "create_position_ids_from_input_ids"
    classes = (value for name, value in source.items() if name.endswith("Embeddings"))
    return int(pad) + 1 if counting in source or any(hasattr(each, counting) for each in classes) else 0


def check_inputs(model: nn.Module, longest: int, last: int) -> None:
    """Check that a built model can read examples of up to ``longest`` tokens, the greatest of which is ``last``.

    Raises:
        DataError: an example is longer than the model allows, or has a token that the model has no embedding for.
    """
    limits = (model_positions(getattr(model, "config", None)), _table_positions(model))
    allowed = min((limit for limit in limits if limit is not None), default=None)
    if allowed is not None and longest > allowed:
        raise DataError(
            f"an example has {longest} tokens, the model allows {allowed}: encode with that max_length "
            f"(eval.max_length={allowed})"
        )
    check_tokens(model, last)


def check_tokens(model: nn.Module, last: int) -> None:
    """Check that a model has embeddings for all tokens up to ``last``.

    Raises:
        DataError: it has not.
    """
    rows = vocabulary_size(model)
    if rows is not None and last >= rows:
        raise DataError(
            f"the tokenizer writes token {last}, and the model has embeddings for {rows} tokens: they do not belong "
            "together"
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many tokens a ``transformers`` model has embeddings for; ``None`` where it does not say."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if find is not None else None
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _table_positions(model: nn.Module) -> int | None:
    """Return how many tokens the smallest table of positions serves; ``None`` where there is none."""
    found = [
        # Tables with a padding index begin behind it; BART's and OPT's have more rows than positions.
        table.num_embeddings - (getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _TABLES
    ]
    return min(found, default=None)
