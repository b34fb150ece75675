"""Whether the configurations and tokenizers of one merge agree, and whose the merged model has where they do not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergelab.errors import MergeWarning, ModelError, listed
from mergelab.models.configs import OF_HEADS, Difference, Named, differences, writing_differences
from mergelab.models.tokenizer_parts import differing_parts

if TYPE_CHECKING:
    from mergelab.experiment.sources import ModelSource


# What a head's outputs are: labels or scores. It changes no output.
_KIND_OF_OUTPUTS = ("problem_type",)


def check_configs(
    base: ModelSource | None, experts: Sequence[ModelSource], *, separate_heads: bool, way_out: str
) -> None:
    """Check that the weights of the models mean the same function.

    The base need not agree in what only heads read, unless it is of the experts' class. Experts whose heads are not
    merged may classify and rate.

    Args:
        base: the base, if there is one.
        experts: at least one.
        separate_heads: whether every task has a head of its own.
        way_out: what the user can do to merge them all the same.

    Raises:
        ModelError: names the settings, their values and the models.
    """
    named = _named(experts)
    ignored = _KIND_OF_OUTPUTS if separate_heads else ()
    found = differences(named, ignore=ignored) if named else []
    if base is not None and named and (own := _named([base])):
        alike = base.class_names == experts[0].class_names
        found += differences([*own, named[0]], ignore=ignored if alike else OF_HEADS)
    if found:
        distinct = list({each.key: each for each in found}.values())
        raise ModelError(f"the models' configs differ: {listed(map(str, distinct), 3)}; {way_out}")


def say_whose(models: Sequence[ModelSource], owner: ModelSource, *, tokenizer: ModelSource | None = None) -> None:
    """Warn where models differ in their tokenizers, special tokens or settings of generation.

    Args:
        models: all of them.
        owner: the one whose config the merged model has.
        tokenizer: the one whose tokenizer it has; by default the same.
    """
    named = _named(models)
    found: list[Difference] = writing_differences(named) if len(named) > 1 else []
    if found:
        _warn(f"the models' settings differ ({listed(map(str, found), 2)}): the merged model has those of {owner.name}")
    folders = {model.name: model.folder for model in models if model.folder is not None}
    if parts := differing_parts(folders):
        whose = tokenizer or owner
        _warn(
            f"the models' tokenizers differ ({listed(parts)}): each model is measured with its own, the merged one has "
            f"that of {whose.name}"
        )


def _named(models: Sequence[ModelSource]) -> list[Named]:
    """Return the configurations of the models that have one."""
    return [Named(model.name, model.tokens.config) for model in models if model.tokens is not None]


def _warn(message: str) -> None:
    warnings.warn(message, MergeWarning, stacklevel=3)
