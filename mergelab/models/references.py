"""References to models: what a user may write for one, and which folder it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergelab.config import ModelsConfig, PairConfig, StackConfig, local_path
from mergelab.errors import ModelError
from mergelab.models import hub

_HUB_ID = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")


@dataclass(frozen=True)
class Reference:
    """A model as the user named it: a local folder, or a repository on the hub at a revision."""

    text: str
    folder: Path | None = None
    repository: str | None = None
    revision: str | None = None

    @property
    def models(self) -> tuple[Reference, ...]:
        """The models that have to be had: this one."""
        return (self,)

    @property
    def label(self) -> str:
        """What tables call it: as the user did; of a long path the end is what tells models apart."""
        return self.text if self.folder is None or len(self.text) <= 40 else f"…{self.text[-39:]}"


@dataclass(frozen=True)
class Pair:
    """An encoder and a decoder that are to be joined.

    Attributes:
        seed: of the weights that neither has.
        token_ids: of ``decoder_start_token_id``, ``pad_token_id`` and ``eos_token_id`` those that the user gave.
    """

    encoder: Reference
    decoder: Reference
    seed: int
    token_ids: Mapping[str, int]

    @property
    def models(self) -> tuple[Reference, ...]:
        """The models that have to be had: both."""
        return (self.encoder, self.decoder)

    @property
    def text(self) -> str:
        """The pair in words."""
        return f"{self.encoder.text} + {self.decoder.text}"

    @property
    def label(self) -> str:
        """What tables call it: by the ends of the models' names, and the seed that tells warm starts apart."""
        names = (reference.text.rstrip("/").rsplit("/", 1)[-1] for reference in self.models)
        return " + ".join(names) + (f" (seed {self.seed})" if self.seed else "")


@dataclass(frozen=True)
class Adapted:
    """A model with an adapter: ``org/name+org/adapter``."""

    model: Reference
    adapter: Reference

    @property
    def models(self) -> tuple[Reference, ...]:
        """The models that have to be had: both."""
        return (self.model, self.adapter)

    @property
    def text(self) -> str:
        """The two as they are written."""
        return f"{self.model.text}+{self.adapter.text}"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.model.label}+{self.adapter.label}"


@dataclass(frozen=True)
class LayerStack:
    """Layers of models, one above the other.

    Attributes:
        parts: each a model with its first layer and the one after its last.
    """

    parts: tuple[tuple[Reference | Adapted, int, int], ...]

    @property
    def models(self) -> tuple[Reference, ...]:
        """The models that have to be had, each once."""
        return tuple(dict.fromkeys(each for model, _, _ in self.parts for each in model.models))

    @property
    def text(self) -> str:
        """The parts in words."""
        return ", ".join(f"{model.text}[{start}:{stop}]" for model, start, stop in self.parts)

    @property
    def label(self) -> str:
        """What tables call it: by the ends of the models' names."""
        ends = (f"{model.text.rstrip('/').rsplit('/', 1)[-1]}[{start}:{stop}]" for model, start, stop in self.parts)
        return " + ".join(ends)


AnyReference = Reference | Pair | Adapted | LayerStack


def parse_reference(reference: str | PairConfig | StackConfig) -> AnyReference:
    """Read ``org/name``, ``org/name@revision``, a local folder's path, one with ``+adapter``, a pair or a stack.

    What exists as a folder is that folder; what is written like a path (``./x``, ``/x``, ``~/x``) must be one.

    Raises:
        ModelError: a path without a folder, or text that is neither a path nor a hub id.
        ConfigError: a path in the home of nobody.
    """
    if isinstance(reference, str):
        return _with_adapter(reference)
    if isinstance(reference, StackConfig):
        return LayerStack(
            tuple((_with_adapter(each.model), each.layers[0], each.layers[1]) for each in reference.stack)
        )
    ids = reference.model_dump(include={"decoder_start_token_id", "pad_token_id", "eos_token_id"}, exclude_none=True)
    return Pair(_parsed(reference.encoder), _parsed(reference.decoder), reference.seed, ids)


def _with_adapter(text: str) -> Reference | Adapted:
    """Read a model, or one with an adapter; a folder may have a + in its name."""
    model, plus, adapter = text.partition("+")
    if not plus or local_path(text, "model").is_dir():
        return _parsed(text)
    return Adapted(_parsed(model), _parsed(adapter))


def _parsed(text: str) -> Reference:
    folder = local_path(text, "model")
    if folder.is_dir():
        return Reference(text, folder=folder.absolute())
    if text.startswith(("/", "./", "../", "~")):
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise ModelError(f"model {text!r}: the folder {what}")
    repository, _, revision = text.partition("@")
    if not _HUB_ID.match(repository) or ("@" in text and not revision):
        raise ModelError(f"model {text!r}: neither a local folder nor a hub id (org/name or org/name@revision)")
    return Reference(text, repository=repository, revision=revision or None)


def references(models: ModelsConfig) -> list[Reference]:
    """List the models that are needed, the base's first; of a pair both.

    Raises:
        ModelError: a reference cannot be read.
    """
    written = [*([models.base] if models.base else []), *(expert.reference for expert in models.experts.values())]
    return [model for reference in written for model in parse_reference(reference).models]


def local_folder(reference: AnyReference, where: str) -> Path:
    """Return the folder of a model: the user's own, one that the hub's cache has or gets, or that of a joined pair.

    ``where`` is the configuration's key of the reference, for messages.

    Raises:
        HubError, ModelError: it cannot be had.
    """
    if isinstance(reference, Pair):
        from mergelab.models.encoder_decoder import warm_start

        encoder, decoder = (local_folder(model, where) for model in reference.models)
        return warm_start(encoder, decoder, where=where, seed=reference.seed, token_ids=reference.token_ids)
    if isinstance(reference, Adapted):
        from mergelab.models.adapted import on_base

        return on_base(*(local_folder(model, where) for model in reference.models), where=where)
    if isinstance(reference, LayerStack):
        from mergelab.models.stacked import stacked

        return stacked([(local_folder(model, where), start, stop) for model, start, stop in reference.parts], where)
    if reference.folder is not None:
        return reference.folder
    assert reference.repository is not None
    return hub.cached(reference.repository, reference.revision) or hub.fetch(reference.repository, reference.revision)
