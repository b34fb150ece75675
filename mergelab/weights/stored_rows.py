"""Where the rows of stored matrices are in the parameters that transformers computes of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergelab.errors import ModelError, listed
from mergelab.weights.conversion import Computed, computed
from mergelab.weights.source import TensorSource

_PROBE = 6  # columns of the matrices that are converted in place of the stored ones


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a stored matrix as a part of a parameter that transformers computes of it, such as stacked experts.

    Attributes:
        stored: its name.
        count: how many rows it has.
        rows: (n,) which of them they are.
        matrix: the index of the parameter's matrix that they are in; 0 where it is one matrix.
        places: (n,) where they are there: its rows; its columns, where it is transposed.
        transposed: whether it is transposed there.
    """

    stored: str
    count: int
    rows: Tensor
    matrix: int
    places: Tensor
    transposed: bool


def stored_rows(module: nn.Module | None, source: TensorSource, wanted: Collection[str]) -> dict[str, list[StoredRows]]:
    """Find which row of which stored matrix each row of a parameter is, where transformers computes the parameter.

    Args:
        module: a model of transformers; its values do not matter.
        source: what a checkpoint stores.
        wanted: names that the module has for parameters.

    Returns:
        By name; those of ``wanted`` that are computed of stored tensors.

    Raises:
        ModelError: one is computed otherwise than by moving rows.
    """
    if module is None or not wanted:
        return {}
    found: dict[str, list[StoredRows]] = {}
    for group in computed(module, source):
        try:
            made = _numbered(group, source)
        except Exception as error:  # whatever the operations of transformers raise
            if group.name in wanted:
                raise _otherwise(group, group.name, source) from error
            continue
        for name in made.keys() & set(wanted):
            found[name] = _rows_of(group, name, made[name], source)
    return found


def _numbered(group: Computed, source: TensorSource) -> dict[str, Tensor]:
    """Convert matrices whose entries are numbered, over all stored tensors, in place of these."""
    start, numbers = 0, {}
    for _, stored in group.parts:
        count, _ = source.shape(stored)
        numbers[stored] = torch.arange(start * _PROBE, (start + count) * _PROBE).view(count, _PROBE)
        start += count
    return group.convert(numbers.__getitem__)


def _rows_of(group: Computed, name: str, made: Tensor, source: TensorSource) -> list[StoredRows]:
    """Read from the numbers where the rows of the stored matrices are."""
    target = tuple(group.module.get_parameter(name).shape)
    stack, columns = made.view(-1, *made.shape[-2:]), torch.arange(_PROBE)
    transposed = not (stack.shape[2] == _PROBE and bool((stack % _PROBE == columns).all()))
    stack = stack.mT if transposed else stack
    rows = stack[..., 0] // _PROBE
    shape = (*target[:-2], target[-1], target[-2]) if transposed else target
    widths = {source.shape(stored)[1] for _, stored in group.parts}
    plain = stack.shape[2] == _PROBE and torch.equal(stack, rows[..., None] * _PROBE + columns)
    ambiguous = transposed and target[-1] == target[-2]  # some conversions transpose what has not the sizes they expect
    if ambiguous or not plain or widths != {shape[-1]} or rows.shape != (shape[0] if len(shape) == 3 else 1, shape[-2]):
        raise _otherwise(group, name, source)
    order = rows.flatten().argsort()
    numbers = rows.flatten()[order]
    found: list[StoredRows] = []
    start = 0
    for _, stored in group.parts:
        count, _ = source.shape(stored)
        begin, end = torch.searchsorted(numbers, torch.tensor([start, start + count])).tolist()
        matrices = (order[begin:end] // rows.shape[1]).tolist()
        if len(set(matrices)) > 1 or len(set(numbers[begin:end].tolist())) != end - begin:
            raise _otherwise(group, name, source)
        if matrices:
            places = order[begin:end] % rows.shape[1]
            found.append(StoredRows(stored, count, numbers[begin:end] - start, matrices[0], places, transposed))
        start += count
    return found


def _otherwise(group: Computed, name: str, source: TensorSource) -> ModelError:
    stored = listed([each for _, each in group.parts], 3)
    return ModelError(
        f"{source.name}: transformers computes {name} of {stored} otherwise than by moving rows, so that an adapter "
        "cannot change it; merge the adapter into its base (PeftModel.merge_and_unload) and save that"
    )
