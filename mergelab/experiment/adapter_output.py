"""A merge written as an adapter: exactly, for sums of LoRA adapters, or at a rank or an energy, for any merge."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergelab.adapters import factored
from mergelab.adapters.changes import LowRank, Replacement
from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.adapters.writing import LoraFolder, write_lora
from mergelab.console.progress import say
from mergelab.errors import ConfigError, ModelError, listed
from mergelab.models.architecture import read_config
from mergelab.weights.align import AlignedModels, RenamedSource
from mergelab.weights.conversion import module_names, tied_parameters
from mergelab.weights.source import DictSource

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergelab.config import SaveConfig
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.session import Session
    from mergelab.weights.source import TensorSource

LINEAR = ("soup", "task_arithmetic")  # methods that add up the models, or their differences from the base


class AdapterOutput:
    """Writes a merge as a LoRA adapter on the base.

    Args:
        merging: the method and the models.
        settings: the form (``lora_cat`` or ``lora_svd``), and the rank or the energy.

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
        self._base: TensorSource = opened.aligned.base
        self._folder, self._module = base.folder, module
        self._names = self._in_module(module, opened.aligned.names)
        self._coefficients = self._linear()

    def write(self, folder: Path, reference: str, revision: str | None) -> float:
        """Write the adapter, say what it keeps of the change, and return the seconds it took.

        Args:
            folder: does not exist yet, or is empty.
            reference, revision: of the base.

        Raises:
            ConfigError, ModelError: something changes that the form cannot hold; or the folder cannot be written.
        """
        started = time.perf_counter()
        found, rest = LoraFolder(self._module), []
        wholes: dict[str, float] = {}
        for name in self._session.opened.aligned.names:
            changes = self._low_rank(name)
            if changes is None:
                rest.append(name)
            elif changes:
                self._add(found, wholes, name, self._fitted(factored.joined(changes)))
        self._add_dense(found, wholes, rest)
        head, updates = self._session.heads.to_save(self._session.tasks[0])
        found.heads |= head.tensors
        config = {**read_config(self._session.opened.experts[0].folder or self._folder, "a"), **updates}
        write_lora(folder, found, base=reference, revision=revision, config=config if head.tensors else None)
        kept = [(found.energy[layer], layer) for layer in found.factors]
        total = sum(wholes.values())
        share = sum(found.energy[layer] * wholes[layer] for layer in wholes) / total if total else 1.0
        least, where = min(kept)
        say(f"kept      {share:.2%} of the change in {len(kept)} layers, least {least:.2%} in {where}")
        return time.perf_counter() - started

    # ------------------------------------------------------------------------------------------------- sums of factors

    def _linear(self) -> Mapping[str, Sequence[float]] | None:
        """Return each tensor's weights of the experts, where the merge is the base plus a sum of their differences.

        The method itself is asked: what it makes of experts that differ from a base of zeros in one entry each, and of
        models that are equal.
        """
        opened, settings = self._session.opened, self._settings
        if self._merging.method.name in LINEAR and all(
            isinstance(e.tensors, AdaptedCheckpoint) for e in opened.experts
        ):
            count = len(opened.experts)
            units = torch.cat([torch.eye(count), torch.ones(count, 1)], dim=1).double()
            start = torch.zeros(count + 1, dtype=torch.float64)
            start[-1] = 1
            asked = AlignedModels(
                base=DictSource("base", {name: start.clone() for name in opened.aligned.names}),
                experts=tuple(
                    DictSource(expert.name, {name: unit.clone() for name in opened.aligned.names})
                    for expert, unit in zip(opened.aligned.experts, units, strict=True)
                ),
                names=opened.aligned.names,
                integers=(),
                aliases={},
                backbone=opened.aligned.backbone,
            )
            found = {name: made.tolist() for name, made in self._merging.on(asked)}
            if all(abs(made[-1] - 1) < 1e-9 for made in found.values()):
                return {name: made[:-1] for name, made in found.items()}
        if settings.form == "lora_cat":
            raise ConfigError(
                "save.form=lora_cat: adapters are joined exactly where all experts are adapters and the method is "
                f"{' or '.join(LINEAR)}, with weights that keep the base; save.form=lora_svd takes any merge"
            )
        return None

    def _low_rank(self, name: str) -> list[tuple[float, LowRank]] | None:
        """Return the weighted changes of one tensor that are to be added up; None where it takes the dense tensors."""
        if self._coefficients is None:
            return None
        changes: list[tuple[float, LowRank]] = []
        for weight, expert in zip(self._coefficients[name], self._session.opened.aligned.experts, strict=True):
            own = _changes_of(expert, name)
            if own and isinstance(own[0], Replacement) and self._is_the_bases(own[0], name):
                own = own[1:]  # a copy of the base's, as PEFT stores it beside an adapted embedding
            if own is None or not all(isinstance(change, LowRank) for change in own):
                return None
            changes += [(weight, change) for change in own if isinstance(change, LowRank) and weight]
        return changes

    def _is_the_bases(self, whole: Replacement, name: str) -> bool:
        base = self._base.get(name)
        return base.shape == whole.values.shape and torch.equal(whole.values.to(base.dtype), base)

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
                self._refuse_cat(place)
                matrix = change.flatten(1)
                fitted = factored.of_matrix(matrix, self._settings.rank, self._settings.energy)
                self._add(found, wholes, name, fitted)
            elif kind is not None and place.endswith(".bias"):
                found.biases[place] = tensor.float()
            elif not place.endswith((".weight", ".bias")):
                raise ConfigError(f"save.form={self._settings.form}: {place} is no layer's weight; save.form=dense")
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

    def _refuse_cat(self, place: str) -> None:
        if self._settings.form == "lora_cat":
            raise ConfigError(
                f"save.form=lora_cat: {place} is changed by more than LoRA (DoRA, IA³, LoHa, LoKr, PiSSA, token rows, "
                "whole tensors); save.form=dense and save.form=lora_svd can hold it"
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


def _changes_of(source: Any, name: str) -> Sequence[Any] | None:
    """Return an adapter's changes of a tensor of an aligned expert; None where they cannot be told."""
    while not isinstance(source, AdaptedCheckpoint):
        if isinstance(source, RenamedSource):
            name = source.stored[name]
        elif hasattr(source, "names") or not hasattr(source, "source"):  # read with its rows in another order
            return None
        source = source.source
    return source.changes(name)
