from __future__ import annotations

from omegaconf import OmegaConf

from mergelab.tracking.values import MAX_NAME, MAX_PARAM, flatten, one_line


def test_a_nested_config_becomes_dotted_names_with_numbers_that_parse() -> None:
    config = OmegaConf.create(
        {"method": {"name": "ties", "density": 0.2, "lambda": 1e-05, "seed": 3, "base": "${method.name}", "trim": True}}
    )
    assert flatten(config) == {
        "method.name": "ties",
        "method.density": "0.2",
        "method.lambda": "1e-05",
        "method.seed": "3",
        "method.base": "ties",
        "method.trim": "true",
    }


def test_null_is_written_as_null_and_empty_containers_as_themselves() -> None:
    assert flatten({"output": None, "experts": {}, "passthrough": []}) == {
        "output": "null",
        "experts": "{}",
        "passthrough": "[]",
    }


def test_each_number_of_a_list_gets_its_own_entry_and_a_list_of_names_one() -> None:
    assert flatten({"weights": [0.5, 1], "columns": ["a", "é"], "rules": [{"layer": 3}]}) == {
        "weights.0": "0.5",
        "weights.1": "1",
        "columns": '["a", "é"]',
        "rules.0.layer": "3",
    }


def test_long_values_are_cut_to_what_the_store_takes_and_stay_different() -> None:
    first, second = flatten({"a": "x" * 7000})["a"], flatten({"a": "x" * 7001})["a"]
    assert len(first) == MAX_PARAM
    assert first != second


def test_names_that_the_store_refuses_are_mended_without_running_into_each_other() -> None:
    flat = flatten({"encoder.*.weight": 1, "encoder.?.weight": 2, "../up": 3, "a//b": 4, "n" * 300: 5})
    assert list(flat.values()) == ["1", "2", "3", "4", "5"]
    assert list(flat)[:2] == ["encoder._.weight", "encoder._.weight_2"]
    assert max(map(len, flat)) <= MAX_NAME


def test_passwords_in_addresses_are_masked() -> None:
    flat = flatten({"uri": "postgresql://me:secret@db/x", "both": ["http://u:pw@h", "plain"]})
    assert flat == {"uri": "postgresql://me:***@db/x", "both": '["http://u:***@h", "plain"]'}


def test_an_error_is_told_in_one_line_with_its_type() -> None:
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
