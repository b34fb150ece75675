"""Average bottleneck and prefix-tuning adapters: ``method=soup save.form=module_average``, `module_average`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.adapters.modules import Modules, check_alike, head_of, read_modules, write_modules
from mergelab.config import ModelsConfig, check, local_path
from mergelab.engine.registry import check_parameters, get_method
from mergelab.engine.run import merge_to_dict
from mergelab.models.references import local_folder, parse_reference
from mergelab.tracking import names
from mergelab.weights.align import AlignedModels
from mergelab.weights.hashing import file_sha256, joint_sha256
from mergelab.weights.source import DictSource

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.engine.parameters import Parameters
    from mergelab.experiment.saving import Documents


def module_average(
    adapters: Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    head: str = "average",
) -> Path:
    """Average bottleneck and prefix-tuning adapters of the Adapters library, and unions of these: Σ w θ / Σ w.

    The mean of adapters' parameters (Chronopoulou et al. 2023, AdapterSoup, arXiv:2302.07027), computed in float32
    (float64 for float64 tensors). Such adapters change no weight of the base, so that no other method takes them; they
    are averaged where their configurations, layers and shapes are the same. LoRA and IA³ are merged by every other
    function of this package.

    Args:
        adapters: folders or hub ids, by name; in a list they have the names of their folders.
        output: the folder to write, which `adapters.AutoAdapterModel.load_adapter` loads; it does not exist, or is
            empty.
        weights: one for each adapter, or by name; any sign; default 1.
        head: of adapters with a prediction head: ``average``, whose labels must agree; ``expert:<name>``; or ``base``
            for none.

    Returns:
        The folder.

    Raises:
        ConfigError: no adapters; a weight or a head of no adapter; the weights sum to 0.
        ModelError, KeyMismatch, ShapeMismatch, NonFinite, HubError: an adapter cannot be read, they cannot be averaged,
            or the folder is in use or cannot be written.
    """
    experts: Any = adapters
    if isinstance(adapters, Mapping):
        experts = {name: str(each) for name, each in adapters.items()}
    elif not isinstance(adapters, str):
        experts = [str(each) for each in adapters]
    models = check(ModelsConfig, {"name": "adapters", "experts": experts, "head": head})
    parameters = check_parameters(get_method("soup"), {} if weights is None else {"weights": weights})
    folder = local_path(str(output), "output")
    ModuleAverage(models).write(folder, parameters)
    return folder


class ModuleAverage:
    """The adapters of a merge, read and found to be alike.

    Args:
        models: the experts, and whose head the average has.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch, NonFinite: an adapter cannot be read, or they cannot be averaged.
    """

    def __init__(self, models: ModelsConfig) -> None:
        self._models = models
        self._adapters: Sequence[Modules] = [
            read_modules(local_folder(parse_reference(expert.reference), f"models.experts.{name}"), name)
            for name, expert in models.experts.items()
        ]
        check_alike(self._adapters)
        self._heads = head_of(self._adapters, models.head)

    def tags(self) -> dict[str, str]:
        """Return a run's tags: the adapters and the hashes of their files."""
        experts = self._models.experts
        tags = {names.MODELS: self._models.name}
        for adapter in self._adapters:
            tags[names.model(adapter.name)] = parse_reference(experts[adapter.name].reference).text
            tags[names.model_hash(adapter.name)] = joint_sha256([file_sha256(file) for file in adapter.files])
        return tags

    def write(self, folder: Path, parameters: Parameters, documents: Documents = lambda _config, _task: {}) -> float:
        """Average, write the adapter with further files, and return the seconds it took.

        Args:
            folder: does not exist, or is empty.
            parameters: of ``soup``.
            documents: makes the texts of further files.

        Raises:
            ModelError: the folder cannot be written. ConfigError: the weights sum to 0.
        """
        started = time.perf_counter()
        tensors = self._average({each.name: each.tensors for each in self._adapters}, parameters)
        head: Mapping[str, Tensor] = {}
        if len(self._heads) == 1:
            head = self._heads[0].head
        elif self._heads:
            head = self._average({each.name: each.head for each in self._heads}, parameters)
        first = self._heads[0] if self._heads else self._adapters[0]
        write_modules(folder, first, tensors, head, documents({}, None))
        return time.perf_counter() - started

    def _average(self, tensors: Mapping[str, Mapping[str, Tensor]], parameters: Parameters) -> dict[str, Tensor]:
        sources = tuple(DictSource(name, dict(own)) for name, own in tensors.items())
        aligned = AlignedModels(None, sources, tuple(sources[0].keys()), (), {})
        weights = [expert.weight for expert in self._models.experts.values()]
        return merge_to_dict(get_method("soup"), parameters, aligned, weights=weights)
