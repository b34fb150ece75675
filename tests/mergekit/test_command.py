"""The command for mergekit's configs, its flags, and what it prints; the documentation's example is one of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergelab.cli.help import commands
from mergelab.errors import ConfigError
from mergelab.mergekit.__main__ import main, shard_size
from tests.conftest import ROOT
from tests.mergekit.made import make_models, merged, planned

PAGE = (ROOT / "docs" / "guides" / "mergekit-users.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's merge.yml, with the models that it names."""
    folder = tmp_path_factory.mktemp("home")
    make_models(folder, "llama")
    (text,) = re.findall(r"```yaml\n(# merge\.yml\n.*?)```", PAGE, flags=re.DOTALL)
    content: dict[str, Any] = yaml.safe_load(text)
    names = iter("ab")
    for each in content["models"]:
        each["model"] = str(folder / ("base" if each["model"] == content["base_model"] else next(names)))
    (folder / "merge.yml").write_text(yaml.safe_dump(content | {"base_model": str(folder / "base")}))
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_command_merges_with_the_flags_of_scripts_and_a_setting_changed(home: Path, tmp_path: Path) -> None:
    flags = [
        "--lazy-unpickle",
        "--no-low-cpu-memory",
        "--copy-tokenizer",
        "--out-shard-size",
        "1B",
        "--random-seed",
        "3",
    ]
    file = str(home / "merge.yml")
    done = run(tmp_path, "mergelab.mergekit", file, "out", *flags, "method.lambda=0.5", "tracking=none")
    assert done.returncode == 0, done.stderr
    expected = merged(f"mergekit={file}", "method.lambda=0.5", "save.dtype=bfloat16")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert not same(expected, merged(f"mergekit={file}"))
    again = run(tmp_path, "mergelab", "mergekit", file, "out", "tracking=none")
    assert again.returncode == 2
    assert again.stderr.count("\n") <= 2
    assert "the folder is not empty" in again.stderr


def test_the_printed_config_is_the_same_merge_as_an_experiment(home: Path, capsys: Any, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from mergelab.config import CONF_DIR
    from mergelab.experiment.plan import plan_experiment

    assert main([str(home / "merge.yml"), "--config"]) == 0
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(capsys.readouterr().out)
    search = f"hydra.searchpath=[file://{tmp_path}]"
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        plan = plan_experiment(compose("config", [search, "experiment=mine", "evaluate=false", "output=out"]))
    direct = planned(f"mergekit={home / 'merge.yml'}")
    assert plan.config.models == direct.config.models
    assert plan.config.save == direct.config.save
    assert plan.parameters.by_key() == direct.parameters.by_key()
    assert plan.method == direct.method


def test_it_is_a_subcommand_and_says_in_a_line_what_is_wrong(capsys: Any, tmp_path: Path) -> None:
    assert "mergekit" in commands()
    (tmp_path / "bad.yml").write_text("{merge_method: dare-ties, models: [{model: a}]}")
    assert main([str(tmp_path / "bad.yml"), "--config"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {tmp_path / 'bad.yml'}: merge_method=dare-ties: mergekit has no such method")
    assert main([str(tmp_path / "bad.yml")]) == 2
    assert "the folder for the merged model is missing" in capsys.readouterr().err


def test_sizes_of_shards_are_mergekits() -> None:
    given = {"5B": "5GB", "5GB": "5GB", "500M": "500MB", "500MB": "500MB", "1.5b": "1.5GB", "200K": "200kB"}
    assert {text: shard_size(text) for text in given} == given
    assert shard_size("5000000000") == "5000000kB"
    with pytest.raises(ConfigError, match="--out-shard-size=big: must be a number with K, M or B"):
        shard_size("big")
