"""Where a folder's weights may be: each way to store them is read the same, or one line says what is amiss."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergelab.errors import ModelError
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.pretrained import load_model


@pytest.fixture
def parts(bert, tmp_path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A folder with a config and without weights, and its weights in two parts."""
    bert(seed=3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(tensors)
    return {name: tensors[name] for name in names[:9]}, {name: tensors[name] for name in names[9:]}


def _store(tensors: dict[str, Tensor], file) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, {"format": "pt"})


def _store_two(parts, folder, first: str, second: str, index: str | None = None) -> None:
    for tensors, name in zip(parts, (first, second), strict=True):
        _store(tensors, folder / name)
    if index is not None:
        names = {name: file for tensors, file in zip(parts, (first, second), strict=True) for name in tensors}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _same(checkpoint: Checkpoint, parts) -> bool:
    tensors = parts[0] | parts[1]
    return set(checkpoint.keys()) == tensors.keys() and all(
        torch.equal(checkpoint.get(name), value) for name, value in tensors.items()
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_may_point_into_sub_folders(parts, tmp_path, suffix) -> None:
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    _store_two(parts, tmp_path, f"weights/a/one.{suffix}", f"two.{suffix}", index)
    assert _same(open_checkpoint(tmp_path), parts)


@pytest.mark.parametrize(
    "where", ["../out.safetensors", "/etc/out.safetensors", "in/../../out.safetensors", "link/x.safetensors"]
)
def test_an_index_may_not_lead_out_of_the_folder(parts, tmp_path, where) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "config.json").write_text((tmp_path / "config.json").read_text())
    _store(parts[0], tmp_path / "elsewhere" / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(parts[0], where)}))
    with pytest.raises(ModelError, match="names files outside its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"),
        ("model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"),
        ("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
    ],
)
def test_shards_need_no_index_where_all_are_there(parts, tmp_path, names) -> None:
    _store_two(parts, tmp_path, *names)
    assert _same(open_checkpoint(tmp_path), parts)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match="of 2 shards number 2 is missing") as error:
        open_checkpoint(tmp_path, "expert")
    assert str(error.value).startswith("expert: ")


def test_shards_of_two_sets_are_not_mixed(parts, tmp_path) -> None:
    _store_two(parts, tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00003.safetensors")
    with pytest.raises(ModelError, match="several sets"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_without_an_index_is_an_error(parts, tmp_path) -> None:
    _store_two(
        (parts[0], parts[1] | dict(list(parts[0].items())[:1])),
        tmp_path,
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
    )
    with pytest.raises(ModelError, match=r"is in model-1-of-2.safetensors and in model-2-of-2.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp32-ema.bin"])
def test_the_only_variant_is_read(parts, tmp_path, name) -> None:
    _store(parts[0] | parts[1], tmp_path / name)
    assert _same(open_checkpoint(tmp_path), parts)


def test_a_variant_in_shards_is_read_by_its_index(parts, tmp_path) -> None:
    files = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
    _store_two(parts, tmp_path, *files, "model.safetensors.index.fp16.json")
    assert _same(open_checkpoint(tmp_path), parts)


def test_several_variants_are_one_line_that_names_them(parts, tmp_path) -> None:
    for variant in ("fp16", "non_ema"):
        _store(parts[0], tmp_path / f"model.{variant}.safetensors")
    with pytest.raises(ModelError, match=r"several variants of its weights \(fp16, non_ema\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("other", ["model.fp16.safetensors", "model-00001-of-00009.safetensors", "pytorch_model.bin"])
def test_plain_safetensors_win_over_everything_else(parts, tmp_path, other) -> None:
    _store(parts[0] | parts[1], tmp_path / "model.safetensors")
    _store({name: value + 1 for name, value in (parts[0] | parts[1]).items()}, tmp_path / other)
    assert _same(open_checkpoint(tmp_path), parts)


def test_the_file_that_the_config_names_is_read(parts, tmp_path) -> None:
    config = json.loads((tmp_path / "config.json").read_text())
    _store(parts[0] | parts[1], tmp_path / "weights" / "mine.safetensors")
    _store({name: value + 1 for name, value in (parts[0] | parts[1]).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "weights/mine.safetensors"}))
    assert _same(open_checkpoint(tmp_path), parts)
    for wrong, message in (("../mine.safetensors", "is not a file in"), ("none.safetensors", "which is not there")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": wrong}))
        with pytest.raises(ModelError, match=message):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_tensors_inside_a_training_frameworks_file_are_read(parts, tmp_path, key) -> None:
    others = {"epoch": 3, "lr_schedulers": [], "optimizer_states": [{"state": {0: torch.ones(2)}}], "version": "2.1"}
    torch.save({key: parts[0] | parts[1], **others}, tmp_path / "pytorch_model.bin")
    assert _same(open_checkpoint(tmp_path), parts)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": torch.ones(2), "b": 3}},
        {"state_dict": {"a": torch.ones(2)}, "model": {"a": torch.ones(2)}},
        {"state_dict": {"a": torch.ones(2)}, "b": torch.ones(2)},
        {"state_dict": {}, "epoch": 3},
    ],
)
def test_what_may_be_no_models_tensors_is_named(parts, tmp_path, content) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds values that are not tensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-1-of-1.safetensors", "pytorch_model.bin"])
def test_the_library_loads_what_it_reads(parts, tmp_path, name) -> None:
    tensors = parts[0] | parts[1]
    stored = {"state_dict": tensors} if name.endswith(".bin") else {f"module.{at}": t for at, t in tensors.items()}
    _store(stored, tmp_path / name)
    model = load_model(tmp_path, "text-classification")
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in tensors.items())
