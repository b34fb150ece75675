"""What tokenizers consist of, compared part by part, so that a difference can be named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.models.architecture import tokenizer_folder
from mergelab.models.tokens import CHAT_TEMPLATE, chat_template

# Parts of tokenizer.json that change which tokens a text becomes.
_STEPS = {
    "model": "vocabulary",
    "normalizer": "normaliser",
    "pre_tokenizer": "pre-tokeniser",
    "post_processor": "post-processor",
    "added_tokens": "added tokens",
}
# Settings of tokenizer_config.json and special_tokens_map.json.
_SETTINGS = (
    *("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
    *("padding_side", "model_max_length", "do_lower_case", "strip_accents", "tokenize_chinese_chars"),
)
_STEPS_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_FILES = (
    *(_STEPS_FILE, _CONFIG, "special_tokens_map.json", CHAT_TEMPLATE),
    *("vocab.txt", "vocab.json", "merges.txt"),
)


def differing_parts(folders: Mapping[str, Path]) -> list[str]:
    """Name the parts in which the tokenizers of models differ; those without a tokenizer do not count.

    Files that are equal byte by byte are not read any further. A file that says nothing, being damaged, is named too.
    """
    own = {name: folder for name, folder in folders.items() if tokenizer_folder([folder]) is not None}
    if len(own) < 2:
        return []
    differing: dict[str, None] = {}
    first, *others = own
    for other in others:
        if _same_files(own[first], own[other]):
            continue
        here, there = _parts(own[first]), _parts(own[other])
        differing |= dict.fromkeys(key for key in here if key in there and here[key] != there[key])
        for name, parts in ((first, here), (other, there)):
            if _STEPS["model"] not in parts and (own[name] / _STEPS_FILE).is_file():
                differing[f"{_STEPS_FILE} of {name} cannot be read"] = None
    return list(differing)


def _same_files(first: Path, second: Path) -> bool:
    return all(_content(first / name) == _content(second / name) for name in _FILES)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _parts(folder: Path) -> dict[str, Any]:
    """Return the parts that a tokenizer's files say; what they leave to its class is not compared."""
    steps = _json(folder / _STEPS_FILE)
    found: dict[str, Any] = {called: _step(steps[key]) for key, called in _STEPS.items() if key in steps}
    settings = _json(folder / "special_tokens_map.json") | _json(folder / _CONFIG)
    found |= {key: _token(settings[key]) for key in _SETTINGS if settings.get(key) is not None}
    return {**found, "chat template": chat_template(folder)}


def _step(content: Any) -> Any:
    """Return a step of tokenizer.json in one spelling: files of earlier versions write merges and tokens otherwise."""
    if isinstance(content, Mapping) and "vocab" in content:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content.get("merges") or []]
        return content.get("type"), content["vocab"], merges
    if isinstance(content, list):
        return [(token.get("id"), token.get("content")) for token in content if isinstance(token, Mapping)]
    return content


def _token(value: Any) -> Any:
    """Return a special token's text, which older tokenizers store among its properties."""
    return value.get("content") if isinstance(value, Mapping) else value


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}  # whoever loads the tokenizer says so
    return content if isinstance(content, dict) else {}
