"""A method applied to a session's models: in memory or into a folder, one merged model or one for each task."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.engine.request import checked_job, merged_adapter, prepared_job
from mergelab.engine.run import merge, merge_in_parts
from mergelab.weights.shards import as_stored, byte_size
from mergelab.weights.source import layout_of

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.adapters.changes import LowRank
    from mergelab.engine.method import MergeMethod
    from mergelab.engine.parameters import Parameters
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.saving import Saving
    from mergelab.experiment.selection import EvaluatorSelection
    from mergelab.experiment.session import Session
    from mergelab.weights.align import AlignedModels
    from mergelab.weights.source import TensorPart


@dataclass(frozen=True)
class Merging:
    """One method with its parameters, on the models of a session."""

    method: MergeMethod
    parameters: Parameters
    session: Session
    seed: int
    """Of random methods."""
    progress: Callable[[str, float], None]
    examples: Calibration | EvaluatorSelection | None = None
    weights: Sequence[float] | None = None
    """The experts' own weights; None: those that they were located with."""

    def in_memory(self) -> tuple[dict[str, Mapping[str, Tensor]], float]:
        """Merge the backbone.

        Returns:
            The tensors that each task is measured with, by the task's name, the same for all tasks unless the method
            makes a model for each; and the seconds it took, reading included.
        """
        started = time.perf_counter()
        skipped = self.session.opened.passed_through
        found: dict[str | None, Mapping[str, Tensor]] = {}
        owners = self.session.heads.owners() if self.method.one_model_per_expert else dict.fromkeys(self._tasks())
        for output in dict.fromkeys(owners.values()):
            found[output] = {**skipped, **dict(self._tensors(output))}
        return {task: found[output] for task, output in owners.items()}, time.perf_counter() - started

    def to_disk(self, saving: Saving, folder: Path, key: str) -> float:
        """Merge into ``folder``, tensor by tensor; return the seconds it took.

        ``key`` names what is merged and how: what an interrupted call with the same key completed is not done again.
        """
        started = time.perf_counter()
        if not self.method.one_model_per_expert:
            saving.merging(folder, partial(self._parts, None), key)
        else:
            for task, output in self.session.heads.owners().items():
                saving.merging(folder, partial(self._parts, output), f"{key} {output}", task)
        return time.perf_counter() - started

    def _tasks(self) -> list[str]:
        return [task.name for task in self.session.tasks]

    def _tensors(self, output: str | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged tensors one by one."""
        report = self._reporter(output, self.session.opened.aligned.names)
        for name, tensor in merge(self.method, self.parameters, self.session.opened.aligned, **self._settings(output)):
            report(name, tensor)
            yield name, tensor

    def _parts(self, output: str | None, only: frozenset[str]) -> Iterator[TensorPart]:
        """Yield the merged tensors of these names part by part; none is ever whole if the method is elementwise."""
        report = self._reporter(output, only)
        job = checked_job(self.method, self.parameters, self.session.opened.aligned, **self._settings(output))
        for part in merge_in_parts(job, only):
            report(part.name, part.entries)
            yield part
            del part  # let it go before the next one is made

    def check(self) -> None:
        """Raise `ConfigError` where the settings do not fit the models; no model is merged."""
        for output in self.session.heads.owners().values() if self.method.one_model_per_expert else [None]:
            checked_job(self.method, self.parameters, self.session.opened.aligned, **self._settings(output))

    def adapters(self) -> Iterator[tuple[str, LowRank]]:
        """Yield the merged change of each layer, where the method combines adapters' factors."""
        job = checked_job(self.method, self.parameters, self.session.opened.aligned, **self._settings(None))
        job = prepared_job(job)
        for name in job.models.names:
            if (change := merged_adapter(job, job.site(name))) is not None:
                yield name, change

    def on(self, models: AlignedModels, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Merge other models with the same method, parameters and weights, whatever dtype they are saved in."""
        settings = {**self._settings(None), "dtype": None}
        return merge(self.method, self.parameters, models, **settings, only=only)

    def _settings(self, output: str | None) -> dict[str, Any]:
        return {
            "weights": self.weights or [expert.weight for expert in self.session.located.experts],
            "seed": self.seed,
            "device": self.session.device,
            "dtype": self.session.opened.dtype,
            "output": output,
            "examples": self.examples,
        }

    def _reporter(self, output: str | None, names: Collection[str]) -> Callable[[str, Tensor], None]:
        """Return a function that takes each merged tensor, or part of one, and reports the fraction of bytes merged."""
        aligned, dtype = self.session.opened.aligned, self.session.opened.dtype
        merged = [name for name in aligned.names if name in names]
        total = max(
            sum(byte_size(as_stored(i, dtype)) for i in layout_of(aligned.base or aligned.experts[0], merged)), 1
        )
        title = f"merging with {self.method.name}" + (f" for {output}" if output else "")
        done, counted = 0, frozenset(merged)
        self.progress(title if self.method.prepare is None else f"{title}, looking through the models", 0.0)

        def report(name: str, tensor: Tensor) -> None:
            nonlocal done
            done += tensor.nbytes if name in counted else 0
            self.progress(f"{title}, {done / 1e9:.2f} of {total / 1e9:.2f} GB", done / total)

        return report
