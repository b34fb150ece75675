from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergelab.errors import ModelError
from mergelab.models.architecture import architecture, open_classifier, open_generator
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.module import load_into
from tests.tasks.tiny import classifier
from tests.tasks.writers import KINDS, writer


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_writes_is_opened_to_pour_weights_into(kind: str, tmp_path: Path) -> None:
    model, _ = writer(kind)
    model.save_pretrained(tmp_path)
    assert architecture(tmp_path, kind).is_generator
    opened = open_generator(tmp_path, kind)
    assert type(opened) is type(model)
    assert not opened.training
    stored = open_checkpoint(tmp_path, kind)
    doubled = {name: 2 * stored.get(name) for name in list(stored.keys())}  # tied tensors are stored once
    load_into(opened, doubled)
    expected = dict(model.named_parameters())
    for name, parameter in opened.named_parameters():
        torch.testing.assert_close(parameter, 2 * expected[name])
    if kind != "llama":
        head = opened.get_output_embeddings()  # type: ignore[operator]
        embeddings = (opened.decoder if kind == "bert2bert" else opened).get_input_embeddings()  # type: ignore[operator, union-attr]
        assert head.weight is embeddings.weight


def test_a_classifier_is_no_model_that_writes(tmp_path: Path) -> None:
    model, _ = classifier("bert")
    model.save_pretrained(tmp_path)
    assert not architecture(tmp_path, "it").is_generator
    assert open_classifier(tmp_path, "it", 3).config.num_labels == 3  # type: ignore[union-attr]


def test_a_model_that_looks_ahead_cannot_write(tmp_path: Path) -> None:
    import transformers as t

    size = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    t.BertLMHeadModel(t.BertConfig(**size, is_decoder=True)).save_pretrained(tmp_path / "back")
    assert open_generator(tmp_path / "back", "it")
    t.BertLMHeadModel(t.BertConfig(**size)).save_pretrained(tmp_path / "ahead")
    with pytest.raises(ModelError, match=r"is_decoder is false in its config\.json: it looks ahead and cannot write"):
        open_generator(tmp_path / "ahead", "it")
