"""A study that is interrupted between any two trials ends as one that is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from mergelab.errors import SweepError
from mergelab.sweep.config import SweepConfig
from mergelab.sweep.plan import with_usable_points
from mergelab.sweep.space import Space, space_from
from mergelab.sweep.storage import open_storage, storage_url
from mergelab.sweep.study import ATTEMPTS, SweepStudy

SPACE = space_from({"a.x": "interval(0,1)", "a.y": "interval(0,1)"}, [])
GRID = space_from({"a.x": "range(0,1,0.2)", "a.y": "range(0,1,0.2)"}, [])
FIRST = {"a.x": 0.2, "a.y": 0.8}
DEFINITION = {"task": "rte", "search space of a.x": "interval(0,1)"}
Open = Callable[..., SweepStudy]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open a study as a new process does."""

    def open_(
        name: str = "study", space: Space = SPACE, directions: tuple[Any, ...] = ("maximize",), **more: Any
    ) -> Any:
        open_storage.cache_clear()
        definition = {**DEFINITION, **more.pop("definition", {})}
        url = more.pop("url", f"journal:{tmp_path / 'studies.log'}")
        return SweepStudy(url, name, space, SweepConfig(**more), directions, definition)

    yield open_
    open_storage.cache_clear()


def drive(study: SweepStudy, again: Callable[[], SweepStudy] | None, trials: int) -> list[tuple[float, ...]]:
    """Draw and tell trials, failed and pruned ones among them; ``again`` opens the study anew before each.

    Of every fourth, also between drawing and telling.
    """
    points = []
    for number in range(trials):
        study = again() if again else study
        asked = study.ask()
        assert asked.number == number
        if again and number % 4 == 2:
            study = again()
            assert [trial.params for trial in study.pending()] == [asked.params]
        x, y = asked.params["a.x"], asked.params["a.y"]
        value = -((x - 0.6) ** 2) - (y - 0.3) ** 2
        if number % 7 == 4:
            study.tell(number, None)
        elif number % 5 == 3 and len(study.directions) == 1:
            trial_id = study.trials[number]._trial_id
            study.storage.set_trial_intermediate_value(trial_id, 50 + number, 2 * value)  # as a pruner's check does
            study.tell(number, [value], estimated_of=100)
        else:
            study.tell(number, [value, x][: len(study.directions)])
        points.append((x, y))
    return points


def test_a_grid_has_every_point_once_whatever_is_enqueued(opened: Open) -> None:
    settings = with_usable_points(SweepConfig(sampler="grid", enqueue=[FIRST]), GRID, 2)
    study = opened(space=GRID, **settings.model_dump())
    points = [tuple(study.ask().params.values()) for _ in range(GRID.grid_size())]
    assert len(set(points)) == GRID.grid_size() == 25


SAMPLERS: list[tuple[Any, int]] = [
    ("tpe", 1), ({"name": "tpe", "multivariate": True}, 1), ("gp", 1), ("cmaes", 1), ("qmc", 1), ("random", 1),
    ("grid", 1), ("nsga2", 1), ("tpe", 2), ({"name": "nsga2", "population_size": 4}, 2),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "objectives"), SAMPLERS, ids=str)
def test_an_interrupted_sweep_draws_the_points_of_an_undisturbed_one(
    opened: Open, sampler: Any, objectives: int
) -> None:
    directions = ("maximize", "minimize")[:objectives]
    told = {"sampler": sampler, "seed": 3, "space": GRID if sampler == "grid" else SPACE, "directions": directions}
    if sampler != "grid":
        told["enqueue"] = [FIRST]
    trials = 13 if sampler == "gp" else 18
    undisturbed = drive(opened("undisturbed", **told), None, trials)
    assert drive(opened("disturbed", **told), lambda: opened("disturbed", **told), trials) == undisturbed
    other_seed = drive(opened("other", **{**told, "seed": 4}), None, trials)
    assert other_seed[1:] != undisturbed[1:]
    if objectives == 1:  # evolution may repeat a good point
        assert len(set(undisturbed)) == trials
    if sampler != "grid":
        assert undisturbed[0] == tuple(FIRST.values())


def test_the_trials_of_a_sequence_fill_the_space_evenly(opened: Open) -> None:
    # Each of 16 points of a scrambled Sobol' sequence has a column of its own; random points share some.
    drawn = drive(opened(sampler={"name": "qmc", "qmc_type": "sobol"}), None, 17)[1:]
    for axis in (0, 1):
        assert len({int(point[axis] * 16) for point in drawn}) >= 15


def test_a_dead_process_leaves_trials_that_are_whole(opened: Open) -> None:
    study = opened()
    asked = study.ask()
    assert study.new_attempt(0) == 1
    found = opened()
    (pending,) = found.pending()
    assert pending.params == asked.params
    assert pending.user_attrs[ATTEMPTS] == 1
    assert found.new_attempt(0) == 2
    assert found.ask().number == 1


def test_a_pruned_trials_estimate_is_its_last_intermediate_value_and_never_the_best(opened: Open) -> None:
    study = opened()
    for value, reports in ((0.25, {}), (0.75, {3: 0.9, 16: 0.8})):
        number = study.ask().number
        trial_id = study.trials[number]._trial_id
        for step, report in reports.items():
            study.storage.set_trial_intermediate_value(trial_id, step, report)
        study.tell(number, [value], estimated_of=12)
    first, second = opened().trials
    assert (first.state, second.state) == (optuna.trial.TrialState.PRUNED,) * 2
    assert first.intermediate_values == {12: 0.25}
    assert second.intermediate_values == {3: 0.9, 16: 0.75}
    assert study.best() is None


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", {"name": "nsga2", "population_size": 4}], ids=str)
def test_samplers_learn_from_the_estimates_of_pruned_trials(opened: Open, sampler: Any) -> None:
    # Nearly all trials are pruned; what is drawn depends on their estimates, as it would on scores.
    def drawn(name: str, sign: float, *, pruned: bool) -> list[tuple[float, float]]:
        study = opened(name, sampler=sampler, seed=1)
        for number in range(16):
            x, y = study.ask().params.values()
            value = [-sign * ((x - 0.6) ** 2 + (y - 0.3) ** 2)]
            study.tell(number, value, estimated_of=100 if pruned and number else None)
        return [tuple(trial.params.values()) for trial in study.trials]

    estimated = drawn("pruned", 1, pruned=True)
    assert estimated == drawn("complete", 1, pruned=False)
    assert estimated != drawn("otherwise", -1, pruned=True)


def test_an_estimate_that_is_not_known_is_no_value(opened: Open) -> None:
    study = opened(sampler="gp")
    for _ in range(12):
        study.tell(study.ask().number, [float("nan")], estimated_of=100)
    assert study.ask().number == 12
    assert [trial.state.name for trial in opened(sampler="gp").trials] == ["PRUNED"] * 12 + ["RUNNING"]


@pytest.mark.parametrize(("direction", "number"), [("maximize", 1), ("minimize", 0)])
def test_the_best_is_the_first_of_the_equal_ones(opened: Open, direction: str, number: int) -> None:
    study = opened(directions=(direction,))
    for value in (0.1, 0.9, None, 0.9, 0.1):
        study.tell(study.ask().number, None if value is None else [value])
    best = study.best()
    assert best is not None
    assert best.number == number


def test_a_study_that_does_not_say_how_it_was_measured_was_pruned(opened: Open) -> None:
    opened().ask()
    assert len(opened(definition={"sweep.evaluation": "pruned"}).trials) == 1
    with pytest.raises(SweepError, match=r"another sweep\.evaluation: pruned, not adaptive"):
        opened(definition={"sweep.evaluation": "adaptive"})


def test_settings_that_are_newer_than_a_study_have_their_defaults_in_it(opened: Open) -> None:
    opened().ask()
    later = {"eval.engine": "transformers", "eval.max_memory": "null"}
    assert len(opened(definition=later).trials) == 1
    with pytest.raises(SweepError, match=r"another eval\.engine: transformers, not vllm"):
        opened(definition={**later, "eval.engine": "vllm"})


def test_a_study_of_something_else_is_not_gone_on_with(opened: Open) -> None:
    opened().ask()
    with pytest.raises(SweepError, match=r"exists with another task: rte, not cola; .* sweep\.study_name=study-2"):
        opened(definition={"task": "cola"})
    with pytest.raises(SweepError, match=r"another search space of a\.x: interval\(0,1\), not interval\(0,2\)"):
        opened(definition={"search space of a.x": "interval(0,2)"})
    with pytest.raises(SweepError, match=r"another search space of a\.z: None, not choice\(1,2\)"):
        opened(definition={"search space of a.z": "choice(1,2)"})
    with pytest.raises(SweepError, match="another direction: maximize, not minimize"):
        opened(directions=("minimize",))
    with pytest.raises(SweepError, match="another direction: maximize, not maximize,minimize"):
        opened(directions=("maximize", "minimize"))
    assert len(opened().trials) == 1


def test_a_study_that_someone_else_has_made_is_left_alone(opened: Open, tmp_path: Path) -> None:
    storage = open_storage(f"journal:{tmp_path / 'studies.log'}")
    optuna.create_study(storage=storage, study_name="study", direction="maximize").ask(
        {"x": SPACE.distributions["a.x"]}
    )
    with pytest.raises(SweepError, match="is not a study of mergelab's; choose another name"):
        opened()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////proc/nowhere/studies.db", r"sweep\.storage=sqlite:////proc/nowhere/studies\.db: cannot be used"),
        ("journal:/proc/nowhere/log", "sweep.storage=journal:/proc/nowhere/log: cannot be used"),
        ("postgresql+psycopg://me:secret@127.0.0.1:9/x", r"sweep\.storage=postgresql\+psycopg://me:\*\*\*@127"),
        ("mysql+nodriver://me:secret@127.0.0.1/x", "nodriver"),
        ("studies.db", "sweep.storage=studies.db: "),
        ("nothing://at/all", "sweep.storage=nothing://at/all: "),
    ],
)
def test_a_storage_that_cannot_be_had_is_one_line_without_its_password(opened: Open, url: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(SweepError, match=message) as caught:
        opened(url=url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


def test_relative_storage_is_relative_to_where_the_command_was_given(tmp_path: Path) -> None:
    assert storage_url(None, "/here") == "sqlite:////here/outputs/sweeps.db"
    assert storage_url("sqlite:///mine.db", "/here") == "sqlite:////here/mine.db"
    assert storage_url("sqlite:////there/mine.db", "/here") == "sqlite:////there/mine.db"
    assert storage_url("journal:logs/a.log", "/here") == "journal:/here/logs/a.log"
    assert storage_url("postgresql+psycopg://u@h/d", "/here") == "postgresql+psycopg://u@h/d"


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "tpe", "n_startup_trials": "x"},
        {"name": "tpe", "n_ei_candidates": "x", "n_startup_trials": 0},
        {"name": "gp", "n_startup_trials": "x"},
        {"name": "qmc", "qmc_type": 5},
    ],
    ids=str,
)
def test_an_option_of_another_type_is_one_line(opened: Open, sampler: dict[str, Any]) -> None:
    with pytest.raises(SweepError, match=rf"^sweep\.sampler={sampler['name']}: "):  # noqa: PT012
        for _ in range(3):
            study = opened(sampler=sampler)
            study.tell(study.ask().number, [0.5])
