"""Texts that leave the machine have neither its paths nor its secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergelab.report.local_paths import LocalPaths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models.base=/home/me/bert", "models.base=bert"),
        ("models.experts={a: /home/me/x, b:/home/me/y}", "models.experts={a: x, b:y}"),
        ("models.experts=[~/one/two,~you/three]", "models.experts=[two,three]"),
        ("task.data_dir=../data/rte", "task.data_dir=rte"),
        ("base_model=./runs/one", "base_model=one"),
        ("sqlite:////home/me/outputs/mlflow.db", "sqlite:////mlflow.db"),
        ("sqlite:///outputs/mlflow.db", "sqlite:///mlflow.db"),
        ("https://me:word@mlflow.org/store", "https://me:***@mlflow.org/store"),
        # What is no path stays.
        ("google-bert/bert-base-uncased@1a2b", "google-bert/bert-base-uncased@1a2b"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("models.base=${oc.env:HOME}/bert", "models.base=${oc.env:HOME}/bert"),
        ("mini/rte, and/or 1/3 of it", "mini/rte, and/or 1/3 of it"),
    ],
)
def test_paths_become_names_and_passwords_are_masked(text: str, expected: str) -> None:
    assert LocalPaths({}).masked(text) == expected


def test_relative_folders_that_are_there_become_names(workplace: Path) -> None:
    (workplace / "mine" / "expert").mkdir(parents=True)
    paths = LocalPaths({"models": {"experts": {"a": {"reference": "mine/expert"}, "b": {"reference": "org/name"}}}})
    assert paths.masked("models.experts=[mine/expert,org/name]") == "models.experts=[expert,org/name]"
    values = {"a": ["mine/expert", 0.5, None], "b": {"c": str(workplace / "mine")}}
    assert paths.of_values(values) == {"a": ["expert", 0.5, None], "b": {"c": "mine"}}


def test_the_token_of_the_hub_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert "secret" not in LocalPaths({}).masked("note=hf_secretsecretsecret")


def test_a_token_that_cannot_be_read_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))  # a folder
    assert LocalPaths({}).masked("/home/me/model") == "model"
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(file / "token"))
    assert LocalPaths({}).masked("/home/me/model") == "model"
