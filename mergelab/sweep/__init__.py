"""Sweeps of a merge's parameters with Optuna. Called, as in ``ml.sweep(method="ties")``, the package runs one."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that shares its name with a function of the library."""

    def __call__(self, *overrides: str, **settings: Any) -> Any:
        return import_module("mergelab.notebook.calls").sweep(*overrides, **settings)


sys.modules[__name__].__class__ = _Callable
