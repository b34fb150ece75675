"""Represent models as dictionaries of tensors that can be added, subtracted, scaled and mapped over.

base, legal = StateDict.from_model(gpt2), StateDict.from_hf("org/legal-gpt2", "text-generation")
merged = (base + 0.5 * (legal - base)).to_model(gpt2)

@dict_map
def median(models: list[Tensor], **kw) -> Tensor:
    return torch.median(torch.stack(models), dim=0).values
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, Self, cast, overload

import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, KeyMismatch, ModelError, ShapeMismatch, listed
from mergelab.weights.agreement import require_agreement
from mergelab.weights.module import copy_module, load_into, mergeable, module_of
from mergelab.weights.pretrained import load_model, load_pipeline, pipeline_with
from mergelab.weights.source import tied_names

Operation = Callable[[Any, Any], Tensor]


class StateDict(dict[str, Tensor]):
    """Tensors by name, in sorted order, with arithmetic.

    ``+ - * /``, their in-place and reflected forms, and unary ``-`` work with another StateDict, a dict, a module or a
    pipeline (same keys and shapes), with a number, and with a tensor that broadcasts to every entry. Half-precision
    entries are computed in float32 and rounded once. Integer and boolean tensors are passed through unchanged; in an
    operation of two dictionaries they must be equal. No operation writes into a tensor or records gradients: in-place
    forms replace this dictionary's entries, so that the model they came from keeps its weights.

    Raises:
        KeyMismatch: the operands do not have the same keys.
        ShapeMismatch: an entry's shape differs, or it is floating point in one and integer in the other.
    """

    __hash__ = None
    __array_ufunc__ = None  # a NumPy number on the left leaves the operation to this class

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()
        self.update(tensors)

    @classmethod
    def from_model(cls, model: nn.Module | Mapping[str, Tensor] | object) -> Self:
        """Collect the parameters of a module or pipeline, or a dict's tensors, a tied one once; nothing is copied.

        Raises:
            ModelError: ``model`` is none of these.
        """
        if (module := module_of(model)) is not None:
            return cls(mergeable(type(module).__name__, dict(module.named_parameters()), module))
        if isinstance(model, Mapping):
            ties = tied_names(model)
            return cls({key: value for key, value in model.items() if key not in ties})
        raise ModelError(f"a module, a pipeline or a dict of tensors is needed, not {type(model).__name__}")

    @classmethod
    def from_hf(cls, name: str | Path, task: str, **kwargs: Any) -> Self:
        """Load the parameters of a model from a hub id or a local folder; arguments and errors as for `load_model`."""
        return cls.from_model(load_model(name, task, **kwargs))

    @classmethod
    def zeros_like(cls, item: Any, **kwargs: Any) -> Self:
        """Return zeros of the shapes and dtypes of a model; integer tensors keep their values.

        Args:
            item: a dict, a module, a pipeline, or a hub id or folder (needs ``task=``).
            kwargs: for a hub id or folder, as for `from_hf`.
        """
        like = cls.from_hf(item, **kwargs) if isinstance(item, str | Path) else cls.from_model(item)
        zeros = {key: torch.zeros_like(value) for key, value in like.items() if value.is_floating_point()}
        return cls({**like, **zeros})

    def to_model(self, model: Any, *, strict: bool = True, task: str | None = None) -> Any:
        """Write the tensors into a copy of ``model`` and return the copy, of the same kind; ``model`` is unchanged.

        Args:
            model: a module, a pipeline, a dict, or a hub id or folder (needs ``task``; returns a pipeline).
            strict: whether every parameter of ``model`` must be given; if not, missing ones keep the model's values.
            task: a transformers pipeline task.

        Raises:
            KeyMismatch, ShapeMismatch: the tensors are not those of ``model``.
            ConfigError: ``model`` is a hub id or folder, and ``task`` is not given.
            ModelError: ``model`` is none of these.
        """
        if isinstance(model, str | Path):
            if task is None:
                raise ConfigError(f"{model}: a model by name needs task=, e.g. task='text-classification'")
            pipe = load_pipeline(model, task)
            load_into(pipe.model, self, strict=strict)
            return pipe
        if isinstance(model, Mapping):
            return self._to_dict(model, strict)
        module = module_of(model)
        if module is None:
            raise ModelError(f"a module, a pipeline, a dict or a model's name is needed, not {type(model).__name__}")
        changed = load_into(copy_module(module), self, strict=strict)
        return changed if model is module else pipeline_with(model, changed)

    def _to_dict(self, like: Mapping[str, Tensor], strict: bool) -> StateDict:
        ties = tied_names(like)
        given = StateDict({ties.get(key, key): value for key, value in self.items()})
        wanted = StateDict({key: value for key, value in like.items() if key not in ties})
        compared = wanted if strict else wanted.subset(wanted.keys() & given.keys())
        require_agreement([("the state dict", given), ("the dict", compared)])
        result = StateDict({**wanted, **given})
        result.update({alias: result[key] for alias, key in ties.items()})
        return result

    def subset(self, keys: Iterable[str]) -> Self:
        """Return only the entries of ``keys``; KeyMismatch lists keys that do not exist."""
        return type(self)({key: self[key] for key in self._known(keys)})

    def remove(self, keys: Iterable[str]) -> Self:
        """Remove ``keys`` from this dictionary and return it; KeyMismatch lists keys that do not exist."""
        for key in self._known(keys):
            del self[key]
        return self

    def filter_values(self, condition: Callable[[Tensor], bool]) -> Self:
        """Remove the entries whose tensor does not satisfy ``condition`` from this dictionary and return it."""
        return self.remove([key for key, value in self.items() if not condition(value)])

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the entries on ``device``, with the floating-point ones in ``dtype``."""
        return type(self)(
            {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in self.items()}
        )

    def copy(self) -> Self:
        """Return a dictionary whose tensors share no memory with this one's."""
        return type(self)(
            {key: value.detach().clone().requires_grad_(value.requires_grad) for key, value in self.items()}
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(_equal(value, other[key]) for key, value in self.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __setitem__(self, key: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise ModelError(f"a StateDict holds tensors; {key} is a {type(value).__name__}")
        appended = key in self or not self or next(reversed(self)) < key
        super().__setitem__(key, _ungraphed(value))
        if not appended:
            self._sort()

    def setdefault(self, key: str, default: Tensor) -> Tensor:
        """Return the entry of ``key``; insert ``default`` when there is none."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Tensor) -> None:
        """Update entries as ``dict.update`` does, and keep the keys sorted."""
        entries = dict(*args, **kwargs)
        for key in sorted(entries):
            if not isinstance(entries[key], Tensor):
                raise ModelError(f"a StateDict holds tensors; {key} is a {type(entries[key]).__name__}")
            super().__setitem__(key, _ungraphed(entries[key]))
        self._sort()

    def __or__(self, other: Mapping[str, Tensor]) -> Self:  # type: ignore[override]
        return type(self)({**self, **other})

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def _sort(self) -> None:
        keys = list(self)
        if any(a > b for a, b in pairwise(keys)):
            entries = sorted(self.items())
            self.clear()
            for key, value in entries:
                super().__setitem__(key, value)

    def _known(self, keys: Iterable[str]) -> list[str]:
        keys = [keys] if isinstance(keys, str) else list(keys)
        if unknown := [key for key in keys if key not in self]:
            raise KeyMismatch(f"the state dict has no tensor {listed(map(repr, unknown))}")
        return keys

    def __add__(self, other: Any) -> Self:
        return self._apply(torch.add, other)

    def __radd__(self, other: Any) -> Self:
        return self._apply(torch.add, other, reflected=True)

    def __sub__(self, other: Any) -> Self:
        return self._apply(torch.sub, other)

    def __rsub__(self, other: Any) -> Self:
        return self._apply(torch.sub, other, reflected=True)

    def __mul__(self, other: Any) -> Self:
        return self._apply(torch.mul, other)

    def __rmul__(self, other: Any) -> Self:
        return self._apply(torch.mul, other, reflected=True)

    def __truediv__(self, other: Any) -> Self:
        return self._apply(torch.div, other)

    def __rtruediv__(self, other: Any) -> Self:
        return self._apply(torch.div, other, reflected=True)

    def __neg__(self) -> Self:
        return self._apply(torch.mul, -1)

    def __iadd__(self, other: Any) -> Self:
        return self._assign(self + other)

    def __isub__(self, other: Any) -> Self:
        return self._assign(self - other)

    def __imul__(self, other: Any) -> Self:
        return self._assign(self * other)

    def __itruediv__(self, other: Any) -> Self:
        return self._assign(self / other)

    def _assign(self, result: Self) -> Self:
        self.update(result)
        return self

    def _apply(self, operation: Operation, other: Any, *, reflected: bool = False) -> Self:
        """Apply ``operation`` to each entry and the other operand, in reverse order when ``reflected``."""
        if isinstance(other, Real | Tensor):
            return type(self)({key: _scaled(key, value, other, operation, reflected) for key, value in self.items()})
        if not isinstance(other, Mapping) and module_of(other) is None:
            return cast(Self, NotImplemented)
        right = StateDict.from_model(other)
        labels = ("the right operand", "the left operand") if reflected else ("the left operand", "the right operand")
        require_agreement([(labels[0], self), (labels[1], right)])
        return type(self)({key: _paired(key, value, right[key], operation, reflected) for key, value in self.items()})


def _scaled(key: str, value: Tensor, other: Any, operation: Operation, reflected: bool) -> Tensor:
    if not value.is_floating_point():
        return value
    if isinstance(other, Tensor) and not _fits(value, other):
        raise ShapeMismatch(
            f"{key} has shape {list(value.shape)}; a tensor of shape {list(other.shape)} does not fit it"
        )
    dtype = value.dtype
    if isinstance(other, Tensor):
        dtype = torch.result_type(value, other) if other.is_floating_point() else value.dtype
    return _compute(value, other.detach() if isinstance(other, Tensor) else other, operation, reflected, dtype)


def _fits(value: Tensor, other: Tensor) -> bool:
    """Return whether ``other`` broadcasts to the shape of ``value``."""
    trailing = value.shape[value.dim() - other.dim() :] if other.dim() <= value.dim() else ()
    return len(trailing) == other.dim() and all(b in (1, a) for a, b in zip(trailing, other.shape, strict=True))


def _paired(key: str, value: Tensor, other: Tensor, operation: Operation, reflected: bool) -> Tensor:
    if not value.is_floating_point():
        if not torch.equal(value, other):
            raise ModelError(f"{key}: integer tensors differ; they are passed through unchanged, so they must be equal")
        return value
    return _compute(value, other, operation, reflected, torch.promote_types(value.dtype, other.dtype))


def _compute(a: Tensor, b: Any, operation: Operation, reflected: bool, dtype: torch.dtype) -> Tensor:
    """Compute in float32 or wider and round once to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        left: Any = a.to(wide)
        right: Any = b.to(wide) if isinstance(b, Tensor) else b
        return (operation(right, left) if reflected else operation(left, right)).to(dtype)


def _ungraphed(value: Tensor) -> Tensor:
    """Return a leaf tensor unchanged, and any other detached from its gradient graph."""
    return value if value.is_leaf else value.detach()


def _equal(a: Tensor, b: object) -> bool:
    return isinstance(b, Tensor) and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class DictFunction(Protocol):
    """A function of lists of dictionaries of tensors; ``layer_function`` is the tensor function that it applies."""

    layer_function: Callable[..., Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> StateDict:
        """Apply ``layer_function`` key by key."""
        ...


@overload
def dict_map(function: Callable[..., Tensor], /) -> DictFunction: ...
@overload
def dict_map(names: Sequence[str] | None = None) -> Callable[[Callable[..., Tensor]], DictFunction]: ...
def dict_map(names: Any = None) -> Any:
    """Lift a function of tensors to dictionaries of tensors, key by key, without gradients.

    ``@dict_map`` and ``@dict_map()`` map over the function's first parameter, ``@dict_map(["models", "fishers"])`` and
    ``@dict_map(names=[...])`` over the named ones. For each mapped parameter the caller passes a list of dictionaries,
    all lists of one length. The function receives, for each key, the list of their tensors. Other arguments are passed
    on unchanged. Every dictionary must have the same keys and shapes. Integer and boolean tensors are not passed to the
    function: they must be equal in all dictionaries and are copied.

    Returns:
        The lifted function, which returns a `StateDict`.

    Raises:
        ConfigError: ``names`` are not the function's parameters, or an argument is not a list of dictionaries.
        KeyMismatch, ShapeMismatch: the dictionaries have different keys or shapes.
        ModelError: integer tensors differ, or the function does not return a tensor.
    """
    if callable(names):
        return _lift(names, None)
    if isinstance(names, str):
        names = [names]
    return lambda function: _lift(function, names)


def _lift(function: Callable[..., Tensor], names: Sequence[str] | None) -> DictFunction:
    signature = inspect.signature(function)
    name = getattr(function, "__name__", repr(function))
    mapped = list(names) if names is not None else list(signature.parameters)[:1]
    if not mapped:
        raise ConfigError(f"dict_map: {name} has no parameter to map over")
    if unknown := [wanted for wanted in mapped if wanted not in signature.parameters]:
        raise ConfigError(f"dict_map: {name} has no parameter {listed(unknown)}; it has {listed(signature.parameters)}")

    @wraps(function)
    def on_dicts(*args: Any, **kwargs: Any) -> StateDict:
        call = signature.bind(*args, **kwargs)
        given = {wanted: _dicts(name, wanted, call.arguments.get(wanted)) for wanted in mapped}
        labelled = [(f"{wanted}[{i}]", model) for wanted, models in given.items() for i, model in enumerate(models)]
        if len({len(models) for models in given.values()}) > 1:
            raise ConfigError(f"{name}: {', '.join(mapped)} must be lists of the same length")
        require_agreement(labelled)
        result = StateDict()
        with torch.no_grad():
            for key, first in labelled[0][1].items():
                if not first.is_floating_point():
                    result[key] = _copy_of_integers(key, labelled)
                    continue
                call.arguments.update({wanted: [model[key] for model in models] for wanted, models in given.items()})
                result[key] = _require_tensor(function(*call.args, **call.kwargs), name, key)
        return result

    lifted = cast(DictFunction, on_dicts)
    lifted.layer_function = function
    return lifted


def _dicts(function: str, name: str, value: object) -> Sequence[Mapping[str, Tensor]]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, Mapping) for item in value):
        raise ConfigError(f"{function}: {name} must be a list of dictionaries of tensors")
    return value


def _copy_of_integers(key: str, models: Sequence[tuple[str, Mapping[str, Tensor]]]) -> Tensor:
    (first, reference), *others = [(label, model[key]) for label, model in models]
    for label, value in others:
        if not _equal(reference, value):
            raise ModelError(f"{key}: integer tensors must be equal, but {label} differs from {first}")
    return reference.clone()


def _require_tensor(value: object, function: str, key: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(f"{function} must return a tensor; for {key} it returned a {type(value).__name__}")
    return value
