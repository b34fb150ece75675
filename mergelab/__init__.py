"""mergelab: merge fine-tuned transformer models in weight space, evaluate the merges, and keep track of them.

Usage:
    import mergelab as ml

    pipe = ml.ties([base, expert_a, expert_b], task="text-classification", base_index=0, density=0.2)
    ml.evaluate_glue_pipeline(pipe, "rte")
    ml.run(method="ties", task="rte").table

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
    "module_average": "mergelab.experiment.module_average",
    "evaluate_glue_pipeline": "mergelab.evaluation.pipeline",
    "run": "mergelab.notebook.calls",
    "sweep": "mergelab.notebook.calls",
}


# Functions of the library that mergelab grew from, with the methods that they are.
SEED_FUNCTIONS = {"task": "task_arithmetic", "stock": "model_stock"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if not name.startswith("_") and name in _function_names():
        return import_module("mergelab.api").method_function(name)
    raise AttributeError(f"module 'mergelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_function_names()])


def _function_names() -> list[str]:
    """List the functions that are merge methods; Python asks for every submodule too, so nothing is imported for it."""
    from mergelab.config import CONF_DIR

    names = (path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
    return [*(name for name in names if name != "custom"), *SEED_FUNCTIONS]
