"""What ``transformers`` alone makes of a saved folder, one example at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.architectures.numpy_merges import Array
from tests.architectures.zoo import Kind


def load(kind: Kind, folder: Path) -> Any:
    """Load a folder into its auto class, float32, and check that every stored tensor and every parameter had its own.

    Raises:
        AssertionError: keys are missing, unexpected or of another shape.
    """
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        cls = getattr(transformers, kind.auto)
        model, about = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(level)
    wrong = {what: sorted(map(str, names)) for what, names in about.items() if names}
    assert not wrong, f"{folder.name}: {wrong}"
    return model.eval()


def labels(folder: Path) -> list[str]:
    """Return a classifier's labels in the order of its outputs."""
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(number)] for number in range(len(config["id2label"]))]
    assert config["label2id"] == {name: number for number, name in enumerate(names)}
    return names


def by_label(tensor: Array, names: list[str]) -> Array:
    """Return a tensor of a head with its outputs in the alphabetical order of their labels."""
    return tensor[np.argsort(names)] if tensor.shape[:1] == (len(names),) else tensor


def tied_groups(model: Any) -> set[frozenset[str]]:
    """Return the names of parameters that are one tensor."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def load_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def class_scores(model: Any, tokenizer: Any, pair: tuple[str, str]) -> Mapping[str, float]:
    """Return the logit of each label for one pair of sentences, by the label's name."""
    logits = model(**tokenizer(*pair, return_tensors="pt")).logits[0]
    return {model.config.id2label[number]: float(logit) for number, logit in enumerate(logits)}


@torch.inference_mode()
def negative_log_likelihood(model: Any, tokenizer: Any, text: str) -> tuple[float, int]:
    """Return −log p of a text's tokens behind the first, and how many these are."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return -float(scores[:-1].gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1


@torch.inference_mode()
def continuation(kind: Kind, model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Return what a model writes greedily for one prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
    )[0]
    tokens = (written[1:] if kind.is_pair else written[ids.shape[1] :]).tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
