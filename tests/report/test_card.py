"""A card's metadata are what the hub takes, and say of scores what was measured, and nothing of what was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mergelab.evaluation.results import ExperimentResult, ModelResult
from mergelab.evaluation.scoring import Score, TaskResult
from mergelab.report.card import CardFacts, MeasuredOn, common_license, model_card, read_metadata
from mergelab.report.provenance import Merge, SourceModel


def result(value: float = 0.5) -> ExperimentResult:
    scores = {"accuracy": Score(value, 0.4, 0.6), "f1": Score(float("nan"), float("nan"), float("nan"))}
    of = TaskResult("rte", "accuracy", {}, scores, 0, 277)
    models = (ModelResult("org/a", "expert", {"rte": of}), ModelResult("ties of 2", "merged", {"rte": of}))
    return ExperimentResult("ties on x", "rte: accuracy on 277 validation examples", ("rte",), models)


FACTS = CardFacts(
    name="org/merged",
    merge=Merge(method="ties", experts=[SourceModel(name="a", model="org/a")], mergelab="1.2"),
    paper="Yadav et al. 2023",
    library="transformers",
    pipeline_tag="text-classification",
    base_models=["org/base", "org/a"],
    license={"license": "apache-2.0"},
    command="python -m mergelab method=ties",
    settings="method: {name: ties}\n",
)
RTE = MeasuredOn("rte", "nyu-mll/glue", "rte", "validation", None, "holdout")


def card(facts: CardFacts) -> tuple[dict[str, Any], str]:
    read = ModelCard(model_card(facts))
    data: dict[str, Any] = read.data.to_dict()
    return data, read.text


def test_metadata_name_the_models_the_method_and_the_scores_with_their_protocol() -> None:
    data, text = card(replace(FACTS, result=result(), measured_on={"rte": RTE}))
    (index,) = data.pop("model-index")
    assert data == {
        "base_model": ["org/base", "org/a"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "tags": ["mergelab", "merge", "ties"],
    }
    assert index["name"] == "org/merged"
    assert index["results"] == [
        {
            "task": {"type": "text-classification", "name": "rte"},
            "dataset": {"name": "rte", "type": "nyu-mll/glue", "config": "rte", "split": "validation"},
            "metrics": [
                {
                    "type": "accuracy",
                    "name": "accuracy",
                    "value": 0.5,
                    "args": {"protocol": "holdout", "examples": 277, "interval_95": [0.4, 0.6]},
                }
            ],
        }
    ]
    assert "| org/a     | 0.5000 [0.400, 0.600] |" in text
    assert "python -m mergelab method=ties" in text


def test_what_was_not_measured_has_no_scores() -> None:
    data, text = card(FACTS)
    assert "model-index" not in data
    assert "This model has not been measured." in text


def test_a_merge_of_folders_names_no_models_of_the_hub() -> None:
    data, text = card(replace(FACTS, base_models=[], license={}))
    assert not {"base_model", "base_model_relation", "license"} & data.keys()
    assert "do not all declare the same license" in text


def test_an_adapter_has_pefts_metadata() -> None:
    data, text = card(replace(FACTS, library="peft", base_models=["org/base"]))
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == ("peft", ["org/base"], "adapter")
    assert "base_model:adapter:org/base" in data["tags"]
    assert 'PeftModel.from_pretrained(base, "org/merged")' in text


def test_a_card_of_the_miniature_says_so_and_claims_no_dataset_of_the_hub() -> None:
    mini = MeasuredOn("mini/rte", "mergelab-miniature", None, "validation", None, "full")
    data, text = card(replace(FACTS, base_models=[], miniature=True, result=result(), measured_on={"rte": mini}))
    assert "miniature" in data["tags"]
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "mergelab-miniature"
    assert "say nothing about the real task" in text
    assert "nyu-mll" not in model_card(replace(FACTS, miniature=True, result=result(), measured_on={"rte": mini}))


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ([{"license": "mit"}, {"license": "mit", "tags": ["x"]}], {"license": "mit"}),
        ([{"license": "mit"}, {"license": "apache-2.0"}], {}),
        ([{"license": "mit"}, {}], {}),
        ([{}, {}], {}),
        ([], {}),
        (
            [{"license": "other", "license_name": "llama", "license_link": "l"}] * 2,
            {"license": "other", "license_name": "llama", "license_link": "l"},
        ),
        ([{"license": "other", "license_name": "llama"}, {"license": "other", "license_name": "gemma"}], {}),
    ],
)
def test_a_license_is_named_where_all_inputs_name_it(licenses: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    assert common_license(licenses) == expected


@pytest.mark.parametrize("content", [None, "# No metadata", "---\n[\n---\n", "---\n- a list\n---\n", "\xff"])
def test_a_card_that_cannot_be_read_has_no_metadata(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "README.md").write_text(content, encoding="latin-1")
    assert read_metadata(tmp_path) == {}


def test_what_a_command_holds_does_not_end_its_block() -> None:
    _, text = card(replace(FACTS, command="python -m mergelab 'a=```'"))
    assert "````bash\npython -m mergelab 'a=```'\n````" in text
