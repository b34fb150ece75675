"""Whatever a weight file or an index holds, opening it ends in the tensors that are there or in one line."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from mergelab.errors import LONGEST_LINE, MergelabError, ModelError, one_line
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.files import weight_files

MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16), "c": torch.arange(3)}
WHOLE = save(TENSORS, {"format": "pt"})
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER: dict[str, Any] = json.loads(WHOLE[8 : 8 + LENGTH])
DATA = WHOLE[8 + LENGTH :]


def folder_with(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "bert"}')
    for name, content in files.items():
        (path / name.replace("__", ".").replace("_of_", "-of-")).write_bytes(content)
    return path


def opened(folder: Path) -> Checkpoint | None:
    """Open a folder and read all of it; None where one line refuses it."""
    try:
        checkpoint = open_checkpoint(folder, "x")
        for key in list(checkpoint.keys()):
            tensor = checkpoint.get(key)
            assert (tuple(tensor.shape), tensor.dtype) == (checkpoint.shape(key), checkpoint.dtype(key))
    except MergelabError as error:
        assert str(error).startswith(("x: ", "model x: ")), error  # noqa: PT017
        assert str(error).isprintable()  # noqa: PT017
        assert len(one_line(str(error))) <= LONGEST_LINE  # noqa: PT017
        return None
    return checkpoint


# ------------------------------------------------------------------------------------------------------- safetensors

NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-8, 64) | st.none() | st.text(max_size=3) | st.floats()
NAMES = st.text(max_size=12) | st.sampled_from(["a", "b.weight", "c", "__metadata__", "é.ü", "../x", "a\0b", ""])
DTYPES = (
    st.sampled_from(["F64", "F32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "U8", "C64", "f32"]) | NUMBERS
)
SHAPES = st.lists(NUMBERS, max_size=4) | st.lists(st.integers(0, 3), max_size=3) | NUMBERS
OFFSETS = st.lists(NUMBERS, max_size=3) | st.lists(st.integers(0, 60), min_size=2, max_size=2) | NUMBERS
ENTRIES = st.fixed_dictionaries({}, optional={"dtype": DTYPES, "shape": SHAPES, "data_offsets": OFFSETS})


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header in which some entries are changed, renamed, left out or new."""
    header = copy.deepcopy(HEADER)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(HEADER)))
        action = draw(st.sampled_from(["change", "rename", "drop", "add", "replace", "share"]))
        if action == "change" and isinstance(header.get(name), dict):
            header[name] = {**header[name], **draw(ENTRIES)}
        elif action == "rename" and name in header:
            header[draw(NAMES)] = header.pop(name)
        elif action == "drop":
            header.pop(name, None)
        elif action == "share" and name in header:
            header[draw(NAMES)] = header[name]
        else:
            header[draw(NAMES)] = draw(ENTRIES | NUMBERS | st.dictionaries(NAMES, NAMES | NUMBERS, max_size=2))
    text = json.dumps(header).encode()
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@MANY
@given(text=headers(), length=st.none() | st.integers(0, 2**64 - 1), data=st.just(DATA) | st.binary(max_size=64))
def test_a_safetensors_file_is_read_as_its_library_reads_it_or_refused(
    text: bytes, length: int | None, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    folder = folder_with(tmp_path_factory.mktemp("hostile") / "model", model__safetensors=content)
    checkpoint = opened(folder)
    if checkpoint is not None:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert set(checkpoint.keys()) == set(file.keys())
            for key in list(checkpoint.keys()):
                ours, theirs = checkpoint.get(key), file.get_tensor(key)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@MANY
@given(at=st.integers(0, len(WHOLE) - 1), bytes_=st.binary(min_size=1, max_size=12), cut=st.integers(0, 40))
def test_a_damaged_safetensors_file_is_read_or_refused(
    at: int, bytes_: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = WHOLE[:at] + bytes_ + WHOLE[at + len(bytes_) : len(WHOLE) - cut]
    opened(folder_with(tmp_path_factory.mktemp("hostile") / "model", model__safetensors=content))


# ------------------------------------------------------------------------------------------------------------- index

SHARD = "model-00001-of-00001.safetensors"
PLACES = st.sampled_from(
    [SHARD, "../outside.safetensors", "ABSOLUTE", "", ".", "..", "sub/../../outside.safetensors", "loop.safetensors",
     "model.safetensors.index.json", "config.json", "loop.safetensors/x", "out/outside.safetensors", "a\0b", "a\0b/c",
     "x" * 300, "..\\x", "sub"]
) | st.text(max_size=20)  # fmt: skip


@MANY
@given(
    places=st.dictionaries(st.sampled_from([*TENSORS, "d"]) | NAMES, PLACES | NUMBERS, max_size=4),
    whole=st.booleans(),
)
def test_an_index_leads_nowhere_else(
    places: dict[str, Any], whole: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("hostile")
    folder = folder_with(home / "model")
    save_file(TENSORS, folder / SHARD)
    save_file({key: torch.full_like(value, 7) for key, value in TENSORS.items()}, home / "outside.safetensors")
    (folder / "sub").mkdir()
    (folder / "out").symlink_to(home)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    weight_map = {**(dict.fromkeys(TENSORS, SHARD) if whole else {}), **places}
    weight_map = {key: str(home / "outside.safetensors") if at == "ABSOLUTE" else at for key, at in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = opened(folder)
    if checkpoint is not None:
        assert weight_map == dict.fromkeys(TENSORS, SHARD)
        assert all(torch.equal(checkpoint.get(key), value) for key, value in TENSORS.items())


DIGITS = st.sampled_from(["00000", "00001", "00002", "1", "2", "3", "٣", "9" * 40, "99999999"])


@MANY
@given(st.lists(st.tuples(DIGITS, DIGITS, st.sampled_from([".safetensors", ".bin"])), min_size=1, max_size=4))
def test_odd_names_of_shards_are_a_whole_set_or_refused(parts: list[tuple[str, str, str]]) -> None:
    names = {f"model-{number}-of-{count}{suffix}" for number, count, suffix in parts}
    try:
        found = weight_files(names)
    except ModelError as error:
        assert len(one_line(str(error))) <= LONGEST_LINE  # noqa: PT017
        return
    assert found is not None
    numbers = [int(name.split("-")[1]) for name in found.files]
    assert numbers == list(range(1, int(found.files[0].split("-of-")[1].split(".")[0]) + 1))
    assert {name for name in names if name.endswith(Path(found.files[0]).suffix)} == set(found.files)


# ------------------------------------------------------------------------------------------------------------ pickles


class Calls:
    """What runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.file),)


def saved(content: Any, *, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
@settings(MANY, max_examples=100)
@given(at=st.floats(0, 1, exclude_max=True), bytes_=st.binary(min_size=1, max_size=6), cut=st.integers(0, 40))
def test_a_damaged_pickle_is_read_or_refused_and_runs_nothing(
    zipped: bool, at: float, bytes_: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("hostile")
    content = saved({**TENSORS, "evil": Calls(home / "made")} if at < 0.2 else TENSORS, zipped=zipped)
    start = int(at * len(content))
    content = content[:start] + bytes_ + content[start + len(bytes_) : len(content) - cut]
    opened(folder_with(home / "model", pytorch_model__bin=content))
    assert sorted(path.name for path in home.iterdir()) == ["model"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"a": evil}, lambda evil: [{"state_dict": evil}]])
def test_no_pickle_runs(protocol: int, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    content = wrap(Calls(tmp_path / "made"))
    pickle.loads(pickle.dumps(content, protocol))
    (tmp_path / "made").rmdir()  # it does what it says where it is trusted
    folder = folder_with(tmp_path / "model", pytorch_model__bin=pickle.dumps(content, protocol))
    assert opened(folder) is None
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(3)], {"a": 5, "b": torch.zeros(2)}, {1: torch.zeros(2)}, torch.zeros(2), {}, None,
     {"a": torch.eye(3).to_sparse()}, {"a": torch.zeros(2, device="meta")}, {"a": {"b": torch.zeros(1)}}],
    ids=["list", "numbers", "names", "tensor", "empty", "none", "sparse", "meta", "nested"],
)  # fmt: skip
def test_pickles_of_other_things_are_read_or_refused(content: Any, tmp_path: Path) -> None:
    opened(folder_with(tmp_path / "model", pytorch_model__bin=saved(content, zipped=True)))
