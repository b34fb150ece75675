"""Companion files: what belongs to a model besides config and weights, and goes with it into a merged model's folder.

That is every file of the folder that is neither weights, of whatever format, nor left by training, nor hidden. Code is
copied like any other file, and never run.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from mergelab.errors import MergeWarning, listed
from mergelab.weights.adapters import ADAPTER_CONFIG, HEAD_CONFIG
from mergelab.weights.quantised import QUANTISATION_FILES

# What describes a model: its card, and what mergelab merged it from. A merged model has its own.
README, PROVENANCE, MERGEKIT = "README.md", "mergelab.json", "mergekit_config.yml"
# sentence-transformers' list of the modules that a model consists of; the first is the transformer itself.
MODULES = "modules.json"
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.keras", "*.msgpack", "*.onnx", "*.onnx_data"),
    *("*.onnx.data", "*.gguf", "*.ggml", "*.ot", "*.tflite", "*.pb", "*.mlmodel", "*.npz", "*.distcp", "*.nemo"),
    *("*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json"),
    *("*.ckpt.index", "*.ckpt.meta", "*.ckpt.data-*", "openvino_*.xml", "flax_model*", "tf_model*", "*.safetensors.*"),
)
# Folders of the same model in another format.
_OTHER_FORMATS = ("onnx", "openvino", "original", "coreml", "gguf", "*.mlpackage", "saved_model", "metal")
_TRAINING = (
    *(
        "optimizer.*",
        "optimizer_[0-9]*",
        "scheduler.*",
        "scaler.*",
        "rng_state*",
        "random_states_*",
        "trainer_state.json",
        "training_args.*",
    ),
    *(
        "checkpoint-*",
        "global_step*",
        "runs",
        "wandb",
        "mlruns",
        "events.out.*",
        "events.*",
        "zero_to_fp32.py",
        "latest",
    ),
    *("*_results.json", "*_results.txt", "*_results.csv", "pytorch_model_fsdp*"),
)
# What a merged model has of its own, and what describes the model's own training or quantisation.
_REPLACED = (
    "config.json",
    README,
    "newly_initialised.json",
    "mergelab*",
    MERGEKIT,
    ADAPTER_CONFIG,
    HEAD_CONFIG,
    *QUANTISATION_FILES,
)
_NO_COMPANIONS = ("__pycache__", "*.pyc", "*.incomplete", "*.lock", "*.part")


def is_companion(name: str) -> bool:
    """Return whether a file belongs to a model and is copied with it, by its path in the model's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return False
    if any(part.startswith(".") or _fits(part, (*_TRAINING, *_NO_COMPANIONS)) for part in path.parts):
        return False
    if any(_fits(part, _OTHER_FORMATS) for part in path.parts[:-1]) or _fits(path.name, _WEIGHTS):
        return False
    return len(path.parts) > 1 or not _fits(path.name, _REPLACED)


def module_folders(folder: Path) -> list[str]:
    """Return the folders of the further modules that a sentence-transformers model lists; none for other models."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    paths = [str(module.get("path") or "") for module in modules if isinstance(module, dict)]
    return [path for path in paths if path and not Path(path).is_absolute() and ".." not in Path(path).parts]


def is_module_weights(name: str, modules: Sequence[str]) -> bool:
    """Return whether a file holds the weights of one of the further ``modules``."""
    path = PurePosixPath(name)
    return _fits(path.name, _WEIGHTS) and any(path.is_relative_to(module) for module in modules)


def companion_files(folder: Path, wanted: Callable[[str], bool] = lambda _name: True) -> list[str]:
    """List a model's companion files by their paths in its folder, weights of further modules included.

    Symbolic links that lead out of the folder are not followed, except those of the hub's cache to its own files; a
    `MergeWarning` names them. Folders that hold another whole model are left out.

    Args:
        folder: the model's.
        wanted: which names to list.
    """
    modules = module_folders(folder)
    found, foreign = [], []
    for name in _files(folder, modules):
        if not (is_companion(name) or is_module_weights(name, modules)) or not wanted(name):
            continue
        if leads_inside(folder / name, folder):
            found.append(name)
        else:
            foreign.append(name)
    if foreign:
        warnings.warn(
            f"{folder}: not copied, as they are links that lead out of the folder: {listed(foreign)}; copy what they "
            "lead to into the folder",
            MergeWarning,
            stacklevel=2,
        )
    return found


def copy_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy files of a folder, by their paths in it, into another one."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def without_unmerged(names: Sequence[str], folder: Path, models: Sequence[Path]) -> list[str]:
    """Leave out the weights of further modules in which the models differ, as these are not merged.

    Args:
        names: companion files of ``folder``.
        folder: whose files are copied.
        models: the folders of the models that are merged.

    Returns:
        The other names; a `MergeWarning` says what is left out.
    """
    modules = module_folders(folder)
    differing = [name for name in names if is_module_weights(name, modules) and not _same(folder, name, models)]
    if differing:
        warnings.warn(
            f"not copied: {listed(differing)}; the models differ there, and these weights are outside the merge: the "
            f"saved folder lacks them, so that sentence-transformers cannot load it",
            MergeWarning,
            stacklevel=2,
        )
    return [name for name in names if name not in differing]


def _same(folder: Path, name: str, models: Sequence[Path]) -> bool:
    """Return whether all models that have a file have it with the same bytes."""
    others = [model / name for model in models if (model / name).is_file()]
    return all(filecmp.cmp(folder / name, other, shallow=False) for other in others)


def _files(folder: Path, modules: Sequence[str]) -> Iterator[str]:
    for path, folders, files in os.walk(folder):
        place = Path(path).relative_to(folder)
        if place.parts and _is_other_model(files) and not any(place.is_relative_to(module) for module in modules):
            folders.clear()
            continue
        links = [name for name in folders if (folder / place / name).is_symlink()]  # os.walk does not follow them
        folders[:] = sorted(name for name in folders if is_companion((place / name / "any").as_posix()))
        yield from sorted((place / name).as_posix() for name in [*files, *links])


def _is_other_model(files: Sequence[str]) -> bool:
    return "config.json" in files and any(_fits(file, _WEIGHTS) for file in files)


def leads_inside(path: Path, folder: Path) -> bool:
    """Return whether a path leads to a file in the folder, or in the hub's cache for one of its snapshots."""
    home = folder.resolve()
    real = path.resolve()
    if not real.is_file():
        return False
    if real.is_relative_to(home):
        return True
    repository = home.parent.parent
    of_cache = home.parent.name == "snapshots" and re.match("(models|datasets|spaces)--", repository.name)
    return bool(of_cache) and real.is_relative_to(repository / "blobs")


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
