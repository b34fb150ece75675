"""Overrides: what they replace, where they may add, who is left out, and one line for a key that does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Outcome

Command = Callable[..., Outcome]
THERE_ARE = "there are textattack, yoshitomo-matsubara, Ruizhou, howey, anirudh21"
SAID = f"no expert 'howy'; did you mean 'howey'? ({THERE_ARE})\n"


def composed(mergelab_command: Command, *arguments: str) -> dict[str, Any]:
    outcome = mergelab_command(*arguments, "--cfg", "job")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = yaml.safe_load(outcome.out)
    return found


def experts(mergelab_command: Command, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = composed(mergelab_command, *arguments)["models"]["experts"]
    return {name: value for name, value in found.items() if value is not None}


def refusal(mergelab_command: Command, *arguments: str) -> str:
    """The one line of a command that nothing came of."""
    outcome = mergelab_command(*arguments)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert not [path for path in Path.cwd().rglob("*") if path.suffix in (".db", ".safetensors")]
    return outcome.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("spelled", ["~models.experts.howy", "models.experts.howy=null", "++models.experts.howy=null"])
@pytest.mark.parametrize(
    "more",
    [
        ("tracking=mlflow",),
        ("--cfg", "job"),
        ("-m", "method=ties,soup"),
        ("-m", "task=rte,rte", "tracking=none"),
        ("-m", "sweep=ties"),
    ],
    ids=" ".join,
)
def test_an_expert_that_is_not_there_cannot_be_left_out(
    mergelab_command: Command, workplace: Path, spelled: str, more: tuple[str, ...]
) -> None:
    outcome = mergelab_command("source=mini", spelled, *more)
    assert (outcome.code, outcome.err, outcome.out) == (2, f"error: {spelled.lstrip('+')}: {SAID}", "")
    assert not list(workplace.rglob("*.db"))


def test_those_that_a_ready_set_leaves_out_itself_are_not_among_those_there_are(mergelab_command: Command) -> None:
    outcome = mergelab_command("task=suite", "models.experts.nobody=null")
    assert outcome.code == 2
    assert outcome.err == ("error: models.experts.nobody=null: no expert 'nobody' (there are cola, mrpc, rte, sst2)\n")
    assert list(experts(mergelab_command, "task=suite", "models.experts.mnli=null")) == ["cola", "mrpc", "rte", "sst2"]
    for spelled in ("~models.experts.rte", "models.experts.rte=null"):
        assert list(experts(mergelab_command, "task=suite", spelled)) == ["cola", "mrpc", "sst2"]


def test_experts_in_a_list_have_no_names_to_be_left_out_by(mergelab_command: Command) -> None:
    for setting in ("models.experts.a=null", "models.experts.a.weight=2", "~models.experts.a"):
        outcome = mergelab_command("models.experts=[./a,./b]", setting)
        assert outcome.code == 2
        assert outcome.err.startswith("error: models.experts.a: models.experts is a list here, whose entries cannot be")
        assert len(outcome.err.splitlines()) == 1
    for spelled in ("~models.experts.a", "models.experts.a=null"):
        named = ("models.experts=[./a]", "models.experts={a: ./a, b: ./b}", spelled)
        assert experts(mergelab_command, *named) == {"b": "./b"}


def test_hydras_own_ways_to_add_and_remove_an_expert_are_as_they_were(mergelab_command: Command) -> None:
    two = "models.experts={a: ./a, b: ./b}"
    assert experts(mergelab_command, two, "models.experts.b=null") == {"a": "./a"}
    assert experts(mergelab_command, two, "~models.experts.b") == {"a": "./a"}
    assert list(experts(mergelab_command, two, "+models.experts.c=./c")) == ["a", "b", "c"]
    assert list(experts(mergelab_command, two, "models.experts.c=./c", "models.experts.b=null")) == ["a", "c"]
    assert experts(mergelab_command, two, "models.experts.a.labels=null")["a"]["labels"] is None
    assert refusal(mergelab_command, two, "~models.experts.c") == "~models.experts.c: no expert 'c' (there are a, b)"


@pytest.mark.parametrize("ready", ["bert_base_rte", "bert2bert_summarization"])
def test_a_whole_set_of_experts_replaces_the_ready_one(mergelab_command: Command, ready: str) -> None:
    ready = f"models={ready}"
    assert experts(mergelab_command, ready, "models.experts={a: ./a}") == {"a": "./a"}
    assert experts(mergelab_command, ready, "models.experts={a: ./a, b: ./b}", "models.experts={c: ./c}") == {
        "c": "./c"
    }
    assert composed(mergelab_command, ready, "models.experts=[./a,./b]")["models"]["experts"] == ["./a", "./b"]
    twice = composed(mergelab_command, ready, "models.experts=[./a]", "models.experts=[./b,./c]")
    assert twice["models"]["experts"] == ["./b", "./c"]
    assert len(experts(mergelab_command, ready, "+models.experts={z: ./z}")) > 3  # Hydra's + adds


def test_a_pair_as_the_base_replaces_the_ready_base(mergelab_command: Command, workplace: Path) -> None:
    (workplace / "conf" / "models").mkdir(parents=True)
    seeded = {"name": "mine", "base": {"encoder": "x/e", "decoder": "x/d", "seed": 3}, "experts": {"a": "./a"}}
    (workplace / "conf" / "models" / "mine.yaml").write_text(yaml.safe_dump(seeded))
    pair = {"encoder": "./e", "decoder": "./d"}
    spelled = "models.base={encoder: ./e, decoder: ./d}"
    mine = ("--config-dir=conf", "models=mine")
    assert composed(mergelab_command, *mine)["models"]["base"] == seeded["base"]
    for ready in (("models=bert_base_rte",), ("models=bert2bert_summarization",), mine):
        assert composed(mergelab_command, *ready, spelled)["models"]["base"] == pair
        assert composed(mergelab_command, *ready, "models.base=./x")["models"]["base"] == "./x"
    assert composed(mergelab_command, *mine, "models.base.seed=4")["models"]["base"] == {**seeded["base"], "seed": 4}


def test_what_is_typed_is_what_hydra_records(mergelab_command: Command, arguments: list[str], workplace: Path) -> None:
    typed = [*arguments, "task.limit=8", "eval.preflight=false", "method.rules=null", "tracking=none"]
    outcome = mergelab_command(*typed, "evaluate=true")
    assert outcome.code == 0, outcome.err
    (recorded,) = workplace.glob("outputs/runs/*/*/.hydra/overrides.yaml")
    assert yaml.safe_load(recorded.read_text()) == [*typed, "evaluate=true"]


def test_keys_of_the_users_own_need_no_plus(mergelab_command: Command) -> None:
    own = ("method.strength=0.5", "task.decoding.stop=[x]", "task.new=1", "models.vocab=union", "models.leave_out=[0]")
    found = composed(mergelab_command, *own, "models.experts.mine=./mine", "models.merge_new=true")
    assert found["method"]["strength"] == 0.5
    assert (found["task"]["decoding"], found["task"]["new"]) == ({"stop": ["x"]}, 1)
    assert (found["models"]["vocab"], found["models"]["leave_out"]) == ("union", [0])
    assert found["models"]["experts"]["mine"] == "./mine"
    each = composed(mergelab_command, "models.leave_out={encoder: [0]}")
    assert each["models"]["leave_out"] == {"encoder": [0]}


def test_a_setting_of_an_expert_keeps_its_reference(mergelab_command: Command) -> None:
    named = ("models.experts={a: ./a, b: ./b}", "models.experts.a.weight=2", "models.experts.a.task=rte")
    assert experts(mergelab_command, *named) == {"a": {"reference": "./a", "weight": 2, "task": "rte"}, "b": "./b"}
    ready = experts(mergelab_command, "models.experts.howey.weight=0.5")
    assert ready["howey"] == {"reference": "howey/bert-base-uncased-rte", "weight": 0.5}


def test_rays_own_options_need_no_plus(mergelab_command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    own = ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=1", "hydra.launcher.ray.remote.max_calls=2")
    outcome = mergelab_command(*own, "--cfg", "hydra")
    assert outcome.code == 0, outcome.err
    ray = yaml.safe_load(outcome.out)["hydra"]["launcher"]["ray"]
    assert ray == {"init": {"address": None, "num_cpus": 1}, "remote": {"max_calls": 2}}
    assert "hydra.launcher.ray.foo: no such key" in refusal(mergelab_command, own[0], "hydra.launcher.ray.foo=1")


SPACE = 'sweep.params={method.density: "interval(0.1,0.5)"}'


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("-m", "sweep=ties", "sweep.n_trial=3"), "sweep.n_trial: no such key; did you mean 'sweep.n_trials'?"),
        (
            ("-m", "sweep=layerwise", "sweep.curve.frist=0"),
            "sweep.curve.frist: no such key; did you mean 'sweep.curve.f",
        ),
        (("sweep.n_trials=3",), "sweep.n_trials: no sweep is chosen; sweep=NAME chooses one (--help lists them)"),
        (
            ("-m", "sweep=ties", "hydra.sweeper.n_trial=3"),
            "hydra.sweeper.n_trial: no such key; did you mean 'hydra.swee",
        ),
        (("eval={protocl: full}",), "eval.protocl: no such key; did you mean 'eval.protocol'?"),
        (("metod=ties",), "metod: no such key; did you mean 'method'?"),
        (("density=0.2",), "density: no such key; did you mean 'method.density'?"),
        (("hydra/luncher=ray",), "hydra/luncher: no such key; did you mean 'hydra/launcher'?"),
        (("~evall.protocol",), "~evall.protocol: no such key; did you mean 'eval.protocol'?"),
        (("+eval.protocol=full",), "Could not append to config. An item is already at 'eval.protocol'."),
        (("task.metrics.f1=0",), "task.metrics.f1: task.metrics is a list here, whose entries cannot be set by name"),
        (
            ("-m", "sweep=custom", "sweep.params={method.t: interval(0,1)}"),
            "sweep.params={method.t: interval(0,1)}: a ra",
        ),
        (("-m", "--cfg", "job"), "Only one of --run, --multirun, --cfg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_override_that_cannot_apply_is_one_line(
    mergelab_command: Command, arguments: tuple[str, ...], line: str
) -> None:
    assert refusal(mergelab_command, *arguments).startswith(line)


def test_a_hint_knows_the_keys_of_the_files_that_were_chosen(mergelab_command: Command, workplace: Path) -> None:
    (workplace / "conf" / "eval").mkdir(parents=True)
    (workplace / "conf" / "eval" / "mine.yaml").write_text("protocol: full\nshuffling: 3\n")
    mine = ("--config-dir=conf", "eval=mine")
    assert "did you mean 'eval.shuffling'?" in refusal(mergelab_command, *mine, "eval.shufling=2")
    assert "did you mean" not in refusal(mergelab_command, "eval.shufling=2")


def test_a_search_space_may_be_given_as_a_whole(mergelab_command: Command) -> None:
    for more in ((), ("method=ties",)):
        line = refusal(mergelab_command, "-m", "sweep=custom", SPACE, *more, "source=mini", "method.density=few")
        assert "search space is empty" in line  # the fixed value has the last word on the only key
    line = refusal(mergelab_command, "-m", "sweep=custom", SPACE, "source=mini", "eval.protocol=full")
    assert line.startswith("eval.protocol=full: what a sweep selects on")


def labels(folder: Path) -> list[list[str]]:
    """Which experts the jobs of a grid merged: the names in their results."""
    files = sorted(folder.glob("outputs/grids/*/*/*/result.json"), key=lambda file: int(file.parent.name))
    models = [json.loads(file.read_text())["models"] for file in files]
    return [[model["label"] for model in each if model["role"] == "expert"] for each in models]


MEASURED = ("task.limit=8", "eval.preflight=false", "tracking=none", "method=soup", "eval.bootstrap=10")


@pytest.mark.parametrize("spelled", ["~models.experts.b", "models.experts.b=null"])
def test_a_grid_can_be_with_and_without_an_expert(
    mergelab_command: Command, arguments: list[str], workplace: Path, spelled: str
) -> None:
    named = [arguments[0], "models.experts={a: ./a, b: ./b, c: ./c}", arguments[2], *MEASURED]
    outcome = mergelab_command("-m", *named, "models.experts.c=null,./c", spelled)
    assert outcome.code == 0, outcome.err
    assert labels(workplace) == [["./a"], ["./a", "./c"]]


def test_in_a_grid_over_sets_of_experts_each_job_must_have_the_one_that_is_left_out(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    (workplace / "conf" / "models").mkdir(parents=True)
    for name, members in {"two": "ab", "three": "abc"}.items():
        found = {"name": name, "base": "./base", "experts": {each: f"./{each}" for each in members}}
        (workplace / "conf" / "models" / f"{name}.yaml").write_text(yaml.safe_dump({**found, "passthrough": []}))
    grid = ["--config-dir=conf", "-m", "models=two,three", arguments[2], *MEASURED]
    for spelled in ("models.experts.c=null", "~models.experts.c"):
        outcome = mergelab_command(*grid, spelled)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == f"error: {spelled}: no expert 'c' (there are a, b)\n"
        assert labels(workplace) == []
    for spelled in ("models.experts.a=null", "~models.experts.a"):
        outcome = mergelab_command(*grid, spelled)
        assert outcome.code == 0, outcome.err
    assert labels(workplace) == [["./b"], ["./b"], ["./b", "./c"], ["./b", "./c"]]


def test_a_sweep_leaves_an_expert_out_of_every_trial(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    named = [
        "models.experts={a: ./a, b: ./b, c: ./c}",
        arguments[0],
        arguments[2],
        "task.limit=20",
        "eval.preflight=false",
    ]
    few = ["sweep.n_trials=2", "sweep.study_name=s", "tracking=none", "eval.bootstrap=10"]
    outcome = mergelab_command("-m", "sweep=task_arithmetic", *named, *few, "~models.experts.b")
    assert outcome.code == 0, outcome.err
    assert "2 experts" in outcome.out
    (result,) = workplace.glob("outputs/sweeps/*/*/result.json")
    models = json.loads(result.read_text())["models"]
    assert [model["label"] for model in models if model["role"] == "expert"] == ["./a", "./c"]
    trials = [yaml.safe_load(file.read_text()) for file in workplace.glob("outputs/sweeps/*/*/*/.hydra/config.yaml")]
    assert trials
    assert all(list(trial["models"]["experts"]) == ["a", "c"] for trial in trials)
