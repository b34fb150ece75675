"""A merge written as an adapter: exactly, for sums of LoRA adapters, or at a rank or an energy, for any merge."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergelab.adapters import factored
from mergelab.adapters.adapterhub_writing import check_library_model, write_library_adapter
from mergelab.adapters.checkpoint import low_rank_changes
from mergelab.adapters.writing import LoraFolder, write_adapter
from mergelab.console.progress import say
from mergelab.errors import ConfigError, ModelError, listed
from mergelab.experiment.ia3_output import merged_vectors
from mergelab.experiment.linear_merge import LINEAR, weights_by_tensor
from mergelab.models.architecture import read_config
from mergelab.models.references import Reference, parse_reference
from mergelab.weights.conversion import module_names, tied_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergelab.adapters.changes import LowRank
    from mergelab.adapters.writing import Ia3Folder
    from mergelab.config import SaveConfig
    from mergelab.experiment.locate import LocatedModels, Source
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.plan import Plan
    from mergelab.experiment.session import Session
    from mergelab.weights.source import TensorSource


def base_reference(plan: Plan, source: Source, located: LocatedModels) -> tuple[str, str | None]:
    """Return what an adapter calls its base, a plan's, and at which revision."""
    assert plan.config.models.base is not None
    assert located.base is not None
    base = parse_reference(plan.config.models.base)
    assert isinstance(base, Reference)
    return str(located.base.folder) if base.folder or source == "mini" else str(base.repository), base.revision


class AdapterOutput:
    """Writes a merge as an adapter on the base.

    Args:
        merging: the method and the models.
        settings: the form (``lora``, ``lora_cat``, ``lora_svd`` or ``ia3``), and the rank or the energy.

    Raises:
        ConfigError: the merge cannot be written in this form; the line says in which it can.
    """

    def __init__(self, merging: Merging, settings: SaveConfig) -> None:
        self._merging, self._settings = merging, settings
        self._session: Session = merging.session
        opened = self._session.opened
        base, module = opened.base, opened.experts[0].skeleton
        if base is None or base.folder is None or opened.aligned.base is None:
            raise ConfigError(f"save.form={settings.form}: an adapter needs a base (models.base)")
        if module is None:
            raise ConfigError(f"save.form={settings.form}: transformers has no class for these models; save.form=dense")
        if opened.vocabulary is not None or opened.untied:
            raise ConfigError(
                f"save.form={settings.form}: an adapter has its base's tokens and ties; save.form=dense can hold others"
            )
        if settings.library == "adapters":
            check_library_model(read_config(base.folder, "the base"))
        self._base: TensorSource = opened.aligned.base
        self._folder, self._module = base.folder, module
        self._names = self._in_module(module, opened.aligned.names)
        tasks, policy = self._session.tasks, self._session.heads.policy
        if policy == "per_task" and len(tasks) > 1 and opened.head_names:
            raise ConfigError(
                f"save.form={settings.form}: an adapter has one head, and models.head=per_task makes one for each of "
                f"{len(tasks)} tasks; save.form=dense writes a model for each"
            )
        self._coefficients = weights_by_tensor(merging)
        if settings.form in ("lora_cat", "ia3") and self._coefficients is None:
            raise ConfigError(
                f"save.form={settings.form}: adapters are joined exactly where all experts are adapters and the method "
                f"is {' or '.join(LINEAR)}, with weights that keep the base; save.form=lora_svd takes any merge"
            )

    def write(self, folder: Path, reference: str, revision: str | None) -> float:
        """Write the adapter, say what it keeps of the change, and return the seconds it took.

        Args:
            folder: does not exist yet, or is empty.
            reference, revision: of the base.

        Raises:
            ConfigError, ModelError: something changes that the form cannot hold; or the folder cannot be written.
        """
        started = time.perf_counter()
        found = self._made
        head, updates = self._session.heads.to_save(self._session.tasks[0])
        found.heads |= head.tensors
        config = {**read_config(self._session.opened.experts[0].folder or self._folder, "a"), **updates}
        if self._settings.library == "adapters":
            write_library_adapter(folder, found, base=reference, config=config)
        else:
            write_adapter(folder, found, base=reference, revision=revision, config=config if head.tensors else None)
        return time.perf_counter() - started

    def in_memory(self) -> tuple[dict[str, Mapping[str, Tensor]], float]:
        """Merge, and return what `mergelab.experiment.merging.Merging.in_memory` does: the base with what is written.

        The tensors are rounded to the base's dtype.
        """
        started = time.perf_counter()
        opened = self._session.opened
        names = [*opened.aligned.names, *(name for name in opened.passed_through if name not in opened.head_names)]
        made = {name: self._made.applied(self._names[name], self._base.get(name)) for name in names}
        made |= {name: self._base.get(name) for name in opened.aligned.integers}
        made |= {alias: made[name] for alias, name in opened.aligned.aliases.items() if name in made}
        return {task.name: made for task in self._session.tasks}, time.perf_counter() - started

    @cached_property
    def _made(self) -> LoraFolder | Ia3Folder:
        """What is written, but for the head."""
        if self._settings.form == "ia3":
            assert self._coefficients is not None
            for name, tensor in self._dense([]):
                if not torch.equal(tensor, self._base.get(name)):
                    self._refuse_more(self._names[name])
            return merged_vectors(self._module, self._session.opened, self._coefficients, self._names)
        found, rest = LoraFolder(self._module), []
        wholes: dict[str, float] = {}
        if self._settings.form == "lora":
            for name, change in self._merging.adapters():
                self._add(found, wholes, name, factored.Fitted(change.left.float(), change.right.float(), 1.0, 1.0))
        else:
            for name in self._session.opened.aligned.names:
                changes = self._low_rank(name)
                if changes is None:
                    rest.append(name)
                elif changes:
                    self._add(found, wholes, name, self._fitted(factored.joined(changes)))
        self._add_dense(found, wholes, rest)
        if not found.factors:
            return found  # refused where it is written
        total = sum(wholes.values())
        share = sum(found.energy[layer] * wholes[layer] for layer in wholes) / total if total else 1.0
        least, where = min((found.energy[layer], layer) for layer in found.factors)
        say(f"kept      {share:.2%} of the change in {len(found.factors)} layers, least {least:.2%} in {where}")
        return found

    # ------------------------------------------------------------------------------------------------- sums of factors

    def _low_rank(self, name: str) -> list[tuple[float, LowRank]] | None:
        """Return the weighted changes of one tensor that are to be added up; None where it takes the dense tensors."""
        if self._coefficients is None:
            return None
        changes: list[tuple[float, LowRank]] = []
        for weight, expert in zip(self._coefficients[name], self._session.opened.aligned.experts, strict=True):
            own = low_rank_changes(expert, name, self._base)
            if own is None:
                return None
            changes += [(weight, change) for change in own if weight]
        return changes

    def _fitted(self, product: tuple[Tensor, Tensor]) -> factored.Fitted:
        if self._settings.form == "lora_cat":
            return factored.Fitted(product[0].float(), product[1].float(), 1.0, 1.0)
        return factored.of_product(*product, self._settings.rank, self._settings.energy)

    # ----------------------------------------------------------------------------------------------- dense differences

    def _add_dense(self, found: LoraFolder, wholes: dict[str, float], names: Sequence[str]) -> None:
        """Add what changes in these tensors: matrices at the rank or energy, biases, and norms as whole modules."""
        for name, tensor in self._dense(names):
            base = self._base.get(name)
            change = tensor.float() - base.float()
            if not change.any():
                continue
            place, layer = self._names[name], self._names[name].rpartition(".")[0]
            kind = self._layer(layer)
            if kind is not None and place.endswith(".weight"):
                if self._settings.form != "lora_svd":
                    self._refuse_more(place)
                matrix = change.flatten(1)
                fitted = factored.of_matrix(matrix, self._settings.rank, self._settings.energy)
                self._add(found, wholes, name, fitted)
            elif kind is not None and place.endswith(".bias"):
                found.biases[place] = tensor.float()
            else:
                found.modules[place] = tensor.float()
        self._complete(found)

    def _dense(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        passed = self._session.opened.passed_through
        if odd := [name for name in passed if name not in self._session.opened.head_names]:
            for name, place in self._in_module(self._module, odd).items():
                self._names[name] = place
                if name in {*self._base.keys(), *self._base.aliases()}:
                    yield name, passed[name]
                else:
                    raise ConfigError(f"save.form={self._settings.form}: the base has no {name}; save.form=dense has")
        if names:
            for name, tensor in self._merging.on(self._session.opened.aligned, only=names):
                if name in set(names):
                    yield name, tensor

    def _complete(self, found: LoraFolder) -> None:
        """Add the unchanged tensors of modules that are written whole."""
        here = {place: name for name, place in self._names.items()}
        for layer in {place.rpartition(".")[0] for place in found.modules}:
            for leaf, _ in self._module.get_submodule(layer).named_parameters(recurse=False):
                place = f"{layer}.{leaf}"
                if place not in found.modules and place in here:
                    found.modules[place] = self._base.get(here[place]).float()

    def _refuse_more(self, place: str) -> None:
        own, others = ("IA³", "LoRA") if self._settings.form == "ia3" else ("LoRA", "IA³")
        raise ConfigError(
            f"save.form={self._settings.form}: {place} is changed by more than {own} (DoRA, {others}, token rows or a "
            "whole tensor); save.form=dense and save.form=lora_svd can hold it"
        )

    def _add(self, found: LoraFolder, wholes: dict[str, float], name: str, fitted: factored.Fitted) -> None:
        layer = self._names[name].removesuffix(".weight")
        if self._names[name] in {alias for pair in tied_parameters(self._module).items() for alias in pair}:
            raise ConfigError(
                f"save.form={self._settings.form}: {name} is tied to another tensor, and LoRA changes one end alone; "
                "save.form=dense can hold it"
            )
        if self._layer(layer) is None:
            raise ModelError(f"save.form={self._settings.form}: {layer} is no layer that LoRA adapts; save.form=dense")
        found.factors[layer] = fitted.left, fitted.right
        found.energy[layer], wholes[layer] = fitted.energy, fitted.whole

    def _layer(self, layer: str) -> nn.Module | None:
        """Return a layer that LoRA adapts, without weights."""
        from torch import nn

        try:
            found = self._module.get_submodule(layer)
        except AttributeError:
            return None
        kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
        return found if isinstance(found, kinds) or type(found).__name__ == "Conv1D" else None

    def _in_module(self, module: Any, names: Sequence[str]) -> dict[str, str]:
        own = module.state_dict()
        found = {name: name for name in names if name in own}
        found |= module_names(module, [name for name in names if name not in own])
        if odd := [name for name in names if found.get(name) not in own]:
            raise ConfigError(
                f"save.form={self._settings.form}: {type(module).__name__} has no layer for {listed(odd, 3)}: "
                "save.form=dense"
            )
        return found
