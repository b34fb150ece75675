"""Ready sets of models: what they name, and a whole merge of encoder-decoders from a hub on loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergelab.config import CONF_DIR, ModelsConfig, check
from mergelab.models.references import parse_reference
from tests.forks import Forks
from tests.hub_server import HubServer
from tests.models import pairs

BERT, SUMMARISER = "google-bert/bert-base-uncased", "patrickvonplaten/bert2bert_cnn_daily_mail"
SETTINGS = {"num_beams": 4, "max_length": 20, "min_length": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 3}


@pytest.mark.parametrize(
    "file",
    sorted(each for each in (CONF_DIR / "models").glob("*.yaml") if each.stem != "custom"),
    ids=lambda file: file.stem,
)
def test_a_ready_set_is_named_as_its_file_and_every_reference_can_be_read(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    if "defaults" in content:
        pytest.skip("is another set with some experts left out")
    models = check(ModelsConfig, content, "models")
    assert models.name == file.stem
    references = [expert.reference for expert in models.experts.values()] + ([models.base] if models.base else [])
    assert all(model.repository for reference in references for model in parse_reference(reference).models)
    assert len(content["experts"]) == len(models.experts) >= 2


def as_of_2020(folder: Path) -> Path:
    """Store an encoder-decoder as its first users did: tied copies, position buffers, settings in ``config.json``."""
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.cls.predictions.decoder.weight"] = tensors["decoder.bert.embeddings.word_embeddings.weight"]
    tensors["decoder.cls.predictions.decoder.bias"] = tensors["decoder.cls.predictions.bias"]
    for part in ("encoder", "decoder.bert"):
        tensors[f"{part}.embeddings.position_ids"] = torch.arange(pairs.POSITIONS)[None]
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SETTINGS, "tie_encoder_decoder": False}))
    return folder


def test_the_summariser_and_its_warm_starts_come_from_the_hub_and_what_is_saved_writes(
    empty_hub: HubServer, tmp_path: Path, forks: Forks
) -> None:
    empty_hub.add_model(BERT, pairs.bert(tmp_path / "bert", 1, head="BertForPreTraining"))
    empty_hub.add_model(SUMMARISER, as_of_2020(pairs.bert2bert(tmp_path / "summariser", 2)))
    environment: dict[str, Any] = {**os.environ, **empty_hub.environment(tmp_path / "home")}
    environment |= {"MERGELAB_CACHE": str(tmp_path / "cache")}
    merge = ["models=bert2bert_summarization", "method=soup", "evaluate=false", "output=merged", "tracking=none"]
    done = forks.run("-m", "mergelab", *merge, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    start, tuned = (
        load_file(tmp_path / "bert" / "model.safetensors"),
        torch.load(tmp_path / "summariser" / "pytorch_model.bin"),
    )
    layer = "encoder.layer.1.output.dense.weight"
    for mine, its in ((f"encoder.{layer}", f"bert.{layer}"), (f"decoder.bert.{layer}", f"bert.{layer}")):
        torch.testing.assert_close(merged[mine], (2 * tuned[mine] + start[its]) / 3)  # two of three have learnt it
    cross = "decoder.bert.encoder.layer.1.crossattention.self.query.weight"
    torch.testing.assert_close(merged[cross], tuned[cross])

    from transformers import AutoTokenizer, EncoderDecoderModel

    model, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (EncoderDecoderModel, AutoTokenizer))
    assert {name: getattr(model.generation_config, name) for name in SETTINGS} == SETTINGS
    ids = tokenizer("this is a really long text .", return_tensors="pt").input_ids
    assert model.generate(ids, attention_mask=torch.ones_like(ids))[0, 0] == tokenizer.cls_token_id
    assert torch.equal(model.decoder.get_output_embeddings().weight, model.decoder.get_input_embeddings().weight)
