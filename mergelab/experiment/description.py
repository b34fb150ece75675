"""What a model is besides its weights. It is measured with the same config and tokenizer that it is saved with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import ConfigError, ModelError
from mergelab.models.architecture import (
    Architecture,
    open_classifier,
    open_generator,
    read_config,
    tokenizer_folder,
)
from mergelab.models.chat_templates import chosen_template
from mergelab.models.configs import head_settings, module_settings
from mergelab.models.encoder_decoder import PAIRED, companions
from mergelab.models.stacked import folders_of
from mergelab.models.tokens import CHAT_TEMPLATE, chat_template, copy_companions, decoder_tokenizer, load_tokenizer
from mergelab.weights.checkpoint import CONFIG
from mergelab.weights.skeleton import opened_by_transformers

if TYPE_CHECKING:
    from torch import nn

    from mergelab.experiment.locate import LocatedModels
    from mergelab.experiment.opening import OpenedModels
    from mergelab.experiment.sources import ModelSource
    from mergelab.models.vocabulary import MergedVocabulary

GENERATION = "generation_config.json"
# What the names of a tokenizer's files have in them.
_OF_TOKENIZERS = ("token", "vocab", "merges", "template", "normalizer", "bpe.codes", ".model", ".spm")


@dataclass(frozen=True)
class Description:
    """A model's config, settings of generation and tokenizer, each by the folder that has it.

    Attributes:
        label: what messages call the model.
        config: where its ``config.json`` is.
        generation: where its ``generation_config.json`` is, if it has one.
        tokenizer: where its tokenizer is; another model's folder where it has none itself; None: no model has one.
        architecture: its class and labels.
        vocabulary: its tokens, where they are those of several models.
        head: the model whose ``config.json`` says how the head works, by its folder; None: its own.
        template: its chat template; None: that of its tokenizer.
    """

    label: str
    config: Path
    generation: Path
    tokenizer: Path | None
    architecture: Architecture | None
    vocabulary: MergedVocabulary | None = None
    head: Path | None = None
    template: str | None = None

    @cached_property
    def module_key(self) -> str:
        """What a module that is built for the model depends on; equal for models that can be run in one module."""
        parts = [module_settings(read_config(self.config, self.label)), self._generation_settings]
        parts.append(None if self.vocabulary is None else self.vocabulary.digest)
        return json.dumps([*parts, self._head_settings])

    @cached_property
    def config_digest(self) -> str:
        """A hash of the config and of the settings of generation; what heads and labels are has a digest of its own."""
        return hashlib.sha256(self.module_key.encode()).hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        """A hash of the tokenizer's files, and of the tokens that were added to them."""
        if self.tokenizer is None:
            return ""
        files = sorted(file for file in self.tokenizer.rglob("*") if any(part in file.name for part in _OF_TOKENIZERS))
        added = "" if self.vocabulary is None else self.vocabulary.digest
        return (
            _digest(files)
            + added
            + ("" if self.template is None else hashlib.sha256(self.template.encode()).hexdigest())
        )

    def open(self, outputs: int) -> nn.Module:
        """Build the module that the model's weights are loaded into, with ``outputs`` outputs, or 0: to write texts.

        Raises:
            ModelError: the model is of another kind.
        """
        kind = self.architecture
        assert kind is not None
        if not (kind.is_sequence_classifier if outputs else kind.is_generator):
            asked = "classification" if outputs else "generation or language modelling"
            raise ModelError(f"{self.label}: a {kind.name} cannot be measured on a {asked} task")
        if outputs:
            module = open_classifier(self.config, self.label, outputs, **self._head_settings)
        else:
            module = open_generator(self.config, self.label)
        if self.generation != self.config and (self.generation / GENERATION).is_file():
            from transformers import GenerationConfig

            opened: Any = module
            with opened_by_transformers(self.label):
                opened.generation_config = GenerationConfig.from_pretrained(self.generation)
        return module if self.vocabulary is None else self.vocabulary.fit(module, self.config)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer of what the model reads."""
        found = self.vocabulary and self.vocabulary.tokenizer()
        found = found or load_tokenizer([self.tokenizer] if self.tokenizer else [], self.label)
        if self.template is not None:
            found.chat_template = self.template
        return found

    def load_decoder_tokenizer(self) -> Any:
        """Load the tokenizer of what an encoder-decoder writes; None where it is the one of what it reads."""
        if self.tokenizer is None or (own := decoder_tokenizer(self.tokenizer)) == self.tokenizer:
            return None
        return load_tokenizer([own], self.label)

    @contextmanager
    def files(self, others: Iterable[Path] = (), *, template: Path | None = None) -> Iterator[Path]:
        """Make one folder of what is saved beside the weights, for as long as the block runs.

        Args:
            others: the folders of the other models of the merge.
            template: whose chat template goes with the tokens of several models; by default the config's owner's.
        """
        with contextlib.ExitStack() as stack:
            folder = self.config
            if self.vocabulary is not None:
                folder = stack.enter_context(self.vocabulary.companions(folder, template=template))
                self._add_template(folder)
                yield folder
                return
            if self.generation != folder or self.tokenizer not in (folder, None) or self.template is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                self._collect(folder)
                self._add_template(folder)
            if self.architecture is not None and self.architecture.name == PAIRED:
                folder = stack.enter_context(companions(folder, [path for path in others if path != self.config]))
            yield folder

    def _add_template(self, folder: Path) -> None:
        if self.template is not None:
            (folder / CHAT_TEMPLATE).write_text(self.template, encoding="utf-8")

    def _collect(self, folder: Path) -> None:
        copy_companions(self.config, folder, tokenizer=False)
        shutil.copyfile(self.config / CONFIG, folder / CONFIG)
        if (self.generation / GENERATION).is_file():
            shutil.copyfile(self.generation / GENERATION, folder / GENERATION)
        if self.tokenizer is not None:
            copy_companions(self.tokenizer, folder, tokenizer=True)
            if (text := chat_template(self.tokenizer)) is not None:
                (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")

    @cached_property
    def _head_settings(self) -> dict[str, Any]:
        """The head's settings, where they are another model's and differ from its own."""
        if self.head is None:
            return {}
        own, wanted = (
            head_settings(read_config(folder, self.label), self.label) for folder in (self.config, self.head)
        )
        return {} if own == wanted else wanted

    @property
    def _generation_settings(self) -> str | None:
        file = self.generation / GENERATION
        return file.read_text(encoding="utf-8") if file.is_file() else None


@dataclass(frozen=True)
class Descriptions:
    """The descriptions of all models of one merge.

    Attributes:
        merged: the merged model's.
        experts: in the order of the experts.
        base: None without a base.
    """

    merged: Description
    experts: tuple[Description, ...]
    base: Description | None

    def of_base(self, outputs: int) -> Description:
        """Return what the base is measured with: its own config and tokens, on a task with outputs behind a head.

        The head is the merged model's.
        """
        assert self.base is not None
        if not outputs:
            return self.base
        return replace(self.base, architecture=self.merged.architecture, head=self.merged.config)


def describe(
    opened: OpenedModels,
    located: LocatedModels,
    *,
    config: str | None,
    tokenizer: str | None,
    template: str | None = None,
) -> Descriptions:
    """Describe every model of a merge as its folder does, and the merged model as the user chose.

    A model without a tokenizer has the base's, or else that of the first model that has one.

    Args:
        opened: the models.
        located: their folders.
        config: the name of the model whose config the merged one has; None: the one whose tokenizer it has, if that is
            of the experts' class, or else the first expert.
        tokenizer: the name of the model whose tokenizer and settings of generation it has; None: the same model.
        template: its chat template, as `mergelab.models.chat_templates.chosen_template` has it.

    Raises:
        ConfigError: it has a chat template, but no tokenizer.
    """
    models = [*([located.base] if located.base is not None else []), *located.experts]
    fallback = tokenizer_folder(model.folder for model in models)
    kinds = {model.name: model.architecture for model in opened.models}
    own = {
        model.name: Description(
            model.label,
            model.folder,
            model.folder,
            tokenizer_folder([model.folder]) or fallback,
            kinds[model.name],
        )
        for model in models
    }
    owner = config_owner(opened.base, opened.experts, config, tokenizer)
    merged = replace(own[owner.name], label=located.name, architecture=opened.architecture)
    if tokenizer is not None:
        chosen = own[tokenizer]
        has_settings = (chosen.generation / GENERATION).is_file()
        merged = replace(
            merged,
            tokenizer=chosen.tokenizer,
            generation=chosen.generation if has_settings and opened.vocabulary is None else merged.generation,
        )
    if template is not None and merged.tokenizer is None:
        raise ConfigError("save.chat_template: no model has a tokenizer, whose template it would be")
    folders = dict.fromkeys(folder for model in models for folder in folders_of(model.folder))
    text = chosen_template(template, list(folders))
    merged = replace(merged, vocabulary=opened.vocabulary, template=text)
    experts = tuple(own[expert.name] for expert in located.experts)
    return Descriptions(merged, experts, own.get("base"))


def config_owner(
    base: ModelSource | None, experts: Sequence[ModelSource], config: str | None, tokenizer: str | None
) -> ModelSource:
    """Return the model whose config the merged one has; see `describe`."""
    by_name = {model.name: model for model in (*([base] if base is not None else []), *experts)}
    if config is not None:
        return by_name[config]
    other = by_name.get(tokenizer or "")
    return other if other is not None and other.class_names == experts[0].class_names else experts[0]


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        if file.is_file():
            found.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()
