"""Average bottleneck and prefix-tuning adapters: ``method=soup save.form=module_average``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.adapters.modules import Modules, check_alike, head_of, read_modules, write_modules
from mergelab.engine.run import merge_to_dict
from mergelab.models.references import local_folder, parse_reference
from mergelab.tracking import names
from mergelab.weights.align import AlignedModels
from mergelab.weights.hashing import file_sha256, joint_sha256
from mergelab.weights.source import DictSource

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.experiment.plan import Plan
    from mergelab.experiment.saving import Documents


class ModuleAverage:
    """The adapters of a plan, read and found to be alike.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch, NonFinite: an adapter cannot be read, or they cannot be averaged.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        experts = plan.config.models.experts
        self._adapters: Sequence[Modules] = [
            read_modules(local_folder(parse_reference(expert.reference), f"models.experts.{name}"), name)
            for name, expert in experts.items()
        ]
        check_alike(self._adapters)
        self._heads = head_of(self._adapters, plan.config.models.head)

    def tags(self) -> dict[str, str]:
        """Return a run's tags: the adapters and the hashes of their files."""
        experts = self._plan.config.models.experts
        tags = {names.MODELS: self._plan.config.models.name}
        for adapter in self._adapters:
            tags[names.model(adapter.name)] = parse_reference(experts[adapter.name].reference).text
            tags[names.model_hash(adapter.name)] = joint_sha256([file_sha256(file) for file in adapter.files])
        return tags

    def write(self, folder: Path, documents: Documents = lambda _config, _task: {}) -> float:
        """Average, write the adapter with further files, and return the seconds it took.

        Raises:
            ModelError: the folder cannot be written. ConfigError: the weights sum to 0.
        """
        started = time.perf_counter()
        tensors = self._average({each.name: each.tensors for each in self._adapters})
        head: Mapping[str, Tensor] = {}
        if len(self._heads) == 1:
            head = self._heads[0].head
        elif self._heads:
            head = self._average({each.name: each.head for each in self._heads})
        first = self._heads[0] if self._heads else self._adapters[0]
        write_modules(folder, first, tensors, head, documents({}, None))
        return time.perf_counter() - started

    def _average(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        sources = tuple(DictSource(name, dict(own)) for name, own in tensors.items())
        aligned = AlignedModels(None, sources, tuple(sources[0].keys()), (), {})
        weights = [expert.weight for expert in self._plan.config.models.experts.values()]
        return merge_to_dict(self._plan.method, self._plan.parameters, aligned, weights=weights)
