"""Where a merged model comes from: the models of the merge and, where these are merges too, theirs, as a tree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergelab.errors import MergeWarning, ModelError, shortened
from mergelab.weights.companions import PROVENANCE
from mergelab.weights.json_files import read_json

_LARGEST = 1_000_000  # bytes of a file that is read
_Text = Annotated[str, Field(max_length=500)]


class _Record(BaseModel):
    """A part of the file; keys of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class SourceModel(_Record):
    """A model that was merged.

    Attributes:
        name: what the merge calls it: ``base``, or an expert's name.
        model: the hub id; of a local folder its name, without the folders above it.
        revision: the commit on the hub.
        sha256: of the weights.
        weight: an expert's weight.
        merge: the merge that made it, where mergelab did.
    """

    name: _Text
    model: _Text
    revision: _Text | None = None
    sha256: _Text | None = None
    weight: float | None = None
    merge: Merge | None = None


class Merge(_Record):
    """A merge.

    Attributes:
        method, parameters: the method's name, and the parameters that it used.
        base, experts: the models.
        run, tracking: the id of the MLflow run, and the store that has it.
        mergelab: the version.
    """

    method: _Text
    parameters: dict[str, Any] = {}
    base: SourceModel | None = None
    experts: list[SourceModel] = []
    run: _Text | None = None
    tracking: _Text | None = None
    mergelab: _Text | None = None

    def to_json(self) -> str:
        """Return the content of the file."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    @property
    def title(self) -> str:
        """The method with its parameters, and the run."""
        parameters = ", ".join(f"{key}={shortened(value)}" for key, value in self.parameters.items())
        run = f", run {self.run}" if self.run else ""
        return plain(f"{self.method}({parameters}){run}")

    def tree(self) -> list[str]:
        """Return the lines of a tree: this merge, below it its models, and below each of these those it is made of."""
        return [self.title, *self._below("")]

    def _below(self, indent: str) -> Iterator[str]:
        models = [*([self.base] if self.base else []), *self.experts]
        for model in models:
            last = model is models[-1]
            yield f"{indent}{'└── ' if last else '├── '}{_said_of(model)}"
            if model.merge is not None:
                inner = f"{indent}{'    ' if last else '│   '}"
                yield f"{inner}made by mergelab: {model.merge.title}"
                yield from model.merge._below(inner)


def read_provenance(folder: Path) -> Merge | None:
    """Read the merge that a model's folder came from; None where mergelab did not make it.

    A `MergeWarning` names a file that cannot be read.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _LARGEST:
            raise ModelError(f"{file} is larger than {_LARGEST // 1_000_000} MB")
        return Merge.model_validate(read_json(file, folder.name))
    except (ModelError, ValidationError, RecursionError) as error:
        why = str(error) if isinstance(error, ModelError) else f"{file} does not describe a merge"
        warnings.warn(
            f"{why}; the merged model's card does not say what it was merged from", MergeWarning, stacklevel=2
        )
        return None


def plain(text: str) -> str:
    """Return a text of unknown origin in one line, and without the marks that would end a block of code."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable()).replace("`", "'")


def _said_of(model: SourceModel) -> str:
    revision = f"@{model.revision[:12]}" if model.revision and "@" not in model.model else ""
    weight = f" (weight {model.weight:g})" if model.weight not in (None, 1.0) else ""
    return plain(f"{model.name}: {model.model}{revision}{weight}")
