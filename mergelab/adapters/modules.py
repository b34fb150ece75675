"""Bottleneck and prefix-tuning adapters of the Adapters library: modules beside the base's weights, averaged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergelab.adapters.adapterhub import MODULES, is_of_library, parts_of
from mergelab.adapters.adapterhub_writing import NAME, VERSION
from mergelab.adapters.files import open_adapter_files
from mergelab.adapters.writing import whole_folder, write_json_file
from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch, listed
from mergelab.weights.adapters import ADAPTER_CONFIG, HEAD_CONFIG, HEAD_WEIGHTS, LIBRARY_WEIGHTS
from mergelab.weights.writer import write_texts

# Settings that matter while a module is made or trained.
_TRAINING = ("init_weights", "init_weights_seed", "dropout", "stochastic_depth")
# Before configurations had a version, "gelu" was what transformers calls "gelu_new".
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_OF_HEADS = ("config", "label2id", "num_labels", "model_class", "model_type")


@dataclass(frozen=True, eq=False)
class Modules:
    """An adapter whose modules can be averaged; its own name is replaced by one that all have.

    Attributes:
        name: what errors call it.
        config: the parsed ``adapter_config.json``.
        tensors: by name.
        head_config, head: of a prediction head beside it, if there is one.
        files: what its content depends on.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    head_config: Mapping[str, Any] | None
    head: Mapping[str, Tensor]
    files: tuple[Path, ...]


def read_modules(folder: Path, name: str) -> Modules:
    """Read an adapter's folder.

    Raises:
        ModelError: it is none of the Adapters library, or has parts that are no bottleneck and no prefix; a tensor does
            not belong to it. NonFinite: a tensor holds NaN or infinity.
    """
    files = open_adapter_files(folder, name)
    if not is_of_library(files.config):
        raise ModelError(
            f"{name}: is no adapter of the Adapters library; save.form=module_average averages those alone"
        )
    for part in parts_of(files.config, name):
        _check_part(part, name)
    config = {**files.config, "name": NAME, "version": VERSION}
    if "version" not in files.config:
        activation = files.config["config"].get("non_linearity")
        config["config"] = {**files.config["config"], "non_linearity": _OLD_ACTIVATIONS.get(activation, activation)}
    own = re.escape(str(files.config.get("name")))
    container = re.compile(rf"(?P<before>(.*\.)?(\w*adapters|prefix_tunings|shared_parameters)\.){own}(?P<after>\..+)")
    tensors = {}
    for stored, tensor in files.tensors.items():
        if (match := container.fullmatch(stored)) is None:
            raise ModelError(f"{name}: the tensor {stored} is none of the adapter {files.config.get('name')!r:.60}")
        tensors[f"{match['before']}{NAME}{match['after']}"] = tensor
    head_config, head = files.head_config, dict(files.head_tensors)
    if head_config is not None and isinstance(head_config.get("config"), Mapping):  # a head of the adapter's name
        inner = f"heads.{head_config.get('name')}."
        head = {f"heads.{NAME}.{key.removeprefix(inner)}" if key.startswith(inner) else key: head[key] for key in head}
        head_config = {**head_config, "name": NAME}
    return Modules(name, config, tensors, head_config, head, files.files)


def _check_part(part: Mapping[str, Any], name: str) -> None:
    kind = part.get("architecture")
    if kind == "lora":
        raise ModelError(
            f"{name}: it has LoRA or IA³, which change weights: the average of A and that of B are not the average of "
            "the changes; adapters of these alone are merged by every method, with save.form=dense, lora_cat or ia3"
        )
    if kind not in MODULES:
        raise ModelError(f"{name}: it is of architecture {kind!r:.40} of the Adapters library, which cannot be merged")
    if part.get("use_gating"):
        raise ModelError(f"{name}: use_gating=true in its adapter_config.json: adapters with gates cannot be merged")


def check_alike(adapters: Sequence[Modules]) -> None:
    """Check that adapters are of one configuration, so that their modules can be averaged.

    Raises:
        ModelError: settings differ. KeyMismatch, ShapeMismatch: tensors do.
    """
    first = adapters[0]
    for other in adapters[1:]:
        settings, others = _settings(first.config), _settings(other.config)
        if odd := [key for key in {**settings, **others} if settings.get(key) != others.get(key)]:
            shown = listed((f"{key}: {settings.get(key)!r:.40} and {others.get(key)!r:.40}" for key in odd), 3)
            line = f"{first.name} and {other.name} are configured differently and cannot be averaged ({shown})"
            raise ModelError(line)
        _check_tensors(first.name, first.tensors, other.name, other.tensors)


def _check_tensors(name: str, tensors: Mapping[str, Tensor], other: str, others: Mapping[str, Tensor]) -> None:
    if odd := sorted(tensors.keys() ^ others.keys()):
        raise KeyMismatch(f"{listed(odd, 3)} is in one of {name} and {other} alone; they cannot be averaged")
    for key, tensor in tensors.items():
        if tensor.shape != others[key].shape:
            raise ShapeMismatch(
                f"{key} is {list(tensor.shape)} in {name} and {list(others[key].shape)} in {other}: they belong to "
                "different bases"
            )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide on what modules compute, by their place in the file."""
    parts = parts_of(config, "")
    found: dict[str, Any] = {key: config.get(key) for key in ("model_type", "hidden_size")}
    for number, part in enumerate(parts):
        of = f"{number}." if len(parts) > 1 else ""
        found |= {f"{of}{key}": value for key, value in part.items() if key not in _TRAINING}
    return found


def head_of(adapters: Sequence[Modules], policy: str) -> Sequence[Modules]:
    """Return the adapters whose heads the average has, by ``models.head``; none where it has no head.

    Raises:
        ModelError: heads differ, or one is missing.
    """
    if policy == "base":
        return ()
    if policy.startswith("expert:"):
        (chosen,) = [each for each in adapters if each.name == policy.removeprefix("expert:")]
        if chosen.head_config is None:
            raise ModelError(f"models.head={policy}: there is no head beside this adapter")
        return (chosen,)
    if policy == "per_task":
        raise ModelError("models.head=per_task: an adapter has one head; choose average, base or expert:<name>")
    with_head = [each for each in adapters if each.head_config is not None]
    if not with_head:
        return ()
    first = with_head[0]
    for other in adapters:
        mine, theirs = first.head_config or {}, other.head_config or {}
        if odd := [key for key in _OF_HEADS if mine.get(key) != theirs.get(key)]:
            raise ModelError(
                f"the heads of {first.name} and {other.name} differ in {listed(odd, 3)}, and cannot be averaged; "
                "choose models.head=expert:<name>, or models.head=base for an adapter without one"
            )
        _check_tensors(first.name, first.head, other.name, other.head)
    return adapters


def write_modules(
    folder: Path,
    first: Modules,
    tensors: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    documents: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter that the library loads with its defaults; the folder exists once it is complete.

    Args:
        folder: does not exist, or is empty.
        first: has the configuration.
        tensors, head: the averages; without a head ``head`` is empty.
        documents: the texts of further files, by their names.

    Raises:
        ModelError: the folder is in use or cannot be written.
    """
    with whole_folder(folder) as making:
        torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, making / LIBRARY_WEIGHTS[0])
        write_texts(making, documents or {})
        if head:
            assert first.head_config is not None
            torch.save({key: tensor.contiguous() for key, tensor in head.items()}, making / HEAD_WEIGHTS[0])
            write_json_file(making / HEAD_CONFIG, first.head_config)
        write_json_file(making / ADAPTER_CONFIG, first.config)
