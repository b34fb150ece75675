"""Load models and pipelines through transformers, and run another model in a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from mergelab.errors import ConfigError, HubError, ModelError, did_you_mean, first_line, listed
from mergelab.weights.adapters import refuse_adapter
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.quantised import QUANTISATION_KEYS

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedModel

    from mergelab.weights.checkpoint import Checkpoint

# Tasks with a model class, but without a pipeline in transformers 5.
_SEQ2SEQ_TASKS = ("text2text-generation", "summarization", "translation")


def load_model(name: str | Path, task: str, *, checkpoint: Checkpoint | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a model for ``task`` from a hub id or a local folder, in its stored dtype.

    Weights that the checkpoint lacks (the head of a base model) are initialised with a fixed seed.

    Args:
        name: hub id or folder.
        task: a transformers pipeline task, e.g. ``text-classification``.
        checkpoint: the folder, opened, where that takes more than its path; default: as it is.
        kwargs: arguments of ``from_pretrained`` (``revision``, ``dtype``, …), and ``device`` to move the model to.

    Raises:
        ConfigError: unknown task, or a framework other than PyTorch.
        ModelError: a local folder that cannot be loaded for the task.
        HubError: the model cannot be found or the hub cannot be reached.
    """
    if kwargs.pop("framework", "pt") != "pt":
        raise ConfigError("framework: only 'pt' is supported")
    device = kwargs.pop("device", None)
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))
    kwargs.setdefault("trust_remote_code", False)  # else transformers asks the user, who may not be there
    if Path(name).is_dir():
        refuse_adapter(str(name), Path(name))
    if Path(name, "config.json").is_file() and not kwargs.keys() & {"subfolder", "variant"}:
        checkpoint = checkpoint or open_checkpoint(name)  # raises errors that name the damaged file
        if not kwargs["trust_remote_code"]:
            refuse_own_code(str(name), checkpoint.config)
    failure: Exception | None = None
    for auto_class in _auto_classes(task):
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                model = (
                    from_tensors(auto_class, checkpoint, **kwargs)
                    if checkpoint is not None and (checkpoint.is_quantised or not checkpoint.standard)
                    else auto_class.from_pretrained(str(name), **kwargs)
                )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            failure = failure or error
        else:
            loaded: PreTrainedModel = model if device is None else model.to(device)
            return loaded
    reason = "" if failure is None else first_line(failure)
    kind = ModelError if Path(name).exists() else HubError
    raise kind(f"{name}: cannot be loaded for {task}: {reason}") from failure


def refuse_own_code(name: str, config: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a model that cannot be built without the code that comes with it, which is never run."""
    code = config.get("auto_map")
    if not isinstance(code, Mapping) or not code:
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING:
        return
    entries = [str(entry) for value in code.values() for entry in (value if isinstance(value, list) else [value])]
    files = dict.fromkeys(f"{entry.rpartition('--')[2].partition('.')[0]}.py" for entry in entries)
    modelling = [file for file in files if file.startswith("model")] or list(files)
    raise ModelError(
        f"{name}: its code is in {listed(modelling, 2)}; mergelab runs no model code, so that it cannot be run here; "
        "evaluate=false merges it, and the saved folder loads with trust_remote_code=True"
    )


def from_tensors(auto_class: Any, checkpoint: Checkpoint, **kwargs: Any) -> PreTrainedModel:
    """Load a folder with ``auto_class`` by what is read of it here: unquantised, under the model's own names.

    Transformers itself runs FP8 weights on some accelerators only, and does not know every file and name.
    """
    from transformers import AutoConfig, GenerationConfig

    dtype = kwargs.pop("dtype", "auto")
    kwargs |= {"local_files_only": True, "trust_remote_code": False, "return_unused_kwargs": True}
    config, options = AutoConfig.from_pretrained(str(checkpoint.folder), **kwargs)
    for each in (config, *(part for part in vars(config).values() if hasattr(part, "to_diff_dict"))):
        for key in QUANTISATION_KEYS:
            if hasattr(each, key):
                delattr(each, key)
    options["dtype"] = (checkpoint.dequantised_dtype or dtype) if dtype == "auto" else dtype
    tensors = {key: checkpoint.get(key).clone() for key in (*checkpoint.keys(), *checkpoint.aliases())}
    cls: Any = auto_class
    if hasattr(auto_class, "from_config"):  # an auto class takes no tensors without a folder
        with torch.device("meta"):
            cls = type(auto_class.from_config(config, trust_remote_code=False))
    model: PreTrainedModel = cls.from_pretrained(None, config=config, state_dict=tensors, **options)
    if model.can_generate() and (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    return model


def load_pipeline(
    name: str | Path,
    task: str,
    *,
    tokenizer: Path | None = None,
    adapt: Callable[[nn.Module], nn.Module] | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Build a pipeline of ``task`` on the CPU from a hub id or a local folder.

    Args:
        name: hub id or folder.
        task: a transformers pipeline task.
        tokenizer: folder of the tokenizer; default: the model's.
        adapt: returns the model to use in place of the loaded one.
        kwargs: as for `load_model`.

    Raises:
        ConfigError, ModelError, HubError: as for `load_model`; or transformers cannot build the pipeline.
    """
    from transformers import pipeline

    model: Any = load_model(name, task, **kwargs)
    model = model if adapt is None else adapt(model)
    try:
        return pipeline(
            task, model=model, tokenizer=str(tokenizer or name), device=model.device, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{name}: no pipeline for {task}: {first_line(error)}") from error


def pipeline_with(base: Pipeline, model: nn.Module) -> Pipeline:
    """Return a copy of the pipeline ``base`` (task, tokenizer, settings) that runs ``model``; ``base`` is unchanged."""
    clone: Pipeline = copy.copy(base)
    clone.model = model
    for setting in ("_preprocess_params", "_forward_params", "_postprocess_params", "generation_config"):
        if hasattr(base, setting):
            setattr(clone, setting, copy.deepcopy(getattr(base, setting)))
    return clone


def _auto_classes(task: str) -> tuple[Any, ...]:
    """Return the auto classes to try for ``task``, the most specific first."""
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    if task in PIPELINE_REGISTRY.get_supported_tasks():
        classes: tuple[Any, ...] = PIPELINE_REGISTRY.check_task(task)[1]["pt"]
        return classes
    if task in _SEQ2SEQ_TASKS or task.startswith("translation_"):
        return (transformers.AutoModelForSeq2SeqLM,)
    known = [*PIPELINE_REGISTRY.get_supported_tasks(), *_SEQ2SEQ_TASKS]
    raise ConfigError(f"task={task!r}: transformers has no such task{did_you_mean(task, known)}")
