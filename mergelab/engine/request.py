"""One merge, checked: its method with the arguments for each tensor, its models in the order the method sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.engine.adapter_factors import factors_at
from mergelab.engine.content_order import content_order
from mergelab.engine.finite_check import finite_checked
from mergelab.engine.low_rank import FactoredSum, factored_sum
from mergelab.engine.method import MergeMethod, call_with
from mergelab.engine.parameters import Parameters
from mergelab.engine.registry import check_capabilities, check_parameters, resolve_weights
from mergelab.errors import ConfigError, NonFinite, listed
from mergelab.ops.blocks import BLOCK, all_finite, blocks, largest, working
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import difference_into
from mergelab.ops.threads import thread_count
from mergelab.ops.workspace import Workspace, WorkspaceMemory, WorkspacePool
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource

SUMS = 8  # joined factors that a request holds: those of the tensors that threads are working on
ACCELERATOR_BLOCK = 1 << 23  # entries; an accelerator wants more work at once than a core's cache holds


@dataclass(frozen=True, eq=False)
class Same:
    """An object as a key: equal to nothing but itself, and alive as long as the key is."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True)
class TensorSettings:
    """The parameters that hold for some tensors.

    Attributes:
        parameters: those of the method.
        names: the tensors.
        each: those that have a number for each expert, in the order of the request's experts.
    """

    parameters: Parameters
    names: Sequence[str]
    each: Mapping[str, Sequence[float]]

    def arguments(self) -> dict[str, Any]:
        """Return the function's arguments."""
        return self.parameters.grouped({**self.parameters.arguments(), **self.each})

    def ordered(self, order: Sequence[int]) -> TensorSettings:
        """Return them for the experts in another order."""
        return replace(self, each={key: tuple(numbers[i] for i in order) for key, numbers in self.each.items()})


@dataclass(frozen=True)
class MergeRequest:
    """A checked request.

    Attributes:
        method: what computes.
        settings: its parameters, for each group of tensors that share them.
        models: the models, looked through for NaN and infinity when they are read; experts as given, or, after
            `ordered_job`, in an order that follows from their values.
        reference: the model whose dtypes and layout the merged one has: the base, or the first expert given.
        prepared: by tensor, what the method's preparing pass made for it.
        workspaces: memory for blocks of task vectors.
        first: name of the expert that was given first.
        seed, dtype, device, block, output, examples: as for `mergelab.engine.run.merge`.
    """

    method: MergeMethod
    settings: Sequence[TensorSettings]
    models: AlignedModels
    reference: TensorSource
    seed: int
    dtype: torch.dtype | None
    device: torch.device
    block: int
    output: int = 0
    first: str = ""
    examples: Any = None
    prepared: Mapping[str, Any] = field(default_factory=dict)
    workspaces: WorkspacePool = field(default_factory=WorkspacePool)
    _sums: dict[str, tuple[FactoredSum | None]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def threads(self) -> int:
        """How many threads may work at once; a user's own function is not asked to be ready for several."""
        return 1 if self.method.custom or self.device.type != "cpu" else thread_count()

    @cached_property
    def arguments(self) -> Mapping[str, Mapping[str, Any]]:
        """The function's arguments for each tensor; tensors without their own share them."""
        found: dict[str, Mapping[str, Any]] = {}
        for settings in self.settings:
            found.update(dict.fromkeys(settings.names, settings.arguments()))
        return found

    def site(self, name: str, ends: Sequence[Tensor | None] = ()) -> Site:
        """Say where in the models the method is working; ``ends`` are the experts' tensors, where they are read."""
        experts = self.models.experts
        ends = ends or (None,) * len(experts)

        def digests() -> list[str]:
            return [finite_checked(expert).digest(name, end) for expert, end in zip(experts, ends, strict=True)]

        shape = tuple(self.reference.shape(name))
        return Site(name, tuple(expert.name for expert in experts), shape, 0, self.seed, digests)

    def factored(self, name: str) -> FactoredSum | None:
        """Return a merged tensor in factors, where it can be computed from the factors of low-rank adapters."""
        known = self._sums.get(name)
        if known is None:
            found = None
            if self.device.type == "cpu":
                found = factored_sum(self.method, self.arguments[name], self.models, name)
            while len(self._sums) >= SUMS:
                self._sums.pop(next(iter(self._sums)), None)
            known = self._sums[name] = (found,)
        return known[0]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a merged tensor is rounded to."""
        return self.dtype or self.reference.dtype(name)

    def empty(self, name: str) -> Tensor:
        """Return a new tensor for a merged one, its entries not set."""
        return torch.empty(tuple(self.reference.shape(name)), dtype=self.stored_dtype(name))

    def open(self, name: str) -> tuple[Tensor | None, list[Tensor]]:
        """Read a tensor of the base, where the method wants it, and of the experts."""
        wants_base = self.method.returns_task_vector or self.method.injected & {"base", "base_index"}
        base = self.models.base.get(name) if self.models.base is not None and wants_base else None
        return base, [] if self.method.takes_adapters else [expert.get(name) for expert in self.models.experts]

    @cached_property
    def longest(self) -> int:
        """The number of entries of the longest block."""
        return min(self.block, max(torch.Size(self.reference.shape(name)).numel() for name in self.models.names))

    def workspace_memory(
        self, base: Tensor | None, ends: Sequence[Tensor]
    ) -> AbstractContextManager[WorkspaceMemory | None]:
        """Lend memory for blocks of a tensor's task vectors; None where the method takes none."""
        if base is None or not self.method.returns_task_vector:
            return nullcontext()
        double = any(tensor.dtype == torch.float64 for tensor in (base, *ends))
        return self.workspaces.take(len(ends), self.longest, torch.float64 if double else torch.float32, self.device)

    def prefetch(self, name: str) -> None:
        """Let the models' data of a tensor be fetched in the background."""
        for source in (self.models.base, *self.models.experts):
            if source is not None:
                source.prefetch(name)


def checked_job(
    method: MergeMethod,
    parameters: Parameters | Mapping[str, Any],
    models: AlignedModels,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    block: int | None = None,
    dtype: torch.dtype | None = None,
    output: str | None = None,
    examples: Any = None,
) -> MergeRequest:
    """Check a request for a merge, before any tensor is read; arguments and errors are those of the engine's merge."""
    if not isinstance(parameters, Parameters):
        parameters = check_parameters(method, parameters)
    check_capabilities(method, has_base=models.base is not None, experts=len(models.experts))
    names = tuple(expert.name for expert in models.experts)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"models.experts: {listed(repeated)} stands for more than one expert; names must differ")
    if method.one_model_per_expert and output not in names:
        raise ConfigError(f"method={method.name}: makes one model for each expert; say for which: {listed(names)}")
    resolve_weights(method, parameters, names, weights)  # as when a run is planned, so that an error names the rule
    settings = []
    groups = parameters.by_tensor(models.names)
    if method.kind == "models" and len(groups) > 1:
        raise ConfigError(
            f"method={method.name}: its parameters hold for whole models and cannot differ between tensors"
        )
    for own, tensors in groups:
        shares = resolve_weights(method, own, names, weights)
        each = own.of_experts(names) | ({"weights": shares} if method.takes_weights else {})
        settings.append(TensorSettings(own, tensors, each))
        if method.takes_adapters:
            for name in tensors:
                factors_at(models, name, method.name)
        if method.check is not None:
            call_with(method.check, {**settings[-1].arguments(), "models": models})
    if method.needs and examples is None:
        needed = "scores on selecting" if "selection" in method.needs else "the experts' training"
        raise ConfigError(f"method={method.name}: needs {needed} examples, and there are none here")
    seen = replace(
        models,
        base=None if models.base is None else finite_checked(models.base),
        experts=tuple(map(finite_checked, models.experts)),
    )
    return MergeRequest(
        method=method,
        settings=settings,
        models=seen,
        reference=seen.base or seen.experts[0],
        seed=seed,
        dtype=dtype,
        device=torch.device(device),
        output=names.index(output) if output in names else 0,
        first=names[0],
        examples=examples,
        block=block or (BLOCK if torch.device(device).type == "cpu" else ACCELERATOR_BLOCK),
    )


def ordered_job(job: MergeRequest) -> MergeRequest:
    """Order the experts by their values, so that names, places and the order given change no bit of the result.

    Equal experts are ordered by their weights and other numbers. Where the method depends on the order, it stays.
    """
    if job.method.order_matters:
        return job
    experts = job.models.experts
    numbers = [[each[i] for settings in job.settings for each in settings.each.values()] for i in range(len(experts))]
    start = sorted(range(len(experts)), key=numbers.__getitem__)
    order = [start[i] for i in content_order([experts[i] for i in start], job.models.names)]
    return replace(
        job,
        settings=[settings.ordered(order) for settings in job.settings],
        models=replace(job.models, experts=tuple(experts[i] for i in order)),
        output=order.index(job.output),
    )


@torch.no_grad()
def prepared_job(job: MergeRequest, known: dict[Any, Any] | None = None) -> MergeRequest:
    """Order the experts, and run the method's preparing pass on the whole models, once for each set of its parameters.

    Args:
        job: a checked request.
        known: results of earlier passes over the same models, by their arguments; new ones are added.
    """
    job = ordered_job(job)
    known = {} if known is None else known
    if job.method.kind == "models":
        own = next(iter(job.arguments.values()), {})
        asked = (job.method.name, job.seed, repr(sorted(own.items())), Same(job.examples))
        if asked not in known:
            known[asked] = _substituted(job)
        return prepared_job(known[asked], known)
    prepare = job.method.prepare
    if prepare is None:
        return job
    looked_at = inspect.signature(prepare).parameters
    prepared: dict[str, Any] = {}
    for name, arguments in job.arguments.items():
        own = {key: value for key, value in arguments.items() if key in looked_at}
        key = (job.method.name, job.seed, repr(sorted(own.items())), Same(job.examples))
        if key not in known:
            supplied = {"models": job.models, "first": job.first, "seed": job.seed, "site_of": job.site}
            known[key] = call_with(prepare, own | supplied | {"examples": job.examples})
        prepared[name] = known[key]
    return replace(job, prepared=prepared)


def _substituted(job: MergeRequest) -> MergeRequest:
    """Return the request that a method on whole models puts in the place of its own."""
    arguments = next(iter(job.arguments.values()))
    other = call_with(
        job.method.function, {**arguments, "models": job.models, "seed": job.seed, "examples": job.examples}
    )
    return checked_job(
        other.method,
        other.parameters,
        other.models,
        weights=arguments.get("weights"),
        seed=job.seed,
        device=job.device,
        block=job.block,
        dtype=job.dtype,
    )


@torch.no_grad()
def merge_into(job: MergeRequest, name: str, into: Tensor, chunk: slice, vector: Tensor | None = None) -> None:
    """Merge a part of a tensor; the whole of it unless the method is elementwise.

    Args:
        job: a prepared request.
        name: the tensor.
        into: flat, as long as ``chunk``: takes the result.
        chunk: the part of the flattened tensor.
        vector: flat, of that length, float32 or float64: takes the merged task vector, where the method returns one.
    """
    if not into.numel():
        return
    if (summed := job.factored(name)) is not None:
        stored = job.stored_dtype(name)
        bound = 0.99 * torch.finfo(stored).max
        exact = not summed.changes and summed.base.dtype == stored  # checked when it was read
        bounded = exact or (bool(summed.changes) and summed.reach < bound)
        for place, entries in summed.parts(chunk):
            once = stored in (into.dtype, entries.dtype) and (bounded or largest(entries) < bound)
            into[place] = entries if once else rounded(job, name, entries, into[place])
        return
    base, experts = job.open(name)
    site = job.site(name, experts)
    if not job.method.elementwise:
        whole, whole_vector = into.view(site.shape), None if vector is None else vector.view(site.shape)
        result = _call(job, site, base, experts, whole_vector)
        whole.copy_(rounded(job, name, result, whole))
        return
    start = None if base is None else base.reshape(-1)[chunk]
    ends = [expert.reshape(-1)[chunk] for expert in experts]
    with job.workspace_memory(start, ends) as memory:
        for part in blocks(into.numel(), job.block):
            first = None if start is None else start[part]
            here = replace(site, offset=chunk.start + part.start)
            vector_part = None if vector is None else vector[part]
            workspace = None if memory is None else memory.workspace(part.stop - part.start)
            result = _call(job, here, first, [end[part] for end in ends], vector_part, workspace)
            into[part] = rounded(job, name, result, into[part])


@torch.no_grad()
def add_scaled(
    job: MergeRequest, name: str, base: Tensor, vector: Tensor, merged: Tensor, *, bounded: bool = False
) -> None:
    """Write θ0 + λ·τ_m for (a part of) a tensor whose merged task vector is known.

    Args:
        job: a checked request.
        name: the tensor.
        base: the base's entries, flat, of any length.
        vector: τ_m, float32 or float64.
        merged: takes the result.
        bounded: it is known that no entry of the result is too large for its dtype.
    """
    scale = job.arguments[name].get("lambda_", 1.0)
    alike = len({base.dtype, vector.dtype, merged.dtype, job.stored_dtype(name)}) == 1
    if not alike or not base.device == vector.device == merged.device:
        merged.copy_(rounded(job, name, _added(placed(job, base), vector, scale), merged))
        return
    torch.mul(vector, scale, out=merged).add_(base)  # the same two roundings, and nothing is copied
    if not bounded and not all_finite(merged):
        rounded(job, name, merged, merged)


def _call(
    job: MergeRequest,
    site: Site,
    stored: Tensor | None,
    ends: Sequence[Tensor],
    vector: Tensor | None = None,
    workspace: Workspace | None = None,
) -> object:
    """Call the method's function with tensors as it takes them; add a task vector that it returns to the base."""
    method = job.method
    base = None if stored is None else placed(job, stored)
    if method.takes_adapters:
        return _with_adapter(job, site, base, vector)
    # Where the task vectors are all that is wanted, no expert is widened but for the moment.
    wanted = method.kind == "list" or "experts" in method.injected
    experts = [placed(job, end) for end in ends] if wanted else []
    supplied = {
        "base": base,
        "experts": experts,
        "site": site,
        "prepared": job.prepared.get(site.name),
        "output": job.output,
        "base_index": 0,
    }
    keywords = dict(job.arguments[site.name])
    scale = 1.0 if method.custom else keywords.pop("lambda_", 1.0) if method.returns_task_vector else 1.0
    if method.returns_task_vector:
        assert base is not None
        start = working(base)
        supplied["workspace"] = workspace
        supplied["vectors"] = _vectors(job, start, ends, workspace)
    keywords |= {name: supplied[name] for name in method.injected}
    if method.kind == "list":
        if "base_index" in method.injected and base is not None:
            experts.insert(0, base)
        return run(job, site.name, lambda: method.function(experts, **keywords))
    result = run(job, site.name, lambda: method.function(**keywords))
    supplied.clear()  # with the keywords: releases the task vectors before the base is added
    keywords.clear()
    if not method.returns_task_vector or base is None:
        return result
    if vector is not None and isinstance(result, Tensor):
        vector.copy_(result)
    return _added(base, result, scale)


def merged_adapter(job: MergeRequest, site: Site) -> LowRank | None:
    """Combine the experts' factors of a layer with a method that takes adapters.

    Returns:
        The merged change, whose scale is 1; None where no expert changes the tensor.
    """
    changes = factors_at(job.models, site.name, job.method.name)
    known = next((change for change in changes if change is not None), None)
    if known is None:
        return None
    supplied = {"adapters": changes, "site": site, "prepared": job.prepared.get(site.name)}
    a, b = call_with(job.method.function, {**job.arguments[site.name], **supplied})
    return LowRank.of(a, b, 1.0, transposed=known.transposed)


def _with_adapter(job: MergeRequest, site: Site, base: Tensor | None, vector: Tensor | None) -> Tensor:
    """Return θ0 + B·A; write B·A to ``vector``."""
    assert base is not None
    start, change = working(base), merged_adapter(job, site)
    added = torch.zeros_like(start) if change is None else change.apply(torch.zeros_like(start))
    if vector is not None:
        vector.copy_(added)
    return added.add_(start)


def _vectors(job: MergeRequest, start: Tensor, ends: Sequence[Tensor], workspace: Workspace | None) -> list[Tensor]:
    """Return the task vectors, in ``workspace`` if given, else in the experts' widened copies or in new tensors."""
    if workspace is not None:
        pairs = zip(workspace.vectors, ends, strict=True)
        return [difference_into(vector, end.to(job.device), start) for vector, end in pairs]
    found = []
    for end in ends:
        wide = working(placed(job, end))
        copied = wide.dtype == start.dtype and wide.data_ptr() != end.data_ptr()
        found.append(wide.sub_(start) if copied else wide - start)
    return found


def _added(base: Tensor, vector: object, scale: float) -> object:
    """Return θ0 + λ·τ_m, product and sum each rounded (a fused multiply-add would differ between machines)."""
    if not isinstance(vector, Tensor) or vector.shape != base.shape or not vector.is_floating_point():
        return vector  # refused by `rounded`
    start = working(base)
    if scale == 1 or vector.dtype != torch.result_type(vector, start):
        return (vector * scale if scale != 1 else vector) + start
    return (vector * scale).add_(start)  # into the copy, so that there is no third one


def placed(job: MergeRequest, tensor: Tensor) -> Tensor:
    """Bring a tensor to the device, and to the dtype of arithmetic where the method leaves that to the engine."""
    here = tensor.to(job.device)
    if job.method.custom:  # a copy, as the function may write into it
        return working(here).clone(memory_format=torch.contiguous_format)
    return working(here) if job.method.elementwise else here


def run(job: MergeRequest, name: str, call: Callable[[], object]) -> object:
    """Call a function; an error of a user's own function names the tensor."""
    if not job.method.custom:
        return call()
    try:
        return call()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        on = f" on tensor {name}" if name else ""
        raise ConfigError(f"method.function={job.method.name}: failed{on}: {type(error).__name__}: {line}") from error


def rounded(job: MergeRequest, name: str, result: object, like: Tensor) -> Tensor:
    """Check what a function returned for (a part of) a tensor, and round it once to the stored dtype."""
    label = f"method.function={job.method.name}" if job.method.custom else f"method={job.method.name}"
    if not isinstance(result, Tensor):
        raise ConfigError(f"{label}: returned a {type(result).__name__} for tensor {name}, not a tensor")
    if result.shape != like.shape:
        raise ConfigError(f"{label}: returned shape {list(result.shape)} for tensor {name}, not {list(like.shape)}")
    if result.is_complex() or not result.is_floating_point():
        raise ConfigError(f"{label}: returned {_short(result.dtype)} for tensor {name}, not floating-point numbers")
    stored = result.detach().to(like.device, job.stored_dtype(name))
    flat = stored.reshape(-1)
    if not all(all_finite(flat[part]) or _is_finite(flat[part]) for part in blocks(flat.numel())):
        raise NonFinite(f"{label}: merging tensor {name} gives NaN or infinity in {_short(stored.dtype)}")
    return stored


def _is_finite(block: Tensor) -> bool:
    return bool(torch.isfinite(block.float() if block.element_size() == 1 else block).all())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
