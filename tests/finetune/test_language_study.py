"""``experiments/smollm2``: the whole study on a tiny language model: it runs to its page, and does nothing twice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.tasks.tiny import sentences
from tests.tasks.writers import writer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the experiments are not part of this copy"),
]
ROWS = 12
ARGUMENTS = ("--data-dir", "data", "--work", "work", "--base", "llama", "--limit", "4", "--examples", "10",
             "--max-length", "256")  # fmt: skip


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a tiny Llama and a few rows of each data set."""
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    model, tokenizer = writer("llama")
    model.config.max_position_embeddings = 512  # rotary: nothing in the weights depends on it
    tokenizer.model_max_length = 512
    model.save_pretrained(workplace / "llama")
    tokenizer.save_pretrained(workplace / "llama")
    short = [text[:40] for text in sentences(ROWS, 0)]
    answers = [f"{text[:20]} #### {number}" for number, text in enumerate(short)]
    rows = {
        "gsm8k": {"question": short, "answer": answers},
        "dialogsum": {"dialogue": short, "summary": sentences(ROWS, 1)},
        "e2e_nlg": {"meaning_representation": short, "human_reference": sentences(ROWS, 2)},
        "wikitext-2-raw-v1": {"text": sentences(ROWS, 3)},
    }
    for name, columns in rows.items():
        (workplace / "data" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            pq.write_table(pa.table(columns), workplace / "data" / name / f"{split}.parquet")
    return workplace


def test_the_study_runs_to_its_page_and_does_nothing_twice(place: Path) -> None:
    main = importlib.import_module("experiments.smollm2.__main__")
    said: list[str] = []
    main.main(ARGUMENTS, say=said.append)
    page = (place / "work" / "page.md").read_text()
    assert "failed" not in page, [line for line in page.splitlines() if "failed" in line]
    assert "Not run" not in page
    assert str(place) not in page
    records = {path.parent.name: path for path in (place / "work" / "steps").glob("*/record.json")}
    for task in (*main.TASKS, main.SKILL):
        _, _, section = page.partition(f"## {task}\n")
        for method in main.METHODS:
            result = json.loads(records[f"merges-{task}-{method}"].read_text())["models"][-1]["results"][task]
            score = result["report"][result["primary"]]
            assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in section.partition("\n## ")[0]
    assert page.count("| base: ") == page.count("| expert: gsm8k ") == 4

    before = {path: path.stat().st_mtime_ns for path in records.values()}
    main.main(ARGUMENTS, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in records.values()} == before


def test_an_expert_that_cannot_be_trained_is_on_the_page(place: Path) -> None:
    main = importlib.import_module("experiments.smollm2.__main__")
    main.main([*ARGUMENTS[:-1], "64"], say=[].append)
    page = (place / "work" / "page.md").read_text()
    assert "- the expert of e2e_nlg failed: error: task=e2e_nlg: no training example is long enough" in page
