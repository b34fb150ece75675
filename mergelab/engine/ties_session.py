"""TIES merged again and again in a warm session: one pass over the models for each density.

The sign of entries whose votes cancel is the one that most entries of the model elect, which is known only when all are
counted. So a pass goes with the sign that the last pass found, and counts; where it turns out to be another one, which
is rare, the tensors that it is the sign for are merged once more.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from mergelab.engine.request import MergeRequest, add_scaled
from mergelab.errors import MergelabError, MergeWarning
from mergelab.ops.blocks import BLOCK, blocks
from mergelab.ops.sign_consensus import Scope, TieBreak, find_thresholds, open_task_vectors, sign_of
from mergelab.ops.threads import CHUNK, in_order
from mergelab.ops.ties_kernels import Vote, compiled, merge_block
from mergelab.ops.workspace import WorkspacePool

Path = Literal["plain", "compiled"]
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
        """Join tensors, with new room for the results."""
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
    """A request, and the thresholds for it by tensor."""

    job: MergeRequest
    vote: Vote
    thresholds: Mapping[str, Sequence[float]]

    def scale(self, name: str) -> float:
        """Return λ for a tensor."""
        return float(self.job.arguments[name].get("lambda_", 1.0))


# Merges a part with a sign for cancelled votes; answers how many more of its entries are elected positive than are
# elected negative.
Merge = Callable[[TensorBlock, float], int]


class TiesSession:
    """What is kept between merges: the signs of cancelled votes, and room for blocks.

    Args:
        compiling: whether to merge with a compiled function.
    """

    def __init__(self, compiling: bool) -> None:
        self._compiling = compiling
        self._signs: dict[str, float] = {}
        self._rooms = WorkspacePool()
        self._divisions: dict[tuple[int, bool], Division] = {}
        self._largest: dict[str, float] = {}
        self._double: bool | None = None

    def path(self, job: MergeRequest, targets: Mapping[str, Tensor]) -> Path | None:
        """Say how a request would be merged; None: not here, but as other methods are.

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
        """Merge into the targets, and keep the merged task vector in ``vectors`` where it has room.

        Returns:
            How it was done: ``path``, or "plain" with a warning where compiling failed.
        """
        own = job.arguments[job.models.names[0]]
        sizes = {name: target.numel() for name, target in targets.items()}
        thresholds = find_thresholds(
            partial(open_task_vectors, job.models), sizes, own["density"], own["scope"], job.models, job.models.memo
        )
        vote = Vote(tuple(own["weights"]), own["majority_sign"], own["reduce"], own["weights_stage"])
        asked = SessionRequest(job, vote, thresholds)
        if path == "compiled":
            try:
                parts = self._parts(asked, targets, vectors, COMPILED_PART)
                self._pass(partial(self._compiled, asked), parts, own["tie_break"], own["scope"], threads=1)
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
        self._pass(partial(self._plain, asked), parts, own["tie_break"], own["scope"], threads=job.threads)
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
        if job.arguments[job.models.names[0]]["scope"] == "tensor":
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

    def _pass(
        self, merge: Merge, parts: Sequence[TensorBlock], tie_break: TieBreak, scope: Scope, *, threads: int
    ) -> None:
        """Merge all parts, and those again that were merged with another sign for cancelled votes than they must be."""
        if tie_break == "majority":
            assumed = {part.name: self._signs.get(part.name) or 1.0 for part in parts}
        else:
            assumed = {part.name: 1.0 if tie_break == "positive" else 0.0 for part in parts}
        found = list(in_order(lambda part: merge(part, assumed[part.name]), parts, threads=threads))
        if tie_break != "majority":
            return
        surplus = dict.fromkeys(assumed, 0)
        for part, more in zip(parts, found, strict=True):
            surplus[part.name] += more
        whole = sum(surplus.values())
        self._signs = {name: sign_of(more if scope == "tensor" else whole) for name, more in surplus.items()}
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
        with self._rooms.take(len(part.ends), BLOCK, torch.float32, asked.job.device) as room:
            for block in part.blocks:
                workspace = room.rows(block.base.numel())
                magnitudes, more = merge_block(asked.vote, block.base, block.ends, thresholds, sign, workspace)
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
        vote, scale = asked.vote, asked.scale(part.name)
        if not self._bounded(asked, part, scale):
            return self._plain(asked, part, sign)
        function = compiled(vote.majority_sign, vote.reduce, vote.weights_stage == "elect", vote.weighted)
        thresholds, given, weights, factor = map(torch.tensor, (asked.thresholds[part.name], sign, vote.weights, scale))
        surplus = function(part.base, list(part.ends), thresholds, given, weights, factor, part.target, part.vector)
        part.divide()
        return int(surplus)

    def _bounded(self, asked: SessionRequest, part: TensorBlock, scale: float) -> bool:
        """Return whether no entry of the result can be too large for its dtype, so that nobody needs to look."""
        if part.joined:
            return all(self._bounded(asked, piece, scale) for piece in part.joined)
        if part.name not in self._largest:
            sources = [source for source in (asked.job.models.base, *asked.job.models.experts) if source is not None]
            self._largest[part.name] = max(map(largest, (source.get(part.name) for source in sources)))
        reach = self._largest[part.name] * (1 + 2 * max(1.0, abs(scale)) * max(1.0, sum(asked.vote.weights)))
        return reach < 0.99 * torch.finfo(part.target.dtype).max


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude; 0 of an empty tensor."""
    if not tensor.numel():
        return 0.0
    ends = torch.aminmax(tensor)
    return max(-float(ends.min), float(ends.max))


def _parts(job: MergeRequest, name: str, target: Tensor, vector: Tensor | None, size: int) -> Iterator[TensorBlock]:
    """Divide a tensor into parts of ``size`` entries."""
    base, ends = job.open(name)
    assert base is not None
    flat = None if vector is None else vector.view(-1)
    whole = TensorBlock(name, base.reshape(-1), [end.reshape(-1) for end in ends], target.view(-1), flat)
    for part in blocks(target.numel(), size):
        yield whole.cut(part)


def _distinct(values: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out what is the same object as an earlier one."""
    return list({id(value): value for value in values}.values())
