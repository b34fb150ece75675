from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergelab.errors import KeyMismatch, ModelError
from mergelab.weights import hashing
from mergelab.weights.checkpoint import open_checkpoint


def same(checkpoint, tensors) -> bool:
    return set(checkpoint.keys()) == set(tensors) and all(
        torch.equal(checkpoint.get(key), value) and checkpoint.dtype(key) == value.dtype
        for key, value in tensors.items()
    )


@pytest.fixture
def one(tmp_path) -> Path:
    """A folder with three small tensors in one safetensors file."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    tensors = {
        "b.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(4, dtype=torch.bfloat16),
        "ids": torch.arange(3),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_safetensors_folder_is_read_as_it_is(bert, folder):
    model = bert()
    checkpoint = open_checkpoint(folder(model), "mine")
    assert checkpoint.name == "mine"
    assert checkpoint.config["model_type"] == "bert"
    assert same(checkpoint, model.state_dict())


def test_shards_are_found_by_their_index(bert, folder):
    model = bert()
    path = folder(model, max_shard_size="1KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert same(open_checkpoint(path), model.state_dict())


def test_dtypes_shapes_and_scalars_come_from_the_header(one):
    checkpoint = open_checkpoint(one)
    assert checkpoint.shape("b.weight") == (2, 3)
    assert (checkpoint.dtype("a.bias"), checkpoint.dtype("ids")) == (torch.bfloat16, torch.int64)
    assert checkpoint.name == str(one)


def test_listing_reads_no_data(tmp_path):
    """A file whose data is a hole of 64 GB opens and lists at once; only its header exists on the disk."""
    folder = tmp_path / "huge"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    size = 1 << 36
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.keys() == ["w"]
    assert checkpoint.shape("w") == (size // 4,)


def test_keys_come_in_the_order_of_the_data(one):
    places = {"a": 2, "b": 0, "c": 1}
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for name, i in places.items()}
    text = json.dumps(header).encode()
    (one / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes([7, 8, 9]))
    checkpoint = open_checkpoint(one)
    assert checkpoint.keys() == ["b", "c", "a"]
    assert [checkpoint.get(key).item() for key in "abc"] == [9, 7, 8]


def test_reading_maps_the_file_instead_of_copying_it(one):
    checkpoint = open_checkpoint(one)
    before = (one / "model.safetensors").read_bytes()
    tensor = checkpoint.get("b.weight")
    assert tensor.data_ptr() == checkpoint.get("b.weight").data_ptr()
    tensor.zero_()  # not allowed, but must not reach the file
    assert (one / "model.safetensors").read_bytes() == before


def test_a_bin_file_counts_tied_tensors_once(gpt2, bin_folder):
    model = gpt2()
    checkpoint = open_checkpoint(bin_folder(model))
    assert checkpoint.aliases() == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in checkpoint.keys()  # noqa: SIM118 - a source is no mapping
    assert torch.equal(checkpoint.get("lm_head.weight"), model.lm_head.weight)
    assert checkpoint.shape("lm_head.weight") == (12, 8)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_of_both_formats_are_read(bert, bin_folder, zipped):
    model = bert()
    checkpoint = open_checkpoint(bin_folder(model, _use_new_zipfile_serialization=zipped))
    assert same(checkpoint, model.state_dict())


def test_bin_shards_are_read(bert, bin_folder):
    model = bert()
    folder = bin_folder(model)
    (folder / "pytorch_model.bin").unlink()
    keys = list(model.state_dict())
    halves = {"pytorch_model-00001-of-00002.bin": keys[:5], "pytorch_model-00002-of-00002.bin": keys[5:]}
    for file, names in halves.items():
        torch.save({name: model.state_dict()[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(open_checkpoint(folder), model.state_dict())


def test_safetensors_are_preferred_to_a_bin_file(one):
    torch.save({"other": torch.ones(1)}, one / "pytorch_model.bin")
    assert "other" not in open_checkpoint(one).keys()  # noqa: SIM118 - a source is no mapping


def test_a_parameter_in_a_bin_file_is_read_without_its_gradient(tmp_path, bin_folder, bert):
    folder = bin_folder(bert(), tensors={"w": torch.nn.Parameter(torch.ones(2))})
    assert not open_checkpoint(folder).get("w").requires_grad


def test_the_folder_the_config_and_the_weights_must_be_there(tmp_path, one):
    with pytest.raises(ModelError, match="mine: no such folder"):
        open_checkpoint(tmp_path / "nowhere", "mine")
    with pytest.raises(ModelError, match="is a file"):
        open_checkpoint(one / "config.json")
    (one / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights; looked for model\.safetensors"):
        open_checkpoint(one)
    (one / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_checkpoint(one)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_safetensors_file_is_named(one, keep):
    file = one / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"mine: .*model\.safetensors is (truncated|not a safetensors file)"):
        open_checkpoint(one, "mine")


@pytest.mark.parametrize("content", [b"<html>404</html>" * 20, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_safetensors_is_named(one, content):
    (one / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file"):
        open_checkpoint(one)


def test_a_git_lfs_pointer_says_what_to_do(one):
    (one / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(ModelError, match=r"Git LFS pointer.*git lfs pull"):
        open_checkpoint(one)


def test_a_config_that_is_no_json_is_named(one):
    (one / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not readable JSON"):
        open_checkpoint(one)


class Surprise:
    def __reduce__(self):
        return (Path("/nonexistent").touch, ())


def test_a_bin_that_needs_arbitrary_unpickling_is_refused_without_running_it(bert, bin_folder):
    folder = bin_folder(bert(), tensors={"w": torch.ones(1), "x": Surprise()})
    with pytest.raises(ModelError, match=r"needs arbitrary unpickling .*save it as safetensors") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_bin_is_named(bert, bin_folder):
    file = bin_folder(bert()) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is truncated") as caught:
        open_checkpoint(file.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>" * 50])
def test_a_bin_that_is_no_pytorch_file_is_named(bert, bin_folder, content):
    file = bin_folder(bert()) / "pytorch_model.bin"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="is not a PyTorch file") as caught:
        open_checkpoint(file.parent)
    assert "\n" not in str(caught.value)


def test_a_bin_that_holds_other_things_than_tensors_is_named(bert, bin_folder):
    with pytest.raises(ModelError, match="values that are not tensors: epoch"):
        open_checkpoint(bin_folder(bert(), tensors={"w": torch.ones(1), "epoch": 3}))
    with pytest.raises(ModelError, match="holds a list"):
        open_checkpoint(bin_folder(bert(), tensors=[torch.ones(1)]))


@pytest.fixture
def sharded(bert, folder) -> Path:
    return folder(bert(), max_shard_size="2KB")


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match=f"names files that are not in .*: {shard.name}"):
        open_checkpoint(sharded)


def test_a_tensor_that_its_shard_does_not_hold_is_named(sharded):
    edit_index(sharded, lambda names: names.update({"ghost.weight": sorted(names.values())[0]}))
    with pytest.raises(ModelError, match=r"names tensors that model-.* does not hold: ghost\.weight"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_leaves_out_is_named(sharded):
    edit_index(sharded, lambda names: names.pop("classifier.bias"))
    with pytest.raises(ModelError, match=r"does not place there: classifier\.bias"):
        open_checkpoint(sharded)


def test_a_shard_that_the_index_leaves_out_is_noticed(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0].name

    def without_first(names):
        for key in [key for key, file in names.items() if file == first]:
            del names[key]

    edit_index(sharded, without_first)
    with pytest.raises(ModelError, match=r"names \d of \d shards"):
        open_checkpoint(sharded)


def test_an_index_may_not_reach_outside_its_folder(sharded):
    edit_index(sharded, lambda names: names.update({"classifier.bias": "../evil.safetensors"}))
    with pytest.raises(ModelError, match="outside its folder"):
        open_checkpoint(sharded)


def test_an_index_without_a_weight_map_is_an_error(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        open_checkpoint(sharded)


def test_an_unknown_tensor_is_an_error(one):
    with pytest.raises(KeyMismatch, match="'nothing'"):
        open_checkpoint(one).get("nothing")


def test_the_content_hash_is_the_files_own_and_the_same_anywhere(one, tmp_path):
    expected = hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()
    assert open_checkpoint(one).content_hash() == expected
    shutil.copytree(one, tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").content_hash() == expected


def test_the_content_hash_of_shards_changes_with_any_of_them(sharded):
    before = open_checkpoint(sharded).content_hash()
    shard = sorted(sharded.glob("*.safetensors"))[1]
    save_file({key: value + 1 for key, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert open_checkpoint(sharded).content_hash() != before


def test_a_hash_is_remembered_until_the_file_changes(one, monkeypatch):
    checkpoint = open_checkpoint(one)
    first = checkpoint.content_hash()
    with monkeypatch.context() as patch:
        patch.setattr(hashing.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert checkpoint.content_hash() == first
    content = bytearray((one / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (one / "model.safetensors").write_bytes(bytes(content))
    assert open_checkpoint(one).content_hash() != first


def test_a_cache_that_cannot_be_used_is_no_error(one, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "file"))
    assert len(open_checkpoint(one).content_hash()) == 64
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "broken"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sha256.json").write_text("{nonsense")
    assert len(open_checkpoint(one).content_hash()) == 64
