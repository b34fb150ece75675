"""Trouble with a cache is a warning, and the work goes on: it can all be made again."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergelab import cache
from mergelab.errors import MergeWarning
from mergelab.estimation.disk_cache import disk_cached
from mergelab.evaluation import scoring
from mergelab.evaluation.scoring import PredictionCache
from mergelab.models.made import made
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    cache._usable.cache_clear()
    cache.temporary_cache.cache_clear()


def accuracies(workplace: Path) -> list[float]:
    newest = sorted(workplace.glob("outputs/runs/*/*/result.json"))[-1]
    return [m["results"]["rte"]["report"]["accuracy"]["value"] for m in json.loads(newest.read_text())["models"]]


@pytest.mark.parametrize("place", ["a file", "below a file", "a dangling link"])
def test_a_cache_that_cannot_be_made_is_replaced_for_the_command(
    mergelab_command: Command, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = [*arguments, "method=soup", "task=rte", "tracking=none"]
    assert mergelab_command(*settings).code == 0
    expected = accuracies(workplace)
    if place == "a dangling link":
        (workplace / "bad").symlink_to(workplace / "nowhere")
    else:
        (workplace / "bad").touch()
    cache = workplace / "bad" / "er" if place == "below a file" else workplace / "bad"
    monkeypatch.setenv("MERGELAB_CACHE", str(cache))
    outcome = mergelab_command(*settings, "output=merged")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.err.replace("│", " ").split())
    assert "the cache" in said
    assert "MERGELAB_CACHE=<folder> names another" in said
    assert accuracies(workplace) == expected


def test_no_home_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MERGELAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(MergeWarning, match="the user's home cannot be used"):
        assert cache.cache_dir().is_dir()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "turned": lambda content: content[:60] + bytes(255 - each for each in content[60:90]) + content[90:],
    "other": lambda _: b"not a cache",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_measured_anew(tmp_path: Path, damage: str) -> None:
    cache = PredictionCache(tmp_path)
    for outputs in (np.ones((40, 3), dtype=np.float32), np.array(["a text"] * 3, dtype=object)):
        cache.put("key", outputs, 1.5)
        found = cache.get("key")
        assert found is not None
        assert np.array_equal(found[0], outputs)
        file = tmp_path / "key.npz"
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
        with pytest.warns(MergeWarning, match=f"the cache {tmp_path} cannot be used"):
            assert cache.get("key") is None
        cache.put("key", outputs, 1.5)
        assert cache.get("key") is not None


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_damaged_statistics_are_computed_anew(tmp_path: Path, damage: str) -> None:
    def compute() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return {"w": torch.ones(200)}, {"made": "yes"}

    disk_cached(tmp_path, {"of": 1}, compute)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.warns(MergeWarning, match=f"the cache {tmp_path} cannot be used"):
        tensors, metadata = disk_cached(tmp_path, {"of": 1}, compute)
    assert torch.equal(tensors["w"], torch.ones(200))
    assert metadata == {"made": "yes"}


def test_a_full_disk_under_the_cache_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scoring.np, "savez", full)
    with pytest.warns(MergeWarning, match="No space left on device"):
        PredictionCache(tmp_path).put("key", np.ones((2, 2)), 1.0)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(MergeWarning, match="No space left on device"):
        disk_cached(tmp_path, {"of": 1}, lambda: ({"w": torch.ones(2)}, {}))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_kept_is_made_for_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "encoder-decoders").touch()
    with pytest.warns(MergeWarning, match="encoder-decoders cannot be used"):
        folder = made("encoder-decoders", {"of": 1}, lambda place: (place / "config.json").write_text("{}") and None)
    assert (folder / "config.json").read_text() == "{}"
    shutil.rmtree(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = made("encoder-decoders", {"of": 1}, lambda place: (place / "config.json").write_text("{}") and None)
    assert kept.is_relative_to(tmp_path / "cache")


def test_a_cache_that_is_full_while_a_miniature_is_built_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from mergelab.experiment import locate

    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(cache, "_replacements", [])
    tried: list[Path] = []

    def build() -> Path:
        tried.append(cache.cache_dir())
        if len(tried) == 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return cache.cache_dir() / "mini"

    with pytest.warns(MergeWarning, match=r"full cannot be used \(I/O error: No space left"):
        made = locate._built(build)
    assert tried[0] == tmp_path / "full"
    assert made == cache.cache_dir() / "mini" == tried[1] / "mini"
    assert not made.is_relative_to(tmp_path / "full")
