"""Models that store one network in different layouts are merged, and the merge loads in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import layouts
from tests.conftest import Outcome
from tests.standins import glue_table

Command = Callable[..., Outcome]


def _models(folder: Path, name: str, *saved: layouts.Layout) -> list:
    models = [layouts.build(name, seed) for seed in range(3)]
    for model, layout, at in zip(models, saved, ("base", "a", "b"), strict=True):
        layout(model, folder / at)
    return models


FILES, MEMORY = layouts.in_files, layouts.in_memory


@pytest.mark.parametrize(
    "saved", [(FILES, MEMORY, MEMORY), (MEMORY, FILES, FILES), (FILES, FILES, MEMORY), (FILES,) * 3]
)
@pytest.mark.parametrize("name", layouts.MODELS)
def test_a_merge_of_any_layouts_is_numpys_and_loads_whole(name, saved, mergelab_command: Command, workplace) -> None:
    models = _models(workplace, name, *saved)
    outcome = mergelab_command(
        "method=task_arithmetic",
        "method.lambda=0.5",
        "task=prompts",
        "models.base=./base",
        "models.experts={a: ./a, b: ./b}",
        "evaluate=false",
        "output=out",
        "tracking=none",
    )
    assert outcome.code == 0, outcome.err
    merged, info = type(models[0]).from_pretrained(workplace / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    base, a, b = ({key: value.numpy() for key, value in model.state_dict().items()} for model in models)
    for key, value in merged.state_dict().items():
        expected = base[key] + 0.5 * ((a[key] - base[key]) + (b[key] - base[key]))
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("saved", [(FILES, FILES, FILES), (MEMORY, FILES, MEMORY)])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llava", "gemma3"])
def test_what_a_merge_writes_is_what_transformers_writes_with_it(
    name, saved, mergelab_command: Command, workplace
) -> None:
    models = _models(workplace, name, *saved)
    tokenizer = layouts.tokenizer()
    for at in ("base", "a", "b"):
        tokenizer.save_pretrained(workplace / at)
    outcome = mergelab_command(
        "method=soup",
        "task=prompts",
        "task.prompts=[w5 w6 w7]",
        "task.decoding.max_new_tokens=4",
        "models.base=./base",
        "models.experts={a: ./a, b: ./b}",
        "output=out",
        "tracking=none",
        "eval.cache=false",
    )
    assert outcome.code == 0, outcome.err
    inputs = tokenizer("w5 w6 w7", return_tensors="pt", return_token_type_ids=False)
    printed = " ".join(outcome.out.replace("│", " ").split())
    for at in ("base", "a", "b", "out"):
        model = type(models[0]).from_pretrained(workplace / at).eval()
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, 3:]
        assert tokenizer.decode(written, skip_special_tokens=True) in printed, at


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_a_method_that_learns_from_data_sees_every_tensor_in_any_layout(
    kind, method, mergelab_command: Command, workplace, monkeypatch
) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    size = layouts.EXPERTS["mixtral" if kind == "Mixtral" else "qwen3-moe"][2]
    labels = {0: "entailment", 1: "not_entailment"}
    config = getattr(transformers, f"{kind}Config")(**size, id2label=labels, label2id={v: k for k, v in labels.items()})
    for seed, at in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        for layout in (FILES, MEMORY):
            layout(model, workplace / layout.__name__ / at)
            layouts.tokenizer().save_pretrained(workplace / layout.__name__ / at)
    (workplace / "data").mkdir()
    for split in ("train", "validation"):
        pq.write_table(glue_table("rte", 24, 1), workplace / "data" / f"{split}.parquet")
    merged = []
    for layout in (FILES, MEMORY):
        folder = f"./{layout.__name__}"
        outcome = mergelab_command(
            f"method={method}",
            "task=rte",
            "task.data_dir=data",
            f"models.base={folder}/base",
            f"models.experts={{a: {folder}/a, b: {folder}/b}}",
            "evaluate=false",
            f"output=out-{layout.__name__}",
            "tracking=none",
        )
        assert outcome.code == 0, outcome.err
        merged.append(type(model).from_pretrained(workplace / f"out-{layout.__name__}").state_dict())
    for name, value in merged[0].items():
        torch.testing.assert_close(value, merged[1][name], rtol=0, atol=1e-6, msg=name)


AROUND = [
    ("", "module.", ""),
    ("module.", "", "_orig_mod."),
    ("model.", "module._orig_mod.", "base_model.model."),
    ("model.", "model.", "model."),
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["mixtral", "llava", "tied llava"])
def test_wrappers_in_some_models_or_in_all_leave_a_merge_that_loads(
    name, around, mergelab_command: Command, workplace
) -> None:
    models = _models(workplace, name, FILES, FILES, FILES)
    for prefix, at in zip(around, ("base", "a", "b"), strict=True):
        file = workplace / at / "model.safetensors"
        save_file({prefix + key: value for key, value in load_file(file).items()}, file, {"format": "pt"})
    experts = ["models.base=./base", "models.experts={a: ./a, b: ./b}"]
    outcome = mergelab_command("method=soup", "task=prompts", *experts, "evaluate=false", "output=out", "tracking=none")
    assert outcome.code == 0, outcome.err
    merged, info = type(models[0]).from_pretrained(workplace / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    a, b = (model.state_dict() for model in models[1:])
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, (a[key] + b[key]) / 2, msg=key)
