from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergelab.errors import ModelError
from mergelab.weights import shards
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.source import TensorInfo, layout_of
from mergelab.weights.writer import save_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def like(bert, folder) -> Path:
    return folder(bert(), "like")


def same(model, tensors) -> bool:
    return all(torch.equal(model.state_dict()[key], value) for key, value in tensors.items())


def nothing_left(folder: Path) -> bool:
    return not folder.exists() and not [path for path in folder.parent.iterdir() if "partial" in path.name]


def test_a_saved_folder_loads_with_its_tokenizer(bert, like, tmp_path, tokenizer):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tensors = bert(seed=1).state_dict()
    save_folder(tensors.items(), tmp_path / "deep" / "out", like=like)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "deep" / "out", output_loading_info=True
    )
    assert same(model, tensors)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "deep" / "out")
    assert loaded("the cat", "on mat")["input_ids"] == tokenizer("the cat", "on mat")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_the_safetensors_library_reads_the_same_bytes(like, tmp_path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "naïve.é": torch.ones(2, dtype=torch.float16),
        "small": torch.ones(2).to(torch.float8_e4m3fn),
    }
    save_folder(tensors, tmp_path / "out", like=like)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert set(read) == set(tensors)
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype
        assert read[key].shape == value.shape
        assert torch.equal(read[key].float(), value.float())
        assert read[key].data_ptr() % value.element_size() == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(checkpoint.get(key).float(), value.float()) for key, value in tensors.items())


def test_large_models_are_divided_with_an_index(bert, like, tmp_path):
    from transformers import AutoModelForSequenceClassification

    tensors = bert(seed=1).state_dict()
    save_folder(tensors.items(), tmp_path / "out", like=like, max_shard_bytes=1500)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), tensors)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert sum(value.nbytes for value in load_file(path).values()) <= 1500 or len(load_file(path)) == 1


def test_a_tensor_above_the_limit_has_a_file_of_its_own(like, tmp_path):
    save_folder({name: torch.ones(3) for name in "abc"}, tmp_path / "out", like=like, max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_large_tensors_are_written_block_by_block(like, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(shards, "_BLOCK", 7)
    tensors = {"a": torch.randn(5, 9), "b": torch.randn(9, 5).T, "c": torch.randn(14)}
    save_folder(tensors, tmp_path / "out", like=like, dtype=dtype)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(read[key], value.to(dtype or value.dtype)) for key, value in tensors.items())


def test_sharded_in_and_out(bert, folder, tmp_path):
    source = open_checkpoint(folder(bert(), max_shard_size="2KB"))
    tensors = ((key, source.get(key)) for key in source.keys())  # noqa: SIM118 - a source is no mapping
    save_folder(tensors, tmp_path / "out", like=source.folder, layout=layout_of(source), max_shard_bytes=3000)
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written.get(key), value) for key, value in bert().state_dict().items())


@pytest.mark.parametrize("make", ["gpt2", "t5"])
def test_tied_tensors_are_stored_once_and_come_back_tied(make, folder, tmp_path, request):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model = request.getfixturevalue(make)(seed=1)
    save_folder(model.state_dict(), tmp_path / "out", like=folder(model, "like"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(stored) == len(list(model.named_parameters()))
    assert len(open_checkpoint(tmp_path / "out").aliases()) == len(model.state_dict()) - len(stored)
    auto = AutoModelForCausalLM if make == "gpt2" else AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(tmp_path / "out")
    assert same(loaded, model.state_dict())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_named_aliases_are_skipped_in_a_stream(gpt2, folder, tmp_path):
    model = gpt2()
    path = folder(model, "like")
    aliases = {"lm_head.weight": "transformer.wte.weight"}
    layout = [TensorInfo(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]
    save_folder(iter(model.state_dict().items()), tmp_path / "out", like=path, aliases=aliases, layout=layout)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert open_checkpoint(tmp_path / "out").aliases() == aliases


def test_an_alias_whose_tensor_is_not_written_is_kept(like, tmp_path):
    save_folder({"b": torch.ones(2)}, tmp_path / "out", like=like, aliases={"b": "a"})
    assert open_checkpoint(tmp_path / "out").keys() == ["b"]


@pytest.mark.parametrize("streamed", [False, True])
def test_another_dtype_is_stored_and_announced(bert, like, tmp_path, streamed):
    from transformers import AutoModelForSequenceClassification

    tensors = {**bert(seed=1).state_dict(), "bert.embeddings.position_ids": torch.arange(16)[None]}
    layout = [TensorInfo(key, tuple(value.shape), value.dtype) for key, value in tensors.items()] if streamed else None
    save_folder(tensors.items(), tmp_path / "out", like=like, dtype=torch.bfloat16, layout=layout)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["bert.embeddings.position_ids"].dtype == torch.int64
    assert torch.equal(stored["classifier.weight"], tensors["classifier.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.classifier.weight.dtype == torch.bfloat16


def test_the_config_says_the_dtype_of_the_weights(bert, like, tmp_path):
    save_folder(bert().to(torch.float16).state_dict(), tmp_path / "out", like=like)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_the_config_is_updated_and_only_what_belongs_to_a_model_is_copied(bert, like, tmp_path):
    (like / "generation_config.json").write_text('{"max_length": 7}')
    for unwanted in ("training_args.bin", "optimizer.pt", "README.md", "tf_model.h5"):
        (like / unwanted).write_text("x")
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates" / "tool.jinja").write_text("x")
    save_folder(bert().state_dict(), tmp_path / "out", like=like, config_updates={"id2label": {"0": "no", "1": "yes"}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["hidden_size"] == 8
    maps = {"special_tokens_map.json"}  # transformers 4 writes it with the tokenizer
    assert {path.name for path in (tmp_path / "out").iterdir()} - maps == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates",
    }


def test_an_empty_folder_is_taken(bert, like, tmp_path):
    (tmp_path / "out").mkdir()
    save_folder(bert().state_dict(), tmp_path / "out", like=like)
    assert open_checkpoint(tmp_path / "out").keys()


def test_tensors_may_arrive_in_any_order_and_are_stored_in_the_layouts(like, tmp_path):
    layout = [TensorInfo(name, (2,), torch.float32) for name in "abcd"]
    arriving = [(name, torch.full((2,), float(ord(name)))) for name in "cadb"]
    save_folder(iter(arriving), tmp_path / "out", like=like, layout=layout, max_shard_bytes=16)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.keys() == list("abcd")
    assert all(checkpoint.get(name)[0] == ord(name) for name in "abcd")


def test_a_stream_is_not_held_in_memory(like, tmp_path):
    """A tensor that was written is let go before the next one is asked for."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def stream():
        for i in range(10):
            counts.append(sum(ref() is not None for ref in alive))
            tensor = torch.full((100,), float(i))
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    layout = [TensorInfo(f"t{i}", (100,), torch.float32) for i in range(10)]
    save_folder(stream(), tmp_path / "out", like=like, layout=layout)
    assert max(counts) == 0


@pytest.mark.parametrize(
    ("arriving", "message"),
    [
        ([("a", torch.ones(2))], "announced tensors did not arrive: b"),
        (
            [("a", torch.ones(2)), ("b", torch.ones(2)), ("c", torch.ones(2))],
            "c is .* was not announced",
        ),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "a is written twice"),
        ([("a", torch.ones(3)), ("b", torch.ones(2))], r"a was announced as float32\[2\] but is float32\[3\]"),
        ([("a", torch.ones(2, dtype=torch.int64))], r"a was announced as float32\[2\] but is int64\[2\]"),
    ],
)
def test_what_was_not_announced_is_an_error_and_leaves_nothing(like, tmp_path, arriving, message):
    layout = [TensorInfo(name, (2,), torch.float32) for name in "ab"]
    with pytest.raises(ModelError, match=message):
        save_folder(arriving, tmp_path / "out", like=like, layout=layout)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_in_the_middle_passes_and_leaves_nothing(like, tmp_path, error):
    def stream():
        yield "a", torch.ones(2)
        raise error("from the reader")

    layout = [TensorInfo(name, (2,), torch.float32) for name in "ab"]
    with pytest.raises(error, match="from the reader"):
        save_folder(stream(), tmp_path / "out", like=like, layout=layout)
    assert nothing_left(tmp_path / "out")


def test_a_target_in_use_is_refused_before_anything_is_read(bert, like, tmp_path):
    def stream():
        pytest.fail("the tensors were asked for")
        yield

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "input").mkdir()
    (tmp_path / "link").symlink_to(like)
    for target, message in {
        "used": "exists and is not empty",
        "like": "is the folder of an input model",
        "link": "is the folder of an input model",
        "input": "is the folder of an input model",
        "file": "is a file",
        "file/inside": "cannot be written: Not a directory|cannot be written: File exists",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            save_folder(stream(), tmp_path / target, like=like, inputs=[tmp_path / "input"], layout=[])
        assert "\n" not in str(caught.value)
    assert (tmp_path / "used" / "precious.txt").read_text() == "x"


def test_a_model_to_take_after_must_have_a_config(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is not readable JSON \(No such file"):
        save_folder({"a": torch.ones(1)}, tmp_path / "out", like=tmp_path)


def test_too_little_room_is_said_before_anything_is_written(like, tmp_path):
    layout = [TensorInfo("w", (1 << 50,), torch.float32)]
    with pytest.raises(ModelError, match=r"out: needs 4503\.6 TB of disk space, but only .* are free"):
        save_folder(iter(()), tmp_path / "out", like=like, layout=layout)
    assert nothing_left(tmp_path / "out")


def test_a_dtype_without_a_place_in_safetensors_is_an_error(like, tmp_path):
    with pytest.raises(ModelError, match=r"w: torch\.complex128 cannot be stored"):
        save_folder({"w": torch.ones(1, dtype=torch.complex128)}, tmp_path / "out", like=like)


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


FULL = """
import resource, signal, sys, torch
from mergelab.errors import ModelError
from mergelab.weights.writer import save_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_folder({"a": torch.ones(10_000), "b": torch.ones(90_000)}, sys.argv[1], like=sys.argv[2])
except ModelError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_is_one_line_and_leaves_nothing(like, tmp_path):
    out = tmp_path / "out"
    text, _ = run(FULL, out, like).communicate(timeout=120)
    assert text == f"{out}: cannot be written: File too large\n"
    assert nothing_left(out)


KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.source import layout_of
from mergelab.weights.writer import save_folder

source = open_checkpoint(sys.argv[2])
keys = source.keys()

def save(out, stop, shard, ready):
    def stream():
        for i, key in enumerate([*keys, None]):
            if i == stop:
                os.write(ready, b"x")
                time.sleep(600)
            if key is not None:
                yield key, source.get(key)
    if stop is None:
        os.write(ready, b"x")
    save_folder(stream(), out, like=sys.argv[2], layout=layout_of(source), max_shard_bytes=shard)

for out, stop, shard, wait in eval(sys.argv[1]):
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        save(Path(out), len(keys) if stop == "end" else stop, shard, there)
        os._exit(0)
    os.read(here, 1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_killed_process_leaves_nothing_that_loads(like, tmp_path):
    """Killed before the first tensor, among them, and when all have been written but the config."""
    from transformers import AutoModelForSequenceClassification

    cases = [(str(tmp_path / f"at-{i}" / "out"), stop, shard, 0.0) for i, (stop, shard) in enumerate(STOPS)]
    text, _ = run(KILLED, cases, like).communicate(timeout=300)
    assert text == ""
    for out, stop, *_ in cases:
        assert not Path(out).exists()
        left = list(Path(out).parent.iterdir())
        assert len(left) == 1
        with pytest.raises(ModelError):
            open_checkpoint(left[0])
        with pytest.raises((OSError, ValueError)):
            AutoModelForSequenceClassification.from_pretrained(left[0])
        for file in left[0].glob("*.safetensors.part") if stop != "end" else ():
            with pytest.raises(Exception, match="header"):
                load_file(file)


STOPS = [(0, 10**9), (5, 10**9), ("end", 10**9), ("end", 2000)]


def test_whatever_stands_at_the_target_when_the_process_is_killed_is_whole(bert, like, tmp_path):
    cases = [(str(tmp_path / f"out-{i}"), None, 2000, 0.001 * i) for i in range(10)]
    text, _ = run(KILLED, cases, like).communicate(timeout=300)
    assert text == ""
    for out, *_ in cases:
        if Path(out).exists():
            written = open_checkpoint(out)
            assert all(torch.equal(written.get(key), value) for key, value in bert().state_dict().items())


def test_a_file_of_zeros_has_the_names_shapes_and_dtypes(tmp_path):
    layout = [
        TensorInfo("a", (3, 2), torch.bfloat16),
        TensorInfo("b", (), torch.int64),
        TensorInfo("c", (5,), torch.bool),
    ]
    shards.write_zeros(tmp_path / "model.safetensors", layout)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == {
        info.name: (info.shape, info.dtype) for info in layout
    }
    assert not any(tensor.any() for tensor in found.values())
