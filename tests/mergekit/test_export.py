"""Merges written as mergekit configs: what is in them, that they are the same merge, and what has no equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergelab.mergekit.settings import filter_of, pattern
from mergelab.mergekit.tokens import NoEqual
from tests.mergekit.configs import configs, placed
from tests.mergekit.made import LAYERS, exported, make_models, merged, merged_and_exported

UNLIKE = "linear, slices of unlike models"
IMPORTED = [title for title in configs(LAYERS["llama"]) if title != UNLIKE]
FIRST = {title.partition(",")[0]: title for title in reversed(IMPORTED)}.values()  # one of each method
OTHERS = [*(title for title in IMPORTED if title not in FIRST), "random masks"]
WITH_MASKS = {
    "merge_method": "dare_ties",
    "base_model": "base",
    "models": [{"model": "base"}, {"model": "a", "parameters": {"density": 0.4, "weight": 1.5}}, {"model": "b"}],
    "parameters": {"weight": 0.5, "density": 0.7},
    "dtype": "float32",
}
# Merges of this package's own config, with an entry of each that mergekit has: by hand, from its documentation.
OWN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "soup": (
        ["method=soup", "models.experts.a.weight=2"],
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": 2.0}}, {"model": "b", "parameters": {"weight": 1.0}}],
            "parameters": {"normalize": True},
            "dtype": "float32",
        },
    ),
    "of several rules the last counts, in mergekit the first filter": (
        [
            "method=task_arithmetic",
            "models.base=base",
            "method.weights={a:1,b:-0.5}",
            "method.rules=[{match:'*mlp*',lambda:0.1},{match:'*mlp.up*',lambda:0.2},{match:'*',weights:{a:3}}]",
            "save.dtype=bfloat16",
        ],
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [
                {"model": "base"},
                {"model": "a", "parameters": {"weight": 3}},
                {"model": "b", "parameters": {"weight": -0.5}},
            ],
            "parameters": {
                "lambda": [{"filter": "mlp.up", "value": 0.2}, {"filter": "mlp", "value": 0.1}, {"value": 0.3}],
                "normalize": False,
            },
            "dtype": "float32",
            "out_dtype": "bfloat16",
        },
    ),
    "slices of unlike models, their own settings before those of all": (
        [
            "method=dare",
            "models.base=base",
            "method.rescale=magnitudes",
            "method.density=0.9",
            "method.rules=[{match:'*attn*',density:0.8}]",
            "models.slices=[{sources:{base:[0,2],a:[0,2],b:[0,2]},method:{weights:{a:0.5},density:{a:0.5,b:1.0}}},"
            "{sources:{base:[1,4],b:[1,4]},method:{rules:[{match:'*mlp*',lambda:0.5}]}}]",
        ],
        {
            "merge_method": "dare_linear",
            "base_model": "base",
            "slices": [
                {
                    "sources": [
                        {"model": "base", "layer_range": [0, 2]},
                        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.5, "density": 0.5}},
                        {"model": "b", "layer_range": [0, 2], "parameters": {"weight": 1.0, "density": 1.0}},
                    ],
                    "parameters": {"lambda": 1.0, "normalize": False, "rescale": True},
                },
                {
                    "sources": [{"model": "base", "layer_range": [1, 4]}, {"model": "b", "layer_range": [1, 4]}],
                    "parameters": {
                        "weight": 1.0,
                        "density": [{"filter": "attn", "value": 0.8}, {"value": 0.9}],
                        "lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}],
                        "normalize": False,
                        "rescale": True,
                    },
                },
            ],
            "dtype": "float32",
        },
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, "llama")
    return folder


def of_models(home: Path, *arguments: str) -> list[str]:
    """The overrides of a merge of the folder's models."""
    own = [each.replace("models.base=base", f"models.base={home / 'base'}") for each in arguments]
    given = [] if any(each.startswith("models.base=") for each in own) else ["models.base=null"]
    return ["models=custom", "models.name=m", f"models.experts={{a:{home / 'a'},b:{home / 'b'}}}", *given, *own]


@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
@pytest.mark.parametrize("title", [*FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_the_import_of_an_export_is_the_same_merge_bit_by_bit(title: str, home: Path, tmp_path: Path) -> None:
    given = WITH_MASKS if title == "random masks" else configs(LAYERS["llama"])[title]
    first, second = tmp_path / "first.yml", tmp_path / "second.yml"
    first.write_text(placed(given, home))
    before, text = merged_and_exported(f"mergekit={first}")
    second.write_text(text)
    after, again = merged_and_exported(f"mergekit={second}")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert again == text


@pytest.mark.parametrize("title", OWN)
def test_a_merge_of_our_own_config_is_mergekits_config(title: str, home: Path, tmp_path: Path) -> None:
    given, expected = OWN[title]
    arguments = of_models(home, *given)
    before, text = merged_and_exported(*arguments)
    assert yaml.safe_load(text.replace(f"{home}/", "")) == expected
    (tmp_path / "merge.yml").write_text(text)
    after = merged(f"mergekit={tmp_path / 'merge.yml'}")
    assert all(before[name].equal(after[name]) for name in before)


def test_the_command_at_its_head_has_the_seed_of_random_masks(home: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yml", tmp_path / "second.yml"
    first.write_text(placed(WITH_MASKS, home))
    second.write_text(exported(f"mergekit={first}", "seed=3"))
    assert second.read_text().splitlines()[0].endswith("mergelab.mergekit FILE OUT seed=3")
    before, after = merged(f"mergekit={first}", "seed=3"), merged(f"mergekit={second}", "seed=3")
    assert all(before[name].equal(after[name]) for name in before)
    assert not all(before[name].equal(other) for name, other in merged(f"mergekit={second}").items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["method=median"], "method=median: mergekit has no such method"),
        (
            ["method=ties", "models.base=base"],
            "method.scope=model, method.tie_break=majority, method.weights_stage=reduce: mergekit's ties has",
        ),
        (["method=dare", "models.base=base"], "method.rescale=true: mergekit has false, magnitudes alone"),
        (["method=model_stock", "models.base=base"], "method.clamp=true: mergekit's model_stock has clamp=false alone"),
        (
            ["method=task_arithmetic", "models.base=base", "method.rules=[{match:'model.norm*',lambda:1}]"],
            "method.rules: 'model.norm*' is no filter of mergekit's",
        ),
        (
            ["method=task_arithmetic", "models.base=base", "method.rules=[{layers:[0,2],lambda:1}]"],
            "method.rules: mergekit has no ranges of layers but slices ([0, 2])",
        ),
        (
            ["method=task_arithmetic", "models.base=base", "method.lambda=[0.2,0.6]"],
            "method.lambda=[0.2, 0.6]: what follows the layers has a list's last number",
        ),
        (
            [
                "method=passthrough",
                "models.slices=[{sources:{a:[0,2]}},{sources:{b:[2,4]}}]",
                "method.scale=[1,2]",
                "method.rules_as=mergekit",
            ],
            "method.scale=[1, 2]: runs over all layers, in mergekit over each slice's",
        ),
        (
            ["method=soup", "models.slices=[{sources:{a:[0,2]}},{sources:{a:[2,4],b:[2,4]}}]"],
            "models.slices.s2: has more sources than the first slice",
        ),
        (
            ["method=soup", "models.passthrough=['*norm*']"],
            "models.passthrough=['*norm*']: mergekit merges every tensor",
        ),
        (["method=soup", "models.base=base", "save.tokenizer=base"], "save.tokenizer=base: in mergekit"),
    ],
)
def test_what_has_no_equal_is_named_in_one_line(given: list[str], said: str, home: Path) -> None:
    with pytest.raises(NoEqual) as error:
        exported(*of_models(home, *given))
    assert str(error.value).startswith(said)
    assert len(str(error.value)) <= 400


def test_models_of_several_dtypes_have_no_equal_unless_one_is_chosen(home: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = load_file(home / name / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text((home / name / "config.json").read_text())
    with pytest.raises(NoEqual, match="the merged tensors are of several dtypes"):
        exported(*of_models(tmp_path, "method=soup"))
    text = exported(*of_models(tmp_path, "method=soup", "save.dtype=float16"))
    assert yaml.safe_load(text)["out_dtype"] == "float16"


def test_classifiers_have_heads_that_mergekit_would_merge(tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=1)
    for name in ("a", "b"):
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
    with pytest.raises(NoEqual, match=r"models\.head=average: mergekit merges classifiers' heads as every tensor"):
        exported(*of_models(tmp_path, "method=soup", "task=rte"))


def test_a_folder_with_a_sign_in_its_name_is_written_in_parts(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models+v@2"
    folder.mkdir()
    for name in ("base", "a", "b"):
        (folder / name).symlink_to(home / name)
    (tmp_path / "merge.yml").write_text(text := exported(*of_models(folder, "method=soup")))
    assert yaml.safe_load(text)["models"][0]["model"] == {"model": {"path": str(folder / "a")}}
    before, after = merged(*of_models(home, "method=soup")), merged(f"mergekit={tmp_path / 'merge.yml'}")
    assert all(before[name].equal(after[name]) for name in before)


def test_filters_are_the_inverse_of_patterns() -> None:
    for text in ("mlp", "x[0]*", "[[]", "a?b"):
        assert filter_of(pattern(text)) == text
    for other in ("*", "**", "mlp", "*mlp", "*m?p*", "*[mk]lp*", "model.*.mlp*"):
        assert filter_of(other) is None
