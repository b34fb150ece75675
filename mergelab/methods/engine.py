"""Running a method over models: tensor by tensor, large ones in blocks, the same bits however they are cut.

for name, tensor in merge(get_method("ties"), {"density": 0.3}, align(base, experts)):
    ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import ConfigError, NonFinite, listed
from mergelab.methods.blocks import BLOCK, all_finite, blocks, working
from mergelab.methods.parameters import Parameters, Site
from mergelab.methods.registry import MergeMethod, check_capabilities, check_parameters, resolve_weights
from mergelab.weights.align import AlignedModels, check_finite
from mergelab.weights.source import TensorSource
from mergelab.weights.state_dict import StateDict

ACCELERATOR_BLOCK = 1 << 23  # entries; an accelerator wants more work at once than a core's cache holds
Progress = Callable[[int], None]


def merge(
    method: MergeMethod,
    parameters: Parameters | Mapping[str, Any],
    models: AlignedModels,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    block: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge ``models`` and answer the merged tensors one after the other.

    Everything that can be wrong with the request is checked before this returns and before a tensor is read. The same
    request gives the same bits for any number of threads, any order of ``models.names``, any ``block``, and, but for
    methods whose order matters, any order of the experts.

    Args:
        method: what to compute.
        parameters: its parameters, checked or to be checked.
        models: base and experts under common names.
        weights: the models' own weights, one per expert; the method's ``weights`` parameter has precedence.
        seed: of random methods.
        device: where to compute; the merged tensors are on the CPU in any case.
        progress: called after each merged tensor with its number of entries.
        block: how many entries an elementwise method is given at once.

    Returns:
        Pairs of name and new tensor: ``models.names`` in their order, in the base's dtype (without a base, the first
        expert's); then copies of ``models.integers``; then ``models.aliases``, each with the tensor that it names.

    Raises:
        ConfigError: no base where one is needed, too few or many experts, parameters or weights that do not fit, two
            experts of one name; while merging: a user's function fails, or answers no tensor of that shape.
        NonFinite: while merging: a tensor of a model, or of the result, holds NaN or infinity.
    """
    if not isinstance(parameters, Parameters):
        parameters = check_parameters(method, parameters)
    check_capabilities(method, has_base=models.base is not None, experts=len(models.experts))
    names = tuple(expert.name for expert in models.experts)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"models.experts: {listed(repeated)} stands for more than one expert; names must differ")
    shares = resolve_weights(method, parameters, names, weights)
    arguments = parameters.arguments() | ({"weights": shares} if method.takes_weights else {})
    if method.check is not None:
        _call_with(method.check, arguments)
    order = range(len(names)) if method.order_matters else sorted(range(len(names)), key=names.__getitem__)
    job = _Job(
        method=method,
        arguments=arguments | ({"weights": tuple(shares[i] for i in order)} if method.takes_weights else {}),
        base=_Checked(models.base) if models.base is not None else None,
        experts=tuple(_Checked(models.experts[i]) for i in order),
        reference=models.base if models.base is not None else models.experts[0],
        seed=seed,
        device=torch.device(device),
        block=block or (BLOCK if torch.device(device).type == "cpu" else ACCELERATOR_BLOCK),
    )
    return _stream(job, models, progress)


def merge_to_dict(
    method: MergeMethod,
    parameters: Parameters | Mapping[str, Any],
    models: AlignedModels,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Merge as `merge` does, and answer all tensors in the order of the base's (without one, the first expert's)."""
    merged = dict(merge(method, parameters, models, weights=weights, seed=seed, device=device, progress=progress))
    reference = models.base if models.base is not None else models.experts[0]
    ordered = [name for name in (*reference.keys(), *reference.aliases()) if name in merged]
    return {name: merged[name] for name in dict.fromkeys([*ordered, *merged])}


@dataclass(frozen=True)
class _Checked:
    """A source whose tensors are looked through for NaN and infinity when they are first read."""

    source: TensorSource
    seen: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.source.name

    def keys(self) -> list[str]:
        return self.source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(key)

    def aliases(self) -> dict[str, str]:
        return self.source.aliases()

    def get(self, key: str) -> Tensor:
        tensor = self.source.get(key)
        if key not in self.seen:
            flat = tensor.reshape(-1)
            if not all(all_finite(flat[part]) for part in blocks(flat.numel())):
                check_finite(self.source, key, tensor)
            self.seen.add(key)
        return tensor


@dataclass(frozen=True)
class _Job:
    """A checked request: the method, its arguments, and the models in the order it is to see them."""

    method: MergeMethod
    arguments: Mapping[str, Any]
    base: _Checked | None
    experts: tuple[_Checked, ...]
    reference: TensorSource
    seed: int
    device: torch.device
    block: int

    def site(self, name: str) -> Site:
        return Site(
            name, tuple(expert.name for expert in self.experts), tuple(self.reference.shape(name)), 0, self.seed
        )


def _stream(job: _Job, models: AlignedModels, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    merged = _merge_models if job.method.kind == "model" else _merge_tensors
    named = set(models.aliases.values())
    held: dict[str, Tensor] = {}
    for name, tensor in merged(_prepared(job, models), models.names):
        if name in named:
            held[name] = tensor
        yield name, tensor
        if progress is not None:
            progress(tensor.numel())
    for name in models.integers:
        held[name] = job.reference.get(name).clone()
        yield name, held[name]
    for alias, name in models.aliases.items():
        yield alias, held[name]


@torch.no_grad()
def _prepared(job: _Job, models: AlignedModels) -> _Job:
    """Run the method's preparing pass, on the models as the method is to see them."""
    if job.method.prepare is None:
        return job
    seen = replace(models, base=job.base, experts=job.experts)
    prepared = _call_with(job.method.prepare, {**job.arguments, "models": seen, "seed": job.seed})
    return replace(job, arguments={**job.arguments, "prepared": prepared})


def _merge_tensors(job: _Job, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, _merge_tensor(job, name)


@torch.no_grad()
def _merge_tensor(job: _Job, name: str) -> Tensor:
    base = job.base.get(name) if job.base is not None and job.method.takes & {"base", "base_index"} else None
    experts = [expert.get(name) for expert in job.experts]
    site = job.site(name)
    merged = torch.empty(site.shape, dtype=job.reference.dtype(name))
    if merged.numel() == 0:
        return merged
    if not job.method.elementwise:
        merged.copy_(_rounded(job, name, _call(job, site, base, experts), merged))
        return merged
    flat = merged.view(-1)
    start = None if base is None else base.reshape(-1)
    ends = [expert.reshape(-1) for expert in experts]
    for part in blocks(flat.numel(), job.block):
        first = None if start is None else start[part]
        result = _call(job, replace(site, offset=part.start), first, [end[part] for end in ends])
        flat[part] = _rounded(job, name, result, flat[part])
    return merged


def _call(job: _Job, site: Site, base: Tensor | None, experts: Sequence[Tensor]) -> object:
    """Call the method's function with tensors as it wants them."""
    method = job.method
    start = None if base is None else _input(job, base)
    ends = [_input(job, expert) for expert in experts]
    supplied = {
        "base": start,
        "experts": ends,
        "site": site,
        "prepared": job.arguments.get("prepared"),
        "base_index": 0,
    }
    keywords = {name: supplied[name] for name in method.takes} | dict(job.arguments)
    if method.kind == "tensor":
        return _run(job, site.name, lambda: method.function(**keywords))
    if "base_index" in method.takes and start is not None:
        ends.insert(0, start)
    return _run(job, site.name, lambda: method.function(ends, **keywords))


def _input(job: _Job, tensor: Tensor) -> Tensor:
    """Bring a tensor to the device, and to the dtype of arithmetic where the method leaves that to the engine."""
    placed = tensor.to(job.device)
    if job.method.custom:  # a copy, as the function may write into it
        return working(placed).clone(memory_format=torch.contiguous_format)
    return working(placed) if job.method.elementwise else placed


def _run(job: _Job, name: str, call: Callable[[], object]) -> object:
    """Call a function; say of a user's own on which tensor it failed."""
    if not job.method.custom:
        return call()
    try:
        return call()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        on = f" on tensor {name}" if name else ""
        raise ConfigError(f"method.function={job.method.name}: failed{on}: {type(error).__name__}: {line}") from error


def _rounded(job: _Job, name: str, result: object, like: Tensor) -> Tensor:
    """Check what a function answered for (a part of) a tensor, and round it once to the stored dtype."""
    label = f"method.function={job.method.name}" if job.method.custom else f"method={job.method.name}"
    if not isinstance(result, Tensor):
        raise ConfigError(f"{label}: answered a {type(result).__name__} for tensor {name}, not a tensor")
    if result.shape != like.shape:
        raise ConfigError(f"{label}: answered shape {list(result.shape)} for tensor {name}, not {list(like.shape)}")
    if result.is_complex() or not result.is_floating_point():
        raise ConfigError(f"{label}: answered {_short(result.dtype)} for tensor {name}, not floating-point numbers")
    stored = result.detach().to("cpu", like.dtype)
    flat = stored.reshape(-1)
    if not all(all_finite(flat[part]) or _is_finite(flat[part]) for part in blocks(flat.numel())):
        raise NonFinite(f"{label}: merging tensor {name} gives NaN or infinity in {_short(like.dtype)}")
    return stored


def _is_finite(block: Tensor) -> bool:
    return bool(torch.isfinite(block.float() if block.element_size() == 1 else block).all())


def _merge_models(job: _Job, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Give whole models to a function of state dicts, all in memory, and answer its result tensor by tensor."""
    result = _merged_model(job, names)
    label = f"method.function={job.method.name}"
    if not isinstance(result, Mapping):
        raise ConfigError(f"{label}: answered a {type(result).__name__}, not a state dict")
    if missing := [name for name in names if name not in result]:
        raise ConfigError(f"{label}: its result lacks {listed(missing)}")
    if extra := [str(name) for name in result if name not in names]:
        raise ConfigError(f"{label}: its result has {listed(extra)} in addition")
    for name in names:
        like = torch.empty(tuple(job.reference.shape(name)), dtype=job.reference.dtype(name))
        yield name, like.copy_(_rounded(job, name, result[name], like))


@torch.no_grad()
def _merged_model(job: _Job, names: Sequence[str]) -> object:
    whole = "base_index" in job.method.takes and job.base is not None
    sources = [job.base, *job.experts] if whole and job.base is not None else list(job.experts)
    models = [StateDict({name: _input(job, source.get(name)) for name in names}) for source in sources]
    keywords = dict(job.arguments) | ({"base_index": 0} if whole else {})
    return _run(job, "", lambda: job.method.function(models, **keywords))


def _call_with(function: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """Call ``function`` with those of the available arguments that it names."""
    return function(**{name: available[name] for name in inspect.signature(function).parameters if name in available})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
