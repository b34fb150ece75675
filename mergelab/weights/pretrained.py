"""Load models and pipelines through transformers, and run another model in a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from mergelab.errors import ConfigError, HubError, ModelError, did_you_mean, first_line
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedModel

# Tasks with a model class, but without a pipeline in transformers 5.
_SEQ2SEQ_TASKS = ("text2text-generation", "summarization", "translation")


def load_model(name: str | Path, task: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model for ``task`` from a hub id or a local folder, in its stored dtype.

    Weights that the checkpoint lacks (the head of a base model) are initialised with a fixed seed.

    Args:
        name: hub id or folder.
        task: a transformers pipeline task, e.g. ``text-classification``.
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
    checkpoint = None
    if Path(name, "config.json").is_file() and not kwargs.keys() & {"subfolder", "variant"}:
        checkpoint = open_checkpoint(name)  # raises errors that name the damaged file
    failure: Exception | None = None
    for auto_class in _auto_classes(task):
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                model: PreTrainedModel = (
                    auto_class.from_pretrained(str(name), **kwargs)
                    if checkpoint is None or checkpoint.standard
                    else _from_tensors(auto_class, checkpoint, **kwargs)
                )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            failure = failure or error
        else:
            return model if device is None else model.to(device)
    reason = "" if failure is None else first_line(failure)
    kind = ModelError if Path(name).exists() else HubError
    raise kind(f"{name}: cannot be loaded for {task}: {reason}") from failure


def _from_tensors(auto_class: Any, checkpoint: Checkpoint, **kwargs: Any) -> PreTrainedModel:
    """Load a folder whose files or names ``from_pretrained`` does not know by what is read of it here."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    with torch.device("meta"):
        cls: Any = type(auto_class.from_config(config))
    tensors = {name: checkpoint.get(name).clone() for name in [*checkpoint.keys(), *checkpoint.aliases()]}
    model: PreTrainedModel = cls.from_pretrained(None, config=config, state_dict=tensors, **kwargs)
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
        return pipeline(task, model=model, tokenizer=str(tokenizer or name), device=model.device)
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
