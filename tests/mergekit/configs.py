"""Configs of every method of mergekit, with the options that they have."""

from __future__ import annotations

from collections.abc import Sequence
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


def modules(method: str, bodies: dict[str, Any], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    """A config of modules, each given by its models and further keys."""
    whole = config(method, [], base, **parameters)
    given = {name: {"models": body} if isinstance(body, list) else body for name, body in bodies.items()}
    return {key: value for key, value in whole.items() if key != "models"} | {"modules": given}


def by_module(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Configs of three modules, of which the second has two layers and the third has none."""
    first, second, third = names
    filters = [{"filter": "attn", "value": [0.1, 0.9]}, {"filter": "coder.", "value": 0.2}, {"value": 0.6}]
    ends = [[model("a", [at, at + 1], weight=0.3), model(name, [at, at + 1])] for at, name in enumerate("bc")]
    based = [[model("base", [at, at + 1]), model(name, [at, at + 1])] for at, name in enumerate("ab")]
    return {
        "linear, modules": modules(
            "linear",
            {
                first: {"models": [model("a", weight=filters), model("b")]},
                second: [model("a", weight=[0.2, 0.9]), model("b", weight=0.5)],
                third: {"models": PAIR, "parameters": {"weight": 3}},
            },
            weight=1,
        ),
        "linear, modules of other models": modules(
            "linear", {first: PAIR, second: WEIGHTED, third: [model("c")]}, weight=1
        ),
        "passthrough, modules": modules(
            "passthrough",
            {first: [model("a")], second: [model("b", scale=[{"filter": "attn", "value": 0.5}])], third: [model("c")]},
        ),
        "slerp, modules": modules(
            "slerp",
            {
                first: {"models": PAIR, "parameters": {"t": [0, 1]}},
                second: {"models": PAIR[::-1], "parameters": {"t": BY_PART}},
                third: {"models": PAIR[1:], "parameters": {"t": 0.7}},
            },
            "a",
        ),
        "ties, modules of other models": modules(
            "ties",
            {
                first: {"models": [model("a"), model("b", density=0.3)], "parameters": {"weight": 0.5}},
                second: {"models": [model("base"), model("c")], "parameters": {"density": [0.2, 0.9]}},
                third: PLAIN,
            },
            "base",
            density=0.6,
            weight=1,
            **{"lambda": [{"filter": "attn", "value": 0.7}, {"value": 1}]},
        ),
        "multislerp, modules of other models": modules(
            "multislerp", {first: WEIGHTED[:2], second: WEIGHTED, third: WEIGHTED[1:]}
        ),
        "sce, modules": modules(
            "sce", {first: {"models": PAIR, "parameters": {"select_topk": 0.3}}, second: PAIR, third: PAIR}, "base"
        ),
        "linear, slices of a module": modules(
            "linear", {first: PAIR, second: {"slices": [{"sources": each} for each in ends]}, third: PAIR}, weight=1
        ),
        "ties, slices of a module": modules(
            "ties",
            {
                first: PAIR,
                second: {
                    "slices": [
                        {"sources": each, "parameters": {"density": value}}
                        for each, value in zip(based, (0.3, 0.9), strict=True)
                    ]
                },
                third: {"models": PAIR, "parameters": {"density": 0.8, "lambda": 0.7}},
            },
            "base",
            weight=1,
            density=0.5,
            **{"lambda": [0.5, 1]},
        ),
    }


class _Plain(yaml.SafeDumper):
    """Writes no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def placed(content: dict[str, Any], folder: Path) -> str:
    """Return a config's text with the models of a folder."""
    text: str = yaml.dump(content, Dumper=_Plain)
    for name in ("base", "a", "b", "c"):
        text = text.replace(f"model: {name}\n", f"model: {folder / name}\n")
    return text
