"""Which settings of models' configurations differ, and which of these change the function that the weights mean.

Weights alone do not say what a model computes: the number of attention heads, the activation or the rotary base stand
in ``config.json``. Models are compared in everything that it says, except what this file lists as harmless.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

from mergelab.errors import ModelError

# What does not change the outputs of a trained model: where it comes from, how it is stored and run, training alone.
# Head and labels, vocabulary and quantisation are compared by the parts of mergelab that handle them.
_HARMLESS = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map", "custom_pipelines"),
    *("dtype", "torch_dtype", "use_bfloat16", "torchscript", "quantization_config", "finetuning_task"),
    *("id2label", "label2id", "num_labels", "_num_labels", "vocab_size", "vocab_size_or_config_json_file"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_past", "return_dict", "output_router_logits"),
    *("gradient_checkpointing", "*attn_implementation*", "*experts_implementation*", "chunk_size_feed_forward"),
    *("*dropout*", "*_pdrop", "*drop_path*", "*layerdrop*", "initializer_*", "init_std", "*_initializer_range"),
    *("*_loss_coef", "router_jitter_noise", "label_smoothing", "mask_*_prob", "mask_*_length", "apply_spec_augment"),
    *("unsloth_*", "pretraining_tp"),
)
# What these patterns would take for training alone, and scales what a trained model computes: in ESM and NLLB-MoE.
_NOT_HARMLESS = ("token_dropout", "moe_token_dropout")
# The number of rows: models may differ in it, and are then merged by token; a module has the rows of one of them.
_ROWS = ("vocab_size", "vocab_size_or_config_json_file")
# Which tensors are tied shows in the tensors. In T5 and its like the key also says whether outputs are scaled.
_TIES = ("tie_word_embeddings",)
# What says which token is which: the tokenizer's business. Each model is measured with its own.
_TOKENS = ("*_token_id", "*_token_ids", "*_token_index")
# How text is written: each model is measured with its own settings.
_GENERATION = (
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "prefix"),
    *("output_scores", "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "task_specific_params", "renormalize_logits"),
)
# What only a head reads; a base of another class does not need to agree.
OF_HEADS = ("problem_type", "classifier_*", "summary_*", "score_*", "cls_*")


class Named(NamedTuple):
    """A model's name in messages and its configuration, as ``config.json`` has it."""

    name: str
    config: Mapping[str, Any]


class Difference(NamedTuple):
    """A setting, dotted where it is nested, and its value in two models that differ in it."""

    key: str
    first: str
    value: Any
    second: str
    other: Any

    def __str__(self) -> str:
        return f"{self.key} is {_short(self.value)} in {self.first} and {_short(self.other)} in {self.second}"


def differences(models: Sequence[Named], *, ignore: Iterable[str] = ()) -> list[Difference]:
    """List the settings in which models differ from the first one and that change what their weights compute.

    Defaults count as if they were written, as transformers fills them in. A setting that the model's class does not
    know, and that only one of two models has, is not compared.

    Args:
        models: at least one.
        ignore: patterns of further keys that need not agree.

    Raises:
        ModelError: transformers cannot read a configuration.
    """
    in_pairs = any(model.config.get("is_encoder_decoder") for model in models)
    skipped = (*_TOKENS, *_GENERATION, *ignore, *(() if in_pairs else _TIES))

    def read(model: Named) -> dict[str, Any]:
        return _flat(_with_problem_type(_complete(model)))

    def counts(key: str) -> bool:
        is_of_a_parts_head = "." in key and _matches(key.rpartition(".")[2], OF_HEADS)  # an encoder-decoder has none
        return not (_is_harmless(key) or is_of_a_parts_head or _matches(key, skipped))

    return _differences(models, counts, read)


def writing_differences(models: Sequence[Named]) -> list[Difference]:
    """List the settings in which models differ that say which token is which and how text is written.

    Those of generation count where both models have them.
    """

    def read(model: Named) -> dict[str, Any]:
        return _flat(model.config) | _flat(_complete(model))

    found = _differences(models, lambda key: _matches(key, (*_TOKENS, *_GENERATION)), read)
    return [each for each in found if _matches(each.key, _TOKENS) or None not in (each.value, each.other)]


def module_settings(config: Mapping[str, Any]) -> str:
    """Return all settings that a module's shapes and outputs depend on, as text that is equal where these are."""
    flat = _flat(config)
    kept = [key for key in sorted(flat) if _matches(key, _ROWS) or not _is_harmless(key)]
    return json.dumps({key: flat[key] for key in kept}, default=str)


def head_settings(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings that only a model's head reads, defaults among them.

    Raises:
        ModelError: transformers cannot read the configuration, of the model ``name``.
    """
    content = _complete(Named(name, config))
    return {key: value for key, value in content.items() if _matches(key, OF_HEADS) and not _matches(key, _TOKENS)}


def kind_of_outputs(count: int, said: str | None) -> str | None:
    """Return the ``problem_type`` of a head of ``count`` outputs, in a config that ``said`` it of its own head."""
    if said is None:
        return None
    if count == 1:
        return "regression"
    return "single_label_classification" if said == "regression" else said


def with_kind_of_outputs(updates: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a head changes in a ``config``, with the ``problem_type`` that fits its number of outputs."""
    count = updates.get("num_labels")
    said = config.get("problem_type")
    kind = said if count is None else kind_of_outputs(int(count), said)
    return {**updates, **({} if kind == said else {"problem_type": kind})}


def _is_harmless(key: str) -> bool:
    return _matches(key, _HARMLESS) and not _matches(key, _NOT_HARMLESS)


def _differences(
    models: Sequence[Named], counts: Callable[[str], bool], read: Callable[[Named], dict[str, Any]]
) -> list[Difference]:
    first, *others = models
    found: dict[str, Difference] = {}
    for other in others:
        written = [_flat(_with_problem_type(model.config)) for model in (first, other)]
        if {k: v for k, v in written[0].items() if counts(k)} == {k: v for k, v in written[1].items() if counts(k)}:
            continue
        known, own, its = _declared(first.config), read(first), read(other)
        for key in sorted({**own, **its}):
            alone = (key in own) != (key in its)
            if not counts(key) or own.get(key) == its.get(key) or (alone and not _is_known(key, known)):
                continue
            found.setdefault(key, Difference(key, first.name, own.get(key), other.name, its.get(key)))
    return list(found.values())


def _with_problem_type(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with the kind of its outputs that transformers takes where none is said."""
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    usual = "regression" if count == 1 else "single_label_classification"
    return {**config, "problem_type": config.get("problem_type") or usual}


def _complete(model: Named) -> Mapping[str, Any]:
    """Return a configuration with the defaults that transformers fills in; as it is where it knows no such model."""
    cls = _config_class(model.config)
    if cls is None:
        return model.config
    try:
        content: Mapping[str, Any] = cls.from_dict(copy.deepcopy(dict(model.config))).to_dict()
    except Exception as error:  # whatever a class raises about its settings
        raise ModelError(
            f"{model.name}: transformers cannot read its config.json: {' '.join(str(error).split())[:200]}"
        ) from error
    return content


def _declared(config: Mapping[str, Any]) -> set[str]:
    """Return the keys that a model's class knows, and those of its parts behind the part's name and a dot."""
    cls = _config_class(config)
    if cls is None:
        return set(config)
    parts = {key: value for key, value in config.items() if isinstance(value, Mapping) and "model_type" in value}
    own = set(cls.from_dict(copy.deepcopy({"model_type": config["model_type"], **parts})).to_dict()) - parts.keys()
    return own | {f"{key}.{inner}" for key, part in parts.items() for inner in _declared(part)}


def _is_known(key: str, declared: set[str]) -> bool:
    """Return whether a dotted key, or a setting that it is nested in, is among ``declared``."""
    steps = key.split(".")
    return any(".".join(steps[:count]) in declared for count in range(1, len(steps) + 1))


def _config_class(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config.get("model_type", "")]
    except KeyError:
        return None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys, without those that say nothing."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value and not _matches(key, ("id2label", "label2id")):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


@lru_cache(maxsize=10_000)
def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a dotted key, or a part that it is nested in, is one of ``patterns``."""
    return any(fnmatchcase(part, pattern) for part in key.split(".") for pattern in patterns)


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` that say that its model ties nothing; none of an encoder-decoder.

    With some encoder-decoders (T5) the key has a second meaning, the scale of the output; transformers does not tie
    tensors that differ in any case.
    """
    if config.get("is_encoder_decoder") or config.get("model_type") == "encoder-decoder":
        return {}
    inner = {
        name: {**part, "tie_word_embeddings": False}
        for name, part in config.items()
        if isinstance(part, dict) and "tie_word_embeddings" in part
    }
    return {"tie_word_embeddings": False, **inner}
