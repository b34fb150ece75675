"""A merge written as an adapter: exactly, for sums of LoRA adapters, or at a rank or an energy, for any merge."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from mergelab.adapters import factored
from mergelab.adapters.adapterhub_writing import check_library_model, write_library_adapter
from mergelab.adapters.changes import LowRank, apply_all, joined
from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.adapters.deltas import delta_of
from mergelab.adapters.writing import LoraFolder, write_adapter
from mergelab.console.progress import say
from mergelab.engine.finite_check import finite_checked
from mergelab.engine.low_rank import weighted
from mergelab.errors import ConfigError, ModelError, listed
from mergelab.experiment.ia3_output import merged_vectors
from mergelab.models.architecture import read_config
from mergelab.models.configs import with_kind_of_outputs
from mergelab.models.references import Reference, parse_reference
from mergelab.models.rows import has_stored_rows, in_own_rows
from mergelab.models.tokens import CHAT_TEMPLATE, copy_companions
from mergelab.weights.companions import copy_files
from mergelab.weights.conversion import module_names, tied_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergelab.adapters.writing import Ia3Folder
    from mergelab.config import SaveConfig
    from mergelab.experiment.locate import LocatedModels, Source
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.plan import Plan
    from mergelab.experiment.saving import Documents
    from mergelab.experiment.session import Session
    from mergelab.weights.source import TensorSource

LINEAR = ("soup", "task_arithmetic")  # methods that add up the models, or their differences from the base


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
        if opened.untied:
            raise ConfigError(
                f"save.form={settings.form}: an adapter has its base's ties; save.form=dense can hold others"
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
        self._coefficients = self._sum()

    def write(
        self, folder: Path, reference: str, revision: str | None, documents: Documents = lambda _config, _task: {}
    ) -> float:
        """Write the adapter, say what it keeps of the change, and return the seconds it took.

        Args:
            folder: does not exist yet, or is empty.
            reference, revision: of the base.
            documents: as for `mergelab.experiment.saving.Saving`.

        Raises:
            ConfigError, ModelError: something changes that the form cannot hold; or the folder cannot be written.
        """
        started = time.perf_counter()
        found = self._made
        head, updates = self._session.heads.to_save(self._session.tasks[0])
        found.heads |= head.tensors
        own = read_config(self._session.opened.experts[0].folder or self._folder, "a")
        config = {**own, **with_kind_of_outputs(updates, own)}
        texts = documents({**config, "architectures": [type(self._module).__name__]}, None)
        if self._settings.library == "adapters":
            write_library_adapter(folder, found, base=reference, config=config, documents=texts)
        else:
            with self._tokenizer() as tokenizer:
                write_adapter(
                    folder,
                    found,
                    base=reference,
                    revision=revision,
                    config=config if head.tensors else None,
                    documents=texts,
                    tokenizer=tokenizer,
                )
        return time.perf_counter() - started

    @contextmanager
    def _tokenizer(self) -> Iterator[Path | None]:
        """Make a folder with the merged model's tokenizer while the block runs; None where it is the base's."""
        opened, merged = self._session.opened, self._session.descriptions.merged
        if merged.template is None and (opened.vocabulary is None or not opened.vocabulary.added):
            yield None
            return
        template = merged.tokenizer if self._settings.tokenizer else None
        with merged.files(opened.folders, template=template) as files, TemporaryDirectory() as made:
            folder = Path(made)
            copy_companions(files, folder, tokenizer=True)
            if (files / CHAT_TEMPLATE).is_file():
                copy_files(files, [CHAT_TEMPLATE], folder)
            rows = opened.vocabulary
            if rows is not None and (size := rows.size) > rows.vocabularies[0].size:
                say(f"tokens    {size} rows: call base.resize_token_embeddings({size}) before PEFT loads the adapter")
            yield folder

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
            for name, change in self._differences([]):
                if change is not None and change.any():
                    self._refuse_more(self._names[name])
            return merged_vectors(self._module, self._session.opened, self._coefficients, self._names)
        found, rest = LoraFolder(self._module), []
        wholes: dict[str, float] = {}
        if self._settings.form == "lora":
            for name, own in self._merging.adapters():
                if not self._add_tied(found, name, [(1.0, own)]):
                    self._add(found, wholes, name, factored.Fitted(own.left.float(), own.right.float(), 1.0, 1.0))
        else:
            for name in self._session.opened.aligned.names:
                changes = self._low_rank(name)
                if changes is None:
                    rest.append(name)
                elif changes:
                    self._add_sum(found, wholes, name, changes)
        self._add_dense(found, wholes, rest)
        if not found.layers:
            return found  # refused where it is written
        total = sum(wholes.values())
        share = sum(found.energy[layer] * wholes[layer] for layer in wholes) / total if total else 1.0
        least, where = min((found.energy[layer], layer) for layer in found.layers)
        say(f"kept      {share:.2%} of the change in {len(found.layers)} layers, least {least:.2%} in {where}")
        return found

    # ------------------------------------------------------------------------------------------------- sums of factors

    def _sum(self) -> Mapping[str, Sequence[float]] | None:
        """Return each tensor's coefficients of the experts, where the merge is the base plus a sum of differences."""
        found = self._merging.coefficients()
        experts = self._session.opened.experts
        if self._settings.form in ("lora_cat", "ia3") and not (
            found is not None and all(isinstance(expert.tensors, AdaptedCheckpoint) for expert in experts)
        ):
            raise ConfigError(
                f"save.form={self._settings.form}: adapters are joined exactly where all experts are adapters and the "
                f"method is {' or '.join(LINEAR)}, with weights that keep the base; save.form=lora_svd takes any merge"
            )
        return found

    def _low_rank(self, name: str) -> list[tuple[float, LowRank]] | None:
        """Return the weighted changes of one tensor that are to be added up; None where it takes the dense tensors."""
        if self._coefficients is None:
            return None
        start = delta_of(self._base, name)
        deltas = [delta_of(expert, name) for expert in self._session.opened.aligned.experts]
        if start.changes or not all(delta.is_on(start) and delta.low_rank is not None for delta in deltas):
            return None
        return weighted(self._coefficients[name], deltas)

    def _add_sum(
        self, found: LoraFolder, wholes: dict[str, float], name: str, changes: list[tuple[float, LowRank]]
    ) -> None:
        if self._add_tied(found, name, changes):
            return
        if self._settings.form == "lora_cat":
            layer = self._adapted(name)
            found.sums[layer], found.energy[layer] = changes, 1.0
        else:
            product = joined(changes)
            self._add(found, wholes, name, factored.of_product(*product, self._settings.rank, self._settings.energy))

    # ----------------------------------------------------------------------------------------------- dense differences

    def _add_dense(self, found: LoraFolder, wholes: dict[str, float], names: Sequence[str]) -> None:
        """Add what changes in these tensors: matrices at the rank or energy, biases, and norms as whole modules."""
        for name, change in self._differences(names):
            place, on_stored = self._names[name], has_stored_rows(self._base, name)
            changed = change is not None and bool(change.any())
            if change is not None and changed and on_stored and self._is_weight(place) and len(self._tied(place)) == 1:
                if self._settings.form != "lora_svd":
                    self._refuse_more(place)
                fitted = factored.of_matrix(change.flatten(1), self._settings.rank, self._settings.energy)
                self._add(found, wholes, name, fitted)
            elif changed or not on_stored:
                base = self._base.get(name)
                whole = base.float() if change is None else change.add_(base)
                # Entries of 0 are so in a base whose embeddings are resized: biases of tokens' scores.
                if changed or whole.any() or in_own_rows(self._base).get(name).any():
                    self._add_whole(found, place, whole)
        self._complete(found)

    def _add_whole(self, found: LoraFolder, place: str, whole: Tensor) -> None:
        """Add a tensor as it is: a bias, or what a module that is stored whole has."""
        layer = place.rpartition(".")[0]
        if not place.endswith((".weight", ".bias")):
            raise ConfigError(
                f"save.form={self._settings.form}: {place} is no layer's weight; save.form=dense can hold it"
            )
        if self._is_weight(place):
            found.modules.update(dict.fromkeys(self._tied(place), whole))
        elif place.endswith(".bias") and (self._layer(layer) is not None or self._has_modules(layer)):
            found.biases.update(dict.fromkeys(self._tied(place), whole))
        elif self._has_modules(layer):
            raise ConfigError(
                f"save.form={self._settings.form}: {place} belongs to no layer that PEFT stores whole; "
                "save.form=dense can hold it"
            )
        else:
            found.modules[place] = whole

    def _is_weight(self, place: str) -> bool:
        return place.endswith(".weight") and self._layer(place.rpartition(".")[0]) is not None

    def _has_modules(self, module: str) -> bool:
        """Return whether a module has others in it, so that to store it whole would be to store these too."""
        return any(True for _ in self._module.get_submodule(module).children())

    def _differences(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor | None]]:
        """Yield what is added to each tensor, in float32; None for nothing.

        Where the merge is a sum of task vectors these are added up as they are, with no rounding to the base's dtype.
        """
        passed = self._session.opened.passed_through
        if odd := [name for name in passed if name not in self._session.opened.head_names]:
            for name, place in self._in_module(self._module, odd).items():
                self._names[name] = place
                if name not in {*self._base.keys(), *self._base.aliases()}:
                    raise ConfigError(f"save.form={self._settings.form}: the base has no {name}; save.form=dense has")
                yield name, passed[name].float() - self._base.get(name).float()
        if self._coefficients is not None:
            yield from ((name, self._weighted_sum(name, self._coefficients[name])) for name in names)
        elif names:
            for name, tensor in self._merging.unrounded(names):
                if name in set(names):
                    yield name, tensor.sub_(self._base.get(name))

    def _weighted_sum(self, name: str, factors: Sequence[float]) -> Tensor | None:
        base = self._base.get(name)
        total: Tensor | None = None
        for factor, expert in zip(factors, self._session.opened.aligned.experts, strict=True):
            own = finite_checked(expert).get(name)
            if not factor or (own.dtype == base.dtype and torch.equal(own, base)):
                continue
            change = own.float().sub_(base)
            total = change.mul_(factor) if total is None else total.add_(change, alpha=factor)
        return total

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
            f"save.form={self._settings.form}: {place} is changed by more than {own} (DoRA, {others}, LoHa, LoKr, "
            "PiSSA, token rows, whole tensors); save.form=dense and save.form=lora_svd can hold it"
        )

    def _add(self, found: LoraFolder, wholes: dict[str, float], name: str, fitted: factored.Fitted) -> None:
        layer = self._adapted(name)
        found.factors[layer] = fitted.left, fitted.right
        found.energy[layer], wholes[layer] = fitted.energy, fitted.whole

    def _add_tied(self, found: LoraFolder, name: str, changes: list[tuple[float, LowRank]]) -> bool:
        """Add a tensor that is tied to others whole, at all of its places, and return whether it is one.

        PEFT computes with LoRA of both ends as it should, and adds it twice when it merges the adapter.
        """
        places = self._tied(self._names[name])
        if len(places) == 1:
            return False
        whole = apply_all([LowRank(*joined(changes), 1.0)], self._base.get(name).float())
        found.modules.update(dict.fromkeys(places, whole))
        return True

    @cached_property
    def _ties(self) -> dict[str, str]:
        return tied_parameters(self._module)

    def _tied(self, place: str) -> list[str]:
        """Return all names in the module of one of its tensors."""
        holder = self._ties.get(place, place)
        return [holder, *(alias for alias, name in self._ties.items() if name == holder)]

    def _adapted(self, name: str) -> str:
        """Return the layer that has a tensor as its weight."""
        layer = self._names[name].removesuffix(".weight")
        if self._layer(layer) is None:
            raise ModelError(f"save.form={self._settings.form}: {layer} is no layer that LoRA adapts; save.form=dense")
        return layer

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
