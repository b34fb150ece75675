"""Running a method over models: tensor by tensor, large ones in blocks, the same bits however they are cut.

for name, tensor in merge(get_method("ties"), {"density": 0.3}, align(base, experts)):
    ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import ConfigError, listed
from mergelab.methods.blocks import blocks
from mergelab.methods.job import Job, checked_job, merge_into, placed, prepared_job, rounded, run
from mergelab.methods.parameters import Parameters
from mergelab.methods.registry import MergeMethod
from mergelab.methods.workers import CHUNK, pool
from mergelab.weights.align import AlignedModels
from mergelab.weights.state_dict import StateDict

AHEAD = 1 << 26  # bytes of merged tensors that may wait for the one that comes before them
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
    progress: Progress | None = None,
    output: str | None = None,
    examples: Any = None,
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
            examples=examples,
        )
    )
    reference = models.base if models.base is not None else models.experts[0]
    ordered = [name for name in (*reference.keys(), *reference.aliases()) if name in merged]
    return {name: merged[name] for name in dict.fromkeys([*ordered, *merged])}


def _stream(job: Job, progress: Progress | None, only: frozenset[str] | None) -> Iterator[tuple[str, Tensor]]:
    models = job.models
    aliases = {alias: name for alias, name in models.aliases.items() if only is None or alias in only}
    named = set(aliases.values())
    wanted = {*models.names, *models.integers} if only is None else only | named
    names = [name for name in models.names if name in wanted]
    merged: Iterable[tuple[str, Tensor]] = ()
    if names and job.method.kind == "model":  # whole models go in, whatever is wanted of what comes out
        merged = ((name, tensor) for name, tensor in merge_models(job, models.names) if name in wanted)
    elif names:
        merged = _merge_tensors(prepared_job(job), names)
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


def _merge_tensors(job: Job, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Merge tensor by tensor, several at once and large ones in chunks; few are ahead of the one that is answered."""
    with pool(job.threads) as workers:
        waiting: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
        ahead = 0
        for name in names:
            merged = job.empty(name)
            if workers is None:
                for chunk in chunks_of(job, merged):
                    merge_into(job, name, merged, chunk)
                yield name, merged
                continue
            job.prefetch(name)
            work = [workers.submit(merge_into, job, name, merged, chunk) for chunk in chunks_of(job, merged)]
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


def chunks_of(job: Job, merged: Tensor) -> list[slice]:
    """Divide a flattened tensor among threads, where the method may be given parts."""
    return list(blocks(merged.numel(), CHUNK if job.method.elementwise else max(merged.numel(), 1)))


def merge_models(job: Job, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
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
        yield name, like.copy_(rounded(job, name, result[name], like))


@torch.no_grad()
def _merged_model(job: Job, names: Sequence[str]) -> object:
    base = job.models.base if "base_index" in job.method.takes else None
    sources = [*([base] if base is not None else []), *job.models.experts]
    models = [StateDict({name: placed(job, source.get(name)) for name in names}) for source in sources]
    keywords = dict(job.arguments[names[0]]) | ({"base_index": 0} if base is not None else {})
    return run(job, "", lambda: job.method.function(models, **keywords))
