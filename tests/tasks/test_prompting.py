from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mergelab.errors import ConfigError
from mergelab.tasks.prompting import AnswerKind, answer, fewshot_examples, fill, number, score_text, template_columns


def test_a_template_names_its_columns_in_the_order_of_their_first_use() -> None:
    assert template_columns("{second} then {first}, {second} and {{not this}}") == ("second", "first")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Q: {question", r"task\.prompt='Q: \{question': expected '\}' .*a brace that is text is written twice: \{\{"),
        ("Q: question}", r"Single '\}'"),
        ("Q: {}", r"\{\} must be a column's name, such as \{sentence\}"),
        ("Q: {0}", r"\{0\} must be a column's name"),
        ("Q: {row.question}", r"\{row\.question\} must be a column's name"),
        ("Q: {row[question]}", r"\{row\[question\]\} must be a column's name"),
        ("Q: {question!r:>9}", r"\{question!r:>9\} must be a column's name"),
        ("Q:", r"task\.prompt='Q:': must name a column in braces"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        template_columns(template)
    assert "\n" not in str(raised.value)


def test_a_prompt_has_the_rows_texts_as_they_are_behind_the_worked_examples() -> None:
    row = {"text": "braces {like these} and \\n", "other": "unused"}
    assert fill("Read: {text}\nAnswer:", row) == "Read: braces {like these} and \\n\nAnswer:"
    assert fill("Q: {text}", {"text": "c"}, ["Q: a\nA: 1.", "Q: b\nA: 2."]) == "Q: a\nA: 1.\n\nQ: b\nA: 2.\n\nQ: c"


def test_the_eight_examples_of_gsm8k_are_questions_with_the_answers_of_wei_et_al() -> None:
    examples = fewshot_examples("gsm8k_cot")
    assert all(text.startswith("Q: ") and text.count("\nA: ") == 1 for text in examples)
    assert [number(text.split("\nA: ")[1]) for text in examples] == ["6", "5", "39", "8", "9", "29", "33", "8"]
    assert fewshot_examples("gsm8k_cot", 3) == examples[:3]


def test_worked_examples_may_be_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\nQ: a\nA: 1.\n \n\nQ: b\nA: 2.\n")
    assert fewshot_examples(str(file)) == ("Q: a\nA: 1.", "Q: b\nA: 2.")
    with pytest.raises(ConfigError, match=r"task\.num_fewshot=3: .*mine\.txt has 2 worked examples"):
        fewshot_examples(str(file), 3)
    with pytest.raises(ConfigError, match=r"task\.fewshot_examples=gsm8k_cto: .*did you mean 'gsm8k_cot'\?"):
        fewshot_examples("gsm8k_cto")
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"task\.fewshot_examples=.*mine\.txt: no readable text file"):
        fewshot_examples(str(file))
    file.write_text(" \n\n")
    with pytest.raises(ConfigError, match=r"task\.fewshot_examples=.*mine\.txt: has no worked examples"):
        fewshot_examples(str(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" She has 16 - 3 - 4 = 9 eggs. The answer is 9.", "9"),
        ("9 * 2 = $18 every day\n#### 18", "18"),
        ("The answer is $1,234,567.50.", "1234567.5"),
        ("The answer is 12.00 dollars.", "12"),
        ("the answer is: -5", "-5"),
        ("The answer is $-5.", "-5"),
        ("The answer is -$5.", "-5"),
        ("The answer is 23 - 15 = 8. I am sure, 100 %.", "8"),
        ("The answer is 0.50", "0.5"),
        ("The answer is 0.", "0"),
        ("The answer is\n12", "12"),
        ("so 5-10", "10"),
        ("That makes 3 and 4.", "4"),
        ("10,", "10"),
        (".5", "0.5"),
        ("none at all", ""),
        ("The answer is yes.", ""),
        ("", ""),
        ("#### 123456789012345678901234567890123", "123456789012345678901234567890123"),
    ],
)
def test_the_number_is_the_one_that_a_solution_ends_with(text: str, expected: str) -> None:
    assert number(text) == answer("number", text) == expected


@pytest.mark.parametrize(
    "more",
    [
        "\n\nQ: There are 7 cars. How many wheels?\nA: The answer is 28.",
        "\nQuestion: 7?\n#### 7",
        " The answer is 28.",
        "\n#### 28",
        " Let me check: 2 + 4 = 6.",
    ],
)
def test_what_follows_the_first_answer_does_not_count(more: str) -> None:
    assert number("2 + 3 = 5. The answer is 5." + more) == "5"


def test_a_question_that_is_made_up_after_an_unstated_answer_does_not_count() -> None:
    assert number("2 + 3 = 5\n\nQ: There are 7 cars.\nA: 28") == "5"
    assert number("\n\nQ: There are 7 cars.\nA: 28") == ""


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("label", "yes", "yes"),
        ("label", " Yes.\n", "yes"),
        ("label", "'not yet'", "Not yet"),
        ("label", "yes it is", ""),
        ("label", "maybe", ""),
        ("label", "", ""),
        ("score", "3.8", "3.8"),
        ("score", " 4 \n", "4"),
        ("score", "-1.0", "-1.0"),
        ("score", "3.8 or so", ""),
        ("score", "nan", ""),
        ("score", "1e9", ""),
        ("score", "", ""),
        ("text", " A summary.\nOf two lines. \n", "A summary.\nOf two lines."),
    ],
)
def test_an_answer_is_found_where_it_is_all_there_is(kind: AnswerKind, text: str, expected: str) -> None:
    assert answer(kind, text, ["no", "yes", "Not yet"]) == expected


def test_scores_are_written_with_one_digit_after_the_point() -> None:
    assert [score_text(score) for score in (5, 3.8, 2.25, 0.0)] == ["5.0", "3.8", "2.2", "0.0"]


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_answer_of_gsm8k_is_found(split: str, count: int, generation_data: Path) -> None:
    texts = pq.read_table(generation_data / "gsm8k" / f"{split}.parquet")["answer"].to_pylist()
    assert [number(text) for text in texts] == [text.rsplit("#### ")[1].replace(",", "").strip() for text in texts]
    assert len(texts) == count
