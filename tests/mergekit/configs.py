"""Configs of every method of mergekit, with the options that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


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


def placed(content: dict[str, Any], folder: Path) -> str:
    """Return a config's text with the models of a folder."""
    text: str = yaml.safe_dump(content)
    for name in ("base", "a", "b", "c"):
        text = text.replace(f"model: {name}\n", f"model: {folder / name}\n")
    return text
