from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergelab.errors import DataError, HubError
from mergelab.tasks.data import load_data
from mergelab.tasks.loading import load_task
from mergelab.tasks.spec import TaskSpec
from tests.tasks.tiny import rte_columns, write_parquet
from tests.tasks.writers import generation_task, language_task

NAMES = ["entailment", "not_entailment"]


@pytest.mark.parametrize("place", ["rte/validation.parquet", "validation.parquet", "validation-00000-of-00001.parquet"])
def test_a_folder_may_be_laid_out_by_task_plainly_or_as_on_the_hub(rte: TaskSpec, tmp_path: Path, place: str) -> None:
    write_parquet(tmp_path / place, rte_columns([0, 1, 1]), NAMES)
    data = load_data(rte, data_dir=tmp_path)
    assert data.texts == (("first 0", "second 0"), ("first 1", "second 1"), ("first 2", "second 2"))
    assert (data.labels.tolist(), data.labels.dtype) == ([0, 1, 1], np.int64)
    assert (data.idx.tolist(), data.split, data.origin, data.location) == (
        [0, 1, 2],
        "validation",
        "folder",
        str(tmp_path),
    )


def test_shards_are_read_in_order_and_a_missing_one_is_an_error(rte: TaskSpec, tmp_path: Path) -> None:
    for shard, labels in enumerate([[0, 0], [1, 1, 1]]):
        write_parquet(tmp_path / "rte" / f"validation-0000{shard}-of-00002.parquet", rte_columns(labels), NAMES)
    assert load_data(rte, data_dir=tmp_path).labels.tolist() == [0, 0, 1, 1, 1]
    (tmp_path / "rte" / "validation-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="has 1 of the 2 shards of validation"):
        load_data(rte, data_dir=tmp_path)


def test_class_numbers_follow_the_files_own_names(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", rte_columns([0, 1, 1]), ["Not Entailment", "entailment"])
    assert load_data(rte, data_dir=tmp_path).labels.tolist() == [1, 0, 0]


def test_class_numbers_without_names_are_in_the_tasks_order(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", rte_columns([0, 1, 1]))
    assert load_data(rte, data_dir=tmp_path).labels.tolist() == [0, 1, 1]


def test_labels_may_be_names(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", rte_columns(["not_entailment", "entailment", "not_entailment"]))
    assert load_data(rte, data_dir=tmp_path).labels.tolist() == [1, 0, 1]
    write_parquet(tmp_path / "validation.parquet", rte_columns(["not_entailment"] * 3))
    assert load_data(rte, data_dir=tmp_path).labels.tolist() == [1, 1, 1]


def test_another_tasks_file_is_recognised_by_its_class_names(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", rte_columns([0, 1]), ["not_equivalent", "equivalent"])
    with pytest.raises(DataError, match="has the label 'not_equivalent', which is none of entailment, not_entailment"):
        load_data(rte, data_dir=tmp_path)


def test_too_few_class_names_are_an_error(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", rte_columns([0, 0]), ["entailment"])
    with pytest.raises(DataError, match=r"has 1 classes \(entailment\), not entailment, not_entailment"):
        load_data(rte, data_dir=tmp_path)


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in rte_columns([0, 1]).items() if key != name}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            _without("sentence2"),
            "lacks the columns sentence2: needs sentence1, sentence2, label, has sentence1, label, idx",
        ),
        (
            _without("label"),
            "lacks the columns label: needs sentence1, sentence2, label, has sentence1, sentence2, idx",
        ),
        (rte_columns([]) | {"label": pa.array([], pa.int64())}, "has no examples"),
        (rte_columns([0, 1]) | {"sentence1": ["a", None]}, r"the column sentence1 has 1 empty \(null\) texts"),
        (rte_columns([0, 1]) | {"sentence1": [1, 2]}, "the column sentence1 must hold text, it holds int64"),
        (rte_columns([0, 2]), r"label 2 in row 1 is outside 0 to 1 \(entailment, not_entailment\)"),
        (rte_columns([0, -1]), "label -1 in row 1 is outside 0 to 1"),
        (rte_columns([0, None]), "the column label has 1 null labels"),
        (rte_columns([0.5, 1.0]), "the column label must hold class numbers or names, it holds double"),
    ],
)
def test_what_is_wrong_in_a_table_is_one_line_that_names_the_file(
    rte: TaskSpec, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    file = write_parquet(tmp_path / "validation.parquet", columns)
    with pytest.raises(DataError, match=message) as raised:
        load_data(rte, data_dir=tmp_path)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_table_without_idx_is_numbered(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", _without("idx"))
    assert load_data(rte, data_dir=tmp_path).idx.tolist() == [0, 1]


def test_scores_are_float32_and_must_be_finite(stsb: TaskSpec, tmp_path: Path) -> None:
    file = tmp_path / "validation.parquet"
    write_parquet(file, rte_columns([0.0, 2.5, 5.0]))
    data = load_data(stsb, data_dir=tmp_path)
    assert (data.labels.tolist(), data.labels.dtype, data.labelled) == ([0.0, 2.5, 5.0], np.float32, True)
    for wrong in ([0.0, float("inf")], [0.0, float("nan")], [0.0, None]):
        write_parquet(file, rte_columns(wrong))
        with pytest.raises(DataError, match="scores that are not finite numbers"):
            load_data(stsb, data_dir=tmp_path)
    write_parquet(file, rte_columns(["high", "low"]))
    with pytest.raises(DataError, match="must hold numbers, it holds string"):
        load_data(stsb, data_dir=tmp_path)


def test_a_split_with_hidden_labels_can_be_loaded_and_says_so(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", rte_columns([-1, -1]), NAMES)
    data = load_data(rte, data_dir=tmp_path, split="test")
    assert (data.labels.tolist(), data.labelled, data.split) == ([-1, -1], False, "test")


def test_a_folder_that_is_not_there_is_an_error(rte: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.data_dir=.*nowhere: there is no such folder"):
        load_data(rte, data_dir=tmp_path / "nowhere")


def test_a_missing_split_is_answered_with_what_the_folder_has(tmp_path: Path) -> None:
    spec = load_task("mnli")
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
    write_parquet(tmp_path / "mnli" / "validation_matched.parquet", columns, spec.labels)
    with pytest.raises(DataError, match=r"no data of the split validation_mismatched .* it has validation_matched"):
        load_data(spec, data_dir=tmp_path)
    chosen = replace(spec, splits=("validation_matched",))
    assert load_data(chosen, data_dir=tmp_path).labels.tolist() == [2]
    assert load_data(spec, data_dir=tmp_path, split="validation_matched").split == "validation_matched"


def test_several_splits_are_joined_and_every_example_remembers_its_own(tmp_path: Path) -> None:
    spec = load_task("mnli")
    for split, labels in (("validation_matched", [0, 1]), ("validation_mismatched", [2, 2, 0])):
        rows = {"premise": [split] * len(labels), "hypothesis": ["h"] * len(labels), "label": labels}
        write_parquet(tmp_path / "mnli" / f"{split}.parquet", rows, spec.labels)
    data = load_data(spec, data_dir=tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 2, 0]
    assert data.parts.tolist() == [0, 0, 1, 1, 1]
    assert [text[0] for text in data.texts] == [spec.splits[part] for part in data.parts]


def test_a_file_that_is_not_parquet_is_named(rte: TaskSpec, tmp_path: Path) -> None:
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 no more than that")
    with pytest.raises(DataError, match=r"validation\.parquet: not a readable Parquet file"):
        load_data(rte, data_dir=tmp_path)


def test_shards_of_different_schemas_are_an_error(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation-00000-of-00002.parquet", rte_columns([0]))
    write_parquet(tmp_path / "validation-00001-of-00002.parquet", rte_columns(["entailment"]))
    with pytest.raises(DataError, match=r"rte: the shards of validation in .* differ"):
        load_data(rte, data_dir=tmp_path)


def test_a_limit_keeps_every_labels_share_and_the_order(rte: TaskSpec, tmp_path: Path) -> None:
    labels = [0] * 70 + [1] * 30
    write_parquet(tmp_path / "validation.parquet", rte_columns(labels), NAMES)
    data = load_data(rte, data_dir=tmp_path, limit=10)
    assert np.bincount(data.labels).tolist() == [7, 3]
    assert data.idx.tolist() == sorted(data.idx.tolist())
    assert [text[0] for text in data.texts] == [f"first {i}" for i in data.idx]
    assert load_data(rte, data_dir=tmp_path, limit=10).fingerprint == data.fingerprint
    assert load_data(rte, data_dir=tmp_path, limit=10, seed=1).fingerprint != data.fingerprint
    assert len(load_data(rte, data_dir=tmp_path, limit=1000).labels) == 100
    with pytest.raises(DataError, match="limit=0: must be at least 1"):
        load_data(rte, data_dir=tmp_path, limit=0)


def test_the_fingerprint_changes_with_texts_and_labels_and_with_nothing_else(rte: TaskSpec, tmp_path: Path) -> None:
    def fingerprint(folder: str, columns: dict[str, Any]) -> str:
        write_parquet(tmp_path / folder / "validation.parquet", columns)
        return load_data(rte, data_dir=tmp_path / folder).fingerprint

    first = fingerprint("a", rte_columns([0, 1]))
    assert fingerprint("b", rte_columns([0, 1]) | {"idx": [7, 8]}) == first
    assert fingerprint("c", rte_columns([1, 1])) != first
    assert fingerprint("d", rte_columns([0, 1]) | {"sentence1": ["first 0", "first 1 "]}) != first
    # The border between two texts counts.
    moved = {"sentence1": ["first 0s", "first 1"], "sentence2": ["econd 0", "second 1"]}
    assert fingerprint("e", rte_columns([0, 1]) | moved) != first


def test_the_origin_can_be_named(rte: TaskSpec, tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", rte_columns([0, 1]))
    assert load_data(rte, data_dir=tmp_path, origin="mini").origin == "mini"


def test_a_hub_that_cannot_be_asked_is_one_line(rte: TaskSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"rte: cannot load .* cannot be reached") as raised:
        load_data(replace(rte, path="nobody/has-this"))
    assert "\n" not in str(raised.value)


ROWS = {"cola": 1043, "mnli": 9815, "mrpc": 408, "qnli": 5463, "rte": 277, "sst2": 872, "stsb": 1500, "wnli": 71}


@pytest.mark.real_data
@pytest.mark.parametrize("task", sorted(ROWS))
def test_real_glue_data_are_read_as_they_are(task: str, glue_data: Path) -> None:
    spec = load_task(task)
    split = "validation_matched" if task == "mnli" else "validation"
    data = load_data(spec, data_dir=glue_data, split=split)
    table = pq.read_table(glue_data / task / f"{split}.parquet")
    assert len(data.texts) == ROWS[task]
    assert data.texts == tuple(zip(*(table[column].to_pylist() for column in spec.columns), strict=True))
    np.testing.assert_array_equal(data.labels, table["label"].to_numpy())
    np.testing.assert_array_equal(data.idx, table["idx"].to_numpy())
    assert data.labelled


def _sums(tmp_path: Path, columns: dict[str, Any], **settings: Any) -> Any:
    write_parquet(tmp_path / "validation.parquet", columns)
    return load_data(generation_task(**settings), data_dir=tmp_path)


def test_prompts_are_made_of_columns_and_references_may_be_texts_or_lists(tmp_path: Path) -> None:
    columns = {
        "question": ["one and one", "two and two"],
        "unit": ["eggs", "cups"],
        "answer": ["2", "4"],
        "others": [["two", "ii"], ["four"]],
    }
    prompt = {"prompt": "How many {unit}: {question}?", "references": ["answer", "others"]}
    data = _sums(tmp_path, columns, **prompt)
    assert data.texts == (("How many eggs: one and one?",), ("How many cups: two and two?",))
    assert data.references.tolist() == [("2", "two", "ii"), ("4", "four")]
    assert data.truth is data.references
    assert data.labelled


def test_rows_with_one_value_are_one_example_with_all_their_references(tmp_path: Path) -> None:
    columns = {"question": ["a", "b", "a", "c", "a"], "answer": ["1", "2", "3", "4", "5"]}
    data = _sums(tmp_path, columns, group_by="question")
    assert data.texts == (("a",), ("b",), ("c",))
    assert data.references.tolist() == [("1", "3", "5"), ("2",), ("4",)]
    assert data.idx.tolist() == [0, 1, 3]
    assert len(_sums(tmp_path, columns, group_by=None)) == 5


def test_answers_are_found_in_references_too(tmp_path: Path) -> None:
    columns = {"question": ["a", "b"], "answer": ["3 + 4 = 7\n#### 7", "so 1,200 it is\n#### 1,200"]}
    assert _sums(tmp_path, columns, answer="number").references.tolist() == [("7",), ("1200",)]


def test_labels_are_answered_by_their_words_and_scores_with_one_digit(rte: TaskSpec, tmp_path: Path) -> None:
    words = {"references": [], "labels": list(rte.labels or ()), "verbalizer": ["yes", "no"], "metrics": ["accuracy"]}
    settings = {**words, "primary": "accuracy", "prompt": "{sentence1} / {sentence2}?"}
    write_parquet(tmp_path / "validation.parquet", rte_columns([0, 1, 1]), NAMES[::-1])
    data = load_data(generation_task(**settings), data_dir=tmp_path)
    assert (data.labels.tolist(), data.references.tolist()) == ([1, 0, 0], [("no",), ("yes",), ("yes",)])
    scores = {"references": ["label"], "answer": "score", "metrics": ["pearson"], "primary": "pearson"}
    write_parquet(tmp_path / "validation.parquet", rte_columns([0.0, 2.46, 5.0]))
    data = load_data(generation_task(**{**scores, "prompt": "{sentence1}"}), data_dir=tmp_path)
    assert data.references.tolist() == [("0.0",), ("2.5",), ("5.0",)]
    assert data.labels.tolist() == [0.0, 2.5, 5.0]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"question": ["a"]}, {}, "lacks the columns answer: needs question, answer, has question"),
        ({"question": ["a", "b"], "answer": ["1", None]}, {}, "1 of 2 rows have no reference in answer .*row 1"),
        ({"question": ["a"], "answer": [[]]}, {}, "1 of 1 rows have no reference"),
        ({"question": ["a"], "answer": ["none"]}, {"answer": "number"}, r"no reference in answer \(answer: number\)"),
        ({"question": ["a"], "answer": [1]}, {}, "the column answer must hold texts or lists of texts, it holds int64"),
        ({"question": ["a"], "answer": ["1"]}, {"group_by": "topic"}, "lacks the columns topic"),
    ],
)
def test_references_that_are_missing_are_one_line(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        _sums(tmp_path, {**columns, "more": ["x"] * len(columns["question"])}, **settings)
    assert "\n" not in str(raised.value)


def test_rows_that_are_read_as_one_text_keep_every_character(tmp_path: Path) -> None:
    rows = ["", " = Title = \n", "", "The judge .\n", " ", "Kings .\n", ""]
    write_parquet(tmp_path / "test.parquet", {"text": rows})
    data = load_data(language_task(join="\n\n"), data_dir=tmp_path)
    assert "".join(before + text for before, text in data.texts) == "\n\n".join(rows)
    assert [text.strip() for _, text in data.texts] == ["= Title =", "The judge .", "Kings ."]
    assert data.idx.tolist() == [1, 3, 5]
    assert load_data(language_task(join="\n\n"), data_dir=tmp_path, limit=2).texts == data.texts[:2]
    assert load_data(language_task(), data_dir=tmp_path).texts == (
        ("", " = Title = \n"),
        ("", "The judge .\n"),
        ("", "Kings .\n"),
    )
    write_parquet(tmp_path / "test.parquet", {"text": ["", " "]})
    with pytest.raises(DataError, match="no row has any words"):
        load_data(language_task(), data_dir=tmp_path)


def test_data_may_lie_under_the_name_of_the_datasets_configuration(tmp_path: Path) -> None:
    write_parquet(tmp_path / "wikitext-2-raw-v1" / "test.parquet", {"text": ["The judge ."]})
    assert len(load_data(load_task("wikitext"), data_dir=tmp_path)) == 1


def test_the_fingerprint_changes_with_the_references(tmp_path: Path) -> None:
    first = _sums(tmp_path, {"question": ["a"], "answer": ["1"]})
    assert _sums(tmp_path, {"question": ["a"], "answer": ["2"]}).fingerprint != first.fingerprint


@pytest.mark.real_data
def test_real_texts_are_read_as_they_are(glue_data: Path) -> None:
    folder = glue_data.parent / "generation"
    wikitext = load_data(load_task("wikitext"), data_dir=folder)
    rows = pq.read_table(folder / "wikitext-2-raw-v1" / "test.parquet")["text"].to_pylist()
    assert "".join(before + text for before, text in wikitext.texts) == "\n\n".join(rows)
    e2e = load_data(load_task("e2e_nlg"), data_dir=folder)
    table = pq.read_table(folder / "e2e_nlg" / "validation.parquet")
    assert len(e2e) == len(set(table["meaning_representation"].to_pylist())) == 547
    assert sum(map(len, e2e.references)) == table.num_rows
