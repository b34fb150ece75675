"""Merging in parts: what goes to disk is never whole in memory, and has the bits of a merge in memory."""

from __future__ import annotations

import pytest
import torch

from mergelab.engine import run
from mergelab.engine.registry import get_method
from mergelab.engine.request import checked_job
from mergelab.engine.run import merge_in_parts
from mergelab.engine.warm_session import MergeSession
from tests.methods.toy import SHAPES, aligned, merged, toy_models

LENGTHS = (7, 100, 64, 1, 33, 0, 250, 100, 100, 16, 5, 90, 3, 77, 64, 64, 128)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead", [1, 300, 1000])
def test_parts_have_the_bits_of_whole_tensors_until_the_next_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, ahead: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    dicts = [
        {f"t{i}": torch.randn(length, generator=generator) for i, length in enumerate(LENGTHS * 4)} for _ in range(3)
    ]
    models = aligned(dicts[0], dicts[1:])
    expected = merged("task_arithmetic", models)
    monkeypatch.setattr(run, "CHUNK", 37)
    monkeypatch.setattr(run, "AHEAD", ahead)
    torch.set_num_threads(threads)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in expected}
    places = set()
    for name, start, entries in merge_in_parts(checked_job(get_method("task_arithmetic"), {}, models)):
        assert start == sum(map(len, found[name]))
        assert len(entries) <= 37
        found[name].append(entries.clone())
        places.add(entries.untyped_storage().data_ptr())
    assert all(torch.equal(torch.cat(parts), expected[name]) for name, parts in found.items())
    assert len(places) == 1  # one piece of memory for all


def test_only_the_wanted_tensors_come_in_parts_and_aliases_with_what_they_name() -> None:
    models = toy_models(2)
    whole = merged("ties", models)
    job = checked_job(get_method("ties"), {}, models)
    assert {part.name for part in merge_in_parts(job)} == set(whole)
    parts = [(name, entries.clone()) for name, _, entries in merge_in_parts(job, {"gate", "ids", "tied"})]
    assert [name for name, _ in parts] == ["tied", "gate", "ids"]
    assert all(torch.equal(entries, whole[name].reshape(-1)) for name, entries in parts)


@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "soup", "slerp"])
def test_a_warm_merge_in_another_dtype_is_rounded_once(name: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    models = toy_models(2, dtype=stored)
    targets = {at: torch.empty(shape, dtype=wanted) for at, shape in SHAPES.items()}
    session = MergeSession(models, targets, dtype=wanted)
    job = checked_job(get_method(name), {}, models, dtype=wanted)
    for _ in range(2):
        session.merge(get_method(name), {})
        for part in merge_in_parts(job, SHAPES.keys()):
            assert torch.equal(targets[part.name].reshape(-1)[part.start :][: len(part.entries)], part.entries)
