"""The remains of a killed writer are removed when the target is written again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergelab.weights.writer import save_folder

KILLED = """
import os, sys, torch
from mergelab.weights.source import TensorInfo
from mergelab.weights.writer import writing_folder
with writing_folder(sys.argv[1], layout=[TensorInfo("x", (4,), torch.float32)], like=sys.argv[2]) as writer:
    writer.write("x", torch.zeros(4))
    os._exit(9)
"""


@pytest.fixture
def like(tmp_path: Path) -> Path:
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*.partial"))


def test_a_killed_writers_remains_are_removed_by_the_next_one(tmp_path: Path, like: Path) -> None:
    target = tmp_path / "merged-x [1]"
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), str(like)], check=False).returncode == 9
    assert len(hidden(tmp_path)) == 1
    save_folder({"x": torch.ones(4)}, target, like=like)
    assert hidden(tmp_path) == []
    assert (target / "model.safetensors").is_file()


def test_what_others_are_writing_stays(tmp_path: Path, like: Path) -> None:
    target = tmp_path / "merged"
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), str(like)], check=False).returncode == 9
    (left,) = hidden(tmp_path)
    machine, process, rest = left.removeprefix(".merged.").split("-")
    alive, elsewhere, other = (
        f".merged.{machine}-{os.getpid()}-{rest}",
        f".merged.0000000-{process}-{rest}",
        f".merged-2.{machine}-{process}-{rest}",
    )
    for name in (alive, elsewhere, other):
        (tmp_path / name).mkdir()
    save_folder({"x": torch.ones(4)}, target, like=like)
    assert hidden(tmp_path) == sorted([alive, elsewhere, other])
