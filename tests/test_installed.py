"""A wheel installed elsewhere runs from any folder, and a user's own configs add to the groups."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel.

    Attributes:
        python: its interpreter.
        site: where its packages are.
    """

    python: Path
    site: Path

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in a folder, without what the tests' own environment has on its path."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        program, *arguments = command
        return subprocess.run(
            [str(self.python.parent / program), *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A fresh environment with the wheel alone, which finds what mergelab needs where the tests have it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("mergelab-*.whl")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, capture_output=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return Installed(python, site)


def test_a_wheel_carries_its_configs(installed: Installed, tmp_path: Path) -> None:
    where = installed.run(tmp_path, "python", "-c", "from mergelab.config import CONF_DIR; print(CONF_DIR)")
    assert Path(where.stdout.strip()) == installed.site / "mergelab" / "conf"
    assert (installed.site / "mergelab" / "py.typed").is_file()
    assert (installed.site / "mergelab" / "__init__.pyi").is_file()
    assert (installed.site / "mergelab" / "tasks" / "prompts" / "gsm8k_cot.txt").is_file()
    assert {"page.html.j2", "page.css", "page.js"} <= {
        path.name for path in (installed.site / "mergelab" / "report").iterdir()
    }
    assert (installed.site / "hydra_plugins" / "mergelab_sweeper.py").is_file()
    assert not (installed.site / "hydra_plugins" / "__init__.py").exists()  # other packages' plugins live there too
    done = installed.run(tmp_path, "mergelab", "--cfg", "job", "method=dare", "task=mrpc")
    assert done.returncode == 0, done.stderr
    assert "name: bert_base_mrpc" in done.stdout


def test_a_folder_of_the_users_own_adds_to_the_groups(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "models" / "pair.yaml").write_text(
        "name: pair\nbase: org/base\nexperts: {a: org/a, b: org/b}\nhead: average\npassthrough: []\n"
    )
    done = installed.run(tmp_path, "mergelab", "--config-dir", "mine", "models=pair", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "base: org/base" in done.stdout
    assert "method:\n  name: ties" in done.stdout
    listed = installed.run(tmp_path, "mergelab", "--config-dir", "mine", "--help")
    assert "pair" in listed.stdout
    assert "bert_base_rte" in listed.stdout


@pytest.mark.slow
def test_an_installed_wheel_runs_the_main_job_from_another_folder(installed: Installed, tmp_path: Path) -> None:
    done = installed.run(tmp_path, "mergelab", "method=ties", "task=rte", "source=mini", "task.limit=60")
    assert done.returncode == 0, done.stderr
    assert "ties of 5" in done.stdout
    assert (tmp_path / "outputs" / "mlflow.db").is_file()
    described = "import mergelab, importlib.metadata as m; print(mergelab.__file__, m.metadata('mergelab')['Author'])"
    said = installed.run(tmp_path, "python", "-c", described).stdout.split(maxsplit=1)
    assert Path(said[0]).is_relative_to(installed.site)
    assert said[1].strip() == "mergelab developers"
