"""What mergelab asks of a model hub, against one on loopback; each in a process of its own, with a fresh cache."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub_server import HubServer
from tests.standins import BERT_BASE, BIN_ONLY, NAMED_LABELS

Client = Callable[..., Any]

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
FETCH = """
from mergelab.models import hub
folder = hub.fetch({0!r}, {1!r})
result = dict(files=sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()),
              folder=folder, commit=hub.commit(folder), again=hub.cached({0!r}, {1!r}))
"""
CACHED = "from mergelab.models import hub\nresult = hub.cached({0!r}, {1!r})"
REACHABLE = "from mergelab.models import hub\nresult = hub.reachable({})"


def test_fetch_brings_config_card_tokenizer_and_safetensors_and_nothing_else(hub: HubServer, client: Client) -> None:
    answer = client(FETCH.format(BERT_BASE, None))
    assert set(answer["files"]) == {"README.md", "config.json", "model.safetensors", *TOKENIZER}
    assert answer["again"] == answer["folder"]
    downloaded = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert downloaded == set(answer["files"])


def test_fetch_takes_pytorch_weights_only_where_there_are_no_safetensors(hub: HubServer, client: Client) -> None:
    answer = client(FETCH.format(BIN_ONLY, None))
    assert set(answer["files"]) == {"config.json", "pytorch_model.bin", *TOKENIZER}
    assert answer["again"] == answer["folder"]


def test_fetch_brings_the_index_and_every_shard(empty_hub: HubServer, client: Client, sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    empty_hub.add_model("org/sharded", sharded)
    answer = client(FETCH.format("org/sharded", None))
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert set(answer["files"]) == {"config.json", "model.safetensors.index.json", *shards, *TOKENIZER}
    (Path(answer["folder"]) / min(shards)).unlink()
    assert client(CACHED.format("org/sharded", None)) is None


@pytest.mark.parametrize("way", ["sub-folder", "no index", "variant"])
def test_fetch_brings_weights_wherever_they_are(way: str, empty_hub: HubServer, client: Client, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    if way == "sub-folder":
        (sharded / "weights").mkdir()
        (sharded / shards[1]).rename(sharded / "weights" / shards[1])
        index.write_text(index.read_text().replace(shards[1], f"weights/{shards[1]}"))
        expected = {index.name, shards[0], f"weights/{shards[1]}"}
    elif way == "no index":
        index.unlink()
        expected = set(shards)
    else:
        for name in (index.name, *shards):
            (sharded / name).unlink()
        save_file({"a": torch.ones(1)}, sharded / "model.fp16.safetensors", {"format": "pt"})
        expected = {"model.fp16.safetensors"}
    empty_hub.add_model("org/other", sharded)
    answer = client(FETCH.format("org/other", None))
    assert set(answer["files"]) == {"config.json", *expected, *TOKENIZER}
    assert client(CACHED.format("org/other", None)) == answer["folder"]


def test_fetch_gives_generation_settings_chat_templates_and_a_decoders_tokenizer_too(
    empty_hub: HubServer, client: Client, checkpoint: Path
) -> None:
    extra = ["generation_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    extra += ["decoder_tokenizer/tokenizer.json", "decoder_tokenizer/tokenizer_config.json"]
    for name in extra:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    empty_hub.add_model("org/chat", checkpoint)
    assert set(extra) <= set(client(FETCH.format("org/chat", None))["files"])


def test_fetch_brings_all_that_belongs_to_a_model_and_neither_other_formats_nor_training_state(
    empty_hub: HubServer, client: Client, checkpoint: Path
) -> None:
    belongs = [
        "LICENSE",
        "README.md",
        "mergelab.json",
        "modeling_my.py",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    ]
    left = ["onnx/model.onnx", "tf_model.h5", "optimizer.pt", "runs/now/events.out.1", "extra/model.bin"]
    for name in [*belongs, *left]:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("{}")
    (checkpoint / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    empty_hub.add_model("org/sentences", checkpoint)
    files = set(client(FETCH.format("org/sentences", None))["files"])
    assert {*belongs, "modules.json"} <= files
    assert not files & set(left)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_fetched_with_its_tokenizer(
    with_config: bool, empty_hub: HubServer, client: Client, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    for name in ("adapter_model.safetensors", "adapter_model.bin", "optimizer.pt", "tokenizer.json"):
        (folder / name).write_bytes(b"content")
    if with_config:
        shutil.copy(checkpoint / "config.json", folder)
    empty_hub.add_model("org/adapter", folder)
    assert client(CACHED.format("org/adapter", None)) is None
    answer = client(FETCH.format("org/adapter", None))
    own = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert set(answer["files"]) == own | ({"config.json"} if with_config else set())
    assert client(CACHED.format("org/adapter", None)) is not None


def test_an_adapter_of_the_adapters_library_is_fetched_with_its_head(
    empty_hub: HubServer, client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"config": {"architecture": "lora"}, "model_name": "org/base"}')
    own = {"pytorch_adapter.bin", "head_config.json", "pytorch_model_head.bin"}
    for name in (*own, "adapter.safetensors", "model_head.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(b"content")
    empty_hub.add_model("org/adapter", folder)
    assert set(client(FETCH.format("org/adapter", None))["files"]) == own | {"adapter_config.json"}
    assert client(CACHED.format("org/adapter", None)) is not None


def test_an_adapter_of_another_library_on_the_hub_is_said_to_be_one(
    empty_hub: HubServer, client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "model": "org/base"}')
    (folder / "adapters.safetensors").write_bytes(b"weights")
    empty_hub.add_model("org/adapter", folder)
    answer = client(FETCH.format("org/adapter", None))
    assert answer["error"] == "HubError"
    line = answer["message"]
    assert line.startswith("model org/adapter: is a LoRA adapter of org/base (lora): adapters of PEFT and the Adapters")
    assert "\n" not in line


def test_a_revision_is_fetched_and_told_by_its_commit(
    hub: HubServer, client: Client, bert_checkpoints: Mapping[str, Path]
) -> None:
    main = hub.add_model("org/model", bert_checkpoints[BERT_BASE])
    tagged = hub.add_model("org/model", bert_checkpoints[NAMED_LABELS], revision="v2")
    assert client(FETCH.format("org/model", "v2"))["commit"] == tagged
    assert client(FETCH.format("org/model", tagged))["commit"] == tagged
    assert client(CACHED.format("org/model", None)) is None
    assert client(FETCH.format("org/model", None))["commit"] == main


def test_a_folder_outside_the_cache_has_no_commit(client: Client, tmp_path: Path) -> None:
    call = f"from pathlib import Path\nfrom mergelab.models import hub\nresult = hub.commit(Path({str(tmp_path)!r}))"
    assert client(call) is None


def test_a_fetch_writes_nothing_where_there_is_no_terminal(hub: HubServer, client: Client) -> None:
    quiet = "import contextlib, io\nwith contextlib.redirect_stderr(io.StringIO()) as written:\n    {}"
    code = FETCH.format(BERT_BASE, None).strip().replace("\n", "\n    ")
    assert client(f"{quiet.format(code)}\nresult = written.getvalue()") == ""


def test_what_the_cache_has_is_not_downloaded_again(hub: HubServer, client: Client) -> None:
    first = client(FETCH.format(BERT_BASE, None))
    hub.requests.clear()
    assert client(FETCH.format(BERT_BASE, None)) == first
    assert not [path for _, path in hub.requests if "/resolve/" in path]


def test_cached_asks_nothing_of_the_network(hub: HubServer, client: Client) -> None:
    assert client(CACHED.format(BERT_BASE, None)) is None
    assert hub.requests == []
    folder = client(FETCH.format(BERT_BASE, None))["folder"]
    hub.requests.clear()
    assert client(CACHED.format(BERT_BASE, None)) == folder
    assert client(CACHED.format("a/b/c", None)) is None
    assert hub.requests == []


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "the tokenizer"])
def test_a_partial_copy_is_not_cached(lacking: str, hub: HubServer, client: Client) -> None:
    present = [name for name in ("config.json", "model.safetensors", "vocab.txt") if name != lacking]
    if lacking == "the tokenizer":
        present.remove("vocab.txt")
    client(f"""
from huggingface_hub import hf_hub_download
result = [hf_hub_download({BERT_BASE!r}, name) for name in {present!r}]
""")
    assert client(CACHED.format(BERT_BASE, None)) is None
    assert client(FETCH.format(BERT_BASE, None))["again"] is not None


def test_a_model_without_a_tokenizer_is_cached_after_its_fetch(
    empty_hub: HubServer, client: Client, checkpoint: Path
) -> None:
    for name in TOKENIZER:
        (checkpoint / name).unlink()
    empty_hub.add_model("org/bare", checkpoint)
    answer = client(FETCH.format("org/bare", None))
    assert answer["files"] == ["config.json", "model.safetensors"]
    assert answer["again"] == answer["folder"]


@pytest.mark.parametrize("stopped", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_without_the_hub_fetch_answers_a_complete_copy_and_refuses_else(
    stopped: str, hub: HubServer, client: Client, nobody: str
) -> None:
    folder = client(FETCH.format(BERT_BASE, None))["folder"]
    environment = {stopped: "1" if stopped == "HF_HUB_OFFLINE" else nobody}
    assert client(FETCH.format(BERT_BASE, None), **environment)["folder"] == folder
    refused = client(FETCH.format(BIN_ONLY, None), **environment)
    why = "HF_HUB_OFFLINE is set" if stopped == "HF_HUB_OFFLINE" else f"the hub at {nobody} cannot be reached"
    assert refused["error"] == "HubError"
    assert refused["message"] == (
        f"model {BIN_ONLY} cannot be fetched: {why}, and the local cache has no complete copy"
    )


@pytest.mark.parametrize("logged_in", [False, True])
def test_each_refusal_is_one_line_that_says_why(
    logged_in: bool, hub: HubServer, client: Client, bert_checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    hub.missing_status, hub.gated_status = (404, 403) if logged_in else (401, 401)
    hub.add_model("org/gated", bert_checkpoints[BERT_BASE], gated=True)
    for name, files in {"flax": ["config.json", "flax_model.msgpack"], "data": ["README.md"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        hub.add_model(f"org/{name}", name)
    wanted = [("org/none", None), (BERT_BASE, "v9"), ("org/gated", None), ("org/flax", None), ("org/data", None),
              ("org/a--b", None)]  # fmt: skip
    answers = client(f"""
from mergelab.errors import HubError
from mergelab.models import hub
result = []
for repository, revision in {wanted!r}:
    try:
        hub.fetch(repository, revision)
    except HubError as error:
        result.append(str(error))
""")
    assert answers == [
        f"model org/none does not exist on {hub.url}; if it is private, log in (`hf auth login`)",
        f"model {BERT_BASE}@v9 does not exist on {hub.url}: the repository has no revision 'v9'",
        f"model org/gated is gated: accept its terms at {hub.url}/org/gated and log in (`hf auth login`)",
        "model org/flax has no weights that can be merged (model.safetensors or pytorch_model.bin); "
        "it has flax_model.msgpack",
        "model org/data has no config.json: it is not a transformers checkpoint",
        "'org/a--b' is not a hub id (org/name)",
    ]


def test_an_index_that_names_a_missing_shard_is_refused(empty_hub: HubServer, client: Client, sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    empty_hub.add_model("org/sharded", sharded)
    answer = client(FETCH.format("org/sharded", None))
    assert answer["error"] == "HubError"
    assert answer["message"].endswith("lacks weight files that its index names: model-00002-of-00002.safetensors")


def test_a_full_disk_is_told_as_such(hub: HubServer, client: Client) -> None:
    answer = client(f"""
import errno, huggingface_hub
from mergelab.models import hub
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
huggingface_hub.snapshot_download = full
result = hub.fetch({BERT_BASE!r}, None)
""")
    assert answer["error"] == "HubError"
    assert answer["message"] == f"model {BERT_BASE} cannot be stored in the local cache: No space left on device"


def test_the_hub_is_reachable_whatever_models_it_has(empty_hub: HubServer, client: Client) -> None:
    assert client(REACHABLE.format(30)) is True
    empty_hub.missing_status = 401
    assert client(REACHABLE.format(30)) is True


def test_a_hub_with_an_outage_is_not_reachable(hub: HubServer, client: Client) -> None:
    hub.outage = 503
    assert client(REACHABLE.format(30)) is False


def test_offline_mode_asks_nothing(empty_hub: HubServer, client: Client) -> None:
    assert client(REACHABLE.format(0.5), HF_HUB_OFFLINE="1") is False
    assert empty_hub.requests == []


def test_a_hub_that_refuses_or_stays_silent_is_not_reachable(client: Client, nobody: str, silent: str) -> None:
    assert client(REACHABLE.format(0.5), HF_ENDPOINT=nobody) is False
    assert client(REACHABLE.format(0.5), HF_ENDPOINT=silent) is False
    assert client(REACHABLE.format(0.5), HF_ENDPOINT="http://no-such-host.invalid") is False
    assert client(REACHABLE.format(0.5), HF_ENDPOINT="nonsense") is False


def test_another_web_server_is_not_taken_for_a_hub(client: Client, web_server: str) -> None:
    assert client(REACHABLE.format(30), HF_ENDPOINT=web_server) is False


def test_name_resolution_that_hangs_does_not_hold_the_program(client: Client) -> None:
    hang = "import socket, threading\nsocket.getaddrinfo = lambda *args, **kwargs: threading.Event().wait()\n"
    assert client(hang + REACHABLE.format(0.5), HF_ENDPOINT="http://hub.example") is False


def test_a_cached_dataset_is_known_and_loads_offline_without_a_request(hub: HubServer, client: Client) -> None:
    known = "from mergelab.models import hub\nresult = hub.dataset_cached('nyu-mll/glue', 'rte')"
    load = """
import datasets, huggingface_hub
from mergelab.models import hub
with hub.offline():
    rows = datasets.load_dataset("nyu-mll/glue", "rte", split="validation")
result = dict(rows=len(rows), offline=[datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE])
"""
    assert client(known) is False
    client("import datasets\nresult = len(datasets.load_dataset('nyu-mll/glue', 'rte', split='validation'))")
    assert client(known) is True
    hub.requests.clear()
    assert client(load) == {"rows": 240, "offline": [False, False]}
    assert hub.requests == []


@pytest.fixture
def checkpoint(bert_checkpoints: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of an expert's folder, to change."""
    return Path(shutil.copytree(bert_checkpoints[NAMED_LABELS], tmp_path / "checkpoint"))


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """An expert's folder with its weights in two files and an index."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    placed: dict[str, str] = {}
    for part in (0, 1):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        keys = sorted(tensors)[part::2]
        save_file({key: tensors[key] for key in keys}, checkpoint / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(keys, name)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return checkpoint


@pytest.fixture
def nobody() -> str:
    """An address where connections are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """A web server that knows nothing of models and says so in HTML."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
