"""Running a method over models: tensor by tensor, large ones in blocks, the same bits however they are cut.

for name, tensor in merge(get_method("ties"), {"density": 0.3}, align(base, experts)):
    ...
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import ConfigError, NonFinite, listed
from mergelab.methods.blocks import BLOCK, all_finite, blocks, working
from mergelab.methods.parameters import Parameters, Site
from mergelab.methods.registry import MergeMethod, check_capabilities, check_parameters, resolve_weights
from mergelab.methods.workers import CHUNK, pool, thread_count
from mergelab.weights.align import AlignedModels, check_finite
from mergelab.weights.source import TensorSource
from mergelab.weights.state_dict import StateDict

AHEAD = 1 << 28  # bytes of merged tensors that may wait for the one that comes before them
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
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
    output: str | None = None,
    examples: Any = None,
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
        dtype: of the merged tensors; default: the stored one.
        only: names of the tensors to answer; what a method learns from the whole of the models stays the same.
        output: for which expert, by name, the merged model is, where the method makes one for each.
        examples: what methods that need data learn from.

    Returns:
        Pairs of name and new tensor: ``models.names`` in their order, in ``dtype`` or the base's (without a base, the
        first expert's); then copies of ``models.integers``; then ``models.aliases``, each with the tensor it names.

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
    if method.several and output not in names:
        raise ConfigError(f"method={method.name}: makes one model for each expert; say for which: {listed(names)}")
    if method.needs and examples is None:
        raise ConfigError(f"method={method.name}: learns from the experts' training examples, and there are none here")
    shares = resolve_weights(method, parameters, names, weights)
    arguments = parameters.arguments() | ({"weights": shares} if method.takes_weights else {})
    if method.check is not None:
        _call_with(method.check, {**arguments, "models": models})
    order = range(len(names)) if method.order_matters else sorted(range(len(names)), key=names.__getitem__)
    job = _Job(
        method=method,
        arguments=arguments | ({"weights": tuple(shares[i] for i in order)} if method.takes_weights else {}),
        base=_Checked(models.base) if models.base is not None else None,
        experts=tuple(_Checked(models.experts[i]) for i in order),
        reference=models.base if models.base is not None else models.experts[0],
        seed=seed,
        dtype=dtype,
        device=torch.device(device),
        output=next((at for at, i in enumerate(order) if names[i] == output), 0),
        examples=examples,
        block=block or (BLOCK if torch.device(device).type == "cpu" else ACCELERATOR_BLOCK),
    )
    return _stream(job, models, progress, None if only is None else frozenset(only))


def merge_to_dict(
    method: MergeMethod,
    parameters: Parameters | Mapping[str, Any],
    models: AlignedModels,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    output: str | None = None,
) -> dict[str, Tensor]:
    """Merge as `merge` does, and answer all tensors in the order of the base's (without one, the first expert's)."""
    merged = dict(
        merge(
            method,
            parameters,
            models,
            weights=weights,
            seed=seed,
            device=device,
            progress=progress,
            output=output,
        )
    )
    reference = models.base if models.base is not None else models.experts[0]
    ordered = [name for name in (*reference.keys(), *reference.aliases()) if name in merged]
    return {name: merged[name] for name in dict.fromkeys([*ordered, *merged])}


class _Checked:
    """A source whose tensors are looked through for NaN and infinity when they are first read, by whichever thread."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.name = source.name
        self._seen: dict[str, bool] = {}
        self._locks: dict[str, Lock] = {}

    def keys(self) -> list[str]:
        return self.source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(key)

    def aliases(self) -> dict[str, str]:
        return self.source.aliases()

    def prefetch(self, key: str) -> None:
        self.source.prefetch(key)

    def get(self, key: str) -> Tensor:
        tensor = self.source.get(key)
        if key not in self._seen:
            with self._locks.setdefault(key, Lock()):
                if key not in self._seen:
                    flat = tensor.reshape(-1)
                    if not all(all_finite(flat[part]) for part in blocks(flat.numel())):
                        check_finite(self.source, key, tensor)
                    self._seen[key] = True
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
    dtype: torch.dtype | None
    device: torch.device
    block: int
    output: int = 0
    examples: Any = None

    @property
    def threads(self) -> int:
        """How many threads may work at once; a user's own function is not asked to be ready for several."""
        return 1 if self.method.custom or self.device.type != "cpu" else thread_count()

    def site(self, name: str) -> Site:
        return Site(
            name, tuple(expert.name for expert in self.experts), tuple(self.reference.shape(name)), 0, self.seed
        )

    def empty(self, name: str) -> Tensor:
        """Make room for a merged tensor."""
        return torch.empty(tuple(self.reference.shape(name)), dtype=self.dtype or self.reference.dtype(name))

    def open(self, name: str) -> tuple[Tensor | None, list[Tensor]]:
        """Read a tensor of the base, where the method wants it, and of the experts."""
        wants_base = self.method.adds or self.method.takes & {"base", "base_index"}
        base = self.base.get(name) if self.base is not None and wants_base else None
        return base, [expert.get(name) for expert in self.experts]

    def prefetch(self, name: str) -> None:
        for source in (self.base, *self.experts):
            if source is not None:
                source.prefetch(name)


def _stream(
    job: _Job, models: AlignedModels, progress: Progress | None, only: frozenset[str] | None
) -> Iterator[tuple[str, Tensor]]:
    aliases = {alias: name for alias, name in models.aliases.items() if only is None or alias in only}
    named = set(aliases.values())
    wanted = {*models.names, *models.integers} if only is None else only | named
    names = [name for name in models.names if name in wanted]
    merged: Iterable[tuple[str, Tensor]] = ()
    if names and job.method.kind == "model":  # whole models go in, whatever is wanted of what comes out
        merged = ((name, tensor) for name, tensor in _merge_models(job, models.names) if name in wanted)
    elif names:
        merged = _merge_tensors(_prepared(job, models), names)
    held: dict[str, Tensor] = {}
    for name, tensor in merged:
        if name in named:
            held[name] = tensor
        yield name, tensor
        if progress is not None:
            progress(tensor.numel())
    for name in models.integers:
        if name in wanted:
            held[name] = job.reference.get(name).clone()
            yield name, held[name]
    for alias, name in aliases.items():
        yield alias, held[name]


@torch.no_grad()
def _prepared(job: _Job, models: AlignedModels) -> _Job:
    """Run the method's preparing pass, on the models as the method is to see them."""
    if job.method.prepare is None:
        return job
    seen = replace(models, base=job.base, experts=job.experts)
    prepared = _call_with(
        job.method.prepare, {**job.arguments, "models": seen, "seed": job.seed, "examples": job.examples}
    )
    return replace(job, arguments={**job.arguments, "prepared": prepared})


def _merge_tensors(job: _Job, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Merge tensor by tensor, several at once and large ones in chunks; few are ahead of the one that is answered."""
    with pool(job.threads) as workers:
        waiting: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
        ahead = 0
        for name in names:
            merged = job.empty(name)
            if workers is None:
                for chunk in _chunks(job, merged):
                    _merge_chunk(job, name, merged, chunk)
                yield name, merged
                continue
            job.prefetch(name)
            work = [workers.submit(_merge_chunk, job, name, merged, chunk) for chunk in _chunks(job, merged)]
            waiting.append((name, merged, work))
            ahead += merged.nbytes
            while ahead > AHEAD and len(waiting) > 1:
                done, result = _finished(waiting.popleft())
                ahead -= result.nbytes
                yield done, result
            del merged
        while waiting:
            yield _finished(waiting.popleft())


def _finished(waiting: tuple[str, Tensor, list[Future[None]]]) -> tuple[str, Tensor]:
    name, merged, work = waiting
    for part in work:
        part.result()
    return name, merged


def _chunks(job: _Job, merged: Tensor) -> list[slice]:
    """Divide a flattened tensor among threads, where the method may be given parts."""
    return list(blocks(merged.numel(), CHUNK if job.method.elementwise else max(merged.numel(), 1)))


@torch.no_grad()
def _merge_chunk(job: _Job, name: str, merged: Tensor, chunk: slice) -> None:
    """Merge a part of a tensor into ``merged``; the whole of it unless the method is elementwise."""
    base, experts = job.open(name)
    site = job.site(name)
    if not job.method.elementwise:
        result = _call(job, site, None if base is None else _input(job, base), [_input(job, e) for e in experts])
        merged.copy_(_rounded(job, name, result, merged))
        return
    into = merged.view(-1)[chunk]
    start = None if base is None else base.reshape(-1)[chunk]
    ends = [expert.reshape(-1)[chunk] for expert in experts]
    for part in blocks(into.numel(), job.block):
        first = None if start is None else _input(job, start[part])
        here = replace(site, offset=chunk.start + part.start)
        result = _call(job, here, first, [_input(job, end[part]) for end in ends])
        into[part] = _rounded(job, name, result, into[part])


def _call(job: _Job, site: Site, base: Tensor | None, experts: list[Tensor]) -> object:
    """Call the method's function with tensors as it wants them, and add what it answers to the base if it adds."""
    method = job.method
    if method.adds:
        assert base is not None
        return _added(base, merged_vector(job, site, base, experts), job.arguments.get("lambda_", 1.0))
    supplied = {
        "base": base,
        "experts": experts,
        "site": site,
        "prepared": job.arguments.get("prepared"),
        "output": job.output,
        "base_index": 0,
    }
    keywords = {name: supplied[name] for name in method.takes} | dict(job.arguments)
    if method.kind == "tensor":
        return _run(job, site.name, lambda: method.function(**keywords))
    if "base_index" in method.takes and base is not None:
        experts.insert(0, base)
    return _run(job, site.name, lambda: method.function(experts, **keywords))


def merged_vector(job: _Job, site: Site, base: Tensor, experts: Sequence[Tensor]) -> object:
    """Call a function of task vectors."""
    start = working(base)
    supplied = {
        "vectors": [working(expert) - start for expert in experts],
        "base": base,
        "experts": experts,
        "site": site,
        "prepared": job.arguments.get("prepared"),
        "output": job.output,
    }
    keywords = {name: supplied[name] for name in job.method.takes}
    keywords |= {name: value for name, value in job.arguments.items() if name != "lambda_" or job.method.custom}
    return _run(job, site.name, lambda: job.method.function(**keywords))


def _added(base: Tensor, vector: object, scale: float) -> object:
    """Answer θ0 + λ·τ_m, product and sum each rounded (a fused multiply-add would differ between machines)."""
    if not isinstance(vector, Tensor) or vector.shape != base.shape or not vector.is_floating_point():
        return vector  # refused where every answer is looked at
    return (vector * scale if scale != 1 else vector) + working(base)


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
        like = job.empty(name)
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
