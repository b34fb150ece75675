"""An adapter as an expert gives what its dense form gives: by every method, from the command line and from Python."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergelab as ml
from mergelab.engine.registry import get_method
from mergelab.errors import ModelError
from mergelab.models.adapted import on_base, open_model
from mergelab.models.encoder_decoder import NEW, newly_initialised
from mergelab.weights.writer import save_folder
from tests.adapters import made as small
from tests.conftest import Outcome
from tests.methods.toy import OF_WEIGHTS
from tests.standins import glue_table

Command = Callable[..., Outcome]
peft = pytest.importorskip("peft")

SUMS = ("soup", "task_arithmetic", "lines", "expo")
METHODS = [name for name in OF_WEIGHTS if not get_method(name).needs and get_method(name).max_experts != 1]


def dense(folder: Path, base: Path, adapter: Path) -> Path:
    """Write the dense form of an adapter, as the library would."""
    opened = open_model(on_base(base, adapter, where="a"))
    tensors = {name: opened.get(name).clone() for name in (*opened.keys(), *opened.aliases())}
    save_folder(tensors, folder, like=opened.folder, aliases=opened.aliases())
    return folder


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A classifier in float32, two adapters on it, and their dense forms."""
    settings = {"r": 3, "lora_alpha": 5, "task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]}
    found: dict[str, Path] = {}
    for seed, name in ((1, "a"), (2, "b")):
        made = small.made(tmp_path, small.bert(), peft.LoraConfig(**settings), dtype=torch.float32, seed=seed)
        found |= {"base": made.base, name: made.adapter}
    small.tokenizer(found["base"])
    for name in ("a", "b"):
        found[f"dense {name}"] = dense(tmp_path / f"dense_{name}", found["base"], found[name])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_what_it_gives_on_the_dense_experts(method: str, models: dict[str, Path]) -> None:
    function = getattr(ml, method)
    results = []
    for names in (("base", "a", "b"), ("base", "dense a", "dense b")):
        given = [str(models[name]) for name in names]
        results.append(function(given, task="text-classification", base_index=0))
    on_adapters, on_dense = ((made[0] if isinstance(made, list) else made).model.state_dict() for made in results)
    base = load_file(models["base"] / "model.safetensors")
    assert on_adapters.keys() == on_dense.keys()
    for name, tensor in on_adapters.items():
        if method in SUMS:  # made of the factors, so that the experts' own rounding is not in it
            torch.testing.assert_close(tensor, on_dense[name], rtol=0, atol=5e-7)
        else:
            assert torch.equal(tensor, on_dense[name]), name
    assert not torch.equal(on_adapters["classifier.weight"], base["classifier.weight"])


def test_one_adapter_with_weight_1_is_itself(
    models: dict[str, Path], tmp_path: Path, mergelab_command: Command
) -> None:
    command = [f"models.base={models['base']}", f"models.experts={{a: {models['a']}}}", "task=rte", "evaluate=false"]
    outcome = mergelab_command(*command, "method=task_arithmetic", "method.lambda=1", "output=out", "tracking=none")
    assert outcome.code == 0, outcome.err
    written = load_file(Path("out") / "model.safetensors")
    reference = load_file(models["dense a"] / "model.safetensors")
    assert written.keys() == reference.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-6)
    assert {"tokenizer.json", "config.json"} <= {path.name for path in Path("out").iterdir()}
    assert not any("adapter" in path.name for path in Path("out").iterdir())


def test_a_merge_from_the_command_line_is_that_of_the_dense_experts(
    models: dict[str, Path], mergelab_command: Command
) -> None:
    for out, (a, b) in {"out": ("a", "b"), "reference": ("dense a", "dense b")}.items():
        outcome = mergelab_command(
            f"models.base={models['base']}",
            f"models.experts={{a: {models[a]}, b: {models[b]}}}",
            *("task=rte", "evaluate=false", "method=ties", "method.density=0.3", f"output={out}", "tracking=none"),
        )
        assert outcome.code == 0, outcome.err
    written, reference = (load_file(Path(out) / "model.safetensors") for out in ("out", "reference"))
    assert written.keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in written.items())
    configs = [json.loads((Path(out) / "config.json").read_text()) for out in ("out", "reference")]
    assert configs[0] == configs[1]


def test_without_a_base_the_one_that_the_adapter_names_is_taken(models: dict[str, Path]) -> None:
    for name in ("a", "b"):
        file = models[name] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(models["base"])}))
    soup = ml.soup([str(models["a"]), str(models["b"])], task="text-classification")
    reference = ml.soup([str(models["dense a"]), str(models["dense b"])], task="text-classification")
    for name, tensor in soup.model.state_dict().items():
        torch.testing.assert_close(tensor, reference.model.state_dict()[name], rtol=0, atol=5e-7)


def test_a_head_on_a_base_without_one_has_the_adapters_outputs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    body = small.bert("BertForMaskedLM")
    body.save_pretrained(base)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"]
    )
    folder, wrapped = small.adapter(tmp_path / "adapter", classifier, config)
    opened = open_model(on_base(base, folder, where="a"))
    assert opened.config["architectures"] == ["BertForSequenceClassification"]
    assert opened.config["id2label"] == {str(at): f"LABEL_{at}" for at in range(5)}
    expected = small.outputs(wrapped, input_ids=small.INPUTS)
    torch.testing.assert_close(
        small.outputs(small.loaded(opened), input_ids=small.INPUTS), expected, rtol=1e-5, atol=1e-5
    )
    (folder / "config.json").write_text(json.dumps({"id2label": {str(at): f"label {at}" for at in range(5)}}))
    assert open_model(on_base(base, folder, where="a")).config["id2label"]["3"] == "label 3"


def test_a_head_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    base = tmp_path / "base"
    small.bert("BertForMaskedLM").save_pretrained(base)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    folder, _ = small.adapter(tmp_path / "adapter", classifier, config)
    with pytest.raises(ModelError, match=r"bert\.pooler\.dense\.weight.*neither in the adapter nor in its base"):
        on_base(base, folder, where="a")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_adapter_of_one_part_changes_that_part(part: str, tmp_path: Path) -> None:
    whole: Any = small.bert2bert()
    alone = getattr(whole, part)
    whole.save_pretrained(tmp_path / "base")
    folder, wrapped = small.adapter(tmp_path / "adapter", alone, peft.LoraConfig(r=2, target_modules=["query"]))
    opened = open_model(on_base(tmp_path / "base", folder, where="a", part=part))
    expected = wrapped.merge_and_unload().state_dict()
    stored = load_file(tmp_path / "base" / "model.safetensors")
    changed = 0
    for name in list(opened.keys()):
        own = expected[name.removeprefix(f"{part}.")] if name.startswith(f"{part}.") else stored[name]
        torch.testing.assert_close(opened.get(name), own.float(), rtol=1e-5, atol=1e-6)
        changed += int(not torch.equal(opened.get(name), stored[name]))
    assert changed == (2 if part == "encoder" else 4)  # and the decoder's cross-attention


def test_an_adapter_that_fits_both_parts_needs_to_say_which(tmp_path: Path) -> None:
    whole: Any = small.bert2bert()
    whole.save_pretrained(tmp_path / "base")
    folder, _ = small.adapter(tmp_path / "adapter", whole.encoder, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ModelError, match="fits both parts of its base; say which one with part"):
        on_base(tmp_path / "base", folder, where="a")


def test_what_no_checkpoint_had_stays_so_unless_the_adapter_trained_it(tmp_path: Path) -> None:
    whole: Any = small.bert2bert()
    whole.save_pretrained(tmp_path / "base")
    crossing = [name for name in load_file(tmp_path / "base" / "model.safetensors") if "crossattention" in name]
    (tmp_path / "base" / NEW).write_text(json.dumps(crossing))
    config = peft.LoraConfig(r=2, target_modules=r"decoder\..*crossattention\.self\.query")
    folder, _ = small.adapter(tmp_path / "adapter", whole, config)
    overlay = on_base(tmp_path / "base", folder, where="a")
    trained = {name for name in crossing if name.endswith("self.query.weight")}
    assert len(trained) == 2
    assert newly_initialised(overlay) == set(crossing) - trained


def test_adapters_are_measured_as_their_dense_forms(
    models: dict[str, Path], workplace: Path, mergelab_command: Command
) -> None:
    pq.write_table(glue_table("rte", 40, 1), workplace / "validation.parquet")
    scores = []
    for a, b in (("a", "b"), ("dense a", "dense b")):
        outcome = mergelab_command(
            f"models.base={models['base']}",
            f"models.experts={{a: {models[a]}, b: {models[b]}}}",
            *("task=rte", f"task.data_dir={workplace}", "method=ties", "tracking=none", "eval.preflight=false"),
        )
        assert outcome.code == 0, outcome.err
        scores.append(re.findall(r"│ (?:ties|base|\S*[ab]|\S+ of 2|…\S+) [^│]*│ *(\d\.\d{4})", outcome.out))
    assert len(scores[0]) >= 3, outcome.out
    assert scores[0] == scores[1]
