"""Whole configs merged by mergekit and here, where MERGELAB_MERGEKIT names an interpreter that has mergekit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergelab.mergekit.methods import METHODS
from tests.mergekit.configs import by_module, configs, placed
from tests.mergekit.made import LAYERS, MODULES, exported, make_models, merged
from tests.parity import compared

INTERPRETER = os.environ.get("MERGELAB_MERGEKIT", "")
pytestmark = [
    pytest.mark.skipif(not INTERPRETER, reason="MERGELAB_MERGEKIT names no interpreter that has mergekit"),
    pytest.mark.slow,
]


FOLLOWING = ("model.norm.weight", "lm_head.weight", "pooler.dense.weight", "pooler.dense.bias")
# Columns of two entries: in mergekit's float32, angles below about 3e-4 count as 0.
COARSE = ("bert", "nuslerp, nuslerp_row_wise: true")
UNLIKE = "linear, slices of unlike models"
EXPORTS = [("llama", title) for title in configs(LAYERS["llama"]) if title != UNLIKE]
ALL = {kind: configs(layers) for kind, layers in LAYERS.items()} | {k: by_module(names) for k, names in MODULES.items()}
CASES = [(kind, title) for kind, given in ALL.items() for title in given]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Mapping[tuple[str, str], Path]]:
    """mergekit's version, and the configs' files, each merged by it, all by one process."""
    home = tmp_path_factory.mktemp("mergekit")
    files = {}
    for kind, given in ALL.items():
        make_models(home / kind, kind)
        for at, (title, content) in enumerate(given.items()):
            files[kind, title] = home / f"{kind}_{at}.yml"
            files[kind, title].write_text(placed(content, home / kind))
            if (kind, title) in EXPORTS:
                files["export", title] = home / f"export_{at}.yml"
                files["export", title].write_text(exported(f"mergekit={files[kind, title]}"))
    command = [INTERPRETER, str(Path(__file__).parent / "theirs.py"), *map(str, files.values())]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, timeout=600, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-1], files


def test_every_method_of_mergekit_is_among_the_configs() -> None:
    assert {each["merge_method"] for each in configs(4).values()} == METHODS.keys()


@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
@pytest.mark.parametrize(("kind", "title"), CASES)
def test_values_are_mergekits(kind: str, title: str, theirs: Any) -> None:
    version, files = theirs
    file = files[kind, title]
    expected = _read(Path(f"{file.with_suffix('')}_theirs"))
    found = merged(f"mergekit={file}")
    assert found.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    keys = sorted(found.keys() & expected.keys())
    ours = METHODS[title.split(",")[0]].ours
    compared(
        ours,
        f"mergekit {version}, whole config",
        [found[key] for key in keys],
        [expected[key] for key in keys],
        options=f"{kind}: {title}",
        note="; ".join(filter(None, ["mergekit mended for BERT" if kind == "bert" else "", _remark(kind, title)])),
    )
    for key in keys:
        assert found[key].dtype == expected[key].dtype
        if "bfloat16" in title:
            assert found[key].equal(expected[key])
        elif title == UNLIKE and key in FOLLOWING:
            continue  # mergekit takes as many models for these as the first slice has, as a note says
        elif title == "arcee_fusion":  # an entry may be so near the threshold that float32 decides
            assert (~torch.isclose(found[key], expected[key], rtol=0, atol=1e-6)).sum() <= 1
        elif (kind, title) == COARSE:
            np.testing.assert_allclose(found[key].numpy(), expected[key].numpy(), rtol=0, atol=2e-5, err_msg=key)
        else:
            np.testing.assert_allclose(found[key].numpy(), expected[key].numpy(), rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
@pytest.mark.parametrize("title", [title for _, title in EXPORTS])
def test_mergekit_makes_the_same_of_an_export(title: str, theirs: Any) -> None:
    _, files = theirs
    expected = merged(f"mergekit={files['llama', title]}")
    found = _read(Path(f"{files['export', title].with_suffix('')}_theirs"))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype
        if title == "arcee_fusion":  # as above
            assert (~torch.isclose(tensor, expected[key], rtol=0, atol=1e-6)).sum() <= 1
        else:
            np.testing.assert_allclose(tensor.float(), expected[key].float(), rtol=0, atol=1e-6, err_msg=key)


def _remark(kind: str, title: str) -> str:
    """Say of a config why more than 1e-6 may be between the two."""
    if title == UNLIKE:
        return "mergekit takes as many models for what follows the layers as the first slice has"
    if title == "arcee_fusion":
        return "at most one entry of a tensor, so near the threshold that float32 decides"
    return (
        "columns of two entries: in mergekit's float32, angles below about 3e-4 count as 0"
        if (kind, title) == COARSE
        else ""
    )


def _read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
