"""What a metric is: one class with everything that scoring, intervals, sweeps and the preflight ask of it.

A metric is one file, ``mergelab/evaluation/metrics/<name>.py``, with one class of that ``name``. That file is all that
a task's ``metrics: [<name>]`` needs:

    class BalancedAccuracy(LabelMetric):
        '''The mean over classes of the fraction of their examples that are right.'''

        name = "balanced_accuracy"
        citation = "Brodersen et al. 2010"
        direction = "maximize"
        chance = BEST_CONSTANT
        min_examples = 1

        def score(self, predictions, references): ...
        def from_counts(self, rows, counts): ...

What a class leaves out raises when the class is made. Libraries that compute scores are imported in the methods.
"""

from __future__ import annotations

import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, final, get_args

import numpy as np

from mergelab.errors import ConfigError, did_you_mean, listed
from mergelab.tasks.prompting import AnswerKind

Array = np.ndarray[Any, Any]
Direction = Literal["maximize", "minimize"]
ScoredKind = Literal["classification", "regression", "generation", "language_modelling"]
Chance = float | Literal["best constant"] | None

BEST_CONSTANT: Literal["best constant"] = "best constant"

_PACKAGE = "mergelab.evaluation.metrics"
_FOLDER = Path(__file__).resolve().parents[1] / "evaluation" / "metrics"


class Metric(ABC):
    """A metric. Derive it from one of the classes below, which say what is compared; the docstring describes it.

    Attributes:
        name: as tasks name it; that of its file.
        citation: the paper or the library that defines it.
        kinds: the kinds of tasks that it is for.
        answers: of generation tasks, the kinds of answers that it is for.
        direction: whether models are better when it is greater, or when it is less.
        chance: the score of a model that always answers the same; without labels, of one that writes empty texts.
            `BEST_CONSTANT`: the best score of any one label. A number: the score on all data. None: there is no such
            score, and the preflight does not check this metric.
        min_examples: the fewest examples that have a score.
        num_labels: how many labels a task must have; None: any number.
    """

    name: str
    citation: ClassVar[str]
    kinds: ClassVar[tuple[ScoredKind, ...]]
    answers: ClassVar[tuple[AnswerKind, ...]]
    direction: Direction
    chance: ClassVar[Chance]
    min_examples: ClassVar[int]
    num_labels: ClassVar[int | None] = None
    _is_base: ClassVar[bool] = True

    def __init_subclass__(cls, *, base: bool = False) -> None:
        """Check the declaration, but for a ``base``, which only shares code between metrics.

        Raises:
            ConfigError: something is not declared, or is declared as what it cannot be.
        """
        super().__init_subclass__()
        cls._is_base = base
        if not base:
            _check_declaration(cls)

    @abstractmethod
    def score(self, predictions: Any, references: Any) -> float:
        """Compute the metric, as a fraction where it is one, of all examples: plainly, by the library that defines it.

        Args:
            predictions: n class indices (-1: an answer that is no label), scores or texts; likelihoods (n, 3).
            references: n class indices or scores; n lists of texts; unused with likelihoods.
        """

    @abstractmethod
    def statistics(self, predictions: Any, references: Any) -> Array:
        """Return one row of numbers per example, all that the metric needs of it: (n, k) float64."""

    @abstractmethod
    def from_statistics(self, rows: Array) -> float:
        """Compute the metric of the examples with these ``rows`` (n, k) of `statistics`, each as often as it occurs."""


class PairMetric(Metric, base=True):
    """A metric of one prediction and one reference per example, both numbers: the rows of its statistics, (n, 2)."""

    @abstractmethod
    def from_counts(self, rows: Array, counts: Array) -> Array:
        """Compute the metric of many resamples at once.

        Args:
            rows: (m, 2) float64 distinct examples: prediction and reference.
            counts: (samples, m) float64, how often each resample has each of them.

        Returns:
            (samples,) what `score` computes of each resample.
        """

    @final
    def statistics(self, predictions: Any, references: Any) -> Array:
        """Return the pairs: (n, 2) float64."""
        return np.column_stack([np.asarray(predictions, np.float64), np.asarray(references, np.float64)])


class LabelMetric(PairMetric, base=True):
    """A metric of class indices: of a classifier's, or of label words in generated texts, where -1 is no label."""

    kinds = ("classification", "generation")
    answers = ("label",)

    def from_statistics(self, rows: Array) -> float:
        """Compute the metric from counts, which are exact: libraries take milliseconds, and resamples are many."""
        return float(self.from_counts(rows, np.ones((1, len(rows))))[0])


class ScoreMetric(PairMetric, base=True):
    """A metric of scores: of a classifier with one output, or of numbers in generated texts (-1: there is none)."""

    kinds = ("regression", "generation")
    answers = ("score",)

    def from_statistics(self, rows: Array) -> float:
        """Compute the plain score of the pairs."""
        return self.score(rows[:, 0], rows[:, 1])


class TextMetric(Metric, base=True):
    """A metric of generated texts, or of answers found in them (empty: none), with one reference or more each."""

    kinds = ("generation",)

    def score(self, predictions: Any, references: Any) -> float:
        """Compute the metric from its statistics."""
        return self.from_statistics(self.statistics(predictions, references))


class MeanTextMetric(TextMetric, base=True):
    """A metric of texts that is the mean of its examples' scores; its statistics are these scores, (n, 1)."""

    def from_statistics(self, rows: Array) -> float:
        """Average the examples' scores."""
        return float(rows.mean())


class LikelihoodMetric(Metric, base=True):
    """A metric of how likely given text is: of each example's nats, tokens and words, (n, 3) float64."""

    kinds = ("language_modelling",)
    answers = ()

    def score(self, predictions: Any, references: Any) -> float:
        """Compute the metric from its statistics."""
        return self.from_statistics(self.statistics(predictions, references))

    def statistics(self, predictions: Any, references: Any) -> Array:
        """Return the likelihoods."""
        return np.asarray(predictions, np.float64)


# --------------------------------------------------------------------------------------------------------- declarations

_COMPARED: tuple[type[Metric], ...] = (LabelMetric, ScoreMetric, TextMetric, LikelihoodMetric)


def _check_declaration(cls: type[Metric]) -> None:
    metric = f"metric {cls.__dict__.get('name', cls.__name__)}"
    if inherited := [parent for parent in cls.__mro__[1:] if issubclass(parent, Metric) and not parent._is_base]:
        # Else its own score could go with another metric's score from counts.
        raise ConfigError(
            f"{metric}: must not be derived from the metric {inherited[0].name}; a class with base=True shares code"
        )
    compared = next((base for base in _COMPARED if issubclass(cls, base)), None)
    if compared is None:
        raise ConfigError(f"{metric}: must be derived from one of {listed(base.__name__ for base in _COMPARED)}")
    annotated = [name for parent in reversed(cls.__mro__) for name in inspect.get_annotations(parent)]
    abstract = [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
    if missing := [name for name in annotated if not hasattr(cls, name)] + abstract:
        raise ConfigError(f"{metric}: does not declare {listed(missing, 20)}")
    for key, (right, what) in _allowed(cls, compared).items():
        if not right:
            raise ConfigError(f"{metric}: {key}={getattr(cls, key)!r}: must be {what}")


def _allowed(cls: type[Metric], base: type[Metric]) -> Mapping[str, tuple[bool, str]]:
    """Return, for each attribute, whether its value is a possible one, and in words which values are."""
    answers: tuple[AnswerKind, ...] = getattr(base, "answers", get_args(AnswerKind))
    answered = bool(cls.answers) or "generation" not in cls.kinds
    countable = not {"regression", "language_modelling"} & set(cls.kinds)
    number = isinstance(cls.chance, int | float) and not isinstance(cls.chance, bool)
    return {
        "name": (isinstance(cls.name, str) and bool(re.fullmatch(r"\w+", cls.name)), "letters, digits and underscores"),
        "citation": (isinstance(cls.citation, str) and bool(cls.citation), "the name of a paper or a library"),
        "kinds": (bool(cls.kinds) and {*cls.kinds} <= {*base.kinds}, f"of {listed(base.kinds)}"),
        "answers": (answered and {*cls.answers} <= {*answers}, f"of {listed(answers)}"),
        "direction": (cls.direction in get_args(Direction), f"one of {listed(get_args(Direction))}"),
        "chance": (
            cls.chance is None or number or (cls.chance == BEST_CONSTANT and countable),
            "a number or None" + (" or BEST_CONSTANT" if countable else ": no one constant is the best for all data"),
        ),
        "min_examples": (type(cls.min_examples) is int and cls.min_examples >= 1, "a whole number from 1 on"),
        "num_labels": (cls.num_labels is None or type(cls.num_labels) is int, "a whole number or None"),
    }


# --------------------------------------------------------------------------------------------------------------- lookup

_DECLARED: dict[str, Metric] = {}


def metric_names() -> tuple[str, ...]:
    """List the metrics, sorted; files whose names begin with an underscore share code and are none."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_")))


def declare(metric: Metric) -> None:
    """Make a metric that has no file, one of another library's tasks, known by its name for the rest of the process."""
    _DECLARED[metric.name] = metric
    get_metric.cache_clear()


@functools.cache
def get_metric(name: str) -> Metric:
    """Find a metric by its name; one from elsewhere by its module and name (``my_metrics.brier``).

    Raises:
        ConfigError: there is none, its file cannot be imported, or it is declared incompletely.
    """
    if name in _DECLARED:
        return _DECLARED[name]
    dotted = "." in name and all(part.isidentifier() for part in name.split("."))
    if not dotted and name not in (names := metric_names()):
        raise ConfigError(
            f"task.metrics: no metric {name!r}{did_you_mean(name, names)} (there are {listed(names, 30)})"
        )
    path, _, own = name.rpartition(".") if dotted else (f"{_PACKAGE}.{name}", "", name)
    try:
        module = import_module(path)
    except ImportError as error:
        raise ConfigError(f"task.metrics: importing {path} fails: {error}") from error
    for found in vars(module).values():
        if isinstance(found, type) and issubclass(found, Metric) and not found._is_base and found.name == own:
            return found()
    raise ConfigError(f"task.metrics: {path} has no metric whose name is {own!r}")
