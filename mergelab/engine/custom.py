"""Make a user's function a merge method: ``method=custom method.function=my_module.median``."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from mergelab.engine.method import MISSING, Kind, MergeMethod
from mergelab.engine.parameters import INJECTED, parameters_of
from mergelab.errors import ConfigError, did_you_mean, first_line


def custom_method(path: str) -> MergeMethod:
    """Return the method that a dotted path names.

    A function declared with ``@merge_method`` is used as declared. A function with a parameter ``base`` or ``experts``
    receives these (and ``site``, if it is a parameter). Any other function receives, as its first argument, the list of
    the experts' tensors; with a parameter ``base_index``, the base's tensor is first and ``base_index`` is 0. Functions
    made by ``@layer_merge`` or ``@dict_map`` are applied tensor by tensor, those made by ``@model_merge`` to whole
    state dicts. The remaining parameters, with their defaults and annotations, are the method's parameters. A
    ``**kwargs`` accepts any others.

    Raises:
        ConfigError: the module or function does not exist, fails to import, or takes no tensors.
    """
    function = find_function(path)
    declared = getattr(function, "merge_method", None)
    if isinstance(declared, MergeMethod):
        return declared
    kind: Kind = "list"
    if (layer := getattr(function, "layer_function", None)) is not None:
        function = layer
    elif (whole := getattr(function, "model_function", None)) is not None:
        function, kind = whole, "model"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigError(
            f"method.function={path}: its parameters cannot be read; wrap it in a Python function"
        ) from None
    names = list(signature.parameters)
    if kind == "list" and {"base", "experts"} & set(names):
        return _by_name(path, function, signature)
    first = next(iter(signature.parameters.values()), None)
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ConfigError(f"method.function={path}: must take the list of tensors as its first argument")
    has_base = "base_index" in names
    return MergeMethod(
        name=path,
        function=_without_exit(path, function),
        parameters=parameters_of(function, (first.name, "base_index", "site")),
        kind=kind,
        injected=frozenset(names) & {"base_index", "site"},
        needs_base=has_base,
        order_matters=True,
        identical_at=None,
        custom=True,
    )


def _by_name(path: str, function: Callable[..., Any], signature: inspect.Signature) -> MergeMethod:
    injected = frozenset(signature.parameters) & set(INJECTED)
    if "prepared" in injected:
        raise ConfigError(f"method.function={path}: a preparing pass needs @merge_method(prepare=...)")
    if "vectors" in injected:
        raise ConfigError(f"method.function={path}: task vectors need @merge_method")
    if "adapters" in injected:
        raise ConfigError(f"method.function={path}: adapters' factors need @merge_method")
    base = signature.parameters.get("base")
    return MergeMethod(
        name=path,
        function=_without_exit(path, function),
        parameters=parameters_of(function),
        injected=injected,
        needs_base=base is not None and base.default is base.empty,
        order_matters=True,
        identical_at=None,
        custom=True,
    )


def _without_exit(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with ``sys.exit`` in it being an error: a run is not finished where its method gave up."""

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except SystemExit as stop:
            raise ConfigError(f"method.function={path}: calls sys.exit({stop.code}); raise an error instead") from None

    return called


def find_function(path: str) -> Callable[..., Any]:
    """Import the function that a dotted path names, also from the working folder.

    Raises:
        ConfigError: names the part of the path that does not exist, or the error of the import.
    """
    if path == MISSING or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        value = "" if path == MISSING else f"={path}"
        raise ConfigError(f"method.function{value}: must be the dotted path of a function, such as my_module.median")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"method.function={path}: importing {module_name} fails: {error}") from error
        raise ConfigError(f"method.function={path}: there is no module {error.name!r} here") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"method.function={path}: importing {module_name} fails: {_describe(error)}") from error
    if not hasattr(module, name):
        raise ConfigError(f"method.function={path}: {module_name} has no {name!r}{did_you_mean(name, vars(module))}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"method.function={path}: is a {type(function).__name__}, not a function")
    result: Callable[..., Any] = function
    return result


def _describe(error: BaseException) -> str:
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"
