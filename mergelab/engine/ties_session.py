"""TIES merged again and again in a warm session: one pass over the models for each density.

The sign of entries whose votes cancel is the one that most entries of the model elect, which is known only when all are
counted. So a pass takes the sign that the last pass found, and counts. Where it turns out to be another one, which is
rare, the tensors that it is the sign for are merged once more.

A step of a sweep on five BERT-base experts takes 0.40 to 0.48 s, compiled 0.11 to 0.14 s. Without cutting parts of
tensors once for all merges and joining short tensors it takes 0.72 s (``experiments/benchmarks/README.md``).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mergelab.engine.request import MergeRequest, add_scaled
from mergelab.engine.warm_session import Path
from mergelab.errors import MergelabError, MergeWarning
from mergelab.ops.blocks import BLOCK, blocks, largest
from mergelab.ops.sign_consensus import SignConsensus, tie_signs
from mergelab.ops.task_vectors import just_below, open_task_vectors
from mergelab.ops.threads import CHUNK, in_order
from mergelab.ops.thresholds import Scope, Thresholds, find_thresholds
from mergelab.ops.ties_kernels import compiled, merge_block
from mergelab.ops.workspace import WorkspacePool

COMPILED_PART = 1 << 28  # entries that one call of a compiled function, which has threads of its own, works through
SHORT = 1 << 14  # entries of a tensor; shorter ones are joined: a call takes as long as computing on these


@dataclass(frozen=True)
class TensorBlock:
    """A part of a tensor, flat: the models', and where the results are written; or several short tensors joined."""

    name: str
    base: Tensor
    ends: Sequence[Tensor]
    target: Tensor
    vector: Tensor | None
    joined: tuple[TensorBlock, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[TensorBlock]) -> TensorBlock:
        """Join tensors, with new ones for the results."""
        base = torch.cat([part.base for part in parts])
        ends = [torch.cat(models) for models in zip(*(part.ends for part in parts), strict=True)]
        target = torch.empty(len(base), dtype=parts[0].target.dtype)
        vector = None if parts[0].vector is None else torch.empty(len(base))
        return cls(parts[0].name, base, ends, target, vector, tuple(parts))

    def divide(self) -> None:
        """Copy the results to where those of the joined tensors belong."""
        start = 0
        for part in self.joined:
            own = slice(start, start + len(part.base))
            start = own.stop
            part.target.copy_(self.target[own])
            if part.vector is not None and self.vector is not None:
                part.vector.copy_(self.vector[own])

    def cut(self, part: slice) -> TensorBlock:
        """Return a part of it."""
        vector = None if self.vector is None else self.vector[part]
        return TensorBlock(self.name, self.base[part], [end[part] for end in self.ends], self.target[part], vector)

    @cached_property
    def blocks(self) -> tuple[TensorBlock, ...]:
        """Blocks of it that stay in a core's cache. To cut one takes as long as an operation on it."""
        return tuple(map(self.cut, blocks(self.base.numel())))


@dataclass(frozen=True)
class Division:
    """A model's tensors in parts, and those that were joined from several of these, by their names: both stay."""

    parts: list[TensorBlock]
    joined: dict[tuple[str, ...], TensorBlock]


@dataclass(frozen=True)
class SessionRequest:
    """A request, its election, and the thresholds for it by tensor."""

    job: MergeRequest
    consensus: SignConsensus
    scope: Scope
    thresholds: Mapping[str, Thresholds]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """The experts' weights."""
        return self.consensus.shares(len(self.job.models.experts))

    def scale(self, name: str) -> float:
        """Return λ for a tensor."""
        return float(self.job.arguments[name].get("lambda_", 1.0))


# Merges a part with a sign for cancelled votes; returns how many more of its entries are elected positive than are
# elected negative.
Merge = Callable[[TensorBlock, float], int]


class TiesSession:
    """What merges have in common: the signs of cancelled votes, parts of tensors, and workspaces.

    Args:
        compiling: whether to merge with a compiled function.
    """

    def __init__(self, compiling: bool) -> None:
        self._compiling = compiling
        self._signs: dict[str, float] = {}
        self._workspaces = WorkspacePool()
        self._divisions: dict[tuple[int, bool], Division] = {}
        self._largest: dict[str, float] = {}
        self._double: bool | None = None

    def path(self, job: MergeRequest, targets: Mapping[str, Tensor]) -> Path | None:
        """Return how a request would be merged; None where it cannot be merged here.

        That is so on an accelerator, for float64 models, and where parameters differ between tensors.
        """
        settings = [{k: v for k, v in own.items() if k != "lambda_"} for own in _distinct(job.arguments.values())]
        if self._double is None:
            sources = [source for source in (job.models.base, *job.models.experts) if source is not None]
            self._double = any(source.dtype(name) == torch.float64 for source in sources for name in targets)
        if self._double or job.device.type != "cpu" or any(own != settings[0] for own in settings):
            return None
        # The compiled function rounds once, from float32 to the target's dtype.
        once = all(job.stored_dtype(name) in (torch.float32, target.dtype) for name, target in targets.items())
        return "compiled" if self._compiling and once else "plain"

    def merge(
        self, job: MergeRequest, path: Path, targets: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
    ) -> Path:
        """Merge into the targets, and write the merged task vector into ``vectors`` where there are any.

        Returns:
            How it was done: ``path``, or "plain" with a warning where compiling failed.
        """
        own = job.arguments[job.models.names[0]]
        sizes = {name: target.numel() for name, target in targets.items()}
        thresholds = find_thresholds(
            partial(open_task_vectors, job.models), sizes, own["density"], own["scope"], job.models, job.models.memo
        )
        asked = SessionRequest(job, own["consensus"], own["scope"], thresholds)
        if path == "compiled":
            try:
                parts = self._parts(asked, targets, vectors, COMPILED_PART)
                self._pass(asked, partial(self._compiled, asked), parts, threads=1)
                return path
            except MergelabError:
                raise
            except Exception as error:
                self._compiling = False
                line = (str(error).splitlines() or [""])[0]
                warnings.warn(
                    f"TIES is merged in plain torch operations, as compiling it failed: {type(error).__name__}: {line}",
                    MergeWarning,
                    stacklevel=3,
                )
        parts = self._parts(asked, targets, vectors, CHUNK)
        self._pass(asked, partial(self._plain, asked), parts, threads=job.threads)
        return "plain"

    def _parts(
        self, asked: SessionRequest, targets: Mapping[str, Tensor], vectors: Mapping[str, Tensor], size: int
    ) -> list[TensorBlock]:
        """Divide the tensors into parts of ``size`` entries; join short ones that are merged with the same numbers.

        Both are done once, as models, targets and vectors stay the same.
        """
        job = asked.job
        key = (size, bool(vectors))
        if key not in self._divisions:
            parts = [part for name in targets for part in _parts(job, name, targets[name], vectors.get(name), size)]
            self._divisions[key] = Division(parts, {})
        division = self._divisions[key]
        if asked.scope == "tensor":
            return division.parts
        found, short = [], defaultdict(list)
        for part in division.parts:
            if part.base.numel() < SHORT:
                dtypes = (part.target.dtype, part.base.dtype, *(end.dtype for end in part.ends))
                short[asked.scale(part.name), dtypes].append(part)  # thresholds are all the same then
            else:
                found.append(part)
        for alike in short.values():
            names = tuple(part.name for part in alike)
            if names not in division.joined:
                division.joined[names] = TensorBlock.join(alike)
            found.append(division.joined[names])
        return found

    def _pass(self, asked: SessionRequest, merge: Merge, parts: Sequence[TensorBlock], *, threads: int) -> None:
        """Merge all parts, and those again that were merged with another sign for cancelled votes than they must be."""
        tie_break = asked.consensus.tie_break
        if tie_break == "majority":
            assumed = {part.name: self._signs.get(part.name) or 1.0 for part in parts}
        else:
            assumed = {part.name: 1.0 if tie_break == "positive" else 0.0 for part in parts}
        found = list(in_order(lambda part: merge(part, assumed[part.name]), parts, threads=threads))
        if tie_break != "majority":
            return
        self._signs = tie_signs(zip((part.name for part in parts), found, strict=True), assumed, asked.scope)
        wrong = [part for part in parts if self._signs[part.name] != assumed[part.name]]
        for _ in in_order(lambda part: merge(part, self._signs[part.name]), wrong, threads=threads):
            pass

    def _plain(self, asked: SessionRequest, part: TensorBlock, sign: float) -> int:
        scale, thresholds = asked.scale(part.name), asked.thresholds[part.name]
        once = {part.base.dtype, part.target.dtype, asked.job.stored_dtype(part.name)} == {torch.float32}
        direct = once and part.vector is None and self._bounded(asked, part, scale)
        if part.joined and not direct:
            return sum(self._plain(asked, piece, sign) for piece in part.joined)
        surplus = 0
        with self._workspaces.take(len(part.ends), BLOCK, torch.float32, asked.job.device) as memory:
            for block in part.blocks:
                workspace = memory.workspace(block.base.numel())
                magnitudes, more = merge_block(asked.consensus, block.base, block.ends, thresholds, sign, workspace)
                surplus += more
                if direct:  # a sign is a factor that does not round
                    torch.addcmul(block.base, magnitudes.mul_(scale), workspace.signs, out=block.target)
                    continue
                vector = torch.mul(
                    magnitudes, workspace.signs, out=magnitudes if block.vector is None else block.vector
                )
                add_scaled(asked.job, part.name, block.base, vector, block.target)
        part.divide()
        return surplus

    def _compiled(self, asked: SessionRequest, part: TensorBlock, sign: float) -> int:
        consensus, weights, scale = asked.consensus, asked.weights, asked.scale(part.name)
        if not self._bounded(asked, part, scale):
            return self._plain(asked, part, sign)
        weighted = any(weight != 1 for weight in weights)
        function = compiled(consensus.majority_sign, consensus.reduce, consensus.weights_stage, weighted)
        bounds = [just_below(threshold, torch.float32) for threshold in asked.thresholds[part.name]]
        numbers = map(torch.tensor, (bounds, sign, weights, scale))
        surplus = function(part.base, list(part.ends), *numbers, part.target, part.vector)
        part.divide()
        return int(surplus)

    def _bounded(self, asked: SessionRequest, part: TensorBlock, scale: float) -> bool:
        """Return whether no entry of the result can be too large for its dtype; if so, none is checked."""
        if part.joined:
            return all(self._bounded(asked, piece, scale) for piece in part.joined)
        if part.name not in self._largest:
            sources = [source for source in (asked.job.models.base, *asked.job.models.experts) if source is not None]
            self._largest[part.name] = max(map(largest, (source.get(part.name) for source in sources)))
        reach = self._largest[part.name] * (1 + 2 * max(1.0, abs(scale)) * max(1.0, sum(asked.weights)))
        return reach < 0.99 * torch.finfo(part.target.dtype).max


def _parts(job: MergeRequest, name: str, target: Tensor, vector: Tensor | None, size: int) -> Iterator[TensorBlock]:
    """Divide a tensor into parts of ``size`` entries."""
    base, ends = job.open(name)
    assert base is not None
    flat = None if vector is None else vector.view(-1)
    whole = TensorBlock(name, base.reshape(-1), [end.reshape(-1) for end in ends], target.view(-1), flat)
    for part in blocks(target.numel(), size):
        yield whole.cut(part)


def _distinct(values: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the values without those that are the same object as an earlier one."""
    return list({id(value): value for value in values}.values())
