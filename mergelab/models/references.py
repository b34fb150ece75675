"""References to models: what a user may write for one, and which folder it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergelab.config import ModelsConfig, PairConfig, local_path
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


def parse_reference(reference: str | PairConfig) -> Reference | Pair:
    """Read ``org/name``, ``org/name@revision``, a local folder's path, or a pair of these.

    What exists as a folder is that folder; what is written like a path (``./x``, ``/x``, ``~/x``) must be one.

    Raises:
        ModelError: a path without a folder, or text that is neither a path nor a hub id.
        ConfigError: a path in the home of nobody.
    """
    if isinstance(reference, str):
        return _parsed(reference)
    ids = reference.model_dump(include={"decoder_start_token_id", "pad_token_id", "eos_token_id"}, exclude_none=True)
    return Pair(_parsed(reference.encoder), _parsed(reference.decoder), reference.seed, ids)


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


def local_folder(reference: Reference | Pair, where: str) -> Path:
    """Return the folder of a model: the user's own, one that the hub's cache has or gets, or that of a joined pair.

    ``where`` is the configuration's key of the reference, for messages.

    Raises:
        HubError, ModelError: it cannot be had.
    """
    if isinstance(reference, Pair):
        from mergelab.models.encoder_decoder import warm_start

        encoder, decoder = (local_folder(model, where) for model in reference.models)
        return warm_start(encoder, decoder, where=where, seed=reference.seed, token_ids=reference.token_ids)
    if reference.folder is not None:
        return reference.folder
    assert reference.repository is not None
    return hub.cached(reference.repository, reference.revision) or hub.fetch(reference.repository, reference.revision)
