"""Methods that learn from data, from Python: batches for each expert, with modules, pipelines and folders alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, pipeline

import mergelab as ml
from mergelab.errors import ConfigError, DataError
from tests.standins import NAMED_LABELS, OTHER_LABEL_ORDER

Batches = list[dict[str, Tensor]]
SETTINGS: dict[str, dict[str, Any]] = {
    "fisher": {"estimator": "empirical", "normalize": False, "floor": 1e-9},
    "regmean": {},
    "zipit": {},
    "adamerging": {"steps": 2},
}


@pytest.fixture(scope="module")
def folders(bert_checkpoints: Mapping[str, Path]) -> list[str]:
    return [str(bert_checkpoints[name]) for name in (NAMED_LABELS, OTHER_LABEL_ORDER)]


@pytest.fixture(scope="module")
def modules(folders: list[str]) -> list[nn.Module]:
    return [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in folders]


def batches(seed: int, count: int = 3) -> Batches:
    """Examples of unlike lengths, padded on the right, with labels."""
    generator, found = torch.Generator().manual_seed(seed), []
    for size in range(2, 2 + count):
        lengths = torch.randint(2, 9, (size,), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(5, 30, mask.shape, generator=generator) * mask
        labels = torch.randint(0, 2, (size,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


EXAMPLES = [batches(1), batches(2)]


def cut(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    return {key: value[:count] for key, value in batch.items()}


def squared_gradients(module: nn.Module, examples: Batches) -> dict[str, Tensor]:
    """Sum the squares of each example's own gradient of its label's log-probability, one example at a time."""
    total = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for batch in examples:
        for row, label in enumerate(batch["labels"]):
            length = int(batch["attention_mask"][row].sum())
            module.zero_grad()
            logits = module(input_ids=batch["input_ids"][row : row + 1, :length]).logits
            torch.log_softmax(logits, dim=-1)[0, label].backward()
            for name, value in module.named_parameters():
                if value.grad is not None:
                    total[name] += value.grad**2
    module.zero_grad()
    return {name: value / sum(len(batch["labels"]) for batch in examples) for name, value in total.items()}


def test_fisher_weights_are_those_of_each_experts_own_examples_and_labels(modules: list[nn.Module]) -> None:
    merged = ml.fisher(modules, examples=EXAMPLES, **SETTINGS["fisher"])
    found = [squared_gradients(module, examples) for module, examples in zip(modules, EXAMPLES, strict=True)]
    for name, value in merged.named_parameters():
        flip = name.startswith("classifier.")  # the last one's labels are in the other order
        values = [module.get_parameter(name).detach() for module in modules]
        weights = [each[name].double().clamp(min=1e-9) for each in found]
        first, weight = (values[0].flip(0), weights[0].flip(0)) if flip else (values[0], weights[0])
        expected = (weight * first + weights[1] * values[1]) / (weight + weights[1])
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_modules_pipelines_and_folders_give_the_same(name: str, folders: list[str], modules: list[nn.Module]) -> None:
    function, settings = getattr(ml, name), dict(SETTINGS[name])
    given: list[list[Any]] = [
        modules,
        [pipeline("text-classification", m, tokenizer=folders[0]) for m in modules],
        folders,
    ]
    if name == "adamerging":
        given = [[models[0], *models] for models in given]
    of_modules, of_pipelines, of_folders = (
        function(models, task="text-classification", examples=EXAMPLES, **settings) for models in given
    )
    before = modules[1].state_dict()
    merged = of_modules.state_dict()
    assert any(not torch.equal(before[key], value) for key, value in merged.items())
    for key, value in merged.items():
        assert torch.equal(of_pipelines.model.state_dict()[key], value), key
        # A file's tensors are aligned otherwise in memory, and some processors sum gradients in another order then.
        rounding = {"rtol": 1e-6, "atol": 1e-9} if name == "adamerging" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(of_folders.model.state_dict()[key], value, **rounding)


def test_the_first_samples_count(modules: list[nn.Module]) -> None:
    first = [[cut(own[0], 2), cut(own[1], 1)] for own in EXAMPLES]
    few, expected, all_of_them = (
        ml.regmean(modules, examples=given, **settings).state_dict()
        for given, settings in ((EXAMPLES, {"samples": 3}), (first, {}), (EXAMPLES, {}))
    )
    assert all(torch.equal(expected[key], value) for key, value in few.items())
    assert any(not torch.equal(value, few[key]) for key, value in all_of_them.items())


UNLABELLED = [[{key: value for key, value in batch.items() if key != "labels"} for batch in own] for own in EXAMPLES]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fisher", {}, "fisher learns from examples: give batches for each expert"),
        (
            "greedy_soup",
            {},
            "greedy_soup needs examples that select: run it with python -m mergelab method=",
        ),
        ("fisher", {"examples": EXAMPLES[:1]}, "examples: there are 1 entries for 2 experts"),
        ("fisher", {"examples": {"a": EXAMPLES[0]}}, "examples: must be a list with an entry for each expert"),
        ("fisher", {"examples": [EXAMPLES[0], []]}, r"examples\[1\]: has no batches"),
        ("fisher", {"examples": [["text"], EXAMPLES[1]]}, r"examples\[0\]: a batch must be a mapping"),
        ("fisher", {"examples": [[{"input_ids": torch.ones(2, 3), "labels": torch.ones(1)}], []]}, "one row for each"),
        ("fisher", {"examples": UNLABELLED, "estimator": "empirical"}, r"needs labels, and a batch of examples\[0\]"),
        ("regmean", {"examples": EXAMPLES, "vocab": "union"}, "vocab='union': not together with examples"),
        ("soup", {"examples": EXAMPLES}, "examples: soup learns from none"),
    ],
)
def test_bad_examples_are_named(name: str, arguments: dict[str, Any], said: str, modules: list[nn.Module]) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        getattr(ml, name)(modules, **arguments)


def test_models_that_cannot_be_run_are_named(modules: list[nn.Module], folders: list[str]) -> None:
    with pytest.raises(ConfigError, match="is a state dict; give modules"):
        ml.fisher([module.state_dict() for module in modules], examples=EXAMPLES)
    with pytest.raises(ConfigError, match="task='text-classification'"):
        ml.fisher(folders, examples=EXAMPLES)
