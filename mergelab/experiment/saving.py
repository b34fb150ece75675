"""Merged weights as model folders, with config, tokenizer and labels: one folder, or one for each task."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.console.progress import say
from mergelab.errors import listed
from mergelab.models.architecture import read_config
from mergelab.models.configs import untied_config, with_kind_of_outputs
from mergelab.models.encoder_decoder import PAIRED
from mergelab.weights.source import TensorInfo, TensorPart, layout_of
from mergelab.weights.writer import complete_files, is_unfinished, making_of, stay, writing_folder

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.config import SaveConfig
    from mergelab.experiment.plan import Plan
    from mergelab.experiment.session import Session


Documents = Callable[[Mapping[str, Any], str | None], Mapping[str, str]]


class Saving:
    """Writes what a session's models were merged to.

    Args:
        session: the opened models, their heads, and the tasks.
        settings: how a merged model is written.
        documents: returns the texts of a folder's further files, by their names, of the model's config and its task.

    Attributes:
        copied: for each folder that was written, the files that were copied into it.
    """

    def __init__(
        self, session: Session, settings: SaveConfig, documents: Documents = lambda _config, _task: {}
    ) -> None:
        self._opened, self._heads, self._tasks = session.opened, session.heads, session.tasks
        self._description, self._settings, self._documents = session.descriptions.merged, settings, documents
        self.copied: dict[Path, tuple[str, ...]] = {}

    def say_copied(self) -> None:
        """Write which files have been copied into the folders that were written."""
        for folder, names in self.copied.items():
            say(f"copied    into {folder.name}: {', '.join(names) or 'nothing'}")

    def save(self, backbones: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
        """Write merged weights as a model folder; with a head per task, as a folder for each task below it.

        Args:
            backbones: the weights for each task, by its name; the same for all, or different ones.
            folder: does not exist yet, or is empty.

        Raises:
            ModelError: the folder is in use or cannot be written.
        """
        distinct = {id(backbone): (backbone, task) for task, backbone in backbones.items()}
        for backbone, task in distinct.values():
            layout = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in backbone.items()]
            only = task if len(distinct) > 1 else None
            self._write(folder, layout, partial(_parts_of, backbone), None, only)

    def merging(
        self,
        folder: Path,
        merge: Callable[[frozenset[str]], Iterable[TensorPart]],
        key: str,
        task: str | None = None,
    ) -> None:
        """Write a merged model as `save` does, part by part as it is merged.

        Args:
            folder: as for `save`.
            merge: returns the parts of the merged tensors of these names.
            key: names what is merged and how: what an interrupted call with the same key completed is not done again.
            task: the one whose folder is written; None: each one's that there is.
        """
        reference = self._opened.aligned.base or self._opened.aligned.experts[0]
        dtype = self._opened.dtype
        layout = [
            info._replace(dtype=dtype or info.dtype) if info.name in self._opened.aligned.names else info
            for info in layout_of(reference, [*self._opened.aligned.names, *self._opened.aligned.integers])
        ]
        layout += [
            info._replace(name=alias) for alias, name in self._copies.items() for info in layout if info.name == name
        ]
        own = [
            TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._opened.passed_through.items()
        ]

        def parts(missing: frozenset[str]) -> Iterator[TensorPart]:
            yield from _parts_of(self._opened.passed_through, missing)
            yield from merge(missing - self._opened.passed_through.keys())

        self._write(folder, [*layout, *own], parts, key, task)

    @property
    def _is_pair(self) -> bool:
        kind = self._opened.architecture
        return kind is not None and kind.name == PAIRED

    @cached_property
    def _copies(self) -> dict[str, str]:
        """Find tied tensors that are stored under both names: an encoder's and its decoder's, and what no config ties.

        Transformers 5 does not tie these when it loads a model, and would draw the decoder's anew.
        """
        if self._opened.all_names:
            return dict(self._opened.aligned.aliases)
        if not self._is_pair:
            return {}
        return {alias: name for alias, name in self._opened.aligned.aliases.items() if _part(alias) != _part(name)}

    def _write(
        self,
        folder: Path,
        layout: Sequence[TensorInfo],
        parts: Callable[[frozenset[str]], Iterable[TensorPart]],
        key: str | None,
        task: str | None = None,
    ) -> None:
        """Write one folder, or one for each task's head (or that of one task), from one stream of what they share."""
        shared = [info for info in layout if info.name not in self._opened.head_names]
        folders = self._model_folders(folder, task)
        with noted(folder, [place for place, *_ in folders], key), ExitStack() as stack:
            template = self._description.tokenizer if self._settings.tokenizer else None
            like = stack.enter_context(self._description.files(self._opened.folders, template=template))
            writers = []
            for place, head, updates, of in folders:
                heads = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in head.items()]
                if self._opened.untied:
                    updates = {**untied_config(read_config(like, str(like))), **updates}
                updates = {**self._class(), **with_kind_of_outputs(updates, read_config(like, str(like)))}
                writer = stack.enter_context(
                    writing_folder(
                        place,
                        layout=[*shared, *heads],
                        like=like,
                        config_updates=updates,
                        dtype=self._opened.dtype,
                        max_shard_bytes=self._settings.max_shard_bytes,
                        aliases={a: n for a, n in self._opened.aligned.aliases.items() if a not in self._copies},
                        inputs=self._opened.folders,
                        key=key,
                        documents=self._documents({**read_config(like, str(like)), **updates}, of),
                    )
                )
                for name in head.keys() & writer.missing:
                    writer.write(name, head[name])
                writers.append(writer)
            waiting = [(writer, writer.missing) for writer in writers]
            for part in parts(frozenset().union(*(missing for _, missing in waiting))):
                for writer, missing in waiting:
                    if part.name in missing:
                        writer.write_part(part)
                del part  # let it go before the next one is made
        self.copied |= {place: writer.companions for (place, *_), writer in zip(folders, writers, strict=True)}

    def _model_folders(
        self, folder: Path, only: str | None
    ) -> list[tuple[Path, Mapping[str, Tensor], dict[str, Any], str | None]]:
        """Return the folders to write, each with its head, what its configuration says of the labels, and its task."""
        if self._heads.policy != "per_task" or len(self._tasks) == 1 or not self._opened.head_names:
            head, updates = self._heads.to_save(self._tasks[0])
            return [(folder, head.tensors, updates, None)]
        tasks = [task for task in self._tasks if only in (None, task.name)]
        saved = [(task, *self._heads.to_save(task)) for task in tasks]
        return [(folder / task.name, head.tensors, updates, task.name) for task, head, updates in saved]

    def _class(self) -> dict[str, Any]:
        """Return the key of ``config.json`` that names the merged model's class: the experts', whosever the rest is."""
        kind = self._opened.architecture
        return {} if kind is None else {"architectures": [kind.name]}


def merge_key(plan: Plan, session: Session) -> str:
    """Name all that the content of a plan's merged model depends on; weights by their files' times of change."""
    from importlib.metadata import version

    opened, config = session.opened, plan.config
    stamps = {
        model.name: [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in model.checkpoint.files]
        for model in opened.models
        if model.checkpoint
    }
    parts = {
        "version": version("mergelab"),
        "method": [plan.method.name, plan.parameters.by_key()],
        "models": [config.models.model_dump(), stamps],
        "vocabulary": opened.vocabulary and opened.vocabulary.digest,
        "tasks": [[task.name, session.heads[task.name].digest] for task in session.tasks],
        "save": config.save.model_dump(exclude={"push_to_hub", "private", "stages"}),
        "seed": config.seed,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{key} {plan.data_dir}"  # of the examples that a method learns from


@contextlib.contextmanager
def noted(folder: Path, places: Sequence[Path], key: str | None) -> Iterator[None]:
    """Note on a Ctrl-C what remains of the models that are written to ``places``, and what the same command does.

    Without a key nothing remains.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if key is None:
            raise
        whole = [path.name for path in sorted(folder.glob("*")) if not is_unfinished(path)]
        remaining = {place: count for place in places if (count := complete_files(place, key))}
        if whole and folder not in places:
            interrupt.add_note(f"{folder} holds {listed(whole)} already: remove it before the same command again")
        elif remaining:
            where = listed([str(making_of(place)) for place in remaining], 2)
            interrupt.add_note(f"{stay(sum(remaining.values()))} in {where}: the same command goes on from there")
        raise


def _part(name: str) -> str:
    return name.partition(".")[0]


def _parts_of(tensors: Mapping[str, Tensor], names: frozenset[str]) -> Iterator[TensorPart]:
    return (TensorPart(name, 0, tensor.reshape(-1)) for name, tensor in tensors.items() if name in names)
