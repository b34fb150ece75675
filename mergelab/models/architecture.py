"""What kind of model a folder or a module is, and modules that weights are loaded into for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import ModelError
from mergelab.models.configs import kind_of_outputs
from mergelab.weights import json_files
from mergelab.weights.naming import backbone_prefix
from mergelab.weights.pretrained import refuse_own_code
from mergelab.weights.skeleton import opened_by_transformers
from mergelab.weights.skeleton import quiet_transformers as quiet_transformers

if TYPE_CHECKING:
    from torch import nn

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")
_GENERATORS = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "EncoderDecoderModel"),
    *("MTModel", "BertGenerationDecoder", "ModelWithLMHead"),  # of Marian, BERT for generation, Reformer
)
# What a class's models do, in the hub's words.
_PIPELINE_TAGS = {
    **dict.fromkeys(_GENERATORS, "text-generation"),
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
    "EncoderDecoderModel": "text2text-generation",
    "MTModel": "text2text-generation",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Architecture:
    """A model's class, the prefix of its backbone's tensor names, and what its outputs mean."""

    name: str
    prefix: str
    is_classifier: bool
    id2label: Mapping[int, str]

    @property
    def is_sequence_classifier(self) -> bool:
        """Whether it gives a text, or a pair of texts, one score for each label."""
        return self.name.endswith("ForSequenceClassification")

    @property
    def is_generator(self) -> bool:
        """Whether it writes texts."""
        return self.name.endswith(_GENERATORS)


def read_config(folder: Path, model: str) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        ModelError: there is none; or as `mergelab.weights.json_files.read_config`.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {model}: no config.json in {folder}")
    return json_files.read_config(folder, f"model {model}")


def architecture(
    folder: Path, model: str, names: Collection[str] = (), config: Mapping[str, Any] | None = None
) -> Architecture:
    """Find out what the folder's ``config.json``, or the given ``config``, describes.

    ``names`` are its tensors': where they show the backbone's prefix, the model's class need not be imported, which
    takes seconds.

    Raises:
        ModelError: the configuration is missing or names no class that transformers has.
    """
    config = read_config(folder, model) if config is None else config
    name = str((config.get("architectures") or [""])[0])
    prefix = backbone_prefix(names).removesuffix(".")
    if not name or not prefix:
        import transformers

        cls = getattr(transformers, name, None)
        if name and config.get("auto_map") and cls is None:  # its own code, which is not run
            return Architecture(name, "", False, {})
        if cls is None or not hasattr(cls, "base_model_prefix"):
            raise ModelError(
                f"model {model}: its config.json names no model class that transformers has (architectures={name!r})"
            )
        prefix = str(cls.base_model_prefix)
    labels = {int(index): str(label) for index, label in (config.get("id2label") or {}).items()}
    if not labels and name.endswith(_CLASSIFIERS):
        labels = {index: f"LABEL_{index}" for index in range(int(config.get("num_labels", 2)))}
    return Architecture(name, prefix, name.endswith(_CLASSIFIERS), labels)


def pipeline_tag(config: Mapping[str, Any]) -> str:
    """Return what a model does, in the hub's words, by its class: such as ``text-classification``."""
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForConditionalGeneration") and "vision_config" in config:
        return "image-text-to-text"
    if name.endswith("ForConditionalGeneration") and not config.get("is_encoder_decoder", True):
        return "text-generation"
    return next((tag for end, tag in _PIPELINE_TAGS.items() if name.endswith(end)), "feature-extraction")


def architecture_of(module: nn.Module, names: Collection[str] = ()) -> Architecture | None:
    """Describe a module as `architecture` describes a folder; None for one that is not transformers'.

    A user's subclass of a model of transformers counts as that model. ``names`` are its tensors'.
    """
    classes, config = type(module).__mro__, getattr(module, "config", None)
    if config is None or not any(cls.__name__ == "PreTrainedModel" for cls in classes):
        return None
    own = (cls.__name__ for cls in classes if cls.__module__.startswith("transformers.models."))
    name = next(own, type(module).__name__)
    prefix = backbone_prefix(names).removesuffix(".") or str(getattr(module, "base_model_prefix", ""))
    labels = {int(index): str(label) for index, label in (getattr(config, "id2label", None) or {}).items()}
    return Architecture(name, prefix, name.endswith(_CLASSIFIERS), labels)


def head_names(names: Iterable[str], kind: Architecture) -> tuple[str, ...]:
    """Pick the tensors of a classifier's head: those outside its backbone. Models without such a head have none."""
    if not kind.is_classifier:
        return ()
    return tuple(name for name in names if not name.startswith(f"{kind.prefix}."))


def tokenizer_folder(folders: Iterable[Path]) -> Path | None:
    """Find the first of ``folders`` that has a tokenizer."""
    return next((folder for folder in folders if any((folder / file).exists() for file in _TOKENIZER_FILES)), None)


def open_classifier(folder: Path, model: str, num_labels: int, **settings: Any) -> nn.Module:
    """Open a sequence classifier with ``num_labels`` outputs, float32, in evaluation mode, to load weights into.

    Only its config is read, in which ``settings`` take the place of its own: what the weights are is no matter of this.

    Raises:
        ModelError: transformers cannot build it.
    """
    from transformers import AutoModelForSequenceClassification

    said = settings.pop("problem_type", None) or read_config(folder, model).get("problem_type")

    def adapt(config: Any) -> None:
        config.problem_type = None  # transformers 5 checks after every change that the two fit
        config.num_labels = num_labels
        config.problem_type = kind_of_outputs(num_labels, said)

    return _opened(AutoModelForSequenceClassification, folder, model, adapt, **settings)


def open_generator(folder: Path, model: str) -> nn.Module:
    """Open a model that writes texts, alone or behind an encoder, float32, in evaluation mode, to load weights into.

    Only its config and generation config are read. A model that also reads images writes after texts alone.

    Raises:
        ModelError: transformers cannot build it, or it looks ahead, so that it cannot write.
    """
    import transformers

    config = read_config(folder, model)
    own: Any = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    if config.get("model_type") == "encoder-decoder":
        cls: Any = transformers.EncoderDecoderModel
    elif own is not None and own.__name__.endswith(_GENERATORS) and hasattr(own, "_from_config"):
        cls = own
    elif config.get("is_encoder_decoder"):
        cls = transformers.AutoModelForSeq2SeqLM
    else:
        cls = transformers.AutoModelForCausalLM
    opened: Any = _opened(cls, folder, model)
    if getattr(opened.config, "is_decoder", True) is False and "ForMaskedLM" in _siblings(opened):
        raise ModelError(f"model {model}: is_decoder is false in its config.json: it looks ahead and cannot write")
    return opened  # type: ignore[no-any-return]


def _siblings(module: nn.Module) -> str:
    """Return the names of the classes in a module's file of transformers, such as BertForMaskedLM."""
    import sys

    return " ".join(dir(sys.modules[type(module).__module__]))


def _opened(
    cls: Any, folder: Path, model: str, adapt: Callable[[Any], None] = lambda _config: None, **options: Any
) -> nn.Module:
    """Build a model from its config, with weights that mean nothing: all of them are loaded before it is used."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    refuse_own_code(f"model {model}", read_config(folder, model))
    with opened_by_transformers(f"model {model}"), _no_init_weights():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        adapt(config)
        build = cls.from_config if hasattr(cls, "from_config") else cls._from_config
        module: Any = build(config, dtype=torch.float32)
        module.tie_weights()
        if (folder / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return module.eval()  # type: ignore[no-any-return]


def _no_init_weights() -> contextlib.AbstractContextManager[None]:
    """Return transformers' context in which models are built without drawing weights."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()  # type: ignore[no-any-return]
