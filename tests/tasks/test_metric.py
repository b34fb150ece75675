"""What a metric declares, how a metric is found, and what is said where one is declared or named wrongly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.errors import ConfigError
from mergelab.evaluation.bootstrap import bootstrap_interval, chance_level, paired_test
from mergelab.evaluation.metrics import score
from mergelab.sweep.objective import objectives
from mergelab.tasks import metric
from mergelab.tasks.loading import task_from_config
from mergelab.tasks.metric import (
    BEST_CONSTANT,
    LabelMetric,
    LikelihoodMetric,
    MeanTextMetric,
    Metric,
    ScoreMetric,
    TextMetric,
    get_metric,
    metric_names,
)

CASE = {
    "name": "three", "version": 1, "dataset": {"path": "none"}, "columns": ["text"], "labels": ["a", "b", "c"],
}  # fmt: skip


def computed(*arguments: Any) -> float:
    return 0.5


COMMON = {"name": "new", "citation": "Us", "direction": "maximize", "chance": 0.0, "min_examples": 1}
COMPLETE: dict[type[Metric], Mapping[str, Any]] = {
    LabelMetric: {**COMMON, "score": computed, "from_counts": computed},
    ScoreMetric: {**COMMON, "score": computed, "from_counts": computed},
    TextMetric: {**COMMON, "answers": ("text",), "statistics": computed, "from_statistics": computed},
    MeanTextMetric: {**COMMON, "answers": ("text",), "statistics": computed},
    LikelihoodMetric: {**COMMON, "from_statistics": computed},
}


# --------------------------------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize("base", COMPLETE)
def test_a_complete_declaration_is_a_metric(base: type[Metric]) -> None:
    assert type("New", (base,), dict(COMPLETE[base]))().name == "new"


@pytest.mark.parametrize(("base", "key"), [(base, key) for base, members in COMPLETE.items() for key in members])
def test_what_is_not_declared_raises_where_the_metric_is_declared(base: type[Metric], key: str) -> None:
    members = {name: value for name, value in COMPLETE[base].items() if name != key}
    with pytest.raises(ConfigError, match=rf"^metric (new|New): does not declare {key}$"):
        type("New", (base,), members)


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^metric new: does not declare direction, chance, from_counts$"):
        type("New", (LabelMetric,), {"name": "new", "citation": "Us", "min_examples": 1, "score": computed})


def test_what_a_base_requires_of_its_metrics_is_required_too() -> None:
    from mergelab.evaluation.metrics._perplexity import Perplexity

    with pytest.raises(ConfigError, match="metric byte_perplexity: does not declare units"):
        type("BytePerplexity", (Perplexity,), {"name": "byte_perplexity"})


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LabelMetric, {"direction": "up"}, "direction='up': must be one of maximize, minimize"),
        (LabelMetric, {"chance": "none"}, "chance='none': must be a number or None or BEST_CONSTANT"),
        (LabelMetric, {"chance": True}, "chance=True: must be a number or None or BEST_CONSTANT"),
        (ScoreMetric, {"chance": BEST_CONSTANT}, "must be a number or None: no one constant is the best for all data"),
        (LabelMetric, {"min_examples": 0}, "min_examples=0: must be a whole number from 1 on"),
        (LabelMetric, {"num_labels": "two"}, "num_labels='two': must be a whole number or None"),
        (LabelMetric, {"kinds": ("regression",)}, r"kinds=\('regression',\): must be of classification, generation"),
        (LabelMetric, {"kinds": ()}, r"kinds=\(\): must be of classification, generation"),
        (LabelMetric, {"answers": ("text",)}, r"answers=\('text',\): must be of label"),
        (TextMetric, {"answers": ("words",)}, r"answers=\('words',\): must be of text, number, label, score"),
        (TextMetric, {"answers": ()}, r"answers=\(\): must be of text"),
        (LabelMetric, {"name": "a/b"}, "name='a/b': must be letters, digits and underscores"),
        (LabelMetric, {"citation": ""}, "citation='': must be the name of a paper or a library"),
    ],
)
def test_what_is_declared_as_what_it_cannot_be_raises(
    base: type[Metric], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        type("New", (base,), {**COMPLETE[base], **changes})
    assert "\n" not in str(raised.value)


def test_a_metric_is_not_derived_from_another_whose_score_from_counts_it_would_take() -> None:
    accuracy = type(get_metric("accuracy"))
    with pytest.raises(ConfigError, match="metric error_rate: must not be derived from the metric accuracy"):
        type("ErrorRate", (accuracy,), {"name": "error_rate", "score": computed, "direction": "minimize"})


def test_a_metric_says_what_it_compares_by_its_base() -> None:
    with pytest.raises(ConfigError, match="metric new: must be derived from one of LabelMetric, ScoreMetric"):
        type("New", (Metric,), dict(COMPLETE[LabelMetric]))


# --------------------------------------------------------------------------------------------------------------- lookup

BALANCED = '''
import numpy as np

from mergelab.tasks.metric import BEST_CONSTANT, LabelMetric


class Balanced(LabelMetric):
    """The fraction of wrong predictions, averaged over the classes that there are."""

    name = "balanced_error"
    citation = "Brodersen et al. 2010"
    direction = "minimize"
    chance = BEST_CONSTANT
    min_examples = 1

    def score(self, predictions, references):
        from sklearn.metrics import balanced_accuracy_score

        return 1 - float(balanced_accuracy_score(references, predictions))

    def from_counts(self, rows, counts):
        wrong, classes = rows[:, 0] != rows[:, 1], np.unique(rows[:, 1])
        of_class = rows[:, 1][:, None] == classes
        there = counts @ of_class
        shares = np.divide(counts @ (of_class & wrong[:, None]), there, out=np.zeros_like(there), where=there > 0)
        return shares.sum(axis=1) / (there > 0).sum(axis=1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are metrics as those of the package are."""
    import mergelab.evaluation.metrics as package

    before = set(sys.modules)
    monkeypatch.setattr(metric, "_FOLDER", tmp_path)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.syspath_prepend(str(tmp_path))
    get_metric.cache_clear()
    yield tmp_path
    get_metric.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
            vars(package).pop(name.rpartition(".")[2], None)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("name", ["balanced_error", "own.balanced_error"])
def test_one_file_is_all_that_a_metric_takes(folder: Path, name: str) -> None:
    (folder / f"{name.partition('.')[0]}.py").write_text(BALANCED)
    spec = task_from_config(CASE | {"metrics": [name], "primary": name})
    draw = np.random.default_rng(0)
    truth = draw.choice(3, size=300, p=[0.6, 0.3, 0.1])
    good, bad = (np.eye(3)[np.where(draw.random(300) < share, truth, 0)] for share in (0.9, 0.2))
    low, high = bootstrap_interval(spec, good, truth)[name]
    assert low < score(spec, good, truth)[name] < high
    assert paired_test(spec, good, bad, truth, samples=200) == pytest.approx(1 / 201)
    assert chance_level(spec, truth) == pytest.approx(2 / 3)
    assert objectives(name, None, [spec])[0].direction == spec.direction == "minimize"
    with pytest.raises(ConfigError, match=f"{name} is not for regression, but for classification, generation"):
        task_from_config(CASE | {"labels": None, "metrics": [name], "primary": name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BALANCED.replace("    direction =", "    side ="), "metric balanced_error: does not declare direction"),
        (BALANCED.replace("def from_counts", "def counted"), "metric balanced_error: does not declare from_counts"),
        (BALANCED.replace('"balanced_error"', '"balanced"'), "has no metric whose name is 'balanced_error'"),
        ("import nothing_of_the_kind", r"importing \S+balanced_error fails: No module named 'nothing_of_the_kind'"),
    ],
)
def test_a_task_with_a_metric_that_is_declared_wrongly_is_one_line(folder: Path, text: str, message: str) -> None:
    (folder / "balanced_error.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        task_from_config(CASE | {"metrics": ["balanced_error"], "primary": "balanced_error"})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["acuracy", "__init__", "_ratio", "", ".", "..accuracy", "../metrics/accuracy"])
def test_a_metric_that_there_is_not_is_named_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.metrics: no metric .* \(there are accuracy, bleu, ") as raised:
        get_metric(name)
    assert repr(name) in str(raised.value)


def test_a_dotted_path_that_leads_nowhere_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"task\.metrics: importing my_metrics fails: No module named 'my_metrics'"):
        get_metric("my_metrics.brier")
    with pytest.raises(ConfigError, match=r"task\.metrics: json has no metric whose name is 'brier'"):
        get_metric("json.brier")


def test_a_metric_is_found_by_its_name_in_the_file_of_that_name() -> None:
    assert {"accuracy", "rougeLsum", "word_perplexity"} <= set(metric_names())
    for name in metric_names():
        found = get_metric(name)
        assert (found.name, type(found).__module__) == (name, f"mergelab.evaluation.metrics.{name}")
        assert type(found).__doc__ not in (None, Metric.__doc__)
        assert get_metric(name) is found


def test_looking_at_metrics_imports_no_library_that_computes_them() -> None:
    code = (
        "import sys\n"
        "from mergelab.tasks.loading import load_task, task_names\n"
        "from mergelab.tasks.metric import get_metric, metric_names\n"
        "[load_task(name) for name in task_names()], [get_metric(name) for name in metric_names()]\n"
        "print(*{'datasets', 'evaluate', 'nltk', 'rouge_score', 'sacrebleu', 'scipy', 'sklearn', 'torch'}"
        " & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
