"""How examples of different lengths share a batch, so that no output depends on what an example shares it with.

Whether padding on the right, on the left, or none at all leaves a model's outputs as they are depends on the model's
code: some ignore the attention mask, some classify by the last position, some shift or mix neighbouring tokens. It is
tried once for each module: a few short examples alone, and in one padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import ModelError, first_line
from mergelab.estimation.examples import Padding
from mergelab.evaluation.lengths import vocabulary_size
from mergelab.evaluation.packed_linear import inference_copy
from mergelab.evaluation.spread import device_of, is_spread

Array = np.ndarray[Any, Any]

# Computes the outputs (b, d) of the examples at positions (b,), padded so.
Run = Callable[[Array, Padding], Tensor]

# Examples that are tried, and what they are padded to where the data allow it.
_TRIED, _TRIED_LENGTH = 3, 32
# Differences of up to so many units of precision of the greatest output, plus a share of the differences between
# examples, are rounding.
_UNITS, _SHARE, _GREATEST_SHARE = 256, 1e-3, 0.03
# Outputs tell something about padding when examples differ by so many times the rounding.
_CLEAR = 20
# Larger models of lower precision are not copied to float32 for the trial.
_WIDENED = 10**9

# Tokens that are no token: where a model has no padding token, none of its inputs ends before the last position.
NO_TOKEN = -1

_FOUND: WeakKeyDictionary[nn.Module, dict[str, Padding]] = WeakKeyDictionary()
_WITHOUT_PADDING_TOKEN: WeakSet[nn.Module] = WeakSet()


def choose_padding(model: nn.Module, use: str, lengths: Array, run: Run, sides: Sequence[Padding]) -> Padding:
    """Find out how examples can share a batch of this model; what was found for a module is remembered.

    Where the outputs do not tell (they are the same for all examples), only examples of equal length share a batch,
    and nothing is remembered.

    Args:
        model: the module that ``run`` runs a copy of.
        use: what the model is run for.
        lengths: (n,) of the examples, as many tokens as the model will see.
        run: computes outputs of some of the examples.
        sides: to pad on, the first that changes nothing is taken.

    Raises:
        ModelError: the model cannot be run on an example alone.
    """
    if len(np.unique(lengths)) < 2:
        return sides[0]
    if changes_with_length(getattr(model, "config", None), int(lengths.max())):
        return "equal"
    found = _FOUND.setdefault(model, {})
    if use not in found:
        if (padding := _tried(model, lengths, run, sides)) is None:
            return "equal"
        found[use] = padding
    return found[use]


def _tried(model: nn.Module, lengths: Array, run: Run, sides: Sequence[Padding]) -> Padding | None:
    members = _examples_to_try(lengths)
    alone = torch.cat(
        [run_alone(model, run, members[at : at + 1], int(lengths[members[at]])) for at in range(len(members))]
    )
    same = Comparison(model, alone)
    if not same.is_clear:
        return None
    for side in sides:
        found = _attempt(run, members, side)
        if found is not None and same(found, alone):
            return side
    three = np.repeat(members[:1], 3)
    found = _attempt(run, three, "equal")
    return "equal" if found is not None and same(found, alone[:1].expand_as(found)) else "alone"


def run_alone(model: nn.Module, run: Run, member: Array, length: int) -> Tensor:
    """Run one example; say in one line where the model cannot."""
    try:
        return run(member, "alone")
    except torch.OutOfMemoryError:
        raise
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__}: transformers cannot run it on an example of {length} tokens: "
            f"{first_line(error)[:200]}"
        ) from error


def _attempt(run: Run, members: Array, padding: Padding) -> Tensor | None:
    """Run a batch; some models refuse batches that they cannot tell the padding of."""
    try:
        return run(members, padding)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, IndexError, RuntimeError):
        return None


def _examples_to_try(lengths: Array) -> Array:
    """Return the positions of some of the shortest examples, each of another length, and of one that is longer."""
    different, first = np.unique(lengths, return_index=True)
    enough = different >= 1.25 * different[0]
    longer = np.flatnonzero(enough & (different <= _TRIED_LENGTH))
    partner = int(longer[-1]) if len(longer) else int(np.argmax(enough)) if enough.any() else len(different) - 1
    return first[[*range(min(_TRIED, partner)), partner]]


class Comparison:
    """Whether outputs are the same but for rounding.

    Args:
        model: the module that a `trial_copy` was made of.
        examples: (n, d) outputs of different inputs.

    Attributes:
        is_clear: whether the examples differ by much more than rounding.
    """

    def __init__(self, model: nn.Module, examples: Tensor) -> None:
        examples = _finite(examples)
        rounding = min(_UNITS * _precision(model), _GREATEST_SHARE) * float(examples.abs().max())
        spread = float((examples.amax(0) - examples.amin(0)).max())
        self.is_clear = spread > _CLEAR * rounding
        self._tolerance = rounding + _SHARE * spread

    def __call__(self, found: Tensor, expected: Tensor) -> bool:
        """Return whether two tensors of outputs (b, d) are the same but for rounding."""
        if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
            return False
        return float((_finite(found) - _finite(expected)).abs().max()) <= self._tolerance


def _finite(outputs: Tensor) -> Tensor:
    return torch.nan_to_num(outputs.double(), nan=0.0, posinf=0.0, neginf=0.0)


# ----------------------------------------------------------------------------------------------------------- the model


def trial_copy(model: nn.Module) -> nn.Module:
    """Copy a module, where it is, to try padding with; in float32 where that does not take much memory.

    Hooks of the module, as of statistics that are being taken, see nothing of the trial.
    """
    device = device_of(model)
    return inference_copy(model, device, torch.float32 if _is_widened(model) else None, pack=False, hooks=False)


def _is_widened(model: nn.Module) -> bool:
    narrow = any(each.is_floating_point() and each.element_size() < 4 for each in model.parameters())
    return narrow and not is_spread(model) and sum(each.numel() for each in model.parameters()) <= _WIDENED


def _precision(model: nn.Module) -> float:
    """Return the relative precision that `trial_copy` of the model computes with."""
    if _is_widened(model):
        return torch.finfo(torch.float32).eps
    return max((torch.finfo(each.dtype).eps for each in model.parameters() if each.is_floating_point()), default=0.0)


def changes_with_length(config: Any, longest: int) -> bool:
    """Return whether a model computes something else for inputs of up to ``longest`` tokens than for short ones.

    Then the longest example of a batch decides for all: sparse attention that begins at some length, and rotary
    embeddings that are rescaled from some length on.
    """
    config = getattr(config, "text_config", None) or config
    if getattr(config, "attention_type", None) == "block_sparse":
        return longest > (5 + 2 * int(config.num_random_blocks)) * int(config.block_size)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return False
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type", each.get("type")) in ("dynamic", "longrope", "su"):
            own = each.get("original_max_position_embeddings")
            known = own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            if longest > int(known):
                return True
    return False


def resets(model: nn.Module) -> list[Callable[[], None]]:
    """Return what brings a model back to how it was built, where the length of an input changes it for later ones."""
    found: list[Callable[[], None]] = []
    for module in model.modules():
        part: Any = module
        config = getattr(part, "config", None)
        if hasattr(part, "set_attention_type") and hasattr(config, "attention_type"):
            found.append(lambda part=part: part.set_attention_type(part.config.attention_type))  # type: ignore[misc]
        elif hasattr(part, "original_max_seq_len") and "dynamic" in str(getattr(part, "rope_type", "")):
            found.append(lambda part=part: _reset_rotation(part))  # type: ignore[misc]
    return found


def _reset_rotation(part: Any) -> None:
    for name, value in list(vars(part).items()) + list(part.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            own = name.removesuffix("original_inv_freq") + "inv_freq"
            part.register_buffer(own, value.to(getattr(part, own).device), persistent=False)
        elif name.endswith("max_seq_len_cached"):
            setattr(part, name, part.original_max_seq_len)


# ------------------------------------------------------------------------------------------------------ padding tokens


def settle_padding_token(model: nn.Module, ids: Array, usual: int) -> int:
    """Return a token to pad a model's inputs with, without changing where the model takes an input to end.

    Classifiers on decoders read the last token that is not the configured padding token. Without one they read the
    last token; then one is taken that no example has. `NO_TOKEN` where there is none, and inputs cannot be padded.

    Args:
        model: as it was opened.
        ids: (t,) the tokens of all examples.
        usual: the token that the tokenizer pads with.
    """
    config = getattr(model, "config", None)
    if config is None:
        return usual
    rows = vocabulary_size(model) or 10**9
    own = padding_token(config)
    if own is not None and 0 <= own < rows and model not in _WITHOUT_PADDING_TOKEN:
        return own
    if 0 <= usual < rows and not (ids == usual).any():
        return usual
    used = np.unique(ids)
    unused = np.flatnonzero(np.append(used, rows + len(used)) != np.arange(len(used) + 1))
    return int(unused[0]) if unused[0] < rows else NO_TOKEN


def padding_token(config: Any) -> int | None:
    """Return the padding token that a configuration says, or that of its text part."""
    own = getattr(config, "pad_token_id", None)
    return getattr(getattr(config, "text_config", None), "pad_token_id", None) if own is None else own


def set_padding_token(model: nn.Module, token: int, original: nn.Module | None = None) -> None:
    """Let a model know the token that its inputs are padded with, where its configuration has none of its own.

    Args:
        model: the module to run, whose configuration is changed.
        token: as `settle_padding_token` says for ``original``.
        original: what ``model`` is a copy of; by default itself.
    """
    config = getattr(model, "config", None)
    if config is None or padding_token(config) == token:
        return
    if original is None:
        _WITHOUT_PADDING_TOKEN.add(model)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part.pad_token_id = token
