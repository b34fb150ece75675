"""What killed processes left unfinished is removed when the same is made again; what living ones make stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from mergelab.weights.unfinished import unfinished_file, unfinished_folder
from mergelab.weights.writer import save_folder

WRITING = """
import sys, torch
from mergelab.weights.source import TensorInfo
from mergelab.weights.writer import writing_folder
with writing_folder(sys.argv[1], layout=[TensorInfo("x", (4,), torch.float32)], like=sys.argv[2]) as writer:
    writer.write("x", torch.zeros(4))
    print("writing", flush=True)
    input()
"""
MAKING = """
import sys
from pathlib import Path
from mergelab.weights.unfinished import unfinished_file, unfinished_folder
with unfinished_folder(Path(sys.argv[1], "made")) as folder, unfinished_file(Path(sys.argv[1], "file")) as file:
    (folder / "part").touch()
    file.write_text("part")
    print("writing", flush=True)
    input()
"""
# A process of another container has its own process numbers, and may have the number of any other.
ELSEWHERE = ["unshare", "--user", "--map-root-user", "--uts", "--pid", "--fork"]


@pytest.fixture
def like(tmp_path: Path) -> Path:
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def start(code: str, *arguments: object, prefix: tuple[str, ...] | list[str] = ()) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "writing\n":
        assert prefix, "the process has not started"
        pytest.skip("this system has no namespaces for users")
    return process


def kill(process: subprocess.Popen[str]) -> None:
    for living in psutil.Process(process.pid).children(recursive=True) or [process]:
        living.kill()
    process.communicate()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


@pytest.mark.parametrize("prefix", [[], ELSEWHERE], ids=["here", "another container"])
def test_a_killed_writers_remains_are_removed_by_the_next_one(tmp_path: Path, like: Path, prefix: list[str]) -> None:
    target = tmp_path / "merged-x [1]"
    kill(start(WRITING, target, like, prefix=prefix))
    assert len(hidden(tmp_path)) == 1
    save_folder({"x": torch.ones(4)}, target, like=like)
    assert hidden(tmp_path) == []
    assert (target / "model.safetensors").is_file()


@pytest.mark.parametrize("prefix", [[], ELSEWHERE], ids=["here", "another container"])
def test_what_a_living_process_writes_stays(tmp_path: Path, like: Path, prefix: list[str]) -> None:
    living = start(WRITING, tmp_path / "merged", like, prefix=prefix)
    being_written = hidden(tmp_path)
    save_folder({"x": torch.ones(4)}, tmp_path / "merged", like=like)
    assert hidden(tmp_path) == being_written
    kill(living)


def test_only_what_is_unfinished_of_the_same_name_is_removed(tmp_path: Path, like: Path) -> None:
    kill(start(WRITING, tmp_path / "merged-2", like))
    (other,) = hidden(tmp_path)
    users = [f".merged.{name}" for name in ("partial", "tmp-1.partial", "lock", f"tmp-{'0' * 32}", "backup")]
    for name in users:
        (tmp_path / name).mkdir()
    (tmp_path / f".merged.tmp-{'1' * 32}.partial").symlink_to(like)
    save_folder({"x": torch.ones(4)}, tmp_path / "merged", like=like)
    assert hidden(tmp_path) == sorted([other, *users, f".merged.tmp-{'1' * 32}.partial"])
    assert (like / "config.json").is_file()


def test_the_remains_of_caches_are_removed_whole_or_by_name(tmp_path: Path) -> None:
    kill(start(MAKING, tmp_path))
    assert len(hidden(tmp_path)) == 2
    with unfinished_file(tmp_path / "file") as file:
        assert hidden(tmp_path)[0] == file.name
        file.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert len(hidden(tmp_path)) == 1
    with unfinished_folder(tmp_path / "another", remains_of="*") as folder:
        assert hidden(tmp_path) == [folder.name]
    assert hidden(tmp_path) == []
    assert (tmp_path / "another").is_dir()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), unfinished_folder(tmp_path / "folder"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), unfinished_file(tmp_path / "file"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
