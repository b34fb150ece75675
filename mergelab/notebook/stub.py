"""Write ``mergelab/__init__.pyi``, the types of the library's functions: ``python -m mergelab.notebook.stub``.

The methods' functions are made when they are first used, so that a type checker knows them from this file alone. It is
written anew when a method or one of its parameters changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mergelab
from mergelab import SEED_FUNCTIONS
from mergelab.api import method_function, old_keywords
from mergelab.engine.registry import get_method, method_names

FILE = Path(mergelab.__file__).with_suffix(".pyi")
_HEAD = """\
# Written by python -m mergelab.notebook.stub from the methods' parameters.
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias

from torch import nn

from mergelab.api import layer_merge as layer_merge
from mergelab.api import model_merge as model_merge
from mergelab.estimation.examples import Batch
from mergelab.evaluation.pipeline import evaluate_glue_pipeline as evaluate_glue_pipeline
from mergelab.experiment.module_average import module_average as module_average
from mergelab.models.vocabulary import Policy
from mergelab.notebook.calls import run as run
from mergelab.notebook.calls import sweep as sweep
from mergelab.weights.mapper import ModelTensorMapper as ModelTensorMapper
from mergelab.weights.state_dict import StateDict as StateDict
from mergelab.weights.state_dict import dict_map as dict_map

__version__: str
SEED_FUNCTIONS: dict[str, str]

# A hub id or folder, a pair or part of such, a module, a pipeline, or a state dict. What is returned is of the last
# one's kind.
Model: TypeAlias = str | PathLike[str] | nn.Module | Mapping[str, Any] | Callable[..., Any]
"""


def stub() -> str:
    """Return the file's text."""
    return f"{_HEAD}\n" + "".join(_function(name) for name in sorted([*method_names(), *SEED_FUNCTIONS]))


def _function(name: str) -> str:
    signature = inspect.signature(method_function(name))
    lines = [f"def {name}(", *_parameters(name, signature), f") -> {signature.return_annotation}: ..."]
    return "\n".join(lines) + "\n"


def _parameters(name: str, signature: inspect.Signature) -> Iterator[str]:
    """Yield a line for each parameter; old spellings come last."""
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "    *,"
        annotation = "Sequence[Model]" if parameter.name == "models" else parameter.annotation
        yield _line(parameter.name, annotation, optional=parameter.default is not parameter.empty)
    for old, new in old_keywords(get_method(SEED_FUNCTIONS.get(name, name))).items():
        yield _line(old, signature.parameters[new].annotation if new else "bool", optional=True)


def _line(name: str, annotation: Any, *, optional: bool) -> str:
    written = str(annotation).replace("'", '"')  # as the code's style has it
    return f"    {name}: {written}{' = ...' if optional else ''},"


if __name__ == "__main__":
    FILE.write_text(stub(), encoding="utf-8")
