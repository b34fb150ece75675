"""Layers of models stacked: the tensors, the config, the text that transformers generates, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergelab.errors import ConfigError, ModelError
from mergelab.experiment.locate import locate
from mergelab.models.references import Adapted, LayerStack, local_folder, parse_reference
from mergelab.models.stacked import open_stack, stacked
from tests.conftest import Outcome
from tests.mergekit.made import make_models, merged, planned


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    make_models(home, "llama")
    return home


def sources(**layers: Any) -> str:
    return "{sources:{" + ",".join(f"{name}:{list(each)}" for name, each in layers.items()) + "}}"


def given(models: Path, *names: str, base: bool = False) -> list[str]:
    experts = ",".join(f"{name}:'{models / name}'" for name in names)
    return ["models=custom", f"models.experts={{{experts}}}", *([f"models.base='{models / 'base'}'"] if base else [])]


def test_layers_are_numbered_anew_and_the_ends_are_those_of_the_first_and_the_last(models: Path) -> None:
    a, b = (load_file(models / name / "model.safetensors") for name in "ab")
    slices = f"models.slices={{low:{sources(a=[0, 3])},high:{sources(b=[1, 4])}}}"
    found = merged(*given(models, "a", "b"), "method=passthrough", slices)
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], b["model.norm.weight"])
    for layer, (model, own) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for key in (key for key in model if key.startswith(f"model.layers.{own}.")):
            name = key.replace(f".layers.{own}.", f".layers.{layer}.")
            assert torch.equal(found[name], model[key]), name
    assert len({name.split(".")[2] for name in found if ".layers." in name}) == 6


def test_a_slice_has_settings_of_its_own_and_lists_run_over_it(models: Path) -> None:
    base, a, b = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    slices = (
        "models.slices={low:{sources:{base:[0,2],a:[0,2],b:[0,2]},method:{lambda:[0.2,0.4]}},"
        "high:{sources:{base:[1,4],a:[1,4],b:[1,4]},method:{weights:{b:0.5},rules:[{match:'*mlp*',lambda:2.0}]}}}"
    )
    found = merged(*given(models, "a", "b", base=True), "method=task_arithmetic", "method.lambda=1.0", slices)

    def by_hand(key: str, scale: float, weight: float) -> torch.Tensor:
        return base[key] + scale * ((a[key] - base[key]) + weight * (b[key] - base[key]))

    part = "model.layers.{}.{}.weight"
    for new, old, name, scale, weight in [
        (0, 0, "mlp.up_proj", 0.2, 1.0),
        (1, 1, "self_attn.q_proj", 0.4, 1.0),
        (2, 1, "self_attn.q_proj", 1.0, 0.5),
        (4, 3, "mlp.up_proj", 2.0, 0.5),
    ]:
        expected = by_hand(part.format(old, name), scale, weight)
        torch.testing.assert_close(found[part.format(new, name)], expected, rtol=0, atol=1e-6)
    head = by_hand("lm_head.weight", 1.0, 0.5)
    torch.testing.assert_close(found["lm_head.weight"], head, rtol=0, atol=1e-6)


def test_what_is_written_loads_and_computes_what_the_layers_do(
    models: Path, tmp_path: Path, mergelab_command: Callable[..., Outcome]
) -> None:
    slices = f"models.slices={{low:{sources(a=[0, 3])},high:{sources(b=[2, 4])}}}"
    command = [*given(models, "a", "b"), "method=passthrough", slices, "evaluate=false", "output=out", "tracking=none"]
    outcome = mergelab_command(*command)
    assert outcome.code == 0, outcome.err
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 5
    one, other = (transformers.LlamaForCausalLM.from_pretrained(models / name) for name in "ab")
    one.model.layers = torch.nn.ModuleList([*one.model.layers[:3], *other.model.layers[2:]])
    one.model.norm, one.lm_head = other.model.norm, other.lm_head
    one.model.config.num_hidden_layers = 5
    for at, layer in enumerate(one.model.layers):
        layer.self_attn.layer_idx = at
    tokens = torch.tensor([[1, 5, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, one(tokens, use_cache=False).logits)
        assert loaded.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 8)


def test_lists_with_an_entry_for_each_layer_are_those_of_the_layers(models: Path, tmp_path: Path) -> None:
    for name, kinds in (("a", ["x", "x", "y", "z"]), ("b", ["p", "q", "r", "s"])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(models / name / "model.safetensors")
        config = json.loads((models / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_types": kinds, "other": [1, 2, 3, 4]}))
    made = stacked([(tmp_path / "a", 1, 3), (tmp_path / "b", 0, 4), (tmp_path / "a", 3, 4)], "models.base")
    config = json.loads((made / "config.json").read_text())
    assert config["layer_types"] == ["x", "y", "p", "q", "r", "s", "z"]
    assert config["num_hidden_layers"] == 7
    assert config["other"] == [1, 2, 3, 4]
    whole = open_stack(made, "stack")
    assert whole.content_hash() != open_stack(stacked([(tmp_path / "a", 0, 4)], ""), "other").content_hash()


def test_a_reference_may_be_a_stack_or_have_an_adapter(models: Path) -> None:
    plan = planned(
        f"models.experts={{s:{{stack:[{{model:'{models / 'a'}',layers:[0,2]}},"
        f"{{model:'{models / 'b'}',layers:[3,4]}}]}}}}",
        "models.base=null",
        "method=soup",
    )
    located = locate(plan.config.models, "local", [])
    assert json.loads((located.experts[0].folder / "config.json").read_text())["num_hidden_layers"] == 3
    assert isinstance(parse_reference("org/a@v1+org/b"), Adapted)
    assert isinstance(parse_reference(plan.config.models.experts["s"].reference), LayerStack)
    with pytest.raises(ModelError, match=r"models\.base: layers 2 to 9 of .*a: it has 4 layers"):
        local_folder(LayerStack(((parse_reference(str(models / "a")), 2, 9),)), "models.base")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        ("{s:{sources:{a:[0,2],z:[0,2]}}}", "models.slices.s.sources.z: no model is called so"),
        ("{s:{sources:{a:[0,2],b:[0,3]}}}", "all must have equally many layers"),
        ("{s:{sources:{a:[2,2]}}}", "each must be [FIRST, AFTER_LAST], with a layer between them"),
        ("{s:{sources:{a:[0,2]}}}", "models.experts.b: is in none of models.slices"),
        ("{s:{source:{a:[0,2]}}}", "models.slices.s.source: no such key; did you mean 'sources'"),
        (
            "{s:{sources:{a:[0,2],b:[0,2],base:[0,2]}},t:{sources:{a:[0,2],b:[0,2]}}}",
            "models.slices.t.sources: needs base",
        ),
        ("{s:{sources:{a:[0,2],b:[0,2]},method:{rules:[{layers:[0,1],t:1}]}}}", "leave layers out"),
    ],
)
def test_slices_that_cannot_be_are_one_line(models: Path, slices: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        planned(*given(models, "a", "b", base=True), "method=soup", f"models.slices={slices}")


@pytest.mark.parametrize(("key", "value"), [("weight", "0.3"), ("task", "rte"), ("labels", "[no,yes]")])
def test_an_experts_own_settings_are_refused_where_its_layers_are_stacked(models: Path, key: str, value: str) -> None:
    unlike = "models.slices={s:{sources:{a:[0,2]}},t:{sources:{b:[0,2]}}}"
    experts = f"models.experts={{a:{{reference:{models / 'a'},{key}:{value}}},b:{models / 'b'}}}"
    with pytest.raises(ConfigError, match=rf"^models\.experts\.a\.{key}: cannot be kept"):
        planned(experts, "method=passthrough", unlike)


def test_models_of_other_sizes_are_not_stacked(models: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=r"models\.base: hidden_size is 16 in a and 8 in small"):
        stacked([(models / "a", 0, 2), (tmp_path / "small", 0, 2)], "models.base")
