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
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mergelab.mergekit.methods import METHODS
from tests.mergekit.made import LAYERS, make_models, merged
from tests.parity import compared

INTERPRETER = os.environ.get("MERGELAB_MERGEKIT", "")
pytestmark = [
    pytest.mark.skipif(not INTERPRETER, reason="MERGELAB_MERGEKIT names no interpreter that has mergekit"),
    pytest.mark.slow,
]


def model(name: str, layers: list[int] | None = None, **parameters: Any) -> dict[str, Any]:
    """A model of a config."""
    chosen = {} if layers is None else {"layer_range": layers}
    return {"model": name, **chosen, **({"parameters": parameters} if parameters else {})}


def config(method: str, models: list[Any], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    """A config of models."""
    whole = {"base_model": base} if base else {}
    return {"merge_method": method, "models": models, **whole, "parameters": parameters, "dtype": "float32"}


def stack(method: str, slices: list[list[Any]], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    """A config of slices."""
    whole = config(method, [], base, **parameters)
    return {key: value for key, value in whole.items() if key != "models"} | {
        "slices": [{"sources": each} for each in slices]
    }


WEIGHTED = [model("a", weight=1.0), model("b", weight=2.0), model("c", weight=0.5)]
DENSE = [
    model("base"),
    model("a", weight=1.0, density=0.5),
    model("b", weight=2.0, density=0.3),
    model("c", weight=0.5),
]
PLAIN = [model("a"), model("b"), model("c")]
PAIR = [model("a"), model("b")]
BY_PART = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "attention.self", "value": [0, 0.9]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": [0.2, 0.6]},
]


def configs(layers: int) -> dict[str, dict[str, Any]]:
    """Configs of every method, with the options that they have."""
    ruled = [{"filter": "mlp", "value": [0.2, 0.8]}, {"filter": "dense", "value": 0.3}, {"value": 0.5}]
    return {
        "linear": config("linear", [model("a", weight=0.3), model("b", weight=[0.1, 0.9])]),
        "linear, normalize: false": config("linear", WEIGHTED, normalize=False),
        "linear, base listed": config("linear", [model("base", weight=0.5), model("a", weight=0.5)], "base"),
        "slerp": config("slerp", PAIR, "b", t=BY_PART),
        "slerp, base not listed": config("slerp", [model("b")], "a", t=[0.1, 0.9]),
        "task_arithmetic": config("task_arithmetic", WEIGHTED, "base", **{"lambda": 0.4}),
        "task_arithmetic, normalize: true": config("task_arithmetic", WEIGHTED, "base", normalize=True),
        "ties": config("ties", DENSE, "base", density=0.8),
        "ties, lists, normalize: false": config(
            "ties",
            [model("a", weight=ruled, density=[1, 0.5, 0.1]), model("b", weight=1, density=0.4)],
            "base",
            normalize=False,
            **{"lambda": [0.5, 1]},
        ),
        "dare_linear, density: 1": config("dare_linear", WEIGHTED, "base"),
        "dare_ties, density: 1": config("dare_ties", WEIGHTED, "base"),
        "della, density: 1": config("della", WEIGHTED, "base"),
        "della_linear, density: 1": config("della_linear", WEIGHTED, "base", normalize=True),
        "breadcrumbs": config("breadcrumbs", DENSE, "base", density=0.4, gamma=0.1),
        "breadcrumbs_ties": config("breadcrumbs_ties", DENSE, "base", density=0.4, gamma=0.1),
        "model_stock": config("model_stock", PLAIN, "base"),
        "model_stock, filter_wise: true": config("model_stock", PLAIN, "base", filter_wise=True),
        "nuslerp": config("nuslerp", [model("a", weight=1), model("b", weight=[3, 1])]),
        "nuslerp, nuslerp_row_wise: true": config(
            "nuslerp", WEIGHTED[:2], "base", nuslerp_flatten=False, nuslerp_row_wise=True
        ),
        "nuslerp, nuslerp_flatten: false": config("nuslerp", WEIGHTED[:2], nuslerp_flatten=False),
        "multislerp": config("multislerp", WEIGHTED),
        "multislerp, normalize_weights: false": config("multislerp", WEIGHTED, "base", normalize_weights=False),
        "karcher": config("karcher", PAIR, "base"),
        "sce": config("sce", PLAIN, "base", select_topk=0.4),
        "nearswap": config("nearswap", [model("a")], "base", t=0.05),
        "arcee_fusion": config("arcee_fusion", [model("a")], "base"),
        "ram": config("ram", PLAIN, "base", epsilon="2e-2"),
        "ramplus_tl": config("ramplus_tl", PLAIN, "base", epsilon=0.02, r=0.3, alpha=1.5),
        "passthrough, slices": stack(
            "passthrough",
            [
                [model("a", [0, 2])],
                [model("b", [1, layers], scale=[{"filter": "down_proj", "value": 0.5}, {"value": [1, 0.5]}])],
                [model("c", [layers - 1, layers])],
            ],
        ),
        "slerp, slices": stack(
            "slerp",
            [[model("b", [0, 2]), model("a", [0, 2])], [model("a", [1, layers]), model("b", [1, layers])]],
            "a",
            t=BY_PART,
        ),
        "linear, a slice of one layer": stack(
            "linear",
            [
                [model("a", [0, 1], weight=[0.2, 0.7]), model("b", [0, 1], weight=[0.5, 1])],
                [model("a", [1, layers], weight=[0.2, 0.7]), model("b", [1, layers], weight=1)],
            ],
        ),
        "linear, slices of unlike models": stack(
            "linear",
            [
                [model("a", [0, 2], weight=1)],
                [model("b", [1, layers], weight=0.3), model("a", [1, layers], weight=0.7)],
            ],
        ),
        "ties, slices": stack(
            "ties",
            [
                [model("base", [0, 2]), model("a", [0, 2], density=0.5), model("b", [0, 2], weight=0.5)],
                [model("base", [1, layers]), model("a", [1, layers], weight=[0.3, 1])],
            ],
            "base",
            density=0.7,
            weight=0.9,
        ),
        "linear, out_dtype: bfloat16": config("linear", WEIGHTED) | {"out_dtype": "bfloat16"},
    }


FOLLOWING = ("model.norm.weight", "lm_head.weight", "pooler.dense.weight", "pooler.dense.bias")
# Columns of two entries: in mergekit's float32, angles below about 3e-4 count as 0.
COARSE = ("bert", "nuslerp, nuslerp_row_wise: true")
CASES = [(kind, title) for kind, layers in LAYERS.items() for title in configs(layers)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Mapping[tuple[str, str], Path]]:
    """mergekit's version, and the configs' files, each merged by it, all by one process."""
    home = tmp_path_factory.mktemp("mergekit")
    files = {}
    for kind, layers in LAYERS.items():
        make_models(home / kind, kind)
        for at, (title, content) in enumerate(configs(layers).items()):
            text = yaml.safe_dump(content)
            for name in ("base", "a", "b", "c"):
                text = text.replace(f"model: {name}\n", f"model: {home / kind / name}\n")
            files[kind, title] = home / f"{kind}_{at}.yml"
            files[kind, title].write_text(text)
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
        elif title == "linear, slices of unlike models" and key in FOLLOWING:
            continue  # mergekit takes as many models for these as the first slice has, as a note says
        elif title == "arcee_fusion":  # an entry may be so near the threshold that float32 decides
            assert (~torch.isclose(found[key], expected[key], rtol=0, atol=1e-6)).sum() <= 1
        elif (kind, title) == COARSE:
            np.testing.assert_allclose(found[key].numpy(), expected[key].numpy(), rtol=0, atol=2e-5, err_msg=key)
        else:
            np.testing.assert_allclose(found[key].numpy(), expected[key].numpy(), rtol=0, atol=1e-6, err_msg=key)


def _remark(kind: str, title: str) -> str:
    """Say of a config why more than 1e-6 may be between the two."""
    if title == "linear, slices of unlike models":
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
