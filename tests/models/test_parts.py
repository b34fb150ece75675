"""Checkpoints in the place of an encoder-decoder's encoder or decoder: that part is theirs, all else is the base's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch
from mergelab.models.encoder_decoder import newly_initialised, warm_start
from mergelab.models.parts import ModelPart, with_part
from tests.models import pairs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def taken(base: Path, expert: Path, part: ModelPart) -> tuple[dict[str, Tensor], set[str]]:
    """The weights of the model with the part exchanged, and the names of those that are not the base's."""
    before, after = weights(base), weights(with_part(base, expert, part, where="models.experts.x"))
    assert before.keys() == after.keys()
    return after, {name for name in before if not torch.equal(before[name], after[name])}


def test_a_classifiers_encoder_comes_into_the_encoder_and_its_head_stays_behind(tmp_path: Path) -> None:
    base = pairs.bert2bert(tmp_path / "base", 1)
    expert = pairs.bert(tmp_path / "expert", 2, head="BertForSequenceClassification")
    after, changed = taken(base, expert, "encoder")
    assert changed == {name for name in after if name.startswith("encoder.")}
    own = weights(expert)
    assert all(torch.equal(after[name], own[name.replace("encoder.", "bert.", 1)]) for name in changed)


def test_what_a_masked_language_model_lacks_of_an_encoder_stays_the_bases(tmp_path: Path) -> None:
    base, expert = pairs.bert2bert(tmp_path / "base", 1), pairs.bert(tmp_path / "expert", 2)
    after, changed = taken(base, expert, "encoder")
    assert {name for name in after if name.startswith("encoder.")} - changed == {
        "encoder.pooler.dense.weight",
        "encoder.pooler.dense.bias",
    }


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2Model"])
def test_a_decoder_that_stood_alone_leaves_the_bases_cross_attention(tmp_path: Path, head: str) -> None:
    base = warm_start(pairs.bert(tmp_path / "a", 1), pairs.gpt2(tmp_path / "b", 2), where="models.base")
    after, changed = taken(base, pairs.gpt2(tmp_path / "expert", 3, head=head), "decoder")
    kept = {name for name in after if name.startswith("decoder.")} - changed
    assert kept == {name for name in after if "cross" in name}
    assert changed
    assert newly_initialised(with_part(base, tmp_path / "expert", "decoder", where="")) == newly_initialised(base)


def test_a_masked_language_model_as_decoder_brings_its_output_layer(tmp_path: Path) -> None:
    base, expert = pairs.bert2bert(tmp_path / "base", 1), pairs.bert(tmp_path / "expert", 2)
    after, changed = taken(base, expert, "decoder")
    assert {name for name in after if name.startswith("decoder.")} - changed == {n for n in after if "crossatt" in n}
    assert torch.equal(after["decoder.cls.predictions.bias"], weights(expert)["cls.predictions.bias"])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("make", [pairs.bert2bert, pairs.t5, pairs.bart])
def test_of_another_whole_model_one_part_is_taken(tmp_path: Path, part: ModelPart, make: object) -> None:
    base, expert = make(tmp_path / "base", 1), make(tmp_path / "expert", 2)  # type: ignore[operator]
    after, changed = taken(base, expert, part)
    assert changed == {name for name in after if name.removeprefix("model.").startswith(f"{part}.")}
    assert all(torch.equal(after[name], weights(expert)[name]) for name in changed)


def test_a_t5_encoder_alone_comes_into_a_t5(tmp_path: Path) -> None:
    after, changed = taken(pairs.t5(tmp_path / "a", 1), pairs.t5(tmp_path / "b", 2, head="T5EncoderModel"), "encoder")
    assert changed == {name for name in after if name.startswith("encoder.")}


def tied(folder: Path) -> Path:
    """Let an encoder-decoder share its layers, as older checkpoints do."""
    tensors = weights(folder)
    for name in list(tensors):
        if name.startswith("encoder."):
            twin = name.replace("encoder.", "decoder.bert.", 1)
            tensors |= {twin: tensors[name]} if twin in tensors else {}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    base, bert = pairs.bert2bert(tmp_path / "base", 1), pairs.bert(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"^models\.experts\.x\.part=encoder: the base is no encoder-decoder"):
        with_part(bert, bert, "encoder", where="models.experts.x")
    with pytest.raises(KeyMismatch, match=r"tensor names differ: 'models\.experts\.x' .*'the encoder of the base'"):
        with_part(base, pairs.gpt2(tmp_path / "gpt2"), "encoder", where="models.experts.x")
    with pytest.raises(KeyMismatch, match=r"'the encoder of the base' .*encoder\.layer\.2"):
        with_part(base, pairs.bert(tmp_path / "deep", num_hidden_layers=3), "encoder", where="models.experts.x")
    with pytest.raises(ShapeMismatch, match=r"float32\[40, 8\] in 'models.experts.x'"):
        with_part(base, pairs.bert(tmp_path / "narrow", hidden_size=8), "encoder", where="models.experts.x")
    with pytest.raises(ModelError, match="the encoder and the decoder of the base share their weights"):
        with_part(tied(base), bert, "encoder", where="models.experts.x")
