"""Merges in stages: as several documents and as `models.stages`, each a run, used again only where nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.mergekit.commands import read
from mergelab.tracking import RunRecord, TrackingConfig, names, open_tracking
from tests.conftest import Outcome
from tests.mergekit.made import make_models, merged, planned

Command = Callable[..., Outcome]
STAGES = """
name: first
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
dtype: float32
---
merge_method: slerp
base_model: second
models: [{model: second}, {model: c}]
parameters: {t: 0.25}
---
name: second
merge_method: task_arithmetic
base_model: base
models: [{model: base}, {model: first, parameters: {weight: 0.5}}, {model: c, parameters: {weight: 1}}]
dtype: float32
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, "tied", layers=1)
    return folder


@pytest.fixture
def here(home: Path, workplace: Path) -> Path:
    """The working folder, with the models and the three documents in it."""
    for name in ("base", "a", "b", "c"):
        shutil.copytree(home / name, workplace / name)
    (workplace / "stages.yml").write_text(STAGES)
    return workplace


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def runs(folder: Path) -> list[RunRecord]:
    """The runs of the working folder, the oldest first."""
    return open_tracking(TrackingConfig(uri=f"sqlite:///{folder}/outputs/mlflow.db")).runs()[::-1]


def by_hand(folder: Path) -> Mapping[str, Tensor]:
    """Merge the three documents one after the other, each with its input written to a folder."""

    def write(name: str, *arguments: str) -> None:
        tensors = merged("models=custom", "models.name=m", *arguments)
        shutil.copytree(folder / "a", folder / "hand" / name)
        save_file(dict(tensors), folder / "hand" / name / "model.safetensors", {"format": "pt"})

    write("1", "method=soup", "models.experts={a:./a,b:./b}", "method.weights={a:1,b:3}")
    two = ["method=task_arithmetic", "method.lambda=1", "method.weights={x:0.5,c:1}"]
    write("2", *two, "models.base=./base", "models.experts={x:./hand/1,c:./c}")
    return merged(
        "method=slerp", "models=custom", "models.name=m", "models.experts={x:./hand/2,c:./c}", "method.t=0.25"
    )


def test_each_stage_is_a_run_under_one_parent_with_the_hashes_of_its_models(
    here: Path, mergelab_command: Command
) -> None:
    expected = by_hand(here)
    done = mergelab_command("mergekit=stages.yml", "evaluate=false", "output=out", "save.stages=kept")
    assert done.code == 0, done.err
    found = weights(here / "out")
    assert all(found[name].equal(expected[name]) for name in found)
    parent, *children = runs(here)
    assert parent.tags[names.KIND] == "stages"
    assert [each.tags[names.PARENT] for each in children] == [parent.id] * 3
    assert [each.tags[names.METHOD] for each in children] == ["soup", "task_arithmetic", "slerp"]
    assert [parent.tags[names.stage(name)] for name in ("first", "second")] == [each.id for each in children[:2]]
    (first,) = (here / "kept").glob("first-*")
    made_of = json.loads((first / "mergelab.json").read_text())["experts"]
    assert [each["sha256"] for each in made_of] == [children[0].tags[names.model_hash(name)] for name in "ab"]
    assert children[1].tags[names.model_hash("c")] == children[2].tags[names.model_hash("c")]
    assert "method=soup" in (first / "README.md").read_text()


def test_a_finished_stage_is_used_again_only_if_its_config_and_its_models_are_the_same(
    here: Path, mergelab_command: Command
) -> None:
    def merge(*arguments: str) -> list[str]:
        """Merge, and return the stages that were made."""
        shutil.rmtree(here / "out", ignore_errors=True)
        done = mergelab_command("mergekit=stages.yml", "evaluate=false", "output=out", "tracking=none", *arguments)
        assert done.code == 0, done.err
        lines = [line.split() for line in done.out.splitlines() if line.startswith("stage ")]
        return [words[1] for words in lines if len(words) == 2]

    assert merge() == ["first", "second"]
    assert merge("method.t=0.5") == []
    changed = STAGES.replace("weight: 0.5", "weight: 0.75")
    (here / "stages.yml").write_text(changed)
    assert merge() == ["second"]
    before = weights(here / "out")
    tensors = weights(here / "b")
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, here / "b" / "model.safetensors", {"format": "pt"}
    )
    assert merge() == ["first", "second"]
    assert not any(weights(here / "out")[name].equal(before[name]) for name in before)
    assert len(list((here / "outputs" / "stages").glob("*-*"))) == 5


@pytest.mark.slow
def test_the_jobs_of_a_grid_share_the_stages_unless_they_differ_in_them(here: Path, mergelab_command: Command) -> None:
    shared = ["-m", "mergekit=stages.yml", "evaluate=false", "tracking=none", "output=out${hydra:job.num}"]
    done = mergelab_command(*shared, "method.t=0.25,0.75")
    assert done.code == 0, done.err
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("stage ")] == ["first", "second"]
    found, expected = weights(here / "out0"), by_hand(here)
    assert all(found[name].equal(expected[name]) for name in found)
    assert not all(weights(here / "out1")[name].equal(found[name]) for name in found)
    for folder in ("out0", "out1"):
        shutil.rmtree(here / folder)
    done = mergelab_command(*shared, "models.stages.first.method.weights.b=3.0,1.0")
    assert done.code == 0, done.err
    assert weights(here / "out0").keys() == found.keys()
    assert all(weights(here / "out0")[name].equal(found[name]) for name in found)
    assert not all(weights(here / "out1")[name].equal(found[name]) for name in found)
    assert len(list((here / "outputs" / "stages").glob("first-*"))) == 2


def test_documents_become_stages_and_the_last_is_the_one_that_no_other_takes(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(STAGES)
    found = read(str(file))
    assert found.method == {"name": "slerp", "t": 0.25}
    assert found.models["experts"] == {"second": "second", "c": "c"}
    assert list(found.models["stages"]) == ["first", "second"]
    assert found.models["stages"]["second"] == {
        "base": "base",
        "experts": {"first": "first", "c": "c"},
        "config": "base",
        "method": {"name": "task_arithmetic", "lambda": 1.0, "normalize": False, "weights": {"first": 0.5, "c": 1.0}},
        "dtype": "float32",
        "tokenizer": "base",
    }
    file.write_text(STAGES.replace("merge_method: slerp", "name: last v1.5\nmerge_method: slerp"))
    assert read(str(file)) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("model: first", "model: frist"), "models.stages.second.experts.frist=frist: no stage is called so; did you"),
        (("model: b,", "model: second,"), "models.stages: first → second → first: a stage cannot need itself"),
        (("name: second", "name: first"), "two documents are called first"),
        (("name: second\n", ""), "two documents have no name"),
        (
            ("merge_method: slerp\nbase_model: second", "name: x\nmerge_method: slerp\nbase_model: a"),
            "x, second are taken",
        ),
        (("name: first", "name: 3"), "name=3: must be a name"),
        (("merge_method: linear", "merge_method: liner"), "document 1: merge_method=liner"),
        (("weight: 3", "weight: -1"), "models.stages.first: method.weights"),
    ],
)
def test_what_stages_cannot_be_is_one_line(change: tuple[str, str], said: str, here: Path) -> None:
    assert change[0] in STAGES
    text = STAGES.replace(*change)
    if said.startswith("x,"):
        text = text.replace("models: [{model: second}, {model: c}]", "models: [{model: a}, {model: c}]")
    (here / "stages.yml").write_text(text)
    with pytest.raises(ConfigError) as error:
        planned("mergekit=stages.yml")
    assert said in str(error.value)
    assert len(str(error.value)) <= 400
    assert not (here / "outputs").exists()


def test_a_stage_that_is_a_folder_too_and_a_missing_model_stop_before_anything_is_written(
    here: Path, mergelab_command: Command
) -> None:
    (here / "first").mkdir()
    done = mergelab_command("mergekit=stages.yml", "evaluate=false", "output=out", "tracking=none")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "models.stages.first: there is a folder of that name too; give the stage another one" in done.err
    (here / "first").rmdir()
    shutil.rmtree(here / "c")
    (here / "stages.yml").write_text(STAGES.replace("model: c}", "model: ./c}"))
    done = mergelab_command("mergekit=stages.yml", "evaluate=false", "output=out", "tracking=none")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "models.experts.c: model './c': the folder does not exist" in done.err
    assert not (here / "out").exists()
    assert not list(here.glob("outputs/stages/*"))


def test_our_own_config_has_stages_too(here: Path) -> None:
    stage: dict[str, Any] = {"experts": ["./a", "./b"], "method": {"name": "soup", "wieghts": [1, 2]}}
    given = ["models=custom", "models.name=m", "models.base=./base", "models.experts=[x,./c]", "method=ties"]
    text = yaml.safe_dump(stage, default_flow_style=True, width=1000).strip().replace(" ", "")
    with pytest.raises(ConfigError, match=r"models\.stages\.x: method\.wieghts: soup has no such parameter; did"):
        planned(*given, f"models.stages={{x:{text}}}")
    plan = planned(*given, f"models.stages={{x:{text.replace('wieghts', 'weights')}}}")
    assert plan.config.models.stages is not None
    with pytest.raises(ConfigError, match=r"models\.stages\.x\.expert: no such key; did you mean 'experts'"):
        planned(*given, "models.stages={x:{expert:[./a],method:{name:soup}}}")


@pytest.mark.slow
def test_the_trials_of_a_sweep_share_the_stages(arguments: list[str], mergelab_command: Command) -> None:
    stage = "models.stages={x:{base:./base,experts:{a:./a,b:./b},method:{name:soup}}}"
    given = [*(each for each in arguments if "experts" not in each), "models.experts={x:x,c:./c}", stage, "task=rte"]
    sweep = ["-m", "sweep=task_arithmetic", "sweep.n_trials=2", "sweep.sampler=random", "sweep.pruner=none"]
    done = mergelab_command(*sweep, *given, "tracking=none", "models.stages.x.method.weights=[1,3]", "output=best")
    assert done.code == 0, done.err
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("stage ")] == ["x"]
    (folder,) = Path("outputs/stages").glob("x-*")
    made_of = json.loads((folder / "mergelab.json").read_text())
    assert made_of["parameters"]["weights"] == [1.0, 3.0]
    best = json.loads(Path("best/mergelab.json").read_text())
    assert best["experts"][0]["merge"] == made_of
