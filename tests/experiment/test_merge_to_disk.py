"""Merging without measuring: from folders to a folder, in shards, in another dtype, interrupted and resumed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergelab.config import ModelsConfig
from mergelab.errors import ConfigError, ModelError
from mergelab.experiment.plan import check_output
from mergelab.experiment.saving import noted
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.source import TensorInfo, TensorPart
from mergelab.weights.writer import complete_files, making_of, writing_folder
from tests.conftest import Outcome
from tests.forks import Forks
from tests.vocabularies import bert

Command = Callable[..., Outcome]


def llama(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, shard: str = "60KB") -> Path:
    """Save a tiny Llama in shards, with a generation config and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, vocab_size=128, tie_word_embeddings=True))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "chat_template.jinja").write_text(f"template {seed}")
    return folder


@pytest.fixture
def models(workplace: Path) -> list[str]:
    for seed, name in enumerate(("base", "a", "b")):
        llama(workplace / name, seed)
    return ["models.base=./base", "models.experts=[./a,./b]", "evaluate=false", "tracking=none"]


def tensors(folder: Path) -> dict[str, Tensor]:
    source = open_checkpoint(folder)
    return {key: source.get(key).clone() for key in source.keys()}  # noqa: SIM118


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_a_language_model_in_shards_becomes_one_in_shards_that_transformers_loads(
    mergelab_command: Command, models: list[str], workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    outcome = mergelab_command(*models, "method=task_arithmetic", "save.max_shard_size=60kB", "output=merged")
    assert outcome.code == 0, outcome.err
    assert len(list((workplace / "merged").glob("*.safetensors"))) > 3
    assert (workplace / "merged" / "generation_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(workplace / "merged", dtype="auto")
    assert model.dtype == torch.bfloat16
    base, a, b = (tensors(workplace / name) for name in ("base", "a", "b"))
    name = "model.layers.1.mlp.up_proj.weight"
    start, left, right = (each[name].double() for each in (base, a, b))
    expected = start + 0.3 * ((left - start) + (right - start))
    torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=2**-8, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_dtype_is_rounded_once(mergelab_command: Command, models: list[str], workplace: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert mergelab_command(*models, "method=soup", f"save.dtype={dtype}", f"output={dtype}").code == 0
    wide, narrow = tensors(workplace / "float32"), tensors(workplace / "bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    assert wide[name].dtype == torch.float32
    assert not torch.equal(wide[name], wide[name].bfloat16().float())
    assert same({key: value.bfloat16() for key, value in wide.items()}, narrow)


def test_the_mean_of_heads_is_rounded_once_too(mergelab_command: Command, workplace: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    for seed, name in enumerate("ab"):
        model = AutoModelForSequenceClassification.from_pretrained(bert(workplace / f"whole-{name}", seed))
        shutil.copytree(workplace / f"whole-{name}", workplace / name)
        model.to(torch.bfloat16).save_pretrained(workplace / name)
    settings = ["models.base=null", "models.experts=[./a,./b]", "evaluate=false", "tracking=none", "method=soup"]
    outcome = mergelab_command(*settings, "save.dtype=float32", "output=merged")
    assert outcome.code == 0, outcome.err
    a, b, merged = (tensors(workplace / name) for name in ("a", "b", "merged"))
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert merged[name].dtype == torch.float32
        assert torch.equal(merged[name], (a[name].float() + b[name].float()) / 2)


def test_the_tokenizer_and_its_template_are_the_chosen_models(
    mergelab_command: Command, models: list[str], workplace: Path
) -> None:
    assert mergelab_command(*models, "save.tokenizer=b", "output=merged").code == 0
    assert (workplace / "merged" / "chat_template.jinja").read_text() == "template 2"
    outcome = mergelab_command(*models, "save.tokenizer=c", "output=other")
    assert outcome.code == 2
    assert "save.tokenizer=c: must be one of base, a, b" in outcome.err
    assert not (workplace / "other").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("save.max_shard_size=5", "save.max_shard_size=5: must be text"),
        ("save.max_shard_size=fiveGB", "must be a number of at most 9 digits with kB, MB, GB or TB, such as 5GB"),
        ("save.dtype=int8", "save.dtype='int8': must be one of 'float32', 'bfloat16' or 'float16'"),
        ("output=a", "output=a: the folder is that of an input model; choose another one"),
        ("output=./base/../link", "link: the folder is that of an input model"),
        ("output=full", "output=full: the folder is not empty; choose another one or remove it"),
    ],
)
def test_a_wrong_setting_is_one_line(
    mergelab_command: Command, models: list[str], workplace: Path, setting: str, said: str
) -> None:
    (workplace / "link").symlink_to(workplace / "b")
    (workplace / "full").mkdir()
    (workplace / "full" / "notes.txt").write_text("x")
    outcome = mergelab_command(*models, "output=merged", setting)
    assert outcome.code == 2
    assert said in outcome.err


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(
    mergelab_command: Command, models: list[str], workplace: Path
) -> None:
    shard = min((workplace / "a").glob("model-*.safetensors"))
    kept = load_file(shard)
    lost = kept.popitem()[0]
    save_file(kept, shard, metadata={"format": "pt"})
    outcome = mergelab_command(*models, "output=merged")
    assert outcome.code == 2
    assert lost in outcome.err
    assert not (workplace / "merged").exists()


@pytest.mark.parametrize("change", ["cut", "replaced", "gone"])
def test_an_input_that_changes_while_it_is_read_stops_the_merge(workplace: Path, change: str) -> None:
    folder = llama(workplace / "model", 0, shard="10MB")
    source = open_checkpoint(folder, "model")
    file = folder / "model.safetensors"
    source.get("model.norm.weight")
    if change == "cut":
        os.truncate(file, 1000)
    elif change == "gone":
        file.unlink()
    else:
        shutil.copy(llama(workplace / "other", 1, shard="10MB") / "model.safetensors", file)
    with pytest.raises(ModelError, match="vanished while" if change == "gone" else "was changed while"):
        source.get("model.norm.weight")


FORKED = """
import os, random, signal, sys, time
import mergelab.experiment.run, mergelab.experiment.session, mergelab.methods.ties
import mergelab.models.architecture
from mergelab.__main__ import main
from mergelab.weights import shards

write = shards.WeightFiles.write_part
def told(self, part):
    os.write(there, b"x")
    time.sleep(0.002)
    write(self, part)
shards.WeightFiles.write_part = told
_, seed, times, *settings = sys.argv
sys.argv = ["mergelab", *settings]
generator = random.Random(int(seed))
for attempt in range(int(times)):
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main()
        os._exit(0)
    os.close(there)
    for _ in range(generator.randint(1, 9)):  # tensors; there are 28, of which each attempt leaves some done
        os.read(here, 1)  # nothing, once the process has ended
    time.sleep(generator.uniform(0, 0.002))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(here)
    print(*sorted(name for name in os.listdir(".") if "merged" in name), flush=True)
    if os.path.exists("merged"):
        os.rename("merged", f"whole-{attempt}")
_, there = os.pipe()
main()
"""


CUTTING = """
import os, sys
from pathlib import Path
from mergelab.__main__ import main
from mergelab.engine.request import MergeRequest

opened = MergeRequest.open

def open_and_cut(job, name):
    found = opened(job, name)
    for shard in Path("a").glob("*.safetensors"):
        os.truncate(shard, 1024)
    return found

MergeRequest.open = open_and_cut
sys.argv = ["mergelab", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="the system has no bus errors")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_an_input_that_is_cut_between_the_look_at_it_and_the_read_is_named(
    models: list[str], workplace: Path, threads: str
) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", CUTTING, "method=ties", *models, "output=merged"],
        env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome.returncode == 2, outcome.stderr
    assert re.search(
        r"^error: a: \S*model-0000\S* was changed while it was being read; merge again$", outcome.stderr, re.M
    )
    assert "Traceback" not in outcome.stderr
    assert not (workplace / "merged").exists()


FORKING = """
import os, time
from mergelab.weights import truncated_file

with truncated_file.reported():
    if os.fork() == 0:
        os.close(1)
        os.close(2)
        time.sleep(120)
        os._exit(0)
print("ended")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="the system has no bus errors")
def test_a_process_ends_though_a_child_that_it_forked_goes_on() -> None:
    program = subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, start_new_session=True)
    try:
        out, _ = program.communicate(timeout=60)
    finally:
        os.killpg(program.pid, signal.SIGKILL)
    assert out == b"ended\n"


def test_a_merge_killed_at_random_moments_never_looks_finished_and_goes_on(
    mergelab_command: Command, models: list[str], workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    settings = [*models, "method=ties", "save.max_shard_size=10kB"]
    assert mergelab_command(*settings, "output=reference").code == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FORKED, "3", "10", *settings, "output=merged", "hydra.run.dir=run"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[0].split() == [".merged.lock", ".merged.partial"]
    reference = tensors(workplace / "reference")
    for folder in (workplace / "merged", *workplace.glob("whole-*")):  # what loads is whole
        assert same(tensors(folder), reference)
    assert not list(workplace.glob(".merged*"))
    AutoModelForCausalLM.from_pretrained(workplace / "merged")


def partial_merge(forks: Forks, workplace: Path, settings: list[str], files: int) -> Path:
    """Stop a merge after it has completed some of its files, as a killed one leaves them."""
    script = f"""
import os, signal, sys
from mergelab.weights import shards
complete = shards.WeightFiles._complete
def stop(self, file):
    complete(self, file)
    if len(self.complete) == {files}:
        os.kill(os.getpid(), signal.SIGKILL)
shards.WeightFiles._complete = stop
from mergelab.__main__ import main
main()
"""
    ended = forks.run("-c", script, *settings, folder=workplace)
    assert ended.returncode == -signal.SIGKILL
    (folder,) = workplace.glob(".merged.partial")
    return folder


def test_complete_files_are_written_again_when_labels_were_corrected(
    mergelab_command: Command, workplace: Path, forks: Forks
) -> None:
    def label(name: str, *labels: str) -> None:
        file = workplace / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": dict(enumerate(labels))}))

    for seed, name in enumerate(("a", "b")):
        bert(workplace / name, seed)
        label(name, "entailment", "not_entailment")
    models = ["models.base=null", "models.experts=[./a,./b]", "evaluate=false", "tracking=none", "task=rte"]
    settings = [*models, "method=soup", "save.max_shard_size=1kB"]
    partial_merge(forks, workplace, [*settings, "output=merged"], 3)
    assert "classifier.weight" in written_names(workplace / ".merged.partial")
    label("b", "not_entailment", "entailment")
    assert mergelab_command(*settings, "output=merged").code == 0
    a, b, merged = (tensors(workplace / name) for name in ("a", "b", "merged"))
    torch.testing.assert_close(
        merged["classifier.weight"], (a["classifier.weight"] + b["classifier.weight"].flip(0)) / 2
    )


def written_names(folder: Path) -> set[str]:
    """Name the tensors of an unfinished merge's complete files."""
    found: set[str] = set()
    for part in folder.glob("*.part"):
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found |= json.loads(file.read(length)).keys() if length else set()
    return found


def test_complete_files_are_not_written_again_unless_the_merge_is_another(
    mergelab_command: Command, models: list[str], workplace: Path, forks: Forks
) -> None:
    settings = [*models, "method=ties", "save.max_shard_size=60kB", "output=merged"]
    assert mergelab_command(*settings[:-1], "output=reference").code == 0
    folder = partial_merge(forks, workplace, settings, 3)
    with pytest.raises(ModelError):
        open_checkpoint(folder)
    first = min(folder.glob("*.part"))
    before = first.stat()
    assert mergelab_command(*settings).code == 0
    after = (workplace / "merged" / first.name.removesuffix(".part")).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert same(tensors(workplace / "merged"), tensors(workplace / "reference"))
    shutil.rmtree(workplace / "merged")

    first = min(partial_merge(forks, workplace, settings, 3).glob("*.part"))
    before = first.stat()
    assert mergelab_command(*settings, "method.density=0.9").code == 0
    assert (workplace / "merged" / first.name.removesuffix(".part")).stat().st_mtime_ns != before.st_mtime_ns
    assert mergelab_command(*settings[:-1], "method.density=0.9", "output=other").code == 0
    assert same(tensors(workplace / "merged"), tensors(workplace / "other"))


@contextmanager
def interrupted(files: int) -> Iterator[None]:
    """Ctrl-C once so many weight files are complete; or, with 0, while the first one is written."""
    from mergelab.weights import shards

    complete, write, done = shards.WeightFiles._complete, shards.WeightFiles.write_part, itertools.count(1)

    def completed(self: shards.WeightFiles, file: str) -> None:
        complete(self, file)
        if next(done) == files:
            os.kill(os.getpid(), signal.SIGINT)

    def written(self: shards.WeightFiles, part: TensorPart) -> None:
        write(self, part)
        if not files:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards.WeightFiles, "_complete", completed)
        patched.setattr(shards.WeightFiles, "write_part", written)
        yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_says_what_is_kept_and_that_the_same_command_goes_on(
    mergelab_command: Command, models: list[str], workplace: Path
) -> None:
    settings = [*models, "method=ties", "save.max_shard_size=60kB", "output=merged"]
    for files, said in (
        (0, ""),
        (1, "; 1 complete file stays in .merged.partial: the same command goes on from there"),
        (2, "; 3 complete files stay in .merged.partial: the same command goes on from there"),
        (0, "; 3 complete files stay in .merged.partial: the same command goes on from there"),
    ):
        with interrupted(files):
            outcome = mergelab_command(*settings)
        assert (outcome.code, outcome.err) == (130, f"error: interrupted{said}\n")
        assert (workplace / ".merged.partial").exists() == bool(said)
    first = min((workplace / ".merged.partial").glob("*.part"))
    before = first.stat()
    assert mergelab_command(*settings).code == 0
    assert (workplace / "merged" / first.name.removesuffix(".part")).stat().st_mtime_ns == before.st_mtime_ns


def test_ctrl_c_promises_nothing_where_another_merge_left_the_files(
    mergelab_command: Command, models: list[str], workplace: Path
) -> None:
    settings = [*models, "method=ties", "save.max_shard_size=60kB", "output=merged"]
    with interrupted(2):
        mergelab_command(*settings)
    with interrupted(0):
        outcome = mergelab_command(*settings, "method.density=0.9")
    assert (outcome.code, outcome.err) == (130, "error: interrupted\n")
    assert not (workplace / ".merged.partial").exists()


def test_ctrl_c_tells_of_a_folder_for_each_task_what_the_same_command_would_do(workplace: Path) -> None:
    (workplace / "like").mkdir()
    (workplace / "like" / "config.json").write_text("{}")
    folder, layout = Path("merged"), [TensorInfo(name, (4,), torch.float32) for name in "xy"]

    def write(tasks: Mapping[str, str], end: BaseException) -> None:
        places = {folder / task: names for task, names in tasks.items()}
        with noted(folder, list(places), "key"), ExitStack() as stack:
            for place, names in places.items():
                writing = writing_folder(place, layout=layout, like="like", key="key", max_shard_bytes=16)
                writer = stack.enter_context(writing)
                for name in names:
                    writer.write(name, torch.zeros(4))
            raise end

    def notes(tasks: Mapping[str, str], end: BaseException) -> list[str]:
        with pytest.raises(type(end)) as raised:
            write(tasks, end)
        return getattr(raised.value, "__notes__", [])

    assert notes({"rte": "", "cola": ""}, KeyboardInterrupt()) == []
    assert notes({"rte": "x", "cola": ""}, ValueError()) == []
    assert notes({"rte": "", "cola": "x", "sst2": "y"}, KeyboardInterrupt()) == [
        "3 complete files stay in merged/.rte.partial, merged/.cola.partial and 1 more: the same command goes on from "
        "there"
    ]
    assert (complete_files(folder / "rte", "key"), complete_files(folder / "rte", "another")) == (1, 0)
    check_output("merged", ModelsConfig(name="any", experts={"a": "any/a"}))
    (folder / "mrpc").mkdir()
    said = ["merged holds mrpc already: remove it before the same command again"]
    assert notes({"rte": ""}, KeyboardInterrupt()) == said
    with pytest.raises(KeyboardInterrupt) as raised, noted(folder, [folder / "rte"], None):
        raise KeyboardInterrupt
    assert not hasattr(raised.value, "__notes__")
    with pytest.raises(ConfigError, match="the folder is not empty"):
        check_output("merged", ModelsConfig(name="any", experts={"a": "any/a"}))


HOLD = """
import sys, pathlib
from mergelab.weights.locking import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("spelled", ["merged", "other/../merged", "link/merged", "to_merged"])
def test_two_merges_into_one_folder_exclude_each_other(
    mergelab_command: Command, models: list[str], workplace: Path, spelled: str
) -> None:
    """The other process has another cache and another spelling of the folder."""
    (workplace / "other").mkdir()
    (workplace / "link").symlink_to(workplace)
    (workplace / "to_merged").symlink_to("merged")
    environment = {**os.environ, "MERGELAB_CACHE": str(workplace / "elsewhere"), "HOME": str(workplace / "home")}
    command = [sys.executable, "-c", HOLD, spelled]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        outcome = mergelab_command(*models, "output=merged")
        other.stdin.close()
    assert outcome.code == 2
    assert "merged: another process is writing it" in outcome.err
    assert not (workplace / "merged").exists()
    assert mergelab_command(*models, "output=merged").code == 0
    assert not list(workplace.glob(".merged*"))


def test_of_commands_at_once_one_makes_the_model(mergelab_command: Command, models: list[str], workplace: Path) -> None:
    (workplace / "link").symlink_to(workplace)
    spellings = ["merged", "link/merged", "link/../" + workplace.name + "/merged"]
    methods = ["method=soup", "method=ties", "method=task_arithmetic"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "mergelab", *models, method, f"output={spelled}"],
            env={**os.environ, "MERGELAB_CACHE": str(workplace / f"cache {method}")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for method, spelled in zip(methods, spellings, strict=True)
    ]
    said = [process.communicate()[1] for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2, 2], said
    winner = methods[codes.index(0)]
    assert mergelab_command(*models, winner, "output=alone").code == 0
    assert same(tensors(workplace / "merged"), tensors(workplace / "alone"))


def test_what_another_process_changed_is_not_renamed_into_place(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text("{}")
    layout = [TensorInfo("w", (2,), torch.float32)]

    def write() -> None:
        with writing_folder(tmp_path / "merged", layout=layout, like=like, key="one") as writer:
            writer.write("w", torch.ones(2))
            (making_of(tmp_path / "merged") / "mergelab.key").write_text("another")

    with pytest.raises(ModelError, match="was changed by another process"):
        write()
    assert not (tmp_path / "merged").exists()


def test_too_little_room_leaves_nothing_behind(
    mergelab_command: Command, models: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    outcome = mergelab_command(*models, "method=soup", "output=merged")
    assert outcome.code == 2
    assert "merged: needs 201.5 kB of disk space, but only 1.0 kB are free" in outcome.err
    assert not (workplace / ".merged.partial").exists()


def test_a_full_disk_keeps_the_complete_files_and_says_so(
    mergelab_command: Command, models: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.pwrite
    calls = iter(range(10**6))

    def full(handle: int, content: object, offset: int) -> int:
        if next(calls) > 30:
            raise OSError(28, "No space left on device")
        return written(handle, content, offset)  # type: ignore[arg-type]

    settings = [*models, "method=ties", "save.max_shard_size=60kB", "output=merged"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        outcome = mergelab_command(*settings)
    assert outcome.code == 2
    assert "merged: the disk is full" in outcome.err
    assert "complete files stay in .merged.partial for the same merge again" in outcome.err
    for part in (workplace / ".merged.partial").glob("*.part"):  # what is not complete takes no room
        assert any(part.read_bytes()[:8])
    assert not (workplace / "merged").exists()
    assert mergelab_command(*settings).code == 0
    assert not (workplace / ".merged.partial").exists()
