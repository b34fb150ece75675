"""What is recorded of a model is what transformers finds of the saved folder, example by example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.architectures.loading import (
    by_label,
    class_scores,
    continuation,
    labels,
    load,
    load_tokenizer,
    negative_log_likelihood,
)
from tests.architectures.numpy_merges import read_tensors
from tests.architectures.workshop import NEW_TOKENS, Workshop, pairs, prompts, texts
from tests.architectures.zoo import BY_NAME, CLASSIFIERS, GENERATORS, LABELS, head_names

pytestmark = pytest.mark.slow

DECODERS = [name for name in GENERATORS if not BY_NAME[name].is_pair]
TASK_LABELS = ("entailment", "not_entailment")


def folders(workshop: Workshop, name: str, merged: Path) -> dict[str, Path]:
    """The folders of the models that are measured as they are."""
    return {expert: workshop.models(name) / expert for expert in ("a", "b")} | {"merged": merged}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_recorded_logits_are_those_of_one_example_at_a_time(workshop: Workshop, name: str) -> None:
    kind, measured = BY_NAME[name], workshop.measured(name, "rte")
    recorded, scores = measured.predictions(), measured.scores()
    for which, folder in folders(workshop, name, measured.folder).items():
        model, tokenizer = load(kind, folder), load_tokenizer(folder)
        assert sorted(model.config.id2label.values()) == sorted(LABELS.values())
        alone = [class_scores(model, tokenizer, pair) for pair in pairs(workshop)]
        expected = np.array([[one[label] for label in TASK_LABELS] for one in alone])
        found = np.stack([recorded[which][f"output_{number}"] for number in range(2)], axis=1)
        assert np.ptp(expected, axis=0).min() > 0.01, "the model does not look at what it reads"
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=which)
        right = expected.argmax(axis=1) == np.array(recorded[which]["label"])
        assert scores[which]["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize("name", DECODERS)
def test_recorded_likelihoods_are_those_of_one_text_at_a_time(workshop: Workshop, name: str) -> None:
    kind, measured = BY_NAME[name], workshop.measured(name, "recipes")
    recorded, scores = measured.predictions(), measured.scores()
    for which, folder in folders(workshop, name, measured.folder).items():
        model, tokenizer = load(kind, folder), load_tokenizer(folder)
        alone = {text: negative_log_likelihood(model, tokenizer, text) for text in texts()}
        rows = zip(*(recorded[which][key] for key in ("text", "negative_log_likelihood", "tokens")), strict=True)
        for text, nll, tokens in rows:
            assert tokens == alone[text][1]
            assert nll == pytest.approx(alone[text][0], rel=1e-4), which
        nlls, counts = zip(*alone.values(), strict=True)
        assert scores[which]["token_perplexity"] == pytest.approx(np.exp(sum(nlls) / sum(counts)), rel=1e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_recorded_texts_are_those_of_one_prompt_at_a_time(workshop: Workshop, name: str) -> None:
    kind, measured = BY_NAME[name], workshop.measured(name, "prompts")
    written = measured.texts()
    for which, folder in folders(workshop, name, measured.folder).items():
        model, tokenizer = load(kind, folder), load_tokenizer(folder)
        alone = [continuation(kind, model, tokenizer, prompt, NEW_TOKENS) for prompt in prompts()]
        assert len(set(alone)) > 1, "the model does not look at what it reads"
        assert written[which] == alone, which


@pytest.mark.parametrize("name", [*CLASSIFIERS, *GENERATORS])
def test_what_is_measured_is_what_a_merge_to_disk_writes(workshop: Workshop, name: str) -> None:
    measured = workshop.measured(name, "rte" if name in CLASSIFIERS else "prompts")
    own, other = read_tensors(measured.folder), read_tensors(workshop.merged(name, "ties"))
    assert own.keys() == other.keys()
    head = head_names(BY_NAME[name], own)
    for key, value in own.items():
        if key in head:  # the outputs may be in the task's order or in the experts'
            first, second = measured.folder, workshop.merged(name, "ties")
            assert np.array_equal(by_label(value, labels(first)), by_label(other[key], labels(second))), key
        else:
            assert np.array_equal(value, other[key]), key
