"""The model that an expert is made from: whether it fits the task, and opened for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import ConfigError, ModelError, listed
from mergelab.finetune.plan import MAX_LENGTH
from mergelab.models.adapted import is_adapter_folder
from mergelab.models.architecture import architecture, read_config
from mergelab.models.encoder_decoder import PAIRED
from mergelab.models.tokens import decoder_tokenizer, load_tokenizer
from mergelab.weights.pretrained import refuse_own_code
from mergelab.weights.skeleton import opened_by_transformers, skeleton

if TYPE_CHECKING:
    from mergelab.finetune.plan import FinetuneConfig
    from mergelab.tasks.spec import TaskSpec

_POOLER = "pooler"
_KINDS = {"language_modelling": "CAUSAL_LM", "classification": "SEQ_CLS", "regression": "SEQ_CLS"}


def check_base(folder: Path, label: str, task: TaskSpec) -> None:
    """Check, by its configuration alone, that a model can be trained for a task.

    Raises:
        ConfigError: it cannot. ModelError: it has no configuration that can be read.
    """
    if is_adapter_folder(folder):
        raise ConfigError(f"base={label}: is an adapter; give the whole model that experts are trained from")
    config = read_config(folder, label)
    refuse_own_code(f"base {label}", config)
    name = str((config.get("architectures") or ["a model without a class"])[0])
    if task.outputs:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

        if config.get("model_type") not in CLASSES:
            raise ConfigError(
                f"base={label}: {name} cannot be a classifier, which task={task.name} needs; give an encoder such as "
                "BERT, or a decoder such as GPT-2"
            )
        return
    kind = architecture(folder, label, config=config)
    decodes_alone = not (config.get("is_encoder_decoder") or config.get("model_type") == "encoder-decoder")
    if not kind.is_generator or (task.kind == "language_modelling" and not decodes_alone):
        what = "continues text, such as GPT-2" if task.kind == "language_modelling" else "writes text, such as T5"
        raise ConfigError(f"base={label}: {name} does not fit task={task.name}, which needs a model that {what}")


def check_settings(folder: Path, label: str, task: TaskSpec, config: FinetuneConfig) -> None:
    """Check, without weights, the settings that depend on the base.

    Raises:
        DataError: it does not allow that many tokens.
        ConfigError: it has no layers of these names, or PEFT does not know which of them to adapt.
    """
    from transformers import AutoConfig

    from mergelab.evaluation.lengths import max_input_length

    tokenizer, _ = open_tokenizers(folder, label)
    if config.train.max_length is not None:
        with opened_by_transformers(f"base {label}"):
            own = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            max_input_length(own, tokenizer, config.train.max_length, MAX_LENGTH)
    if config.lora.r is not None:
        _check_targets(folder, label, config.lora.targets)


def _check_targets(folder: Path, label: str, targets: Sequence[str] | None) -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    config = read_config(folder, label)
    module = skeleton(folder, config)
    names = [name for name, _ in module.named_modules()] if module is not None else []
    layers = sorted({name.rpartition(".")[2] for name in names if name.rpartition(".")[2].isidentifier()})
    kind = config.get("model_type")
    if targets is None and kind not in KNOWN and kind != "encoder-decoder":
        raise ConfigError(f"lora.targets: PEFT has none for {kind}; name some of its layers: {listed(layers)}")
    for target in targets or ():
        if names and not any(f".{name}".endswith(f".{target}") for name in names):
            raise ConfigError(f"lora.targets={list(targets or ())}: {label} has no layer {target}: {listed(layers)}")


def open_for_training(folder: Path, label: str, task: TaskSpec) -> tuple[Any, list[str]]:
    """Open a model in float32 with the task's head; a head that its folder lacks is drawn from torch's generator.

    Args:
        folder: of the base, or of a checkpoint of the training.
        label: what errors call it.
        task: whose labels the head has.

    Returns:
        The model, and the names of its modules that were drawn: the head, and a pooler before it.

    Raises:
        ModelError: transformers cannot open it, or its weights are not those of its class.
    """
    import torch

    settings: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    if task.outputs:
        settings |= _labels(task) | {"ignore_mismatched_sizes": True}
    with opened_by_transformers(f"base {label}"):
        model, info = _class(folder, task).from_pretrained(folder, **settings)
    prefix = "" if not task.outputs else f"{model.base_model_prefix}."
    return model, _drawn(label, prefix, info)


def _class(folder: Path, task: TaskSpec) -> Any:
    import transformers

    if task.outputs:
        return transformers.AutoModelForSequenceClassification
    config = read_config(folder, str(folder))
    own = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    return transformers.EncoderDecoderModel if config.get("model_type") == "encoder-decoder" else own


def _labels(task: TaskSpec) -> dict[str, Any]:
    if task.labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: number for number, name in enumerate(task.labels)},
        "problem_type": "single_label_classification",
    }


def _drawn(label: str, prefix: str, info: Mapping[str, Any]) -> list[str]:
    """Return the modules that have no weights in the folder, where only a head and its pooler are such.

    Raises:
        ModelError: others are.
    """

    def is_new(name: str) -> bool:
        return bool(prefix) and (not name.startswith(prefix) or f".{_POOLER}." in f".{name}")

    mismatched = [str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in info["mismatched_keys"]]
    absent = [*info["missing_keys"], *mismatched]
    if wrong := sorted(name for name in absent if not is_new(name)):
        raise ModelError(
            f"base {label}: its weights lack {listed(wrong, 3)}, or have them in another shape; transformers would "
            "train from random ones"
        )
    return sorted({_POOLER if name.startswith(prefix) else name.partition(".")[0] for name in absent})


def open_tokenizers(folder: Path, label: str) -> tuple[Any, Any]:
    """Open the tokenizer of what a model reads, and that of what it writes.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    reads, writes = load_tokenizer([folder], label), decoder_tokenizer(folder)
    return reads, reads if writes == folder else load_tokenizer([writes], label)


def with_adapter(
    model: Any, drawn: Sequence[str], lora: Mapping[str, Any], task: TaskSpec, reference: str, revision: str | None
) -> Any:
    """Put a LoRA adapter on a model, whose matrices A are drawn from torch's generator.

    Args:
        model: the base with the task's head, which is trained too.
        drawn: its modules that are not the base's, and so belong to the adapter.
        lora: ``r``, ``alpha``, ``dropout`` and ``targets``.
        task: what is trained for.
        reference, revision: what the adapter says of its base.

    Raises:
        ConfigError: PEFT does not know which layers get an adapter, or there are none of the names given.
    """
    from peft import LoraConfig, get_peft_model

    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    targets = lora["targets"] or (["query", "value"] if type(model).__name__ == PAIRED else None)
    config = LoraConfig(
        task_type=_KINDS.get(task.kind, kind),
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=targets,
        modules_to_save=list(drawn) or None,
        revision=revision,
    )
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.targets={lora['targets']}: {' '.join(str(error).split())}") from error
    adapted.peft_config["default"].base_model_name_or_path = reference
    return adapted
