"""Many merges of the same models into the same tensors, as a sweep makes them: loaded once, nothing learnt twice.

warm = MergeSession(aligned, dict(module.named_parameters()))
for density, scale in trials:
    warm.merge(get_method("ties"), {"density": density, "lambda": scale})  # the module now has the merged weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from mergelab.engine.finite_check import finite_checked
from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import Parameters
from mergelab.engine.registry import check_parameters
from mergelab.engine.request import MergeRequest, Same, add_scaled, checked_job, merge_into, ordered_job, prepared_job
from mergelab.engine.run import chunks_of, merge_models
from mergelab.errors import InsufficientMemoryError, KeyMismatch, ShapeMismatch, listed
from mergelab.ops.blocks import blocks, largest
from mergelab.ops.threads import pool
from mergelab.ops.workspace import WorkspacePool
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import DictSource, TensorSource

Mode = Literal["merged", "scaled"]
Path = Literal["plain", "compiled"]
SCALED_BLOCK = 1 << 20  # entries of one scaled addition
HEADROOM = 1 << 29  # bytes of an accelerator's memory that are left to the computing itself


class MergeSession:
    """Models held in memory, for any number of merges into the same tensors.

    Every merge gives the bits that `mergelab.engine.run.merge` gives; a compiled one gives them but for float32
    rounding. What a method's preparing pass finds is used again for the same parameters, and any density of TIES is
    looked up in an index of the magnitudes. Where λ alone has changed since the last merge, the result is one scaled
    addition to the base.

    Args:
        models: base and experts under common names; they are copied into memory.
        targets: by name, the tensors that take the result, such as a module's parameters: a contiguous one for each of
            ``models.names``, of any floating-point dtype.
        weights: the models' own weights, one per expert.
        seed: of random methods.
        device: where to compute. On an accelerator, the models' tensors stay there as far as they fit, the others are
            brought there block by block in each merge.
        dtype: what results are rounded to, once; default: the models' own.
        memory: bytes that the models may take; default: what is free.
        compiling: whether methods that can be compiled (`MergeMethod.session`: TIES) are, with ``torch.compile``. That
            needs a C++ compiler and takes seconds; merges then take a third of the time, and equal the others within
            float32 rounding. Where compiling fails, a `MergeWarning` says so and the merge goes on without.

    Attributes:
        path: how the last merge computed: "compiled" or "plain" torch operations.

    Raises:
        InsufficientMemoryError: the models do not fit into memory.
        KeyMismatch, ShapeMismatch: the targets are not those of the models.
    """

    def __init__(
        self,
        models: AlignedModels,
        targets: Mapping[str, Tensor],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        compiling: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self._targets = _checked_targets(models, targets)
        self._weights, self._seed, self._dtype = weights, seed, dtype
        check_memory(models, memory)
        places = residence(models, self.device, memory)
        self.models = replace(
            models,
            base=None if models.base is None else finite_checked(_loaded(models.base, models.names, places)),
            experts=tuple(finite_checked(_loaded(expert, models.names, places)) for expert in models.experts),
            memo={},
        )
        self._known: dict[Any, Any] = {}
        self._workspaces = WorkspacePool()
        self._compiling = compiling
        self._sessions: dict[str, Any] = {}
        self._vectors: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        self._last: object = None  # what the targets hold the merge of, but for λ
        self._kept = False  # whether the vectors hold that too
        self.path: Path = "plain"

    @torch.no_grad()
    def merge(
        self,
        method: MergeMethod,
        parameters: Parameters | Mapping[str, Any],
        *,
        weights: Sequence[float] | None = None,
        output: str | None = None,
        examples: Any = None,
    ) -> Mode:
        """Merge into the targets.

        Args:
            method, parameters, output, examples: as for `mergelab.engine.run.merge`.
            weights: the models' own weights, where they are others than the session was opened with.

        Returns:
            "scaled" where only λ had changed, else "merged".

        Raises:
            ConfigError, NonFinite: as `mergelab.engine.run.merge`. After an error the targets hold what they held,
                or, when it arose while merging, a part of the result.
        """
        if not isinstance(parameters, Parameters):
            parameters = check_parameters(method, parameters)
        job = checked_job(
            method,
            parameters,
            self.models,
            weights=self._weights if weights is None else weights,
            seed=self._seed,
            device=self.device,
            dtype=self._dtype,
            output=output,
            examples=examples,
        )
        job = ordered_job(job)
        last, self._last = self._last, None
        if method.kind == "model":
            self.path = "plain"
            for name, tensor in merge_models(job, self.models.names):
                self._targets[name].copy_(tensor)
            return "merged"
        direction = _direction(job)
        mode: Mode = "scaled" if method.returns_task_vector and self._kept and direction == last else "merged"
        if mode == "scaled":
            self._scale(job)
        else:
            self._kept = False
            self._merge(job, again=direction == last)
        self._last = direction
        return mode

    def _merge(self, job: MergeRequest, *, again: bool) -> None:
        method = job.method
        if method.session is not None and method.name not in self._sessions:
            self._sessions[method.name] = method.session(self._compiling)
        session = self._sessions.get(method.name)
        path = None if session is None else session.path(job, self._targets)
        # A session's merge takes half as long again if it writes its task vector too: only once it is asked for twice.
        keep = method.returns_task_vector and (again or path is None)
        if keep and not self._vectors:
            self._vectors = {name: self._space(name) for name in self.models.names}
        vectors = self._vectors if keep else {}
        if session is not None and path is not None:
            self.path = session.merge(job, path, self._targets, vectors)
        else:
            self.path = "plain"
            job = prepared_job(replace(job, workspaces=self._workspaces), self._known)
            with pool(job.threads) as workers:
                for finished in _spread(workers, job, self._targets, vectors):
                    finished()
        self._kept, self._largest = keep, {}

    def _scale(self, job: MergeRequest) -> None:
        """Add λ·τ_m to the base; operations are long enough to be divided among threads by themselves."""
        self.path = "plain"
        for name, parts in self._parts.items():
            if name not in self._largest:
                self._largest[name] = max(largest(entries) for base, vector, _ in parts for entries in (base, vector))
            reach = self._largest[name] * (1 + abs(job.arguments[name].get("lambda_", 1.0)))
            bounded = reach < 0.99 * torch.finfo(job.stored_dtype(name)).max
            for base, vector, target in parts:
                add_scaled(job, name, base, vector, target, bounded=bounded)

    @cached_property
    def _parts(self) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
        """Base, merged task vector and target of each tensor, in parts: to cut them takes a tenth of adding them."""
        assert self.models.base is not None
        found = {}
        for name, target in self._targets.items():
            whole = (self.models.base.get(name).reshape(-1), self._vectors[name].view(-1), target.view(-1))
            found[name] = [(whole[0][p], whole[1][p], whole[2][p]) for p in blocks(target.numel(), SCALED_BLOCK)]
        return found

    def _space(self, name: str) -> Tensor:
        """Return a new tensor for a merged task vector."""
        sources = [source for source in (self.models.base, *self.models.experts) if source is not None]
        double = any(source.dtype(name) == torch.float64 for source in sources)
        dtype = torch.float64 if double else torch.float32
        return torch.empty(sources[0].shape(name), dtype=dtype, device=sources[0].get(name).device)


def residence(models: AlignedModels, device: torch.device, memory: int | None = None) -> dict[str, torch.device]:
    """Return where each tensor of the models, and of their merged task vector, is held: on ``device`` while it fits.

    Args:
        models: what is to be held.
        device: where it is used.
        memory: bytes there; default: what is free but for `HEADROOM`.
    """
    if device.type == "cpu":
        return dict.fromkeys(models.names, device)
    if memory is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else torch.mps.recommended_max_memory()
        memory = max(0, free - HEADROOM)
    places = {}
    for name in models.names:
        needed = _bytes_held(models, name)
        places[name] = device if needed <= memory else torch.device("cpu")
        memory -= needed if needed <= memory else 0
    return places


def check_memory(models: AlignedModels, memory: int | None = None) -> None:
    """Raise `InsufficientMemoryError` when the models do not fit into the main memory; it says what would fit."""
    import psutil

    free = psutil.virtual_memory().available if memory is None else memory
    needed = sum(_bytes_held(models, name) for name in models.names)
    if needed <= free:
        return
    count = len(models.experts)
    each = sum(_bytes_of(expert, models.names) for expert in models.experts) / count
    fitting = max(0, int(count - (needed - free) / each))
    raise InsufficientMemoryError(
        f"keeping {count} experts in memory takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
        f"{f'{fitting} of them would fit' if fitting else 'not even one of them fits'}; "
        "a merge to disk (evaluate=false output=...) holds only a few tensors at a time"
    )


def _bytes_held(models: AlignedModels, name: str) -> int:
    sources = [source for source in (models.base, *models.experts) if source is not None]
    vector = 4 * torch.Size(sources[0].shape(name)).numel()
    return vector + sum(_bytes_of(source, [name]) for source in sources)


def _bytes_of(source: TensorSource, names: Sequence[str]) -> int:
    return sum(torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize for name in names)


def _loaded(source: TensorSource, names: Sequence[str], places: Mapping[str, torch.device]) -> DictSource:
    tensors = {name: source.get(name).to(places[name], copy=True) for name in names}
    return DictSource(source.name, tensors, source)


def _checked_targets(models: AlignedModels, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if missing := [name for name in models.names if name not in targets]:
        raise KeyMismatch(f"there is no tensor to merge {listed(missing)} into")
    for name in models.names:
        shape = models.experts[0].shape(name)
        if tuple(targets[name].shape) != tuple(shape):
            raise ShapeMismatch(f"{name} is {list(shape)}, and the tensor to merge into {list(targets[name].shape)}")
        if not targets[name].is_contiguous():
            raise ShapeMismatch(f"the tensor to merge {name} into is not contiguous")
    return {name: targets[name].detach() for name in models.names}


def _direction(job: MergeRequest) -> object:
    """Name all that a merged task vector depends on."""
    arguments = {id(own): own for own in job.arguments.values()}
    settings = {at: {k: v for k, v in own.items() if k != "lambda_"} for at, own in arguments.items()}
    return (
        job.method.name,
        job.output,
        Same(job.examples),
        [(n, repr(settings[id(a)])) for n, a in job.arguments.items()],
    )


def _spread(
    workers: ThreadPoolExecutor | None, job: MergeRequest, targets: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
) -> Iterator[Callable[[], None]]:
    """Divide the work among threads; answer, for each part, what waits for its end (and raises its error)."""
    waiting: list[Callable[[], None]] = []
    for name, target in targets.items():
        flat, vector = target.view(-1), vectors[name].view(-1) if name in vectors else None
        for chunk in chunks_of(job, target.numel()):
            work = partial(merge_into, job, name, flat[chunk], chunk, None if vector is None else vector[chunk])
            waiting.append(work if workers is None else workers.submit(work).result)
    yield from waiting
