"""What a task's score and loss are along a line between two models, and on the plane through three."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mergelab.analyze.plan import BASE
from mergelab.errors import ModelError, listed
from mergelab.evaluation.scoring import Score, measure
from mergelab.models.heads import Head
from mergelab.ops.blocks import blockwise
from mergelab.ops.task_vectors import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.opening import OpenedModels
    from mergelab.tasks.data import TaskData

FLAT = 1e-6  # of the longer side, how far the third model must be from the line through the other two


@dataclass(frozen=True)
class Point:
    """A model between others, measured.

    Attributes:
        task: the task's name.
        place: where it is: the share of the way along a line, or the two coordinates in a plane.
        coefficients: the share that each model has in it; they add up to 1.
        score: the task's primary metric on the reporting examples; None where the task has none.
        loss: the mean loss on these examples; None where the task has none.
        model: the name of the model that it is, or "".
    """

    task: str
    place: tuple[float, ...]
    coefficients: tuple[float, ...]
    score: Score | None
    loss: float | None
    model: str = ""


@dataclass(frozen=True)
class Path:
    """The measured points of a line or plane.

    Attributes:
        models: the names of the models that it goes through.
        corners: the place of each of them.
        metrics: the primary metric of each task.
        points: line by line.
    """

    models: tuple[str, ...]
    corners: tuple[tuple[float, ...], ...]
    metrics: Mapping[str, str]
    points: tuple[Point, ...]


class _Place(NamedTuple):
    """Where a point is, the share of each model in it, and the name of the model that it is, if it is one."""

    place: tuple[float, ...]
    shares: tuple[float, ...]
    model: str = ""


def measure_line(evaluator: Evaluator, models: Sequence[str], points: int) -> Path:
    """Measure (1−α)·θ_a + α·θ_b for α from 0 to 1, heads included.

    At the ends it is the models themselves, with the merged model's config and tokenizer; the base has the head that
    `models.head` says.

    Args:
        evaluator: the opened models with the task's examples.
        models: the names of a and b.
        points: how many values α has.
    """
    corners = ((0.0,), (1.0,))
    ends = {0.0: models[0], 1.0: models[1]}
    places = [
        _Place((alpha,), (1 - alpha, alpha), ends.get(alpha, "")) for alpha in map(float, np.linspace(0, 1, points))
    ]
    return _measured(evaluator, models, corners, places)


def measure_plane(evaluator: Evaluator, models: Sequence[str], products: Any, points: int, margin: float) -> Path:
    """Measure a grid of models in the plane through three, and these three (Garipov et al. 2018, arXiv:1802.10026).

    The first model is at (0, 0), the second on the first axis, and distances are those of the weights.

    Args:
        evaluator: the opened models with the task's examples.
        models: the names of three models.
        products: (3, 3) the inner products of their differences from the base, over the tensors that are merged.
        points: how many points each side has.
        margin: how far the grid goes beyond the models, as a share of their extent.

    Raises:
        ModelError: the models lie on one line.
    """
    products = np.asarray(products, dtype=np.float64)
    first, second = ([-1, 1, 0], [-1, 0, 1])
    length = math.sqrt(max(float(first @ products @ first), 0.0))
    squared = max(float(second @ products @ second), 0.0)
    along = float(first @ products @ second) / length if length else 0.0
    height = math.sqrt(max(squared - along * along, 0.0))
    if height <= FLAT * max(length, math.sqrt(squared)):
        raise ModelError(f"analyze.plane: {listed(models)} lie on one line, so that no plane is theirs")
    corners = ((0.0, 0.0), (length, 0.0), (along, height))

    def coefficients(x: float, y: float) -> tuple[float, ...]:
        third = y / height
        other = (x - third * along) / length
        return 1 - other - third, other, third

    axes = [_axis([corner[axis] for corner in corners], points, margin) for axis in (0, 1)]
    grid = [_Place((x, y), coefficients(x, y)) for y, x in product(axes[1], axes[0])]
    own = [
        _Place(corner, tuple(float(at == index) for at in range(3)), models[index])
        for index, corner in enumerate(corners)
    ]
    return _measured(evaluator, models, corners, [*own, *grid])


def _axis(values: Sequence[float], points: int, margin: float) -> list[float]:
    low, high = min(values), max(values)
    beyond = margin * (high - low)
    return [float(value) for value in np.linspace(low - beyond, high + beyond, points)]


def _measured(
    evaluator: Evaluator,
    models: Sequence[str],
    corners: tuple[tuple[float, ...], ...],
    places: Sequence[_Place],
) -> Path:
    opened = evaluator.session.opened
    backbones = [_backbone(opened, name) for name in models]
    heads = {task: [_head(evaluator, name, task) for name in models] for task in evaluator.data}
    done, total = 0, len(places) * len(evaluator.data)

    def points() -> Iterator[Point]:
        nonlocal done
        for place, shares, model in places:
            combined = partial(_combined, backbones, shares)
            for task, data in evaluator.data.items():
                head = Head(_combined([each.tensors for each in heads[task]], shares), "combined")
                outputs = evaluator.session.predict(data, combined, head, "").outputs
                done += 1
                evaluator.progress(f"measuring point {done} of {total}", done / total)
                yield _point(evaluator, task, outputs, place, shares, model)

    metrics = {task: data.spec.primary for task, data in evaluator.data.items()}
    return Path(tuple(models), corners, metrics, tuple(points()))


def _point(
    evaluator: Evaluator,
    task: str,
    outputs: Any,
    place: tuple[float, ...],
    shares: tuple[float, ...],
    model: str,
) -> Point:
    data, examples = evaluator.data[task], evaluator.examples[task]
    result = measure(data, outputs, examples, evaluator.settings, evaluator.seed)
    score = result.score if result.report else None
    return Point(task, place, shares, score, mean_loss(data, outputs, examples.report), model)


def mean_loss(data: TaskData, outputs: Any, members: Any) -> float | None:
    """Return the mean loss of a model's outputs on some examples; None for tasks without one.

    It is the cross-entropy of the labels for classification, the squared error for regression, and the negative
    log-likelihood of a token for language modelling.

    Args:
        data: the examples.
        outputs: (n, …) the model's.
        members: positions of the examples that count.
    """
    kind = data.spec.kind
    if kind == "language_modelling":
        nll, tokens = outputs[members, 0].astype(np.float64), outputs[members, 1].astype(np.float64)
        return float(nll.sum() / tokens.sum()) if tokens.sum() else None
    if not data.spec.outputs or not len(members):
        return None
    logits = torch.from_numpy(np.asarray(outputs[members], dtype=np.float64))
    truth = torch.from_numpy(np.asarray(data.labels[members]))
    if logits.shape[1] == 1:
        return float((logits[:, 0] - truth.double()).square().mean())
    return float(torch.nn.functional.cross_entropy(logits, truth.long()))


def _backbone(opened: OpenedModels, name: str) -> dict[str, Tensor]:
    """Return a model's tensors, in the merged model's rows; what it lacks is as in the merged model."""
    if name == BASE:
        return opened.base_backbone(in_merged_rows=True)
    index = [expert.name for expert in opened.experts].index(name)
    return {**opened.passed_through, **opened.expert_backbone(index, in_merged_rows=True)}


def _head(evaluator: Evaluator, name: str, task: str) -> Head:
    """Return an expert's own head for a task where it has one, else the merged model's."""
    session, spec = evaluator.session, evaluator.data[task].spec
    for index, expert in enumerate(session.located.experts):
        if expert.name == name and session.heads.serves(expert, spec):
            return session.heads.of_expert(index, spec)
    return session.heads[task]


def _combined(models: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ c_t θ_t, computed in float32 and rounded once to the first model's dtype; integers are the first's."""
    combine: Callable[..., Tensor] = lambda *parts: weighted_sum(parts, shares)  # noqa: E731
    return {
        name: blockwise(combine, *(model[name] for model in models)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].items()
    }
