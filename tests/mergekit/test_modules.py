"""Configs of mergekit with modules: what becomes of them, known values, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.mergekit.__main__ import main
from mergelab.mergekit.commands import read
from mergelab.mergekit.module_rules import Region
from tests.mergekit.configs import PAIR, PLAIN, config, model, modules, placed
from tests.mergekit.made import MODULES, make_models, merged, planned

T5 = MODULES["t5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    for kind in (*MODULES, "llama"):
        make_models(folder / kind, kind)
    return folder


def written(content: dict[str, Any], folder: Path) -> Path:
    """Write a config of the models of a folder."""
    file = folder / "merge.yml"
    file.write_text(placed(content, folder))
    return file


def of(content: dict[str, Any], folder: Path) -> Mapping[str, Tensor]:
    return merged(f"mergekit={written(content, folder)}")


def stored(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(folder / name / "model.safetensors") for name in ("base", "a", "b", "c")}


def test_each_module_has_its_own_models_and_numbers(home: Path) -> None:
    bodies = {
        "encoder": {"models": PAIR, "parameters": {"weight": [{"filter": "DenseReluDense", "value": 3}, {"value": 1}]}},
        "decoder": [model("b", weight=1), model("c", weight=3)],
        "shared": [model("a", weight=0.25)],
    }
    found, given = of(modules("linear", bodies, normalize=False), home / "t5"), stored(home / "t5")
    assert found.keys() == given["a"].keys()
    for name, tensor in found.items():
        a, b, c = (given[each][name] for each in "abc")
        if name.startswith("encoder."):
            expected = (a + b) * (3 if "DenseReluDense" in name else 1)
        else:
            expected = b + 3 * c if name.startswith("decoder.") else a / 4
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


def test_passthrough_takes_each_module_of_a_model_bit_by_bit(home: Path) -> None:
    sources = dict(zip(MODULES["bart"], "abc", strict=True))
    content = modules("passthrough", {name: [model(source)] for name, source in sources.items()})
    found, given = of(content, home / "bart"), stored(home / "bart")
    for name, tensor in found.items():
        source = next((source for module, source in sources.items() if name.startswith(f"{module}.")), "c")
        assert tensor.equal(given[source][name]), name


def test_a_list_runs_over_the_layers_of_its_module(home: Path) -> None:
    weights = {"encoder": [0, 1], "decoder": 0.5, "shared": [1, 0]}
    bodies = {name: [model("a", weight=weights[name])] for name in T5}
    found, given = of(modules("task_arithmetic", bodies, "base"), home / "t5"), stored(home / "t5")
    expected = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": 0.0,
        "encoder.block.1.layer.0.SelfAttention.q.weight": 0.5,
        "encoder.block.2.layer.0.SelfAttention.q.weight": 1.0,
        "encoder.final_layer_norm.weight": 0.0,
        "decoder.block.1.layer.0.SelfAttention.q.weight": 0.5,
        "shared.weight": 1.0,
    }
    for name, weight in expected.items():
        base = given["base"][name]
        torch.testing.assert_close(found[name], base + weight * (given["a"][name] - base), rtol=0, atol=1e-6)


def test_a_module_inside_another_counts_first(home: Path) -> None:
    sources = dict(zip(MODULES["qwen2_5_vl"], "abc", strict=True))
    content = modules("passthrough", {name: [model(source)] for name, source in sources.items()})
    found, given = of(content, home / "qwen2_5_vl"), stored(home / "qwen2_5_vl")
    for name, source in {
        "visual.merger.mlp.0.weight": "c",
        "visual.blocks.1.norm1.weight": "a",
        "lm_head.weight": "b",
    }.items():
        assert found[name].equal(given[source][name])


def test_slices_of_a_module_are_its_layers_in_their_places(home: Path) -> None:
    ends = [[model("b", [0, 1])], [model("c", [1, 2])]]
    content = modules(
        "passthrough",
        {"encoder": [model("a")], "decoder": {"slices": [{"sources": each} for each in ends]}, "shared": [model("a")]},
    )
    found, given = of(content, home / "t5"), stored(home / "t5")
    for name, tensor in found.items():
        source = "a" if not name.startswith("decoder.") else "b" if ".block.0." in name else "c"
        assert tensor.equal(given[source][name]), name


def test_a_list_of_the_whole_config_runs_over_each_slice_of_a_module(home: Path) -> None:
    decoder = {"slices": [{"sources": [model("base", [at, at + 1]), model("a", [at, at + 1])]} for at in (0, 1)]}
    bodies = {"encoder": [model("a")], "decoder": decoder, "shared": [model("a")]}
    content = modules("task_arithmetic", bodies, "base", weight=1, **{"lambda": [0.5, 1]})
    found, given = of(content, home / "t5"), stored(home / "t5")
    query = "block.{}.layer.0.SelfAttention.q.weight"
    expected = {f"encoder.{query.format(at)}": number for at, number in enumerate((0.5, 0.75, 1))}
    expected |= {f"decoder.{query.format(at)}": 1 for at in (0, 1)} | {"decoder.final_layer_norm.weight": 0.5}
    for name, number in expected.items():
        base = given["base"][name]
        torch.testing.assert_close(found[name], base + number * (given["a"][name] - base), rtol=0, atol=1e-6)


def test_what_all_modules_share_is_written_once(home: Path) -> None:
    parameters = {"encoder": {"weight": 0.5}, "decoder": {}, "shared": {}}
    bodies = {name: {"models": PAIR, "parameters": parameters[name]} for name in T5}
    content = modules("ties", bodies, "base", weight=1, density=[{"filter": "wi_0", "value": 0.2}, {"value": 0.3}])
    found = read(str(written(content, home / "t5")))
    assert found.method == {
        "name": "ties",
        "scope": "tensor",
        "tie_break": "positive",
        "weights_stage": "elect",
        "lambda": 1.0,
        "reduce": "mean",
        "density": 0.3,
        "weights": {"a": 1.0, "b": 1.0},
        "rules": [
            {"match": "encoder.*", "weights": {"a": 0.5, "b": 0.5}},
            {"match": "decoder.*", "weights": {"a": 1.0, "b": 1.0}},
            {"match": "*wi_0*", "density": 0.2},
        ],
        "rules_as": "mergekit",
    }


def test_a_filter_that_begins_in_the_modules_name_is_found_there() -> None:
    names = ("encoder.block.0.wi.weight", "encoder.block.1.wo.weight", "encoder.norm.weight")
    place = Region(("encoder.",), names)

    def matches(text: str) -> list[str]:
        return [rule["match"] for rule in place.rules(f"*{text}*", {})]

    assert matches("wi") == ["encoder.*wi*"]
    assert matches("code") == ["encoder.*"]
    assert matches("coder.block.1") == ["encoder.block.1*"]
    assert matches(".wo") == ["encoder.*.wo*"]
    assert matches(".") == ["encoder.*"]
    assert matches("r.norm") == ["encoder.norm*"]
    assert matches("none") == ["encoder.*none*"]


def test_the_only_module_of_a_model_is_called_default(home: Path) -> None:
    whole = config("linear", PAIR, weight=1)
    found = of(modules("linear", {"default": PAIR}, weight=1), home / "llama")
    expected = of(whole, home / "llama")
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    stack = {"slices": [{"sources": [model("a", [0, 2])]}, {"sources": [model("b", [1, 4])]}]}
    slices = read(str(written(modules("passthrough", {"default": stack}), home / "llama"))).models["slices"]
    assert [each["sources"] for each in slices.values()] == [{"a": [0, 2]}, {"b": [1, 4]}]


def test_default_needs_no_model_and_other_modules_one(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("{merge_method: linear, modules: {default: {models: [{model: org/a}]}}, parameters: {weight: 1}}")
    assert read(str(file)).models["experts"] == {"a": "org/a"}
    file.write_text(file.read_text().replace("default", "encoder"))
    with pytest.raises(ConfigError, match="modules: what they are is read from a model, and none of org/a is there"):
        read(str(file))


def test_the_modules_are_read_from_the_hub_where_no_model_is_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergelab.models import hub

    asked = []

    def fetch(repository: str, revision: str | None) -> Path:
        asked.append((repository, revision))
        return home / "t5" / "a"

    monkeypatch.setattr(hub, "fetch", fetch)
    file = home / "hub.yml"
    bodies = {name: [{"model": "mergelab-tests/absent@v1"}] for name in T5}
    file.write_text(yaml.safe_dump(modules("linear", bodies, weight=1)))
    assert read(str(file)).method["weights"] == {"absent": 1.0}
    assert asked == [("mergelab-tests/absent", "v1")]


def test_slices_where_a_tensor_outside_the_layers_may_come_first_are_refused(tmp_path: Path) -> None:
    names = ["vision_tower.patch_conv", "multi_modal_projector.linear_1", "language_model.model.layers.0.mlp"]
    names += [f"vision_tower.transformer.layers.{at}.ffn_norm" for at in (0, 1)]
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save_file({f"{name}.weight": torch.ones(2) for name in names}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"architectures": ["Mistral3ForConditionalGeneration"]}')
    ends = {"slices": [{"sources": [model(name, [at, at + 1])]} for at, name in enumerate("ab")]}
    bodies = {"vision_tower": ends, "multi_modal_projector": [model("a")], "text_decoder": [model("a")]}
    with pytest.raises(
        ConfigError, match=r"modules\.vision_tower\.slices: it is not known to which slice vision_tower\.pat"
    ):
        read(str(written(modules("passthrough", bodies), tmp_path)))
    one = {"slices": [{"sources": [model("b", [0, 2])]}]}
    found = read(str(written(modules("passthrough", bodies | {"vision_tower": one}), tmp_path)))
    assert found.method["rules"][-1] == {"match": "vision_tower.*", "weights": {"a": 0.0, "b": 1.0}}


SLICE = {"slices": [{"sources": [model("a", [0, 1])]}]}
AGAIN = {"slices": [{"sources": [model("a", [0, 2])]}, {"sources": [model("a", [0, 2])]}]}
NUMBERS = {"models": PAIR, "parameters": {"weight": 1}}
FILTERS = {"models": PAIR, "parameters": {"weight": [{"filter": "shared", "value": 1}]}}


@pytest.mark.parametrize(
    ("kind", "bodies", "further", "said"),
    [
        (
            "t5",
            {"encoder": PAIR, "decodr": PAIR, "shared": PAIR},
            {},
            "modules.decodr: T5ForConditionalGeneration has no",
        ),
        ("t5", {"encoder": PAIR, "decodr": PAIR, "shared": PAIR}, {}, "did you mean 'decoder'?"),
        (
            "t5",
            {"default": PAIR},
            {},
            "modules.default: T5ForConditionalGeneration has no such module; there are encoder,",
        ),
        ("t5", {"encoder": PAIR, "decoder": PAIR}, {}, "modules: shared of T5ForConditionalGeneration is missing"),
        ("bart", {"encoder": PAIR, "default": PAIR}, {}, "modules.encoder: BartForConditionalGeneration has no such"),
        ("llama", {"decoder": PAIR}, {}, "modules.decoder: LlamaForCausalLM has no such module; there are default"),
        (
            "t5",
            {"encoder": PAIR, "decoder": SLICE, "shared": PAIR},
            {},
            "modules.decoder.slices: must have layers 0 to 2",
        ),
        (
            "t5",
            {"encoder": PAIR, "decoder": AGAIN, "shared": PAIR},
            {},
            "modules.decoder.slices: must have layers 0 to 2",
        ),
        (
            "t5",
            {"encoder": PAIR, "decoder": PLAIN, "shared": PAIR},
            {"merge_method": "karcher"},
            "karcher has no weights",
        ),
        (
            "t5",
            {"encoder": PAIR, "decoder": PLAIN, "shared": PAIR},
            {"tokenizer_source": "union"},
            "modules.decoder: has other models, whose tokens count only with base_model",
        ),
        (
            "t5",
            {"encoder": PAIR, "decoder": PAIR, "shared": PAIR},
            {"parameters": {}},
            "/a: needs weight, under parameters",
        ),
        (
            "t5",
            {"encoder": NUMBERS, "decoder": NUMBERS, "shared": FILTERS},
            {"parameters": {}},
            "modules: weights.a differs, and needs a value without filter in each of them",
        ),
        (
            "qwen2_5_vl",
            {
                "vision_tower": PAIR,
                "text_decoder": PAIR,
                "multi_modal_projector": {"models": PAIR, "parameters": {"weight": [1, 2]}},
            },
            {},
            "a list of numbers runs over layers, and visual.merger.mlp.0",
        ),
        ("t5", {"encoder": {}}, {}, "modules.encoder: needs one of models and slices"),
        ("t5", {"encoder": 3}, {}, "modules.encoder=3: must be a mapping"),
    ],
)
def test_what_cannot_be_merged_is_one_line(
    kind: str, bodies: dict[str, Any], further: dict[str, Any], said: str, home: Path, capsys: Any
) -> None:
    file = written(modules("linear", bodies, weight=1) | further, home / kind)
    assert main([str(file), "--config"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert said in line
    assert len(line) <= 400


def test_the_printed_config_is_the_same_merge(home: Path, capsys: Any) -> None:
    bodies = {"encoder": PAIR, "decoder": [model("c", weight=[0.5, 1])], "shared": PAIR}
    file = written(modules("linear", bodies, weight=1), home / "t5")
    assert main([str(file), "--config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    plan = planned(f"mergekit={file}")
    assert printed["method"] == {key: value for key, value in read(str(file)).method.items() if key != "name"}
    assert [rule["match"] for rule in printed["method"]["rules"]] == ["encoder.*", "decoder.*"]
    assert plan.parameters.by_key()["rules"] == printed["method"]["rules"]
