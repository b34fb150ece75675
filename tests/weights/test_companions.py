"""What belongs to a model goes with it: every file that is neither weights nor left by training; no foreign link."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergelab.errors import MergeWarning
from mergelab.models.tokens import copy_companions
from mergelab.weights.companions import companion_files, is_companion
from mergelab.weights.writer import save_folder

COPIED = [
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "normalizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "LICENSE",
    "NOTICE.txt",
    "modeling_my.py",
    "nested/configuration_my.py",
    "source.spm",
    "spiece.model",
    "vocab.json",
    "custom_generate/generate.py",
]
LEFT = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.ckpt.index",
    "consolidated.00.pth",
    "model-q4.gguf",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.xml",
    "original/params.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "checkpoint-500/config.json",
    "checkpoint-500/tokenizer.json",
    "runs/Jan01/events.out.tfevents.1",
    "wandb/run-1/config.yaml",
    "events.out.tfevents.1",
    "eval_results.json",
    ".git/config",
    ".gitattributes",
    ".cache/huggingface/download/model.lock",
    "__pycache__/modeling_my.cpython-311.pyc",
    "README.md",
    "hf_quant_config.json",
    "other/config.json",
    "other/model.safetensors",
    "other/tokenizer.json",
]


def add(folder: Path, name: str, content: str = "") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content or f"what is in {name}")


def saved_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(bert: Callable[..., Any], folder: Callable[..., Path]) -> Path:
    return folder(bert())


def merged(like: Path, *models: Path) -> Path:
    target = like.parent / "out"
    save_folder(load_file(like / "model.safetensors"), target, like=like, inputs=[like, *models])
    return target


def test_every_file_that_belongs_to_a_model_is_copied_and_nothing_else(model: Path) -> None:
    before = saved_files(model)
    for name in [*COPIED, *LEFT]:
        add(model, name)
    out = merged(model)
    assert saved_files(out) == before | set(COPIED)
    assert all((out / name).read_text() == f"what is in {name}" for name in COPIED)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", ""])
def test_what_lies_outside_the_folder_is_no_companion(name: str) -> None:
    assert not is_companion(name)


def test_code_is_copied_and_not_run(model: Path) -> None:
    add(model, "modeling_my.py", "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_my.Mine"}}))
    out = merged(model)
    assert (out / "modeling_my.py").read_text() == (model / "modeling_my.py").read_text()
    assert json.loads((out / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_my.Mine"}
    assert not (model / "ran").exists()
    assert not (out / "ran").exists()


@pytest.mark.parametrize("kind", ["absolute", "relative", "folder", "of a folder", "broken"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(kind: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secrets" / "key"
    secret.parent.mkdir()
    secret.write_text("secret")
    (model / "sub").mkdir()
    link, target = {
        "absolute": (model / "LICENSE", secret),
        "relative": (model / "sub" / "notes.txt", Path("../../secrets/key")),
        "folder": (model / "extra", secret.parent),
        "of a folder": (model / "sub" / "deeper", Path("../../secrets")),
        "broken": (model / "LICENSE", tmp_path / "nowhere"),
    }[kind]
    link.symlink_to(target)
    with pytest.warns(MergeWarning, match=f"links that lead out of the folder: {link.relative_to(model)}"):
        out = merged(model)
    assert not any("secret" in path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix == ".txt")
    assert not (out / link.relative_to(model)).exists()


def test_links_inside_the_folder_and_links_to_weights_are_followed(model: Path, tmp_path: Path) -> None:
    add(model, "texts/LICENSE")
    (model / "LICENSE").symlink_to("texts/LICENSE")
    os.rename(model / "model.safetensors", tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    linked = tmp_path / "latest"
    linked.symlink_to(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = merged(linked)
    assert (out / "LICENSE").read_text() == "what is in texts/LICENSE"
    assert not (out / "LICENSE").is_symlink()


def test_the_hubs_cache_links_to_its_own_files(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40)
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    add(model, "LICENSE")
    add(model, "1_Pooling/config.json")
    for name in saved_files(model):
        (snapshot / name).parent.mkdir(exist_ok=True)
        os.rename(model / name, blobs / name.replace("/", "-"))
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{name.replace('/', '-')}")
    (tmp_path / "hub" / "token").write_text("secret")
    (snapshot / "NOTICE").symlink_to("../../../token")
    with pytest.warns(MergeWarning, match="out of the folder: NOTICE;"):
        out = merged(snapshot)
    assert {"LICENSE", "1_Pooling/config.json", "tokenizer.json"} <= saved_files(out)
    assert "NOTICE" not in saved_files(out)


def with_modules(folder: Path, value: float) -> Path:
    add(folder, "modules.json", json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    add(folder, "1_Pooling/config.json", "{}")
    add(folder, "2_Dense/config.json", "{}")
    save_file({"linear.weight": torch.full((2, 2), value)}, folder / "2_Dense" / "model.safetensors")
    return folder


def test_weights_of_further_modules_are_copied_only_where_all_models_have_the_same(
    bert: Callable[..., Any], folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = folder(bert(), "base")
    first, same, other = (
        with_modules(folder(bert(), name), value) for name, value in zip("abc", (1, 1, 2), strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = merged(first, base, same)
    assert {"2_Dense/model.safetensors", "2_Dense/config.json", "1_Pooling/config.json"} <= saved_files(out)
    os.rename(out, tmp_path / "first out")
    with pytest.warns(MergeWarning, match="not copied: 2_Dense/model.safetensors; the models differ there"):
        out = merged(first, base, other)
    assert "2_Dense/model.safetensors" not in saved_files(out)
    assert "2_Dense/config.json" in saved_files(out)


def test_a_sentence_transformer_gives_the_same_vectors_after_a_merge_with_itself(model: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    words = modules.Transformer(str(model))
    width = 8
    parts = [words, modules.Pooling(width, pooling_mode="cls"), modules.Dense(width, 4), modules.Normalize()]
    whole = library.SentenceTransformer(modules=parts, device="cpu")
    whole.save(str(model.parent / "st"))
    saved = library.SentenceTransformer(str(merged(model.parent / "st")), device="cpu")
    texts = ["the cat sat", "on the mat"]
    assert torch.equal(torch.as_tensor(saved.encode(texts)), torch.as_tensor(whole.encode(texts)))


def test_a_tokenizers_files_and_the_others_are_together_all(model: Path, tmp_path: Path) -> None:
    for name in COPIED:
        add(model, name)
    for name, tokenizer in (("tokenizer", True), ("others", False)):
        (tmp_path / name).mkdir()
        copy_companions(model, tmp_path / name, tokenizer=tokenizer)
    of_tokenizer, others = saved_files(tmp_path / "tokenizer"), saved_files(tmp_path / "others")
    assert not of_tokenizer & others
    assert of_tokenizer | others | {"chat_template.jinja"} == set(companion_files(model))
    assert {"tokenizer.json", "spiece.model", "normalizer.json"} <= of_tokenizer
    assert {"LICENSE", "modeling_my.py", "1_Pooling/config.json"} <= others
