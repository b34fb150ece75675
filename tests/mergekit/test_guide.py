"""The guide for mergekit's users: every command in it is run, and what it shows is what they write."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from mergelab.miniature.text.build import build
from tests.conftest import ROOT, Outcome
from tests.mergekit.made import make_models

GUIDE = (ROOT / "docs" / "guides" / "mergekit.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(yaml|bash|text)\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
def test_the_guides_commands_write_what_it_shows(workplace: Path, mergelab_command: Callable[..., Outcome]) -> None:
    make_models(workplace, "llama")
    for old, new in {"a": "code", "b": "chat", "c": "law"}.items():
        (workplace / old).rename(workplace / new)
    make_models(workplace / "made", "t5")
    for old, new in {"a": "t5-news", "b": "t5-chat"}.items():
        (workplace / "made" / old).rename(workplace / new)
    writers = {name: folder for experts in build("law_recipes").experts.values() for name, folder in experts.items()}
    for old, new in {"legal": "lawyer", "recipes": "cook"}.items():
        shutil.copytree(writers[old], workplace / new)
    (workplace / "base" / "mergekit_config.yml").write_text("of another merge")
    shown, stages = "", []
    for kind, content in BLOCKS:
        if kind == "yaml":
            (name,) = re.findall(r"^# (\S+)$", content, flags=re.MULTILINE)
            (workplace / name).write_text(content)
        elif kind == "text":
            assert set(content.splitlines()) <= set(shown.splitlines())
        else:
            for line in content.splitlines():
                _, _, module, *arguments = shlex.split(line)
                command = {"mergelab": [], "mergelab.mergekit": ["mergekit"]}[module]
                done = mergelab_command(*command, *arguments)
                assert done.code == 0, done.err
                shown = done.out
                stages.append([each.split()[1] for each in shown.splitlines() if re.fullmatch(r"stage +\w+", each)])
    assert stages == [[], [], [], [], ["both", "legal"], [], []]
    assert json.loads((workplace / "duo" / "config.json").read_text())["n_layer"] == 3
    assert (workplace / "duo" / "mergekit_config.yml").is_file()
    assert sum("input_layernorm" in name for name in load_file(workplace / "stacked" / "model.safetensors")) == 6
    merged, news = (load_file(workplace / name / "model.safetensors") for name in ("t5", "t5-news"))
    assert {name for name in news if not merged[name].equal(news[name])} == {
        name for name in news if name.startswith("decoder.")
    }
    kept = yaml.safe_load((workplace / "stacked" / "mergekit_config.yml").read_text())
    assert kept["slices"][1]["sources"] == [{"model": str(workplace / "chat"), "layer_range": [1, 4]}]
    assert not (workplace / "ties" / "mergekit_config.yml").exists()
