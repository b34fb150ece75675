"""Old names of configuration keys: one line that gives today's name, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import mergelab as ml
from mergelab.config import RENAMED, renamed
from mergelab.engine.registry import get_method
from mergelab.errors import ConfigError
from mergelab.sweep.config import SweepConfig
from mergelab.tasks.schema import GenerationTask
from tests.conftest import Outcome

Command = Callable[..., Outcome]

ELECTION = "method.election: is called majority_sign now; write majority_sign=total"
ON_THE_COMMAND_LINE = [
    (("method.election=mass",), ELECTION),
    (("method.election=count", "method=dare_ties"), ELECTION.replace("total", "frequency")),
    (("method.majority_sign=count",), "method.majority_sign='count': is called frequency now"),
    (("method.zero_sign=positive",), "method.zero_sign: is called tie_break now"),
    (("method.weights_at=before",), "method.weights_at: is called weights_stage now; write weights_stage=elect"),
    (("method.weights_stage=after",), "method.weights_stage='after': is called reduce now"),
    (("method.rules=[{match: '*', election: mass}]",), ELECTION.replace("method.", "method.rules[0].")),
    (
        ("method.rules=[{match: '*', weights_stage: after}]",),
        "method.rules[0].weights_stage='after': is called reduce now",
    ),
    (("task=gsm8k", "task.shots=4"), "task.shots: is called num_fewshot now"),
    (("task=lm_eval", "task.shots=4"), "task.shots: is called num_fewshot now"),
    (("task=gsm8k", "task.examples=x"), "task.examples: is called fewshot_examples now"),
    (("task=gsm8k", "task.worked_examples=x"), "task.worked_examples: is called fewshot_examples now"),
    (("task=t5_rte", "task.label_words=[a,b]"), "task.label_words: is called verbalizer now"),
    (("-m", "sweep=ties", "sweep.first=[]"), "sweep.first: is called enqueue now"),
    (("-m", "hydra/sweeper=mergelab", "hydra.sweeper.first=[]"), "sweep.first: is called enqueue now"),
    (("-m", "sweep=ties", "method.election=choice(mass,count)"), ELECTION),
    (("-m", "sweep=custom", "sweep.params={method.election: 'choice(mass,count)'}"), ELECTION),
    (("-m", "sweep=ties", "method.majority_sign=choice(total,count)"), "method.majority_sign='count': is called frequ"),
    (("-m", "method=ties,dare_ties", "method.election=mass"), ELECTION),
]


def refused(outcome: Outcome, line: str) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {line}")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"), ON_THE_COMMAND_LINE, ids=[" ".join(arguments) for arguments, _ in ON_THE_COMMAND_LINE]
)
def test_an_old_key_on_the_command_line(
    mergelab_command: Command, workplace: Path, arguments: tuple[str, ...], line: str
) -> None:
    refused(mergelab_command(*arguments, "source=mini"), line)
    assert not list(workplace.iterdir())


OWN_FILES = {
    "experiment": ({"method": {"election": "mass"}}, ELECTION),
    "method": (
        {"name": "mine", "function": "mergelab.methods.ties.ties", "weights_at": "after"},
        "method.weights_at: is called weights_stage now; write weights_stage=reduce",
    ),
    "task": (
        {
            **{"name": "mine", "version": 1, "kind": "generation", "dataset": {"path": "x/y"}, "prompt": "{a}"},
            **{"references": ["b"], "metrics": ["exact_match"], "primary": "exact_match", "shots": 3},
        },
        "task.shots: is called num_fewshot now",
    ),
    "sweep": (
        {"defaults": ["_settings", "_self_", {"override /hydra/sweeper": "mergelab"}], "sweep": {"first": []}},
        "sweep.first: is called enqueue now",
    ),
}


@pytest.mark.parametrize("group", OWN_FILES)
def test_an_old_key_in_a_users_own_file(mergelab_command: Command, workplace: Path, group: str) -> None:
    content, line = OWN_FILES[group]
    (workplace / "conf" / group).mkdir(parents=True)
    package = "# @package _global_\n" if group in ("experiment", "sweep") else ""
    (workplace / "conf" / group / "mine.yaml").write_text(package + yaml.safe_dump(content))
    multirun = ("-m", "method.density=interval(0.1,0.5)") if group == "sweep" else ()
    refused(mergelab_command("--config-dir=conf", *multirun, f"{group}=mine", "source=mini"), line)
    assert [path.name for path in workplace.iterdir()] == ["conf"]


def test_a_key_of_a_sweeps_file_that_nothing_refers_to_is_an_error(mergelab_command: Command, workplace: Path) -> None:
    (workplace / "conf" / "sweep").mkdir(parents=True)
    content = {"defaults": ["ties", "_self_"], "sweep": {"n_trial": 3}}
    (workplace / "conf" / "sweep" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
    outcome = mergelab_command("--config-dir=conf", "-m", "sweep=mine", "source=mini")
    refused(outcome, "sweep.n_trial: no such key, and nothing refers to it; did you mean 'n_trials'?")


def test_an_old_key_in_python() -> None:
    models = [{"w": torch.ones(2)} for _ in range(3)]
    for parameters in ({"election": "mass"}, {"rules": [{"match": "*", "election": "mass"}]}):
        with pytest.raises(ConfigError, match=r"election: is called majority_sign now; write majority_sign=total"):
            ml.ties(models, base_index=0, **parameters)
    with pytest.raises(ConfigError, match=r"method.weights_stage='before': is called elect now"):
        ml.dare_ties(models, base_index=0, weights_stage="before")


def test_an_old_key_is_not_renamed_where_the_new_one_does_not_exist(mergelab_command: Command) -> None:
    refused(mergelab_command("method=soup", "method.election=mass"), "method.election: soup has no such parameter")
    refused(mergelab_command("task=rte", "task.shots=3"), "task.shots: no such key")


def test_a_function_of_the_users_own_may_have_parameters_of_these_names(
    mergelab_command: Command, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def mean(base, experts, *, election: str = 'none'):\n    return sum(experts) / len(experts)\n"
    (workplace / "mine_election.py").write_text(code)
    monkeypatch.syspath_prepend(str(workplace))
    own = ("method=custom", "method.function=mine_election.mean", "method.election=mass", "evaluate=false")
    outcome = mergelab_command(*arguments, *own, "output=merged", "tracking=none")
    assert outcome.code == 0, outcome.err


def test_every_new_name_exists() -> None:
    known = {
        "method": set(get_method("ties").parameters.model_fields),
        "task": set(GenerationTask.model_fields),
        "sweep": set(SweepConfig.model_fields),
    }
    for old, (name, values) in RENAMED.items():
        group, _, key = old.partition(".")
        assert name in known[group], old
        assert key not in known[group], old
        for value, new in values.items():
            assert get_method("ties").parameters.model_validate({name: new}), (value, new)


def test_only_old_names_are_renamed() -> None:
    assert renamed("models.first", 1, ["enqueue"]) is None
    assert renamed("method.majority_sign", "total", ["majority_sign"]) is None
    assert renamed("method.reduce", "mass", ["reduce"]) is None
