"""Tied tensors that an adapter changes: both names in the same way, or only one, so that they come apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergelab.adapters.changes import Change, Rows, same_changes
from mergelab.errors import ModelError

if TYPE_CHECKING:
    from mergelab.adapters.canonical import Adapter
    from mergelab.adapters.names import Names


@dataclass(frozen=True, eq=False)
class Ties:
    """The changes of tensors, by the names in the source that the adapted model is read from.

    Attributes:
        changes: by name; a tensor with several names is changed under one of them.
        apart: tensors that the base has under another name alone, or tied to it, each with that name.
    """

    changes: dict[str, list[Change]]
    apart: dict[str, str]


def kept_ties(changes: Mapping[str, list[Change]], names: Names, adapter: Adapter, *, is_pair: bool) -> Ties:
    """Decide for each group of tied tensors whether the adapted model has it tied.

    It has where all names are changed alike. Rows of tokens, and an adapter that says so (``ensure_weight_tying``),
    change all names of a group.

    Args:
        changes: by the names in the module.
        names: the adapter's names in its base.
        adapter: the adapter.
        is_pair: whether the model is an encoder-decoder, which cannot be untied.

    Raises:
        ModelError: only one end of a tie is changed in an encoder-decoder.
    """
    found: dict[str, list[Change]] = {}
    apart: dict[str, str] = {}
    available = {*names.source.keys(), *names.source.aliases()}
    aliases = names.source.aliases()
    done: set[str] = set()
    for name, own in changes.items():
        group = names.tied.get(name, (name,))
        if name in done:
            continue
        done.update(group)
        changed = {each: changes[each] for each in group if each in changes}
        holders = [at for each in group if (at := names.at(each)) in available]
        alike = all(same_changes(own, other) for other in changed.values())
        if len(group) == 1 or (alike and (len(changed) == len(group) or _for_all(own, adapter))):
            found.update({aliases.get(at, at): own for at in holders})
            continue
        if is_pair:
            lone = next((each for each in group if each not in changed), name)
            raise ModelError(
                f"{adapter.name}: it changes {name}, which is tied to {lone}, otherwise than that; encoder-decoders "
                "cannot be untied"
            )
        for each in group:
            at = names.at(each)
            holder = holders[0] if at not in available else aliases.get(at, at)
            if at != holder:
                apart[at] = holder
            if each in changed:
                found[at] = changed[each]
    return Ties(found, apart)


def _for_all(changes: list[Change], adapter: Adapter) -> bool:
    """Return whether a change of one name holds for all names that are tied to it."""
    return adapter.keeps_ties or all(isinstance(change, Rows) for change in changes)
