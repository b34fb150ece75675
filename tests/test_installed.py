"""A wheel installed elsewhere runs from any folder, and a user's own configs add to the groups."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("mergelab-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "mergelab", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_wheel_carries_its_configs(installed: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "from mergelab.config import CONF_DIR; print(CONF_DIR)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()) == installed / "mergelab" / "conf"
    assert (installed / "mergelab" / "tasks" / "prompts" / "gsm8k_cot.txt").is_file()
    assert {"page.html.j2", "page.css", "page.js"} <= {
        path.name for path in (installed / "mergelab" / "report").iterdir()
    }
    assert (installed / "hydra_plugins" / "mergelab_sweeper.py").is_file()
    assert not (installed / "hydra_plugins" / "__init__.py").exists()  # other packages' plugins live there too
    done = run(installed, tmp_path, "--cfg", "job", "method=dare", "task=mrpc")
    assert done.returncode == 0, done.stderr
    assert "name: bert_base_mrpc" in done.stdout


def test_a_folder_of_the_users_own_adds_to_the_groups(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "models" / "pair.yaml").write_text(
        "name: pair\nbase: org/base\nexperts: {a: org/a, b: org/b}\nhead: average\npassthrough: []\n"
    )
    done = run(installed, tmp_path, "--config-dir", "mine", "models=pair", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "base: org/base" in done.stdout
    assert "method:\n  name: ties" in done.stdout
    listed = run(installed, tmp_path, "--config-dir", "mine", "--help")
    assert "pair" in listed.stdout
    assert "bert_base_rte" in listed.stdout
