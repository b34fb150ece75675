"""mergelab: merge fine-tuned transformer models in weight space, evaluate the merges, and keep track of them.

Usage:
    import mergelab as ml

    pipe = ml.ties([base, expert_a, expert_b], task="text-classification", base_index=0, density=0.2)
    ml.evaluate_glue_pipeline(pipe, "rte")

Every registered merge method is a function of this package (``ml.soup``, ``ml.slerp``, ...). Everything is imported at
first use, so that ``import mergelab`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "StateDict": "mergelab.weights.state_dict",
    "ModelTensorMapper": "mergelab.weights.mapper",
    "dict_map": "mergelab.weights.state_dict",
    "model_merge": "mergelab.api",
    "layer_merge": "mergelab.api",
    "evaluate_glue_pipeline": "mergelab.evaluation.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if not name.startswith("_"):
        library = import_module("mergelab.api")
        if name in library.function_names():
            return library.method_function(name)
    raise AttributeError(f"module 'mergelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *import_module("mergelab.api").function_names()])
