"""``sweep=<method>`` works for every method: its space comes from its parameters' ranges, its defaults come first."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution, IntDistribution
from pydantic import Field
from torch import Tensor

from mergelab.config import CONF_DIR
from mergelab.engine.method import MergeMethod, merge_method
from mergelab.engine.parameters import Densities, Density, Fraction, Lambda, Positive, Samples, Weights
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.sweep_range import NotSwept, SweepRange
from mergelab.errors import SweepError
from mergelab.sweep.method_space import method_space, sweep_config_of
from mergelab.sweep.space import space_from
from mergelab.sweep.storage import open_storage
from tests.conftest import Outcome
from tests.methods.toy import OF_WEIGHTS, merged, toy_models

SEARCHED = [name for name in method_names() if method_space(get_method(name))]
NOT_SEARCHED = [name for name in method_names() if name not in SEARCHED]
READY = sorted(path.stem for path in (CONF_DIR / "sweep").glob("[a-z]*.yaml"))


def declared(annotation: Any, default: Any) -> MergeMethod:
    """A method with one parameter, ``x``."""

    def method(experts: list[Tensor], *, x: Any = default) -> Tensor:
        return experts[0]

    method.__annotations__["x"] = annotation
    made: MergeMethod = merge_method()(method).merge_method  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("annotation", "default", "space"),
    [
        (Density, 0.2, FloatDistribution(0.05, 1)),
        (Density, 0.01, FloatDistribution(0.005, 1, log=True)),
        (Densities, 0.2, FloatDistribution(0.05, 1)),
        (Annotated[Densities, SweepRange(0.2, 0.8)], 0.5, FloatDistribution(0.2, 0.8)),
        (Fraction, 0.0, FloatDistribution(0, 1)),
        (Annotated[float, Field(gt=0, lt=2)], 1.0, FloatDistribution(0.1, 1.9)),
        (Annotated[float, Field(ge=-1, le=1)], 0.0, FloatDistribution(-1, 1)),
        (Annotated[float, Field(ge=1e-3, le=1)], 0.1, FloatDistribution(1e-3, 1, log=True)),
        (Annotated[float, Field(ge=1e-1, le=1)], 0.1, FloatDistribution(1e-1, 1)),
        (Lambda, 1.0, FloatDistribution(0.2, 2)),
        (Lambda, 0.3, FloatDistribution(0.06, 1)),
        (float, -2.0, FloatDistribution(-4, -0.4)),
        (Positive, 1e-5, FloatDistribution(1e-6, 1e-4, log=True)),
        (Annotated[float, Field(ge=0)], 0.2, FloatDistribution(0.02, 2, log=True)),
        (Annotated[Positive, SweepRange(1e-9, 1.0, log=True)], 1e-5, FloatDistribution(1e-9, 1, log=True)),
        (Annotated[int, Field(ge=1, lt=9)], 2, IntDistribution(1, 8)),
        (Annotated[int, Field(gt=1), SweepRange(2, 5)], 2, IntDistribution(2, 5)),
    ],
    ids=str,
)
def test_a_range_gives_a_space(annotation: Any, default: Any, space: Any) -> None:
    found = space_from(method_space(declared(annotation, default)), [])
    assert found.distributions == {"method.x": space}
    assert found.check_point({"method.x": default}) is None


@pytest.mark.parametrize(
    ("annotation", "default"),
    [
        (Annotated[Fraction, NotSwept()], 0.5),
        (Lambda, 0.0),
        (Annotated[float, Field(ge=0)], 0.0),
        (Annotated[float, Field(le=1)], 0.5),
        (Density | None, None),
        (Samples, 100),
        (int, 3),
        (bool, True),
        (Literal["a", "b"], "a"),
        (str, "a"),
        (Weights, None),
    ],
)
def test_what_has_no_range_stays_at_its_default(annotation: Any, default: Any) -> None:
    assert method_space(declared(annotation, default)) == {}


@pytest.mark.parametrize("name", SEARCHED)
def test_the_defaults_of_every_method_come_first_and_lie_in_its_space(name: str) -> None:
    sweep = sweep_config_of(name)["sweep"]
    (first,) = sweep["enqueue"]
    defaults = get_method(name).parameters().by_key()
    assert first == {f"method.{key}": value for key, value in defaults.items() if f"method.{key}" in sweep["params"]}
    assert space_from(sweep["params"], []).check_point(first) is None


@pytest.mark.parametrize("name", [name for name in SEARCHED if name in OF_WEIGHTS])
def test_every_method_can_merge_at_the_corners_of_its_space(name: str) -> None:
    method = get_method(name)
    models = toy_models(method.max_experts or 3)
    lowest, highest, *_ = space_from(method_space(method), []).edges()
    for ends in itertools.product(*([lowest[key], highest[key]] for key in lowest)):
        corner = {key.removeprefix("method."): value for key, value in zip(lowest, ends, strict=True)}
        result = merged(name, models, **corner)
        assert all(bool(tensor.isfinite().all()) for tensor in result.values()), corner


@pytest.mark.parametrize("name", NOT_SEARCHED)
def test_a_method_without_anything_to_search_says_what_to_do_instead(name: str) -> None:
    with pytest.raises(SweepError, match=f"^sweep={name}: {name} ") as error:
        sweep_config_of(name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ sweep=<method>


@pytest.fixture
def composed(mergelab_command: Callable[..., Outcome]) -> Callable[..., Any]:
    """What ``python -m mergelab ... --cfg all`` shows."""

    def compose(*overrides: str) -> Any:
        outcome = mergelab_command(*overrides, "--cfg", "all")
        assert outcome.code == 0, outcome.err
        return OmegaConf.create(outcome.out)

    return compose


@pytest.mark.parametrize("name", ["slerp", "dare_ties", "ties"])
def test_the_option_named_as_a_method_sweeps_that_method(composed: Callable[..., Any], name: str) -> None:
    config = composed(f"sweep={name}")
    assert config.method.name == name
    assert config.hydra.runtime.choices["hydra/sweeper"] == "mergelab"
    assert config.eval.protocol == "holdout"
    assert config.sweep.n_trials == 50
    assert config.sweep.params
    assert len(config.sweep.enqueue) == 1


def test_a_file_comes_before_the_ranges(composed: Callable[..., Any]) -> None:
    assert composed("sweep=ties").sweep.params["method.density"] == "interval(0.05,0.95)"
    assert method_space(get_method("ties"))["method.density"] == "interval(0.05,1)"


def test_a_users_own_file_comes_before_the_ranges(mergelab_command: Callable[..., Outcome], workplace: Path) -> None:
    assert "pcb" not in READY
    (workplace / "own" / "sweep").mkdir(parents=True)
    (workplace / "own" / "sweep" / "pcb.yaml").write_text(
        "# @package _global_\ndefaults: [_settings, _self_, override /method: pcb]\n"
        "sweep: {params: {method.ratio: 'interval(0.3,0.4)'}}\n"
    )
    outcome = mergelab_command("--config-dir", "own", "sweep=pcb", "--cfg", "job", "--package", "sweep.params")
    assert outcome.out.splitlines()[-1] == "method.ratio: interval(0.3,0.4)"


def test_the_options_are_listed_without_importing_a_method() -> None:
    code = (
        "import sys; from hydra.core.object_type import ObjectType;"
        "from hydra_plugins.mergelab_sweep_spaces import MethodSweeps;"
        "print(*MethodSweeps('mergelab', 'mergelab://sweep').list('sweep', ObjectType.CONFIG));"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(method_names())


def test_a_sweep_from_the_ranges_tries_the_defaults_and_then_others(
    mergelab_command: Callable[..., Outcome], arguments: list[str], workplace: Path
) -> None:
    own = ["sweep.n_trials=3", "sweep.study_name=s", "sweep.pruner=none", "tracking=none"]
    outcome = mergelab_command("-m", "sweep=sce", *arguments, *own)
    assert outcome.code == 0, outcome
    assert "sweep     sce: method.select_topk=interval(0.05,1)" in outcome.out
    open_storage.cache_clear()
    study = optuna.load_study(storage=f"sqlite:///{workplace}/outputs/sweeps.db", study_name="s")
    tried = [trial.params["method.select_topk"] for trial in study.trials]
    assert tried[0] == 1.0
    assert len(set(tried)) == 3
    assert all(0.05 <= value <= 1 for value in tried)
