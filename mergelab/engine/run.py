"""Run a method over models: tensor by tensor, large ones in blocks, to the same bits for any block size.

for name, tensor in merge(get_method("ties"), {"density": 0.3}, align(base, experts)):
    ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import Parameters
from mergelab.engine.request import MergeRequest, checked_job, merge_into, placed, prepared_job, rounded, run
from mergelab.errors import ConfigError, listed
from mergelab.ops.blocks import blocks
from mergelab.ops.threads import CHUNK, pool, return_memory
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorPart
from mergelab.weights.state_dict import StateDict

AHEAD = 1 << 25  # bytes of merged parts that may be computed before they are needed
TensorProgress = Callable[[int], None]  # receives the number of entries of each merged tensor


def merge(
    method: MergeMethod,
    parameters: Parameters | Mapping[str, Any],
    models: AlignedModels,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: TensorProgress | None = None,
    block: int | None = None,
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
    output: str | None = None,
    examples: Any = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge ``models`` and return an iterator over the merged tensors.

    The request is checked before this returns, and before a tensor is read. The same request gives the same bits for
    any number of threads, any order of ``models.names`` and any ``block``. The order of the experts changes no bit
    either, except for methods where it matters.

    Args:
        method: the merge method.
        parameters: its parameters, already checked or as plain values.
        models: base and experts under common names.
        weights: the models' weights, one per expert; the method's ``weights`` parameter takes precedence.
        seed: of methods that draw random numbers.
        device: device to compute on; the merged tensors are on the CPU in any case.
        progress: called after each merged tensor with its number of entries.
        block: number of entries that an elementwise method receives at once.
        dtype: dtype of the merged tensors; default: the stored one.
        only: names of the tensors to merge; statistics of whole models are not affected.
        output: name of the expert to merge for, when the method makes one model per expert.
        examples: examples for methods that need data.

    Returns:
        Pairs of name and new tensor: ``models.names`` in their order, in ``dtype`` or the base's (without a base, the
        first expert's); then copies of ``models.integers``; then ``models.aliases``, each with the tensor it names.

    Raises:
        ConfigError: a base is missing, too few or too many experts, parameters or weights that do not fit, two experts
            of one name; while merging: a user's function fails, or does not return a tensor of the right shape.
        NonFinite: while merging: a tensor of a model, or of the result, holds NaN or infinity.
    """
    job = checked_job(
        method,
        parameters,
        models,
        weights=weights,
        seed=seed,
        device=device,
        block=block,
        dtype=dtype,
        output=output,
        examples=examples,
    )
    return _stream(job, progress, None if only is None else frozenset(only))


def merge_to_dict(
    method: MergeMethod,
    parameters: Parameters | Mapping[str, Any],
    models: AlignedModels,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: TensorProgress | None = None,
    output: str | None = None,
    examples: Any = None,
) -> dict[str, Tensor]:
    """Merge as `merge` does; return all tensors in the base's order (without a base, the first expert's)."""
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
            examples=examples,
        )
    )
    reference = models.base if models.base is not None else models.experts[0]
    ordered = [name for name in (*reference.keys(), *reference.aliases()) if name in merged]
    return {name: merged[name] for name in dict.fromkeys([*ordered, *merged])}


def merge_in_parts(job: MergeRequest, only: Collection[str] | None = None) -> Iterator[TensorPart]:
    """Merge as `merge` does, and yield parts of the tensors; an elementwise method never has a whole tensor in memory.

    Args:
        job: a checked request.
        only: names of the tensors to merge, as for `merge`.

    Returns:
        The parts of each tensor in their order; each part of an alias follows that of the tensor that it names. A
        part's entries are overwritten once the next part is requested.

    Raises:
        ConfigError, NonFinite: as for `merge`, while merging.
    """
    models = job.models
    wanted = {*models.names, *models.integers, *models.aliases} if only is None else frozenset(only)
    stored_as: dict[str, list[str]] = {name: [name] for name in (*models.names, *models.integers) if name in wanted}
    for alias, name in models.aliases.items():
        if alias in wanted:
            stored_as.setdefault(name, []).append(alias)
    for part in _parts(job, [name for name in models.names if name in stored_as]):
        for name in stored_as[part.name]:
            yield part._replace(name=name)
    for name in models.integers:
        for each in stored_as.get(name, ()):
            yield TensorPart(each, 0, job.reference.get(name).reshape(-1))


def _stream(
    job: MergeRequest, progress: TensorProgress | None, only: frozenset[str] | None
) -> Iterator[tuple[str, Tensor]]:
    models = job.models
    aliases = {alias: name for alias, name in models.aliases.items() if only is None or alias in only}
    named = set(aliases.values())
    wanted = {*models.names, *models.integers} if only is None else only | named
    made: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}

    def allocate(name: str) -> Tensor:
        made[name] = job.empty(name)
        return made[name]

    for name, start, entries in _parts(job, [name for name in models.names if name in wanted], allocate):
        if start + entries.numel() < made[name].numel():
            continue
        if name in named:
            held[name] = made[name]
        yield name, made[name]
        if progress is not None:
            progress(made[name].numel())
        del made[name], entries
    for name in models.integers:
        if name in wanted:
            held[name] = job.reference.get(name).clone()
            yield name, held[name]
    for alias, name in aliases.items():
        yield alias, held[name]


def _parts(
    job: MergeRequest, names: Sequence[str], allocate: Callable[[str], Tensor] | None = None
) -> Iterator[TensorPart]:
    """Merge the named tensors; ``allocate`` as for `_merged_parts`."""
    if not names:
        return
    if job.method.kind != "model":
        job = prepared_job(job)
        return_memory()
        yield from _merged_parts(job, names, allocate)
        return
    for name, tensor in merge_models(job, job.models.names):  # such a method needs whole models, whatever is requested
        if name in names:
            into = tensor if allocate is None else allocate(name).copy_(tensor)
            yield TensorPart(name, 0, into.view(-1))


def _merged_parts(
    job: MergeRequest, names: Sequence[str], allocate: Callable[[str], Tensor] | None = None
) -> Iterator[TensorPart]:
    """Merge part by part, several at once, with at most `AHEAD` bytes computed before they are needed.

    Args:
        job: a prepared request.
        names: names of the tensors.
        allocate: returns a new tensor for the result; default: parts share a ring buffer, and are overwritten once the
            next part is requested.
    """
    ring = RingBuffer(job, names)
    with pool(job.threads) as workers:
        waiting: deque[tuple[TensorPart, Future[None]]] = deque()
        ahead = 0
        for name in names:
            job.prefetch(name)
            count = torch.Size(job.reference.shape(name)).numel()
            whole = None if allocate is None else allocate(name).view(-1)
            for chunk in chunks_of(job, name, count):
                into = ring.take(name, chunk.stop - chunk.start) if whole is None else whole[chunk]
                part = TensorPart(name, chunk.start, into)
                if workers is None:
                    merge_into(job, name, into, chunk)
                    yield part
                    continue
                waiting.append((part, workers.submit(merge_into, job, name, into, chunk)))
                ahead += _padded(into.nbytes)
                del part, into  # release them once they are yielded
                while ahead > AHEAD and len(waiting) > 1:
                    ahead -= _padded(waiting[0][0].entries.nbytes)
                    yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


class RingBuffer:
    """A buffer for parts that are released in the order in which they are taken.

    When a part is taken, the parts in use fill at most `AHEAD` bytes, or are a single part. The buffer has space for
    two more parts, so that the new part always fits behind the last, or at the start when the end is near. Separate
    allocations for the parts would fragment the memory.
    """

    def __init__(self, job: MergeRequest, names: Sequence[str]) -> None:
        self._job = job
        sizes = {name: torch.Size(job.reference.shape(name)).numel() for name in names}
        self._largest = max(_padded(min(sizes[name], CHUNK) * job.stored_dtype(name).itemsize) for name in names)
        self._buffer = torch.empty(0, dtype=torch.uint8)  # allocated at the first use
        self._next = 0

    def take(self, name: str, count: int) -> Tensor:
        """Return memory for ``count`` entries of a tensor."""
        dtype = self._job.stored_dtype(name)
        size = count * dtype.itemsize
        if _padded(size) > self._largest:
            return torch.empty(count, dtype=dtype)
        if not len(self._buffer):
            self._buffer = torch.empty(max(AHEAD, self._largest) + 2 * self._largest, dtype=torch.uint8)
        start = 0 if self._next + size > len(self._buffer) else self._next
        self._next = start + _padded(size)
        return self._buffer[start : start + size].view(dtype)


def _padded(size: int) -> int:
    """Round ``size`` bytes up to whole cache lines."""
    return size + -size % 64


def _finished(part: TensorPart, work: Future[None]) -> TensorPart:
    work.result()
    return part


def chunks_of(job: MergeRequest, name: str, count: int) -> list[slice]:
    """Divide a flattened tensor of ``count`` entries into parts; a method that is not elementwise needs the whole."""
    if count and (summed := job.factored(name)) is not None:
        return list(blocks(count, summed.chunk))
    return list(blocks(count, CHUNK if job.method.elementwise else max(count, 1))) or [slice(0, 0)]


def merge_models(job: MergeRequest, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Run a function of state dicts on whole models in memory, and yield its result tensor by tensor."""
    result = _merged_model(job, names)
    label = f"method.function={job.method.name}"
    if not isinstance(result, Mapping):
        raise ConfigError(f"{label}: returned a {type(result).__name__}, not a state dict")
    if missing := [name for name in names if name not in result]:
        raise ConfigError(f"{label}: its result lacks {listed(missing)}")
    if extra := [str(name) for name in result if name not in names]:
        raise ConfigError(f"{label}: its result has {listed(extra)} in addition")
    for name in names:
        like = job.empty(name)
        yield name, like.copy_(rounded(job, name, result[name], like))


@torch.no_grad()
def _merged_model(job: MergeRequest, names: Sequence[str]) -> object:
    base = job.models.base if "base_index" in job.method.injected else None
    sources = [*([base] if base is not None else []), *job.models.experts]
    models = [StateDict({name: placed(job, source.get(name)) for name in names}) for source in sources]
    keywords = dict(job.arguments[names[0]]) | ({"base_index": 0} if base is not None else {})
    return run(job, "", lambda: job.method.function(models, **keywords))
