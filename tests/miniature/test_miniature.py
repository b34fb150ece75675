from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab import miniature
from mergelab.miniature.recipe import Recipe

# Enough to go through every step, far too little to learn anything: for tests of how the miniature is made.
SKETCH = Recipe(documents=96, size=0.02)


@pytest.fixture(scope="session")
def rte() -> miniature.MiniSet:
    """The real miniature, from the user's cache, so that the whole suite builds it once."""
    return miniature.build("rte")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path))
    return tmp_path


def _bytes(found: miniature.MiniSet) -> dict[str, str]:
    folders = {"base": found.base, **found.experts}
    files = {name: folder / "model.safetensors" for name, folder in folders.items()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _validation(found: miniature.MiniSet) -> tuple[Any, np.ndarray]:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    table = pq.read_table(found.data / "validation.parquet")
    tokenizer = AutoTokenizer.from_pretrained(found.base)
    pairs = [table["sentence1"].to_pylist(), table["sentence2"].to_pylist()]
    return tokenizer(*pairs, padding=True, return_tensors="pt"), np.array(table["label"].to_pylist())


def _predictions(found: miniature.MiniSet, inputs: Any) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForSequenceClassification

    answers = {}
    for name, folder in found.experts.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.inference_mode():
            answers[name] = model(**inputs).logits.argmax(-1).numpy()
    return answers


def test_experts_are_well_above_chance_and_below_perfect_and_differ_from_each_other(rte: miniature.MiniSet) -> None:
    inputs, labels = _validation(rte)
    answers = _predictions(rte, inputs)
    scores = {name: float((answer == labels).mean()) for name, answer in answers.items()}
    chance = max(float((labels == label).mean()) for label in (0, 1))
    assert all(chance + 0.1 < score < 0.99 for score in scores.values()), scores
    names = list(answers)
    for at, first in enumerate(names):
        for second in names[at + 1 :]:
            assert (answers[first] != answers[second]).any(), (first, second)


def test_experts_share_one_base_that_they_moved_away_from(rte: miniature.MiniSet) -> None:
    from safetensors.torch import load_file

    base = load_file(rte.base / "model.safetensors")
    for folder in rte.experts.values():
        expert = load_file(folder / "model.safetensors")
        shared = [name for name in expert if name.startswith("bert.")]
        assert {name for name in base if name.startswith("bert.")} == set(shared)
        assert all(base[name].shape == expert[name].shape for name in shared)
        assert any((base[name] != expert[name]).any() for name in shared)


def test_experts_beat_the_base_under_their_own_heads(rte: miniature.MiniSet) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    inputs, labels = _validation(rte)
    base = {k: v for k, v in load_file(rte.base / "model.safetensors").items() if k.startswith("bert.")}
    for name, folder in rte.experts.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.inference_mode():
            expert = float((model(**inputs).logits.argmax(-1).numpy() == labels).mean())
            model.load_state_dict(base, strict=False)
            plain = float((model(**inputs).logits.argmax(-1).numpy() == labels).mean())
        assert expert > plain + 0.1, name


def test_the_folders_name_the_tasks_labels(rte: miniature.MiniSet) -> None:
    for folder in rte.experts.values():
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {"0": "entailment", "1": "not_entailment"}
        assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_second_call_finds_the_miniature_without_importing_torch(rte: miniature.MiniSet) -> None:
    code = "import sys; from mergelab import miniature; miniature.build('rte'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("task", miniature.TASKS)
def test_data_has_the_hubs_schema_and_no_example_in_both_splits(task: str, cache: Path) -> None:
    import pyarrow.parquet as pq

    found = miniature.build(task, recipe=SKETCH)
    tables = {split: pq.read_table(found.data / f"{split}.parquet") for split in ("train", "validation")}
    seen = {}
    for split, table in tables.items():
        columns = [name for name in table.column_names if name.startswith("sentence")]
        seen[split] = set(zip(*(table[name].to_pylist() for name in columns), strict=True))
        assert len(seen[split]) == table.num_rows
        assert str(table.schema.field("label").type) == ("float" if task == "stsb" else "int64")
        assert str(table.schema.field("idx").type) == "int32"
    assert not seen["train"] & seen["validation"]
    features = json.loads(tables["train"].schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["_type"] == ("Value" if task == "stsb" else "ClassLabel")
    real = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue" / task / "validation.parquet"
    if real.is_file():
        assert pq.read_schema(real).remove_metadata() == tables["validation"].schema.remove_metadata()
        assert json.loads(pq.read_schema(real).metadata[b"huggingface"])["info"]["features"] == features


def test_a_grammar_that_repeats_itself_still_gives_each_example_once(cache: Path) -> None:
    import pyarrow.parquet as pq

    # CoLA's short sentences come up again within a thousand draws.
    found = miniature.build("cola", recipe=Recipe(documents=96, size=0.2))
    splits = [
        pq.read_table(found.data / f"{split}.parquet")["sentence"].to_pylist() for split in ("train", "validation")
    ]
    assert len({*splits[0], *splits[1]}) == len(splits[0]) + len(splits[1])


def test_two_builds_give_the_same_bytes_whatever_the_threads_and_leave_torch_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / str(threads)))
            torch.set_num_threads(threads)
            state = torch.random.get_rng_state()
            made.append(_bytes(miniature.build("rte", recipe=SKETCH)))
            assert torch.equal(torch.random.get_rng_state(), state)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]
    assert len(set(made[0].values())) == 6


def test_an_interrupted_build_leaves_nothing_that_looks_finished(cache: Path) -> None:
    def interrupt(_message: str, _done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        miniature.build("rte", progress=interrupt, recipe=SKETCH)
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.name in ("base", "rte")]
    assert not list(cache.rglob("*.safetensors"))
    assert miniature.build("rte", recipe=SKETCH).base.is_dir()


def test_two_processes_may_build_at_once(cache: Path) -> None:
    code = (
        "from mergelab import miniature; from mergelab.miniature.recipe import Recipe\n"
        "print(miniature.build('rte', recipe=Recipe(documents=96, size=0.02)).base)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ), text=True)
        for _ in range(2)
    ]
    answers = [process.communicate()[0].strip().splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert answers[0] == answers[1]
    assert not [path for path in Path(answers[0]).parent.iterdir() if path.is_dir() and path.name.startswith(".")]


def test_progress_is_reported_and_rises(cache: Path) -> None:
    told: list[float] = []
    miniature.build("rte", progress=lambda _message, done: told.append(done), recipe=SKETCH)
    assert told
    assert told == sorted(told)
    assert all(0 <= done <= 1 for done in told)


def test_the_tokenizer_reads_words_that_no_grammar_uses(cache: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(miniature.build("rte", recipe=SKETCH).base)
    tokens = tokenizer.tokenize("The teacher bought a zeppelin.")
    assert tokens[:4] == ["the", "teacher", "bought", "a"]
    assert "[UNK]" not in tokens
    ids = tokenizer("One.", "Two.")["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(ids)[at] for at in (0, -1)] == ["[CLS]", "[SEP]"]
