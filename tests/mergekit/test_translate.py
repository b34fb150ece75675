"""What a mergekit config becomes here, what it says in vain, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergelab.errors import ConfigError
from mergelab.mergekit.commands import expanded, read
from mergelab.mergekit.methods import METHODS, known_parameters
from mergelab.mergekit.translate import Translation, translate
from mergelab.report.commands import spelled

TIES = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/one
    parameters: {weight: [{filter: mlp, value: [0.2, 0.8]}, {value: 0.5}], density: 0.5}
  - model: org/two
parameters: {weight: 2, density: 0.3, lambda: 0.7}
dtype: bfloat16
"""


def of(text: str) -> Translation:
    return translate(yaml.safe_load(text), "merge.yml", "merge")


def test_the_nearest_level_counts_and_the_base_is_no_expert() -> None:
    found = of(TIES)
    assert found.models["base"] == "org/base"
    assert found.models["experts"] == {"one": "org/one", "two": "org/two"}
    assert found.method == {
        "name": "ties",
        "scope": "tensor",
        "tie_break": "positive",
        "weights_stage": "elect",
        "reduce": "mean",
        "lambda": 0.7,
        "weights": {"one": 0.5, "two": 2.0},
        "density": {"one": 0.5, "two": 0.3},
        "rules": [{"match": "*mlp*", "weights": {"one": [0.2, 0.8]}}],
        "rules_as": "mergekit",
    }
    assert found.save == {"dtype": "bfloat16", "tokenizer": "base"}
    assert found.models["config"] == "base"
    (note,) = found.notes
    assert note.startswith("dtype: bfloat16: mergekit rounds to it on the way")


def test_slerp_goes_from_the_base_wherever_it_is_listed() -> None:
    found = of("{merge_method: slerp, base_model: b, models: [{model: a}, {model: b}], parameters: {t: 0.3}}")
    assert list(found.models["experts"].values()) == ["b", "a"]
    assert found.models["base"] is None


def test_karcher_counts_the_base_as_a_model() -> None:
    found = of("{merge_method: karcher, base_model: b, models: [{model: a}, {model: c}]}")
    assert set(found.models["experts"].values()) == {"a", "b", "c"}


def test_each_slice_has_what_differs_and_the_method_what_they_share() -> None:
    found = of(
        """
        merge_method: slerp
        base_model: org/a
        slices:
          - sources: [{model: org/b, layer_range: [0, 4]}, {model: org/a, layer_range: [0, 4]}]
            parameters: {t: [0, 1]}
          - sources: [{model: org/a, layer_range: [2, 8]}, {model: org/b, layer_range: [2, 8]}]
            parameters: {t: [{filter: mlp, value: 0.2}, {value: 0.7}]}
        """
    )
    assert found.models["slices"] == {
        "s1": {"sources": {"a": [0, 4], "b": [0, 4]}, "method": {"t": [0.0, 1.0]}},
        "s2": {"sources": {"a": [2, 8], "b": [2, 8]}, "method": {"t": 0.7, "rules": [{"match": "*mlp*", "t": 0.2}]}},
    }
    assert found.method == {"name": "slerp", "rules_as": "mergekit"}


def test_numbers_that_yaml_reads_as_text_are_numbers_and_int8_mask_is_nothing() -> None:
    found = of("{merge_method: ram, base_model: b, models: [{model: a}], parameters: {epsilon: 1e-5, int8_mask: true}}")
    assert found.method["epsilon"] == 1e-5
    assert found.notes == ()


def test_a_needed_value_that_only_filters_give_is_required() -> None:
    found = of(
        "{merge_method: slerp, base_model: b, models: [{model: a}, {model: b}],"
        " parameters: {t: [{filter: mlp, value: 0.1}, {filter: attn, value: 0.2}]}}"
    )
    assert found.method["required"] == ["t"]


def test_a_filter_is_a_part_of_the_name_as_it_stands() -> None:
    found = of(
        "{merge_method: slerp, base_model: b, models: [{model: a}, {model: b}],"
        " parameters: {t: [{filter: 'x[0]*', value: 0.1}, {filter: '*', value: 0.2}, {filter: mlp, value: 1}]}}"
    )
    assert found.method["rules"] == [{"match": "*x[[]0][*]*", "t": 0.1}]
    assert found.method["t"] == 0.2
    assert "mergekit's filters are no patterns" in found.notes[0]


def test_models_with_adapters_and_revisions_keep_both() -> None:
    found = of(
        "{merge_method: linear, models: [{model: org/m@v1+org/l, parameters: {weight: 1}},"
        " {model: {model: {path: org/n, revision: v2}, lora: {path: org/l}}, parameters: {weight: 1}}]}"
    )
    assert list(found.models["experts"].values()) == ["org/m@v1+org/l", "org/n@v2+org/l"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{model: a, density: 0.5}]", "models[0].density: mergekit has no such key there"),
        ("models: [{model: a, density: 0.5}]", "did you mean models[0].parameters.density?"),
        ("models: [{model: a}]\ndype: float16", "dype: mergekit has no such key there and passes over it; did you"),
        ("models: [{model: a}]\nselect_topk: 0.1", "select_topk: mergekit has no such key there"),
        ("models: [{model: a, parameters: {weigth: 1, weight: 1}}]", "did you mean 'weight'?"),
        ("models: [{model: a}]\nparameters: {weight: [{filtr: x, value: 1}]}", "did you mean 'filter'?"),
    ],
)
def test_what_mergekit_passes_over_is_named_with_what_was_meant(
    text: str, said: str, tmp_path: Path, capsys: Any
) -> None:
    whole = f"merge_method: ties\nbase_model: b\n{text}\n"
    if "parameters" not in text:
        whole += "parameters: {weight: 1}\n"
    file = tmp_path / "merge.yml"
    file.write_text(whole)
    read(str(file))
    shown = capsys.readouterr().err
    assert said in shown
    assert all(len(line) <= 400 for line in shown.splitlines())
    with pytest.raises(ConfigError, match=r"strict=true"):
        read(str(file), strict=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{merge_method: dare-ties, models: [{model: a}]}", "no such method; did you mean 'dare_ties'"),
        ("{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {t: 1}}", "slerp: needs base_model"),
        (
            "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}, {model: c}], parameters: {t: 1}}",
            "takes exactly 2 models, and has 3",
        ),
        ("{merge_method: slerp, base_model: a, models: [{model: b}]}", "needs t, under parameters"),
        ("{merge_method: linear, models: [{model: a}]}", "needs weight, under parameters"),
        (
            "{merge_method: linear, base_model: z, models: [{model: a, parameters: {weight: 1}}]}",
            "z: needs weight",
        ),
        ("{merge_method: ties, models: [{model: a}], parameters: {weight: 1}}", "ties: needs base_model"),
        ("{merge_method: passthrough, models: [{model: a}], slices: [1]}", "needs exactly one of models, slices and"),
        ("{merge_method: passthrough}", "exactly one of models, slices and modules, and has none"),
        (
            "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 4]},"
            " {model: b, layer_range: [0, 3]}]}]}",
            "slices[0]: its sources must have equally many layers, and have [4, 3]",
        ),
        ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [4, 4]}]}]}", "holds no layer"),
        (
            "{merge_method: linear, models: [{model: a}], parameters: {weight: 1}, tokenizer: {pad_to_multiple_of: 0}}",
            "pad_to_multiple_of=0: must be a whole number above 0",
        ),
        (
            "{merge_method: linear, models: [{model: a}], parameters: {weight: 1},"
            " tokenizer: {}, tokenizer_source: base}",
            "tokenizer_source",
        ),
        ("{merge_method: linear, models: [{model: a}, {model: a}], parameters: {weight: 1}}", "there more than once"),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: heavy}}", "must be a number"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {weight: 1, rescale: true}}",
            "rescale",
        ),
        ("{base_model: a, gate_mode: hidden, experts: [{source_model: b}]}", "mixtures of experts"),
        ("{genome: {models: [a, b]}}", "-m sweep=METHOD"),
        (
            "{merge_method: model_stock, base_model: a, models: [{model: b}]}",
            "takes at least 2 models besides the base",
        ),
    ],
)
def test_what_cannot_be_merged_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        of(text)
    assert said in str(error.value)
    assert len(str(error.value)) <= 400


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    for content, said in (("{a: [", "is no YAML"), ("- 1", "must be a mergekit config"), ("", "must be a mergekit")):
        (tmp_path / "merge.yml").write_text(content)
        with pytest.raises(ConfigError, match=said):
            read(str(tmp_path / "merge.yml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(str(tmp_path / "none.yml"))


def test_overrides_come_first_so_that_others_can_change_them(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(TIES)
    lines = expanded(["method.lambda=0.1", f"mergekit={file}", "-m", "strict=false"])
    assert lines[:2] == ["method=ties", "models=custom"]
    assert lines[-2:] == ["method.lambda=0.1", "-m"]
    assert "method.lambda=0.7" in lines


def test_a_ready_sweep_searches_its_space_and_what_is_typed_stays(tmp_path: Path, capsys: Any) -> None:
    from mergelab.sweep.method_space import searched_keys

    file = tmp_path / "merge.yml"
    file.write_text(TIES.replace("density: 0.3, lambda: 0.7", "density: [{filter: mlp, value: 0.4}, {value: 0.3}]"))

    def keys(*typed: str) -> set[str]:
        given = ["-m", f"mergekit={file}", *typed]
        found = expanded(given, searched_keys)[: -len(typed)]
        return {each.partition("=")[0] for each in found} & {"method.lambda", "method.density", "method.weights"}

    assert keys("task=rte") == {"method.lambda", "method.density", "method.weights"}
    assert keys("sweep=ties") == {"method.weights"}
    said = capsys.readouterr().err
    assert "the sweep searches in place of the config: density={one:0.5,two:0.3}, lambda=1.0" in said
    assert "the config's filters set density where they fit; the sweep varies the other tensors" in said
    assert keys("sweep=ties", "method.density=0.9") == {"method.density", "method.weights"}
    assert keys("sweep=layerwise") == {"method.density", "method.weights"}
    assert keys("sweep=mine") == {"method.lambda", "method.density", "method.weights"}


def test_values_survive_hydras_grammar() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for value in ["a'b", "c:\\d\\", "x\\'y", "1e5", "*mlp*", {"a-b": [0.5, 1.0], "c_1": "~/d+e@f"}, [None, 3], True]:
        override = OverridesParser.create().parse_override(f"key={spelled(value)}")
        assert override.value() == value


def test_every_setting_is_a_parameter_of_the_method_here() -> None:
    from mergelab.engine.registry import get_method

    for method in METHODS.values():
        fields = {name.removesuffix("_") for name in get_method(method.ours).parameters.model_fields}
        assert {setting.ours for setting in method.settings} | set(method.constants) <= fields
    assert known_parameters()["linear"] == ["weight", "normalize"]
