"""The heads of several classifiers in one order of labels: which output of each stands for which label."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergelab.errors import MergeWarning, ModelError, listed
from mergelab.models.architecture import head_names
from mergelab.models.heads import ReorderedSource, output_names
from mergelab.tasks.labels import matched_order, numbered_order

if TYPE_CHECKING:
    from mergelab.experiment.sources import ModelSource
    from mergelab.weights.source import TensorSource

Order = tuple[int, ...]


class Labels(NamedTuple):
    """A classifier's name and its labels in the order of its outputs; no labels for other models."""

    name: str
    labels: tuple[str, ...]


class LabelOrders(NamedTuple):
    """For each model the outputs to read, or None: as they stand; and the labels that these then stand for."""

    orders: list[Order | None]
    labels: tuple[str, ...]


def label_orders(models: Sequence[Labels]) -> LabelOrders:
    """Find, for each classifier, the output that stands for each label of the last one.

    Names are matched as those of tasks are: case and separators aside, or by a known synonym. Labels that are only
    numbered (``LABEL_0``) do not say what they stand for; they are taken to be in the order that most of the models
    that name them have (the first model's, where orders are equally frequent), and a `MergeWarning` says so.

    Returns:
        The outputs in the order of the last classifier's labels; they are read as they stand where they are in that
        order already, of another number, or of no classifier.

    Raises:
        ModelError: the names of two models cannot be matched one to one.
    """
    labels = _with_names(models)
    wanted = next((own for own in reversed(labels) if own), ())
    last = next((model.name for model, own in zip(reversed(models), reversed(labels), strict=True) if own), "")
    orders: list[Order | None] = []
    for model, own in zip(models, labels, strict=True):
        if len(own) != len(wanted) or _lower(own) == _lower(wanted):
            orders.append(None)
            continue
        order = _matched(wanted, own)
        if order is None:
            raise ModelError(
                f"the labels of {model.name} ({listed(own)}) cannot be matched with {last}'s ({listed(wanted)}), so "
                "that their heads cannot be merged; merge the models without heads, or give both the same id2label"
            )
        orders.append(None if order == tuple(range(len(order))) else order)
    return LabelOrders(orders, wanted)


def in_order(model: ModelSource, order: Order | None) -> TensorSource:
    """Return a model's tensors with the outputs of its head in the given order.

    Raises:
        ModelError: the names do not show which tensors are the head.
    """
    if order is None:
        return model.tensors
    kind = model.architecture
    if kind is None or not kind.prefix:
        raise ModelError(f"{model.name}: its labels are in another order, and its tensors' names do not show its head")
    names = output_names(model.tensors, head_names(model.tensors.keys(), kind), len(order))
    return ReorderedSource(model.tensors, names, order)


def _with_names(models: Sequence[Labels]) -> list[tuple[str, ...]]:
    """Return the labels of models with several, numbered ones by the names that they are taken to stand for."""
    labels = [model.labels if len(model.labels) > 1 else () for model in models]
    numbers = {at: order for at, own in enumerate(labels) if own and (order := numbered_order(own))}
    named = [at for at, own in enumerate(labels) if own and at not in numbers]
    if not named:
        return labels
    orders = [_matched(labels[named[0]], labels[at]) for at in named]
    usual = Counter(orders).most_common(1)[0][0]
    reference = named[orders.index(usual)]
    names, found = labels[reference], list(labels)
    for at, order in numbers.items():
        if len(order) == len(names):
            found[at] = tuple(names[order.index(output)] for output in range(len(order)))
    if taken := [models[at].name for at in numbers if found[at] != labels[at]]:
        others = [models[at].name for at, order in zip(named, orders, strict=True) if order != usual]
        warnings.warn(
            f"{listed(taken)}: labels are numbers only (LABEL_0, …), which are taken to mean {listed(names)}, as in "
            f"{models[reference].name}" + (f", though {listed(others)} has another order" if others else ""),
            MergeWarning,
            stacklevel=2,
        )
    return found


def _lower(labels: Sequence[str]) -> list[str]:
    return [label.lower() for label in labels]


def _matched(wanted: Sequence[str], own: Sequence[str]) -> Order | None:
    return _exact_order(wanted, own) or matched_order(wanted, own)


def _exact_order(wanted: Sequence[str], own: Sequence[str]) -> Order | None:
    """Match names that are equal, case aside; None unless all of both are matched one to one."""
    here = _lower(own)
    if len(set(here)) < len(here) or sorted(here) != sorted(_lower(wanted)):
        return None
    return tuple(here.index(label) for label in _lower(wanted))
