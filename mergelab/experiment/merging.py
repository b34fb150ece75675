"""A method applied to a session's models: in memory or into a folder, one merged model or one for each task."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.engine.request import checked_job
from mergelab.engine.run import merge, merge_in_parts
from mergelab.experiment.saving import Saving
from mergelab.weights.shards import as_stored, byte_size
from mergelab.weights.source import layout_of

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.engine.method import MergeMethod
    from mergelab.engine.parameters import Parameters
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.selection import EvaluatorSelection
    from mergelab.experiment.session import Session
    from mergelab.weights.source import TensorPart


@dataclass(frozen=True)
class Merging:
    """One method with its parameters, on the models of a session."""

    method: MergeMethod
    parameters: Parameters
    session: Session
    progress: Callable[[str, float], None]
    examples: Calibration | EvaluatorSelection | None = None
    weights: Sequence[float] | None = None
    """The experts' own weights, where they are others than those that the session was opened with."""

    def in_memory(self) -> tuple[dict[str, Mapping[str, Tensor]], float]:
        """Merge the backbone.

        Returns:
            The tensors that each task is measured with, by the task's name, the same for all tasks unless the method
            makes a model for each; and the seconds it took, reading included.
        """
        started = time.perf_counter()
        skipped = self.session.passed_through
        found: dict[str | None, Mapping[str, Tensor]] = {}
        owners = self.session.head_owner() if self.method.one_model_per_expert else dict.fromkeys(self._tasks())
        for output in dict.fromkeys(owners.values()):
            found[output] = {**skipped, **dict(self._tensors(output))}
        return {task: found[output] for task, output in owners.items()}, time.perf_counter() - started

    def to_disk(self, folder: Path, data: str) -> float:
        """Merge into ``folder``, tensor by tensor; answer the seconds it took.

        What an interrupted call completed is not done again, if it merged the same: ``data`` names the examples that a
        method learns from.
        """
        started = time.perf_counter()
        saving = Saving(self.session)
        key = f"{saving.merge_key(self.method, self.parameters)} {data}"
        if not self.method.one_model_per_expert:
            saving.merging(folder, partial(self._parts, None), key)
        else:
            for task, output in self.session.head_owner().items():
                saving.merging(folder, partial(self._parts, output), f"{key} {output}", task)
        return time.perf_counter() - started

    def _tasks(self) -> list[str]:
        return [task.name for task in self.session.tasks]

    def _tensors(self, output: str | None) -> Iterator[tuple[str, Tensor]]:
        """Return the merged tensors one by one."""
        told = self._teller(output, self.session.aligned.names)
        for name, tensor in merge(self.method, self.parameters, self.session.aligned, **self._settings(output)):
            told(name, tensor)
            yield name, tensor

    def _parts(self, output: str | None, only: frozenset[str]) -> Iterator[TensorPart]:
        """Return the merged tensors of these names part by part; none is ever whole if the method is elementwise."""
        told = self._teller(output, only)
        job = checked_job(self.method, self.parameters, self.session.aligned, **self._settings(output))
        for part in merge_in_parts(job, only):
            told(part.name, part.entries)
            yield part
            del part  # let it go before the next one is made

    def _settings(self, output: str | None) -> dict[str, Any]:
        return {
            "weights": self.weights or [expert.weight for expert in self.session.located.experts],
            "seed": self.session.config.seed,
            "device": self.session.device,
            "dtype": self.session.saved_dtype,
            "output": output,
            "examples": self.examples,
        }

    def _teller(self, output: str | None, names: Collection[str]) -> Callable[[str, Tensor], None]:
        """Return what is told of each tensor, or part of one, and shows how far it is, in bytes of what is merged."""
        aligned, dtype = self.session.aligned, self.session.saved_dtype
        merged = [name for name in aligned.names if name in names]
        total = max(
            sum(byte_size(as_stored(i, dtype)) for i in layout_of(aligned.base or aligned.experts[0], merged)), 1
        )
        title = f"merging with {self.method.name}" + (f" for {output}" if output else "")
        done, counted = 0, frozenset(merged)
        self.progress(title if self.method.prepare is None else f"{title}, looking through the models", 0.0)

        def told(name: str, tensor: Tensor) -> None:
            nonlocal done
            done += tensor.nbytes if name in counted else 0
            self.progress(f"{title}, {done / 1e9:.2f} of {total / 1e9:.2f} GB", done / total)

        return told
