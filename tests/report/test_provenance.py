"""A merge's file says what it was made of, to any depth; one from elsewhere is read with care."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergelab.errors import MergeWarning
from mergelab.report.provenance import Merge, SourceModel, read_provenance
from mergelab.weights.companions import PROVENANCE

INNER = Merge(method="soup", experts=[SourceModel(name="x", model="org/x"), SourceModel(name="y", model="y")], run="r1")
OUTER = Merge(
    method="ties",
    parameters={"density": 0.2, "lambda": 1.0},
    base=SourceModel(name="base", model="org/base", revision="0123456789abcdef"),
    experts=[SourceModel(name="a", model="soup-1", weight=0.5, merge=INNER), SourceModel(name="b", model="org/b")],
    run="r2",
)


def test_a_tree_has_a_merges_models_below_it_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_text(OUTER.to_json())
    found = read_provenance(tmp_path)
    assert found == OUTER
    assert found is not None
    assert found.tree() == [
        "ties(density=0.2, lambda=1.0), run r2",
        "├── base: org/base@0123456789ab",
        "├── a: soup-1 (weight 0.5)",
        "│   made by mergelab: soup(), run r1",
        "│   ├── x: org/x",
        "│   └── y: y",
        "└── b: org/b",
    ]


def test_a_folder_without_the_file_is_no_merge_of_ours(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_text(json.dumps({"method": "soup", "colour": "red"}))
    assert read_provenance(tmp_path) == Merge(method="soup")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"method": 3}',
        '{"method": "soup", "experts": [{"name": "a"}]}',
        '{"method": "' + 600 * "a" + '"}',
        '{"method": "soup", "experts": [' * 400 + "]}" * 400,
        '{"method": "soup", "note": "' + 1_000_000 * "a" + '"}',
    ],
)
def test_a_file_that_describes_no_merge_is_named_and_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / PROVENANCE).write_text(content)
    with pytest.warns(MergeWarning, match=r"mergelab\.json"):
        assert read_provenance(tmp_path) is None


def test_texts_from_elsewhere_stay_in_the_trees_block_of_code() -> None:
    hostile = SourceModel(name="a", model="```\n# Hello\n<script>\x1b[31m")
    (title, line) = Merge(method="so\nup", experts=[hostile]).tree()
    assert title == "so up()"
    assert line == "└── a: ''' # Hello <script>[31m"
