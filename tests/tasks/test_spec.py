from __future__ import annotations

from typing import Any

import pytest

from mergelab.errors import ConfigError, DataError
from mergelab.tasks.loading import load_task, task_from_config, task_names, tasks_from_config

GLUE = {"ax", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"}

# nyu-mll/glue: text columns and the order of the class labels.
HUB = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "stsb": (("sentence1", "sentence2"), None),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
    "ax": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
}


def node(**changes: Any) -> dict[str, Any]:
    return {
        "name": "rte", "version": 1, "dataset": {"path": "nyu-mll/glue", "name": "rte"}, "splits": ["validation"],
        "columns": ["sentence1", "sentence2"], "labels": ["entailment", "not_entailment"], "metrics": ["accuracy"],
        "primary": "accuracy", "limit": None, "data_dir": None,
    } | changes  # fmt: skip


def test_every_glue_task_is_ready_with_the_datasets_columns_and_label_order() -> None:
    assert set(task_names()) >= GLUE
    assert {name: (load_task(name).columns, load_task(name).labels) for name in GLUE} == HUB
    assert all((load_task(name).path, load_task(name).config) == ("nyu-mll/glue", name) for name in GLUE)


def test_every_glue_task_has_its_official_metrics() -> None:
    official = {
        "cola": ("matthews_correlation",), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"),
        "stsb": ("pearson", "spearmanr"), "qqp": ("accuracy", "f1"), "mnli": ("accuracy",), "qnli": ("accuracy",),
        "rte": ("accuracy",), "wnli": ("accuracy",), "ax": ("matthews_correlation", "accuracy"),
    }  # fmt: skip
    assert {name: load_task(name).metrics for name in GLUE} == official
    assert load_task("mnli").splits == ("validation_matched", "validation_mismatched")
    assert load_task("ax").splits == ("test",)


def test_an_unknown_task_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match=r"no task 'mrcp'; did you mean 'mrpc'\?"):
        load_task("mrcp")


def test_a_suite_is_no_task() -> None:
    assert "glue7" not in task_names()
    with pytest.raises(DataError, match="no task 'glue7'"):
        load_task("glue7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limt": 3}, r"task\.limt: no such key; did you mean 'limit'\?"),
        ({"limit": 0}, r"task\.limit=0: must be at least 1"),
        ({"limit": "10"}, r"task\.limit='10': must be a whole number"),
        ({"limit": True}, r"task\.limit=True: must be a whole number"),
        ({"metrics": ["acuracy"]}, r"no metric 'acuracy'; did you mean 'accuracy'\?"),
        (
            {"metrics": ["pearson"], "primary": "pearson"},
            "pearson is not for classification, but for regression, generation",
        ),
        ({"labels": None}, "accuracy is not for regression"),
        ({"primary": "f1"}, r"task\.primary='f1': must be one of task\.metrics: accuracy"),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"], "primary": "f1"}, "f1 is for 2 labels, rte has 3"),
        ({"columns": ["sentence1", "sentence1"]}, "must not repeat a name"),
        ({"columns": []}, "columns"),
        ({"dataset": {"path": "x", "split": "validation"}}, r"task\.dataset\.split: no such key"),
        ({"name": "../rte"}, r"task\.name='\.\./rte': must match"),
    ],
)
def test_what_is_wrong_in_a_task_is_one_line_that_names_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        task_from_config(node(**changes))
    assert "\n" not in str(raised.value)


def test_a_plain_task_is_a_suite_of_one() -> None:
    suite = tasks_from_config(node(limit=10, data_dir="/somewhere"))
    assert (suite.name, suite.limit, suite.data_dir) == ("rte", 10, "/somewhere")
    assert suite.tasks == (load_task("rte"),)


def test_a_suite_loads_its_members_and_can_choose_their_splits() -> None:
    suite = tasks_from_config(
        {
            "name": "two",
            "version": 1,
            "members": ["rte", "mnli"],
            "splits": {"mnli": ["validation_matched"]},
            "limit": 5,
        }
    )
    assert [task.name for task in suite.tasks] == ["rte", "mnli"]
    assert suite.tasks[1].splits == ("validation_matched",)
    assert suite.limit == 5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"members": ["rte", "mrcp"]}, DataError, "did you mean 'mrpc'"),
        ({"members": ["rte", "glue7"]}, DataError, "no task 'glue7'"),
        ({"members": ["rte", "rte"]}, ConfigError, "must not repeat a task"),
        ({"members": []}, ConfigError, "members"),
        ({"splits": {"mnli": ["test"]}}, ConfigError, r"task\.splits\.mnli: not among task\.members"),
        ({"metrics": ["accuracy"]}, ConfigError, r"task\.metrics: no such key"),
    ],
)
def test_what_is_wrong_in_a_suite_is_one_line_that_names_it(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tasks_from_config({"name": "two", "version": 1, "members": ["rte", "cola"]} | changes)


@pytest.mark.parametrize("name", sorted(GLUE | {"glue7", "suite"}))
def test_every_task_file_composes_with_the_models_that_it_is_for(name: str) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from mergelab.config import CONF_DIR

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"task={name}", "task.limit=7"])
    suite = tasks_from_config(OmegaConf.to_container(config.task, resolve=True))  # type: ignore[arg-type]
    assert (suite.name, suite.limit) == (name, 7)
    assert config.models.name
    assert len((CONF_DIR / "task" / f"{name}.yaml").read_text().splitlines()) <= 15


GENERATION = {
    "name": "sums", "version": 1, "kind": "generation", "dataset": {"path": "x"}, "prompt": "{question}",
    "references": ["answer"], "metrics": ["exact_match"], "primary": "exact_match",
}  # fmt: skip
LANGUAGE = {
    "name": "words", "version": 1, "kind": "language_modelling", "dataset": {"path": "x"}, "columns": ["text"],
    "metrics": ["word_perplexity"], "primary": "word_perplexity",
}  # fmt: skip
PROMPTS = {"name": "prompts", "version": 1, "kind": "prompts", "prompts": ["a"]}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (GENERATION, {"kind": "generating"}, r"task\.kind='generating': must be one of .*did you mean 'generation'"),
        (GENERATION, {"prompt": "{question} {"}, r"task\.prompt="),
        (GENERATION, {"prompt": "no column"}, "must name a column in braces"),
        (GENERATION, {"references": []}, "name the columns of references, or task.labels"),
        (GENERATION, {"labels": ["a", "b"]}, "and not both"),
        (GENERATION, {"answer": "label"}, "must be label where there are task.labels"),
        (GENERATION, {"answer": "digits"}, r"task\.answer='digits'"),
        (GENERATION, {"references": [], "labels": ["a", "b"], "verbalizer": ["a", "b", "c"]}, "must be as many as"),
        (GENERATION, {"references": [], "labels": ["a", "b"], "group_by": "a"}, r"task\.group_by=a"),
        (GENERATION, {"num_fewshot": 2}, "task.fewshot_examples names no worked examples"),
        (GENERATION, {"metrics": ["rouge3"]}, "no metric 'rouge3'; did you mean 'rouge"),
        (
            GENERATION,
            {"metrics": ["word_perplexity"]},
            "word_perplexity is not for generation, but for language_modelling",
        ),
        (GENERATION, {"decoding": {"temprature": 1.0}}, r"task\.decoding\.temprature: no such key; did you mean"),
        (GENERATION, {"decoding": {"temperature": 0.0}}, r"task\.decoding\.temperature=0\.0: must be greater than 0"),
        (GENERATION, {"decoding": {"do_sample": True, "num_beams": 2}}, "beams are searched, not sampled"),
        (GENERATION, {"decoding": {"min_new_tokens": 80}}, "must be at most max_new_tokens=64"),
        (LANGUAGE, {"stride": 20, "window": 10}, r"task\.stride=20: must be at most task\.window=10"),
        (
            LANGUAGE,
            {"metrics": ["rougeL"], "primary": "rougeL"},
            "rougeL is not for language_modelling, but for generation",
        ),
        (LANGUAGE, {"columns": ["text", "more"]}, "columns"),
        (PROMPTS, {"prompts": []}, r"task\.prompts=\[\]: needs at least one prompt"),
        (PROMPTS, {"prompts": [" "]}, "needs at least one prompt"),
        (PROMPTS, {"metrics": ["rouge1"]}, r"task\.metrics: no such key"),
    ],
)
def test_what_is_wrong_in_a_task_of_texts_is_one_line(
    task: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        task_from_config(task | changes)
    assert "\n" not in str(raised.value)


def test_a_task_says_in_which_direction_models_are_better() -> None:
    assert task_from_config(LANGUAGE).direction == "minimize"
    assert task_from_config(GENERATION).direction == "maximize"
    invalid = {"answer": "number", "metrics": ["invalid_rate"], "primary": "invalid_rate"}
    assert task_from_config(GENERATION | invalid).direction == "minimize"
    assert load_task("rte").direction == "maximize"
    with pytest.raises(ConfigError, match="task=prompts: has no metrics"):
        _ = task_from_config(PROMPTS).direction


def test_the_prompts_columns_are_those_that_its_template_names() -> None:
    assert task_from_config(GENERATION | {"prompt": "{b} and {a}, {b}"}).columns == ("b", "a")
