"""Batches are computed side by side, each on one core: neither results nor torch's settings depend on how many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from mergelab.evaluation import side_by_side as module
from mergelab.evaluation.classification import Encoded, predict
from mergelab.evaluation.generation import encode_prompts
from mergelab.evaluation.options import EvaluationOptions
from mergelab.evaluation.perplexity import encode_windows
from mergelab.evaluation.side_by_side import side_by_side
from mergelab.ops import threads
from mergelab.tasks.data import TaskData
from mergelab.tasks.loading import load_task
from tests.vocabularies import llama

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 5])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let torch have this many threads, on a machine with as many cores."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_usable_cores", lambda: 8)
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_as_many_batches_as_threads_run_at_once_each_on_one_core(count: int) -> None:
    together = threading.Barrier(count, timeout=30)

    def work(batch: int) -> tuple[int, int, bool]:
        together.wait()
        return batch, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert list(side_by_side(work, range(3 * count), CPU)) == [(batch, 1, True) for batch in range(3 * count)]


def test_where_a_batch_changes_the_model_there_is_one_at_a_time(count: int) -> None:
    running = []

    def work(batch: int) -> int:
        running.append(batch)
        assert running == [batch]
        return running.pop()

    assert list(side_by_side(work, range(20), CPU, alone=True)) == list(range(20))


def test_an_error_and_a_stop_end_the_rest(count: int) -> None:
    done: list[int] = []

    def work(batch: int) -> int:
        if batch == 3:
            raise ValueError("three")
        done.append(batch)
        return batch

    with pytest.raises(ValueError, match="three"):
        list(side_by_side(work, range(1000), CPU))
    found = side_by_side(lambda batch: done.append(batch), range(1000), CPU)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(done) < 100


def test_no_more_threads_than_the_container_may_use_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    for cores, expected in ((1, 1), (4, 4), (64, 6)):
        monkeypatch.setattr(threads, "_usable_cores", lambda cores=cores: cores)
        assert threads.thread_count() == expected
    torch.set_num_threads(before)


def classifier() -> tuple[torch.nn.Module, Encoded]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=3
    )
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 60, size=70)
    ids = draw.integers(5, 50, size=int(lengths.sum()))
    return BertForSequenceClassification(config).eval(), Encoded({"input_ids": ids}, lengths, 0)


def outputs(kind: str, folder: Path, *, stop: bool = False) -> Callable[[], Any]:
    def watch(members: Any, found: Any) -> None:
        if stop:
            raise KeyError("stopped")

    if kind == "classification":
        model, encoded = classifier()
        return lambda: predict(model, encoded, EvaluationOptions(batch_tokens=200), watch=watch)
    generator = AutoModelForCausalLM.from_pretrained(llama(folder / "llama", 0)).eval()
    reads = AutoTokenizer.from_pretrained(folder / "llama")
    words = ["alpha", "beta", "gamma", "delta", "eps"]
    draw = np.random.default_rng(1)
    texts = tuple((" ".join(draw.choice(words, size=int(draw.integers(1, 9)))),) for _ in range(24))
    zeros = np.zeros(len(texts), dtype=np.int64)
    spec = load_task("prompts" if kind == "generation" else "legal")
    data = TaskData(spec, texts, zeros, np.arange(len(texts)), zeros, "validation", "folder", "", "")
    if kind == "generation":
        prompts = encode_prompts(data, generator.config, reads)
        return lambda: prompts.run(generator, EvaluationOptions(batch_tokens=200), watch=watch)
    windows = encode_windows(data, generator.config, reads, 32)
    return lambda: windows.run(generator, EvaluationOptions(batch_tokens=200), watch=watch)


@pytest.mark.parametrize("kind", ["classification", "generation", "perplexity"])
def test_no_bit_depends_on_the_number_of_threads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = outputs(kind, tmp_path)
    before, found, used = torch.get_num_threads(), [], []
    monkeypatch.setattr(threads, "_usable_cores", lambda: 8)
    counted = module.thread_count
    monkeypatch.setattr(module, "thread_count", lambda: used.append(counted()) or used[-1])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(run())
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)
    assert used == [1, 2, 5]
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["classification", "generation", "perplexity"])
def test_where_an_evaluation_is_stopped_torch_has_its_threads_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the exception is still held, as a caller may do."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_usable_cores", lambda: 8)
    run = outputs(kind, tmp_path, stop=True)
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError) as held:
            run()
        assert torch.get_num_threads() == 3
        assert held.value.args == ("stopped",)
    finally:
        torch.set_num_threads(before)
