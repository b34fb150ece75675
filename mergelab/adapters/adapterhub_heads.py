"""Prediction heads of the Adapters library, under transformers' names where the two compute the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mergelab.errors import ModelError, listed

_FLEXIBLE = ("AdapterModel", "ModelWithHeads")  # what the library's own classes end in
_LAYER = re.compile(r"heads\.(?P<name>[^.]+)\.(?P<rest>(?P<index>\d+)\.(weight|bias))")
_TASKS = {"classification": "SEQ_CLS", "tagging": "TOKEN_CLS", "question_answering": "QUESTION_ANS"}


@dataclass(frozen=True)
class _Like:
    """A head of transformers that computes what one of the library's does.

    Attributes:
        layers: its linear layers, first to last, as the class of the task has them.
        activation: between them.
        pooled: whether the head of the library takes the pooler's output.
        bias: whether the last layer has one.
    """

    layers: tuple[str, ...]
    activation: str | None = None
    pooled: bool = False
    bias: bool = True


_TWO_LAYERS = _Like(("classifier.dense", "classifier.out_proj"), "tanh")
_SCORE = _Like(("score",), bias=False)
_CONTEXT = _Like(("pooler.dense", "classifier"), "gelu")
# By model_type. BERT's pooler is a layer with tanh, so that a head of two layers is the pooler and the classifier.
_CLASSIFIERS: Mapping[str, tuple[_Like, ...]] = {
    "bert": (_Like(("classifier",), pooled=True), _Like(("bert.pooler.dense", "classifier"), "tanh")),
    "roberta": (_TWO_LAYERS,),
    "xlm-roberta": (_TWO_LAYERS,),
    "distilbert": (_Like(("pre_classifier", "classifier"), "relu"),),
    "deberta": (_CONTEXT,),
    "deberta-v2": (_CONTEXT,),
    "gpt2": (_SCORE,),
    "llama": (_SCORE,),
    "mistral": (_SCORE,),
}
_TAGGERS = (_Like(("classifier",)),)
_WITH_TAGGER = ("bert", "roberta", "xlm-roberta", "distilbert", "deberta", "deberta-v2", "gpt2")
_ANSWERS = (_Like(("qa_outputs",)),)
_WITH_ANSWERS = ("bert", "roberta", "xlm-roberta", "distilbert", "deberta", "deberta-v2")


@dataclass(frozen=True)
class LibraryHead:
    """A prediction head beside an adapter; empty where there is none.

    Attributes:
        class_name: the class of transformers that it is of, where the file says so.
        task_type: PEFT's name for its task, for a head of the library's own classes.
        label2id: the numbers of its labels, by name.
        tensors: its tensors, by transformers' names.
    """

    class_name: str | None = None
    task_type: str | None = None
    label2id: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def read_head(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], name: str) -> LibraryHead:
    """Bring a head into transformers' names.

    Args:
        config: the parsed ``head_config.json``; None where there is no head.
        tensors: what its weight file holds.
        name: what errors call the adapter.

    Raises:
        ModelError: no head of transformers computes what it does; the line names its type and model.
    """
    if config is None:
        return LibraryHead()
    cls, inner = str(config.get("model_class")), config.get("config")
    if not cls.endswith(_FLEXIBLE):
        return LibraryHead(cls, None, _labels(config, name), tensors)
    if not isinstance(inner, Mapping):
        raise ModelError(f"{name}: head_config.json does not describe its head ({cls})")
    kind, model_type = inner.get("head_type"), str(config.get("model_type"))
    like = _matching(inner, model_type)
    if like is None:
        settings = {key: inner.get(key) for key in ("layers", "activation_function", "use_pooler", "bias")}
        raise ModelError(
            f"{name}: its {kind} head ({listed(f'{key}={value}' for key, value in settings.items())}) is none that "
            f"{model_type} models of transformers have; leave head_config.json out, or train the model's own head"
        )
    step = 3 if inner.get("activation_function") else 2  # dropout, layer, activation
    places = {str(1 + step * at): layer for at, layer in enumerate(like.layers)}
    wanted = {f"{at}.{leaf}" for at in places for leaf in ("weight", "bias")}
    if not like.bias:
        wanted.remove(f"{list(places)[-1]}.bias")
    found: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        match = _LAYER.fullmatch(stored)
        if match is None or match["name"] != config.get("name") or match["rest"] not in wanted:
            raise ModelError(f"{name}: the tensor {stored} of its head has no place in a {model_type} model")
        wanted.remove(match["rest"])
        found[f"{places[match['index']]}.{match['rest'].partition('.')[2]}"] = tensor
    if wanted:
        raise ModelError(f"{name}: its {kind} head lacks {listed(sorted(wanted), 4)}")
    return LibraryHead(None, _TASKS[str(kind)], _labels(inner, name), found)


def _matching(head: Mapping[str, Any], model_type: str) -> _Like | None:
    kind = head.get("head_type")
    among: tuple[_Like, ...] = ()
    if kind == "classification":
        among = _CLASSIFIERS.get(model_type, ())
    elif kind == "tagging" and model_type in _WITH_TAGGER:
        among = _TAGGERS
    elif kind == "question_answering" and model_type in _WITH_ANSWERS:
        among = _ANSWERS
    return next((like for like in among if _is_like(head, like)), None)


def _is_like(head: Mapping[str, Any], like: _Like) -> bool:
    return (
        head.get("layers") == len(like.layers)
        and (len(like.layers) == 1 or head.get("activation_function") == like.activation)
        and bool(head.get("use_pooler")) == like.pooled
        and bool(head.get("bias", True)) == like.bias
    )


def _labels(config: Mapping[str, Any], name: str) -> dict[str, int]:
    labels = config.get("label2id") or {}
    if not isinstance(labels, Mapping) or not all(isinstance(at, int) for at in labels.values()):
        raise ModelError(f"{name}: label2id in its head_config.json must give each label a number")
    return {str(label): at for label, at in labels.items()}
