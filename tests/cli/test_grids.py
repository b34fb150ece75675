"""Grids whose jobs do not share what they are decided by, and launchers that refuse their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Command = Callable[..., Outcome]
CODE = """
import torch
def mean(models):
    return torch.stack(models).mean(0)
def first(models):
    return models[0]
def stop(models):
    raise GeneratorExit("enough")
"""


def rows(outcome: Outcome) -> list[str]:
    """Name the table's rows."""
    assert outcome.code == 0, outcome
    return [line.split("│")[1].strip() for line in outcome.out.splitlines() if line.startswith("│")]


def test_functions_of_the_users_own_are_a_grid(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    (workplace / "own_functions.py").write_text(CODE)
    functions = "method.function=own_functions.mean,own_functions.first"
    found = rows(mergelab_command("-m", "method=custom", functions, *arguments))
    assert found[-2:] == ["method.function=own_functions.mean", "method.function=own_functions.first"]


def test_a_pattern_of_options_is_a_grid_with_a_parent_run(mergelab_command: Command, arguments: list[str]) -> None:
    outcome = mergelab_command("-m", "method=glob(dare*)", *arguments)
    assert rows(outcome)[-2:] == ["method=dare", "method=dare_ties"]
    assert "parent run " in outcome.out


def test_local_experts_of_a_grid_are_not_replaced_where_there_is_no_hub(
    mergelab_command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    base, _, data = arguments
    outcome = mergelab_command("-m", "method=soup", base, data, "models.experts=[./a,./b],[./a,./c]")
    found = rows(outcome)
    assert found[-2:] == ["models.experts=[./a,./b]", "models.experts=[./a,./c]"]
    # The base is measured behind the merged head, which is another one in each job.
    assert found[:2] == ["./base (models.experts=[./a,./b])", "./base (models.experts=[./a,./c])"]
    assert found[2:5] == ["./a", "./b", "./c"]


def test_a_model_that_scores_differently_on_the_jobs_examples_has_a_row_for_each(
    mergelab_command: Command, arguments: list[str]
) -> None:
    found = rows(mergelab_command("-m", "method=soup", "seed=1,2", "eval.protocol=holdout", *arguments))
    assert {"./base (seed=1)", "./base (seed=2)", "seed=1", "seed=2"} <= set(found)


def test_seeds_that_draw_no_split_do_not_repeat_the_models(mergelab_command: Command, arguments: list[str]) -> None:
    found = rows(mergelab_command("-m", "method=soup", "seed=1,2", *arguments))
    assert found == ["./base", "./a", "./b", "./c", "seed=1", "seed=2"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hydra.launcher.n_jobs=0", "n_jobs == 0 in Parallel has no meaning"),
        ("hydra.launcher.batch_size=-3", "batch_size must be 'auto' or a positive integer, got: -3"),
        ("hydra.launcher.prefer=x", "prefer=x is not a valid backend hint"),
    ],
)
def test_a_launcher_that_refuses_its_settings_is_one_line(
    mergelab_command: Command, arguments: list[str], setting: str, said: str
) -> None:
    outcome = mergelab_command("-m", "hydra/launcher=joblib", setting, "seed=1,2", *arguments, "tracking=none")
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith(f"error: hydra/launcher=joblib: {said}")


@pytest.mark.parametrize("kind", [(), ("-m", "seed=0,1")], ids=["single", "grid"])
def test_a_method_that_raises_what_is_no_exception_is_one_line(
    mergelab_command: Command, arguments: list[str], workplace: Path, kind: tuple[str, ...]
) -> None:
    (workplace / "stopping.py").write_text(CODE)
    outcome = mergelab_command(*kind, "method=custom", "method.function=stopping.stop", *arguments, "tracking=none")
    assert outcome.code == 2
    assert "raises GeneratorExit; raise an error instead" in outcome.err.splitlines()[-1]
