"""A tiny BERT, GPT-2 and T5, data of three tasks, and the command that trains them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import Outcome
from tests.tasks.tiny import sentences, word_tokenizer
from tests.tasks.writers import writer

ROWS = 60
FEW = ("train.epochs=2", "train.batch_size=16", "train.holdout=0.2", "device=cpu")


@pytest.fixture(scope="session")
def trained_from(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bases, and of data that have a training split alone."""
    import transformers as t

    folder = tmp_path_factory.mktemp("finetuned")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        bert = t.BertForMaskedLM(t.BertConfig(**size, intermediate_size=64, max_position_embeddings=96))
        models = {"bert": (bert, word_tokenizer()), "gpt2": writer("gpt2"), "t5": writer("t5")}
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write(folder / "data" / "rte", rte(sentences(ROWS, 0)))
    pairs = zip(sentences(ROWS, 2), sentences(ROWS, 3), strict=True)
    columns = list(zip(*((one[:60], other[:30]) for one, other in pairs), strict=True))
    write(folder / "data" / "samsum", {"dialogue": list(columns[0]), "summary": list(columns[1])})
    text = [line if number % 4 else "" for number, line in enumerate(sentences(ROWS, 4))]
    write(folder / "data" / "wikitext-2-raw-v1", {"text": text})
    return folder


def rte(texts: list[str]) -> dict[str, Any]:
    """Rows of RTE whose label says whether a word occurs."""
    labels = [int("never" in text.split()) for text in texts]
    return {"sentence1": texts, "sentence2": texts[::-1], "label": labels, "idx": list(range(len(texts)))}


def write(folder: Path, columns: dict[str, Any], split: str = "train") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(np.array(values)) if name == "label" else values for name, values in columns.items()}
    pq.write_table(pa.table(arrays), folder / f"{split}.parquet")


@pytest.fixture
def place(trained_from: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with links to the bases and the data."""
    monkeypatch.setenv("MERGELAB_CACHE", str(trained_from / "cache"))
    for name in ("bert", "gpt2", "t5", "data"):
        (workplace / name).symlink_to(trained_from / name)
    return workplace


@pytest.fixture
def finetune(place: Path, mergelab_command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """``mergelab finetune task.data_dir=data ARGUMENTS``, in this process."""
    return partial(mergelab_command, "finetune", "task.data_dir=data", *FEW)
