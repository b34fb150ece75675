"""Settings that would do something else than they say, and user code that ends the process: one line, exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Command = Callable[..., Outcome]
SWEEP = ("-m", "sweep=task_arithmetic", "sweep.n_trials=2", "tracking=none")
CODE = """
import sys
from optuna.samplers import RandomSampler
def leave(base, experts):
    sys.exit(0)
def leave_list(models, *, code: int = 3):
    raise SystemExit(code)
class Draw(RandomSampler):
    def __init__(self, seed=None):
        super().__init__(seed)
    def sample_independent(self, *arguments):
        sys.exit(0)
"""


def line(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome
    (found,) = (each for each in outcome.err.splitlines() if each.startswith("error: "))
    assert outcome.err.splitlines()[-1] == found
    assert len(found) <= 400
    return found.removeprefix("error: ")


@pytest.mark.parametrize("spelled", ["method.name=soup", "++method.name=soup", "+task.name=mnli", "task.name=sst2,rte"])
@pytest.mark.parametrize("kind", [(), ("-m", "seed=0,1"), SWEEP], ids=["single", "grid", "sweep"])
def test_what_says_which_method_or_task_it_is_cannot_be_set(
    mergelab_command: Command, workplace: Path, spelled: str, kind: tuple[str, ...]
) -> None:
    group = spelled.lstrip("+").partition(".")[0]
    said = line(mergelab_command(*kind, "source=mini", spelled))
    assert said.startswith(f"{group}.name: says which {group} the other settings are of")
    assert f"{group}=NAME" in said
    assert not list(workplace.iterdir())


def test_a_search_space_cannot_vary_it_either(mergelab_command: Command, workplace: Path) -> None:
    said = line(mergelab_command(*SWEEP, "source=mini", "+sweep.params={method.name: 'choice(soup,ties)'}"))
    assert said.startswith("sweep.params: method.name: says which method")


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///", "sqlite:////", "sqlite+pysqlite://"])
def test_an_sqlite_address_without_a_file_is_one_line(
    mergelab_command: Command, workplace: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = "names no file; write sqlite:///FILE"
    for kind in (("method=soup",), ("-m", "method=soup,median"), SWEEP[:-1]):
        assert shown in line(mergelab_command(*kind, "source=mini", f"tracking.uri={address}"))
    said = line(mergelab_command(*SWEEP, "source=mini", f"sweep.storage={address}"))
    assert said.startswith(f"sweep.storage={address}: {shown}")
    assert not list(workplace.rglob("*.db"))


@pytest.mark.parametrize(
    "setting",
    [
        "sweep.enqueue=[{method.lambda: nan}]",
        "sweep.enqueue=[{method.lambda: 0.3},{method.lambda: inf}]",
        "sweep.enqueue=[{method.lambda: much}]",
        "method.lambda=choice(0.3,nan)",
        "method.lambda=interval(nan,1)",
        "method.lambda=interval(0.1,nan)",
        "method.lambda=range(0.1,nan,0.1)",
    ],
)
def test_no_number_among_the_points_to_try_is_one_line(
    mergelab_command: Command, workplace: Path, setting: str
) -> None:
    said = line(mergelab_command(*SWEEP, "source=mini", setting))
    assert "nan" in said or "inf" in said or "much" in said
    assert "lambda" in said
    assert not list(workplace.rglob("sweeps.db"))


@pytest.mark.parametrize("function", ["leave", "leave_list"])
@pytest.mark.parametrize("kind", [(), ("-m", "seed=0,1"), ("-m", "hydra/launcher=joblib", "seed=0,1")], ids=" ".join)
def test_a_method_that_calls_exit_is_one_line(
    mergelab_command: Command, arguments: list[str], workplace: Path, function: str, kind: tuple[str, ...]
) -> None:
    (workplace / "leaving.py").write_text(CODE)
    own = ("method=custom", f"method.function=leaving.{function}")
    said = line(mergelab_command(*kind, *own, *arguments, "tracking=none"))
    assert f"method.function=leaving.{function}: calls sys.exit({0 if function == 'leave' else 3})" in said


def test_a_module_and_a_sampler_that_call_exit_are_one_line(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    (workplace / "leaving_now.py").write_text("import sys\nsys.exit(0)\n")
    (workplace / "leaving_later.py").write_text(CODE)
    said = line(mergelab_command("method=custom", "method.function=leaving_now.f", *arguments, "tracking=none"))
    assert "importing leaving_now fails: SystemExit: 0" in said
    said = line(mergelab_command(*SWEEP, *arguments, "sweep.sampler=leaving_now.Draw"))
    assert "sweep.sampler=leaving_now.Draw: importing leaving_now fails: SystemExit: 0" in said
    said = line(mergelab_command(*SWEEP, *arguments, "sweep.sampler=leaving_later.Draw", "sweep.enqueue=[]"))
    assert "leaving_later.py, line" in said
    assert "calls sys.exit(0)" in said
