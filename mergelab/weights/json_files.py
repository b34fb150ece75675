"""The JSON files of a model's folder: read, and checked for the types of what is taken from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergelab.errors import ModelError, first_line

CONFIG = "config.json"


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: the file.
        name: the model's name in errors.

    Raises:
        ModelError: it cannot be read, is not JSON, is nested too deeply, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(f"{name}: {path} is not readable JSON ({why[:100]})") from error
    except RecursionError:
        raise ModelError(f"{name}: {path} is not readable JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path} must hold a JSON object")
    return content


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read a model's ``config.json``, and check the types of what mergelab takes from it.

    Raises:
        ModelError: as `read_json`; or a setting is of another type than transformers writes.
    """
    config = read_json(folder / CONFIG, name)
    _check(config, f"{name}: {folder / CONFIG}", "")
    _check_code(config, f"{name}: {folder / CONFIG}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_labels(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_number(key) or (isinstance(key, str) and key.isdecimal()) for key in value
    )


_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: isinstance(value, str), "text"),
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        "a list of class names",
    ),
    "id2label": (_is_labels, "an object that gives a name for each number"),
    "label2id": (lambda value: isinstance(value, Mapping), "an object that gives a number for each name"),
    "num_labels": (lambda value: _is_number(value) and value > 0, "a positive whole number"),
    "vocab_size": (lambda value: _is_number(value) and value > 0, "a positive whole number"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "is_encoder_decoder": (lambda value: isinstance(value, bool), "true or false"),
    "quantization_config": (lambda value: isinstance(value, Mapping), "an object"),
    "auto_map": (lambda value: isinstance(value, Mapping), "an object"),
    "dtype": (lambda value: isinstance(value, str | Mapping), "the name of a dtype"),
    "torch_dtype": (lambda value: isinstance(value, str | Mapping), "the name of a dtype"),
}
_PARTS = ("text_config", "vision_config", "encoder", "decoder")


def _check(config: Mapping[str, Any], where: str, prefix: str) -> None:
    for key, (is_right, wanted) in _TYPES.items():
        if (value := config.get(key)) is not None and not is_right(value):
            raise ModelError(f"{where}: {prefix}{key} must be {wanted}, and is {_short(value)}")
    for key in _PARTS:
        if isinstance(part := config.get(key), Mapping):
            _check(part, where, f"{prefix}{key}.")
    for key, value in config.items():
        if key.endswith("_token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(_is_number(each) for each in ids):
                raise ModelError(f"{where}: {prefix}{key} must be a whole number, and is {_short(value)}")


def _check_code(config: Mapping[str, Any], where: str) -> None:
    """Refuse attention and the like by a repository's kernel, which transformers would fetch and run."""
    nested: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while nested:
        prefix, part = nested.pop()
        for key, value in part.items():
            inner = value if isinstance(value, Mapping) else {}
            if "implementation" not in key:
                nested += [(f"{prefix}{key}.", inner)] if inner else []
            elif code := [each for each in (*inner.values(), value) if isinstance(each, str) and "/" in each]:
                raise ModelError(
                    f"{where}: {prefix}{key} names the code of a repository ({_short(code[0])}), and mergelab runs no "
                    "code of models; remove the key, or name an implementation of transformers such as sdpa"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
