"""A sweep's jobs get the configuration that Hydra would compose for each, without composing each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from mergelab.config import CONF_DIR
from mergelab.sweep.job_configs import JobConfigs

NAMES = "hydra.job.config.override_dirname"
TOLD = [
    "task=rte", "method=ties", "models.head=average", "hydra.sweep.dir=/somewhere",
    f"{NAMES}.kv_sep=_is_", f"{NAMES}.exclude_keys=[models.head]",
]  # fmt: skip


@pytest.fixture
def loader() -> Iterator[Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


class Counted:
    """A loader that counts what it composes."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.count = loader, 0

    def load_sweep_config(self, *args: Any) -> Any:
        self.count += 1
        return self.loader.load_sweep_config(*args)


def text(config: Any) -> str:
    return OmegaConf.to_yaml(config, resolve=False)


def composed(loader: Any, jobs: list[list[str]]) -> int:
    """Compare the configurations of jobs with Hydra's; answer how many were composed."""
    master = loader.load_configuration("config", ["sweep=ties", *TOLD], run_mode=RunMode.MULTIRUN)
    counted = Counted(loader)
    configs = JobConfigs(counted)  # type: ignore[arg-type]
    for job in jobs:
        found, wanted = configs.load_sweep_config(master, job), loader.load_sweep_config(master, job)
        assert text(found) == text(wanted)
        assert OmegaConf.is_struct(found)
        found.hydra.job.id = "7"  # what a job does with its own is not in the next one's
        found.method["lambda"] = -1
    return counted.count


def job(number: int, *more: str, **values: object) -> list[str]:
    spelled = ",".join(f"{key}:{value}" for key, value in {"study": '"a b"', "number": number, **values}.items())
    return [*TOLD, *more, f"hydra.sweep.subdir={number}", f"++sweep.job={{{spelled}}}"]


def test_jobs_that_differ_in_values_are_composed_once(loader: Any) -> None:
    jobs = [job(at, f"method.density={0.1 * at:.2f}", f"method.lambda=[0.2,{at}]") for at in range(1, 4)]
    assert composed(loader, jobs) == 1


def test_values_that_are_new_to_the_configuration_are_composed_once(loader: Any) -> None:
    assert composed(loader, [job(at, f"+method.extra.{'deep'}={at}") for at in range(3)]) == 1


@pytest.mark.parametrize(
    "jobs",
    [
        [job(0, "method=ties"), job(1, "method=dare")],
        [job(0, stage="report"), job(1)],
        [job(0, "+method.extra={a:1}"), job(1, "+method.extra={b:1}")],
        [job(0, "+method.extra={a:1}"), job(1, "+method.extra=5")],
        [job(0, "method.density=0.3"), job(1, "method.lambda=0.3")],
        [job(0, "method.density=0.3"), job(1, "method.density=0.3", "method.lambda=0.3")],
        [job(0, "+method.extra={a:1}", "+method.extra.b=2"), job(1, "+method.extra={a:3}", "+method.extra.b=2")],
        [job(0, "method.density=0.3", "method.density=0.5"), job(1, "method.density=0.4", "method.density=0.5")],
    ],
)
def test_jobs_that_differ_in_more_than_values_are_composed_each(loader: Any, jobs: list[list[str]]) -> None:
    assert composed(loader, jobs) == len(jobs)
