"""The ready tasks of generation: what their files say, and what they make of real rows where there are any."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergelab.config import CONF_DIR
from mergelab.errors import ConfigError
from mergelab.tasks.data import TaskData, load_data
from mergelab.tasks.loading import load_task, task_from_config, tasks_from_config
from mergelab.tasks.spec import Decoding
from tests.tasks.tiny import write_parquet

SUMMARIES = {"samsum": "dialogue", "dialogsum": "dialogue", "xsum": "document", "cnn_dailymail": "article"}
T5 = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
READY = [*SUMMARIES, "e2e_nlg", "gsm8k", *(f"t5_{name}" for name in T5)]

# What flan-t5 experts of GLUE were trained on, spelling and all: FusionBench, glue_prompt_templates.py.
PROMPTS = {
    "cola": (
        {"sentence": "S"},
        "Indicate if the following sentence is grammatically correct or not: \"S\". "
        "Answere 'acceptable' or 'unacceptable'.",
    ),
    "mnli": (
        {"premise": "P", "hypothesis": "H"},
        "Does the premise: 'P' logically imply, contradict, or is neutral to the hypothesis: 'H'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
    ),
    "mrpc": (
        {"sentence1": "A", "sentence2": "B"},
        "Are the following sentences 'A' and 'B' conveying the same meaning? Answere with 'yes' or 'no'.",
    ),
    "qnli": (
        {"sentence": "S", "question": "Q"},
        "Given the context: 'S', does the question 'Q' have an answer based on the information provided? "
        "Answer with 'yes' or 'no'.",
    ),
    "qqp": (
        {"question1": "A", "question2": "B"},
        "Do the questions 'A' and 'B' have the same intent? Answere with 'yes' or 'no'.",
    ),
    "rte": (
        {"sentence1": "A", "sentence2": "B"},
        "Does the text: 'A' entail that 'B' is true? Provide 'yes' or 'no'.",
    ),
    "sst2": ({"sentence": "S"}, "Given the sentence 'S', determine the sentiment. Is it positive or negative?"),
    "stsb": (
        {"sentence1": "A", "sentence2": "B"},
        "Consider the sentences 'A' and 'B'. On a scale from 1 (completely different) to 5 (completely similar), "
        "rate the similarity.",
    ),
}  # fmt: skip

# By number in nyu-mll/glue.
WORDS = {
    "cola": ["unacceptable", "acceptable"], "mnli": ["entailment", "neutral", "contradiction"], "mrpc": ["no", "yes"],
    "qnli": ["yes", "no"], "qqp": ["no", "yes"], "rte": ["yes", "no"], "sst2": ["negative", "positive"],
}  # fmt: skip


def composed(name: str, *overrides: str) -> Any:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"task={name}", *overrides])
    return OmegaConf.to_container(config, resolve=True)


def loaded(name: str, folder: Path, split: str | None = None) -> TaskData:
    return load_data(load_task(name), data_dir=folder, split=split)


@pytest.mark.parametrize("name", [*READY, "t5_glue"])
def test_every_file_composes_with_models_to_what_a_suite_would_load(name: str) -> None:
    config = composed(name, "task.limit=7", "task.data_dir=/somewhere")
    suite = tasks_from_config(config["task"])
    assert (suite.name, suite.limit, suite.data_dir) == (name, 7, "/somewhere")
    assert config["models"]["name"] in ("bert2bert_summarization", "flan_t5_glue", "gpt2_law_recipes")
    members = [name] if name != "t5_glue" else [f"t5_{task}" for task in T5]
    for task, member in zip(suite.tasks, members, strict=True):
        assert replace(task, splits=()) == replace(load_task(member), splits=())
    assert len((CONF_DIR / "task" / f"{name}.yaml").read_text().splitlines()) <= 15


def test_every_flan_t5_expert_is_named_by_its_task() -> None:
    assert sorted(composed("t5_glue")["models"]["experts"]) == sorted(composed("t5_glue")["task"]["members"])


def test_greedy_decoding_is_what_holds_where_nothing_is_said() -> None:
    assert {**composed("samsum")["task"]["decoding"], "max_new_tokens": 64, "stop": ()} == asdict(Decoding())


def test_decoding_is_chosen_by_name_and_changed_by_key() -> None:
    beam = composed("samsum", "task/decoding=beam", "task.decoding.num_beams=3")["task"]["decoding"]
    assert (beam["num_beams"], beam["no_repeat_ngram_size"], beam["max_new_tokens"]) == (3, 3, 96)
    config = composed("gsm8k", "task/decoding=sample", "task.decoding.seed=5", "task.num_fewshot=4")["task"]
    spec = task_from_config(config)
    assert (spec.decoding.do_sample, spec.decoding.top_p, spec.decoding.seed) == (True, 0.95, 5)
    assert (spec.decoding.stop, len(spec.fewshot_examples)) == (("\nQ:",), 4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("samsum", {"metrics": ["f1"], "primary": "f1"}, "f1 is of answers of the kind label, not of text"),
        (
            "gsm8k",
            {"metrics": ["pearson"], "primary": "pearson"},
            "pearson is of answers of the kind score, not of numb",
        ),
        (
            "e2e_nlg",
            {"metrics": ["bleu", "invalid_rate"]},
            "invalid_rate is of answers of the kind number, label, score",
        ),
        ("t5_rte", {"metrics": ["rouge1"], "primary": "rouge1"}, "rouge1 is of answers of the kind text, not of label"),
        ("t5_mnli", {"metrics": ["f1"], "primary": "f1"}, "f1 is for 2 labels, t5_mnli has 3"),
        ("t5_rte", {"verbalizer": ["yes", "Yes."]}, r"verbalizer=\['yes', 'Yes\.'\]: must differ in more than case"),
        ("t5_rte", {"verbalizer": ["yes", "?"]}, "must differ in more than case and punctuation"),
        ("samsum", {"metrics": ["rougeL", "blue"]}, r"no metric 'blue'; did you mean 'bleu'\?"),
        ("samsum", {"prompt": "{dialogue"}, r"task\.prompt='\{dialogue': expected '\}'"),
        ("gsm8k", {"num_fewshot": 9}, r"task\.num_fewshot=9: gsm8k_cot has 8 worked examples"),
    ],
)
def test_what_does_not_fit_a_task_of_generation_is_one_line(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        task_from_config(composed(name)["task"] | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", T5)
def test_prompts_and_words_of_text_to_text_glue_are_those_of_the_experts(name: str, tmp_path: Path) -> None:
    row, prompt = PROMPTS[name]
    labels: list[Any] = [0.0, 2.25, 5.0] if name == "stsb" else list(range(len(WORDS[name])))
    rows = {column: [text] * len(labels) for column, text in row.items()} | {"label": labels}
    write_parquet(tmp_path / f"t5_{name}" / "any.parquet", rows)
    data = loaded(f"t5_{name}", tmp_path, "any")
    assert data.texts == ((prompt,),) * len(labels)
    assert data.references is not None
    assert [said for (said,) in data.references] == (["0.0", "2.2", "5.0"] if name == "stsb" else WORDS[name])
    assert "invalid_rate" in data.spec.metrics


# ------------------------------------------------------------------------------------------------------------ real rows


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "split", "count"), [("samsum", "validation", 818), ("dialogsum", "validation", 500)])
def test_real_dialogues_are_prompts_with_a_summary_each(
    name: str, split: str, count: int, generation_data: Path
) -> None:
    data, table = loaded(name, generation_data), pq.read_table(generation_data / name / f"{split}.parquet")
    assert [prompt for (prompt,) in data.texts] == table["dialogue"].to_pylist()
    assert data.references is not None
    assert [said for (said,) in data.references] == [text.strip() for text in table["summary"].to_pylist()]
    assert len(data) == count


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "split", "by", "reference", "groups", "rows"),
    [
        ("dialogsum", "test", "dialogue", "summary", 500, 1500),
        ("e2e_nlg", "validation", "meaning_representation", "human_reference", 547, 4672),
        ("e2e_nlg", "test", "meaning_representation", "human_reference", 630, 4693),
    ],
)
def test_real_rows_of_one_input_are_one_example_with_all_their_references(
    name: str, split: str, by: str, reference: str, groups: int, rows: int, generation_data: Path
) -> None:
    table = pq.read_table(generation_data / name / f"{split}.parquet")
    expected: dict[str, list[str]] = {}
    for row in table.to_pylist():
        expected.setdefault(row[by], []).append(row[reference].strip())
    data = loaded(name, generation_data, split)
    assert data.references is not None
    assert [list(said) for said in data.references] == list(expected.values())
    assert all(text in prompt for (prompt,), text in zip(data.texts, expected, strict=True))
    assert (len(data), sum(map(len, data.references)), table.num_rows) == (groups, rows, rows)


@pytest.mark.real_data
def test_real_questions_of_gsm8k_stand_behind_the_worked_examples(generation_data: Path) -> None:
    data, table = loaded("gsm8k", generation_data), pq.read_table(generation_data / "gsm8k" / "test.parquet")
    assert len(data) == 1319
    for (prompt,), question in zip(data.texts, table["question"].to_pylist(), strict=True):
        assert prompt.startswith("Q: There are 15 trees in the grove.")
        assert prompt.endswith(f"The answer is 8.\n\nQ: {question}\nA:")
        assert prompt.count("The answer is") == 8
    assert data.references is not None
    assert [float(said) for (said,) in data.references[:5]] == [18, 3, 70000, 540, 20]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("cola", "validation", {"unacceptable": 322, "acceptable": 721}),
        ("mnli", "validation_matched", {"entailment": 3479, "neutral": 3123, "contradiction": 3213}),
        ("mrpc", "validation", {"no": 129, "yes": 279}),
        ("qnli", "validation", {"yes": 2702, "no": 2761}),
        ("rte", "validation", {"yes": 146, "no": 131}),
        ("sst2", "validation", {"negative": 428, "positive": 444}),
    ],
)
def test_real_labels_of_glue_become_their_words(name: str, split: str, counts: dict[str, int], glue_data: Path) -> None:
    data = loaded(f"t5_{name}", glue_data, split)
    assert data.references is not None
    assert Counter(said for (said,) in data.references) == counts
    table = pq.read_table(glue_data / name / f"{split}.parquet")
    columns = list(PROMPTS[name][0])
    for (prompt,), row in zip(data.texts[:50], table.slice(0, 50).to_pylist(), strict=True):
        assert all(row[column] in prompt for column in columns)


@pytest.mark.real_data
def test_real_scores_of_stsb_become_texts(glue_data: Path) -> None:
    data = loaded("t5_stsb", glue_data)
    scores = pq.read_table(glue_data / "stsb" / "validation.parquet")["label"].to_numpy()
    assert data.references is not None
    assert max(abs(float(said) - score) for (said,), score in zip(data.references, scores, strict=True)) <= 0.051
    assert {len(said) for (said,) in data.references} == {3}


def test_articles_and_their_highlights_are_read_as_the_hub_has_them(tmp_path: Path) -> None:
    rows = {"article": ["By A. One .", "B two ."], "highlights": ["One .\nTwo .", "Three ."], "id": ["0", "1"]}
    write_parquet(tmp_path / "cnn_dailymail" / "validation.parquet", rows)
    data = loaded("cnn_dailymail", tmp_path)
    assert data.references is not None
    assert (data.texts, [*data.references]) == ((("By A. One .",), ("B two .",)), [("One .\nTwo .",), ("Three .",)])
    write_parquet(tmp_path / "xsum" / "validation.parquet", {"document": ["D"], "summary": ["S"], "id": ["1"]})
    assert loaded("xsum", tmp_path).texts == (("D",),)


def test_a_list_of_references_in_a_column_is_as_good_as_rows(tmp_path: Path) -> None:
    column = pa.array([["One.", "Uno."], ["Two."]])
    write_parquet(tmp_path / "validation.parquet", {"meaning_representation": ["a", "b"], "human_reference": column})
    references = loaded("e2e_nlg", tmp_path).references
    assert references is not None
    assert [*references] == [("One.", "Uno."), ("Two.",)]
