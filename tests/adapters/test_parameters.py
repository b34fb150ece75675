"""LoRA of parameters, such as stacked experts, is the library's own model, whatever the files of the base look like."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from mergelab.errors import MergelabError
from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.adapters.test_dense import TEXT, lora
from tests.adapters.test_experts import dense
from tests.adapters.test_peft_types import adalora
from tests.conftest import Outcome

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="version 4 has these experts as separate layers"
)

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS: dict[str, tuple[Any, Any]] = {
    "mixtral": (small.mixtral, lora(**EXPERTS)),
    "mixtral, one parameter": (small.mixtral, lora(target_modules=[], target_parameters=["experts.down_proj"])),
    "mixtral, square": (
        lambda: small.mixtral(hidden_size=16, intermediate_size=8),
        lora(target_modules=[], target_parameters=["gate_up_proj", "mlp.experts.down_proj"], use_rslora=True),
    ),
    "qwen3": (small.qwen3_moe, lora(**EXPERTS)),
    "qwen3 patterns": (
        small.qwen3_moe,
        lora(
            **EXPERTS,
            rank_pattern={r".*\.down_proj": 2},
            alpha_pattern={r".*layers\.1\..*gate_up_proj": 11, r".*\.down_proj": 3},
        ),
    ),
    "router": (small.qwen3_moe, lora(target_modules=[], target_parameters=["mlp.gate.weight"])),
    "one layer alone": (
        small.qwen3_moe,
        lora(target_modules=["o_proj"], target_parameters=["layers.1.mlp.experts.gate_up_proj"]),
    ),
    "gpt-oss": (small.gpt_oss, lora(**EXPERTS)),
    "gpt-oss, square": (
        lambda: small.gpt_oss(hidden_size=16, intermediate_size=16),
        lora(target_modules=[], target_parameters=["experts.down_proj"]),
    ),
    "weight of a transposed layer": (
        small.gpt2,
        lora(target_modules=[], target_parameters=["attn.c_proj.weight", "attn.c_attn.weight"]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_the_library_does(tmp_path: Path, kind: str) -> None:
    build, config = KINDS[kind]
    made = small.made(tmp_path, build(), config)
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(made.peft, **TEXT)
    torch.testing.assert_close(small.outputs(small.loaded(opened), **TEXT), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, small.outputs(build().double(), **TEXT), atol=1e-3), "the adapter does nothing"
    merged: Any = made.peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "dense")
    library = load_file(tmp_path / "dense" / "model.safetensors")
    for name in list(opened.keys()):
        torch.testing.assert_close(opened.get(name), library[name], rtol=1e-10, atol=1e-10, msg=f"{kind}: {name}")


def test_the_change_of_each_expert_is_a_product_of_its_own_factors(tmp_path: Path) -> None:
    made = small.made(tmp_path, small.qwen3_moe(), lora(r=2, lora_alpha=3, **EXPERTS))
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    stored, base = load_file(made.adapter / "adapter_model.safetensors"), load_file(made.base / "model.safetensors")
    start = "base_model.model.model.layers.1.mlp.experts"
    a, b = (stored[f"{start}.base_layer.lora_{factor}.weight"].numpy() for factor in "AB")  # (r · e, in), (out, r · e)
    for expert in range(4):
        product = sum(np.outer(b[:, rank * 4 + expert], a[expert * 2 + rank]) for rank in range(2)) * 1.5
        for half, name in enumerate(("gate_proj", "up_proj")):
            key = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
            change = (opened.get(key) - base[key]).numpy()
            np.testing.assert_allclose(change, product[half * 12 : half * 12 + 12], rtol=1e-9, atol=1e-12)


def test_a_classifier_on_a_base_without_a_head(tmp_path: Path) -> None:
    """It is of another class than its base, whose experts are read stacked."""
    base: Any = small.mixtral(pad_token_id=0)
    config = copy.deepcopy(base.config)
    config.num_labels = 3
    model: Any = transformers.MixtralForSequenceClassification(config).eval()
    model.set_experts_implementation("eager")
    model.model.load_state_dict(base.model.state_dict())
    base.double().save_pretrained(tmp_path / "base")
    folder, wrapped = small.adapter(tmp_path / "a", model.double(), lora(**EXPERTS, task_type="SEQ_CLS"))
    opened = open_model(on_base(tmp_path / "base", folder, where="a"))
    expected = small.outputs(wrapped, **TEXT)
    assert expected.shape == (2, 3)
    torch.testing.assert_close(small.outputs(small.loaded(opened), **TEXT), expected, rtol=1e-9, atol=1e-9)


def joined() -> Any:
    """A model whose queries, keys and values are layers of their own, and one tensor in its files."""
    sizes = {**small.SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(3)
    return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**sizes)).eval()


LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("config", [lora(target_modules=LAYERS), adalora(target_modules=["k_proj", "gate_proj"])])
def test_layers_that_are_stored_as_one_are_changed_in_their_rows(config: Any, tmp_path: Path) -> None:
    made = small.made(tmp_path, joined(), config)
    held = load_file(made.base / "model.safetensors")
    assert any("gqkv_proj" in name for name in held)
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(made.peft, **TEXT)
    torch.testing.assert_close(small.outputs(small.loaded(opened), **TEXT), expected, rtol=1e-9, atol=1e-9)
    made.peft.merge_and_unload().save_pretrained(tmp_path / "dense")
    library = load_file(tmp_path / "dense" / "model.safetensors")
    changed = [name for name in opened.keys() if not torch.equal(library[name], held[name])]  # noqa: SIM118
    assert any("gqkv_proj" in name for name in changed)
    for name in held:
        torch.testing.assert_close(opened.get(name), library[name], rtol=1e-10, atol=1e-10, msg=name)


OTHER_CHANGES = {
    "dora": lora(target_modules=["q_proj"], use_dora=True),
    "pissa": lora(target_modules=["q_proj"], init_lora_weights="pissa"),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("what", OTHER_CHANGES)
def test_more_than_a_product_in_such_layers_is_refused(what: str, tmp_path: Path) -> None:
    made = small.made(tmp_path, joined(), OTHER_CHANGES[what], dtype=torch.float32)
    line = r"^a: it changes model.*q_proj.weight by more than a low-rank product, .* stores that in .*gqkv_proj.weight;"
    with pytest.raises(MergelabError, match=line):
        on_base(made.base, made.adapter, where="a")


def test_shared_projections_in_such_layers_are_refused(tmp_path: Path) -> None:
    made = small.made(tmp_path, joined(), peft.VeraConfig(r=4, target_modules=["q_proj"]), dtype=torch.float32)
    with pytest.raises(MergelabError, match=r"^a: it changes .*q_proj.weight, which the base does not store by itself"):
        on_base(made.base, made.adapter, where="a")


def test_an_adapter_of_version_4_is_the_model_that_the_library_makes_of_it(tmp_path: Path) -> None:
    """It has factors of each expert's own layers; the library joins them for the stacked experts of version 5."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    small.mixtral().double().save_pretrained(base)
    torch.manual_seed(2)
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            for name, (outputs, inputs) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
                site = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{site}.lora_A.weight"] = torch.randn(2, inputs, dtype=torch.float64)
                tensors[f"{site}.lora_B.weight"] = torch.randn(outputs, 2, dtype=torch.float64)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 3, "r": 2, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": ["w1", "w2", "w3"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    opened = open_model(on_base(base, folder, where="a"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model.set_experts_implementation("eager")
    library = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).double().eval()
    found = small.outputs(small.loaded(opened), **TEXT)
    torch.testing.assert_close(found, small.outputs(library, **TEXT), rtol=1e-5, atol=1e-5)


def test_two_experts_merge_as_their_dense_forms(tmp_path: Path, mergelab_command: Callable[..., Outcome]) -> None:
    small.mixtral().save_pretrained(tmp_path / "base")
    models: dict[str, Path] = {}
    for seed, name in enumerate("ab"):
        made = small.made(tmp_path, small.mixtral(), lora(**EXPERTS), dtype=torch.float32, seed=seed)
        models |= {"base": made.base, name: made.adapter}
        models[f"dense {name}"] = dense(tmp_path / f"dense_{name}", made.base, made.adapter)
    for out, (a, b) in {"out": ("a", "b"), "reference": ("dense a", "dense b")}.items():
        outcome = mergelab_command(
            f"models.base={models['base']}",
            f"models.experts={{a: {models[a]}, b: {models[b]}}}",
            *("task=rte", "evaluate=false", "method=ties", "method.density=0.3", f"output={out}"),
            "tracking=none",
        )
        assert outcome.code == 0, outcome.err
    written, reference = (load_file(Path(out) / "model.safetensors") for out in ("out", "reference"))
    assert written.keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in written.items())


def config_with(**settings: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return apply


def tensors_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "adapter_model.safetensors")

    return apply


def cut(held: dict[str, torch.Tensor], name: str, axis: int) -> None:
    held[name] = held[name].narrow(axis, 0, held[name].shape[axis] - 1)


def exchange(held: dict[str, torch.Tensor], first: str, second: str) -> None:
    for end in ("_A.weight", "_B.weight"):
        held[first + end], held[second + end] = held[second + end], held[first + end]


INNER, OUTER = (f"base_model.model.model.layers.0.mlp.experts{wrapper}.lora" for wrapper in (".base_layer", ""))
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "not named": (config_with(target_parameters=None), r"names of the adapter match nothing"),
    "one more": (
        config_with(target_parameters=["experts.down_proj"]),
        r"target_parameters names 1 parameters of model.layers.0.mlp.experts, and the adapter has factors of 2",
    ),
    "none": (config_with(target_parameters=["experts.w5"]), r"the adapter has no factors of parameters"),
    "no list": (config_with(target_parameters="gate_up_proj"), r"target_parameters in its .* is no list of names"),
    "dora": (config_with(use_dora=True), r"target_parameters cannot go with use_dora"),
    "pissa": (config_with(init_lora_weights="pissa"), r"target_parameters cannot go with init_lora_weights='pissa'"),
    "one missing": (
        tensors_with(lambda held: [held.pop(f"{OUTER}_{factor}.weight") for factor in "AB"]),
        r"names 2 parameters of model.layers.0.mlp.experts, and the adapter has factors of 1",
    ),
    "other ranks": (
        tensors_with(lambda held: cut(held, f"{INNER}_A.weight", 0) or cut(held, f"{INNER}_B.weight", 1)),
        r"the factors of model.layers.0.mlp.experts.gate_up_proj have 11 ranks, and the parameter is \[3, 48, 16\]",
    ),
    "other sizes": (
        tensors_with(lambda held: cut(held, f"{INNER}_B.weight", 0)),
        r"trained for a model.layers.0.mlp.experts.gate_up_proj of 47 × 16 for each expert, and the model has \[3, 48",
    ),
    "exchanged": (tensors_with(lambda held: exchange(held, INNER, OUTER)), r"it belongs to another base"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_one_line(what: str, tmp_path: Path) -> None:
    made = small.made(tmp_path, small.mixtral(), lora(**EXPERTS))
    on_base(made.base, made.adapter, where="a")
    spoil, line = BAD[what]
    spoil(made.adapter)
    with pytest.raises(MergelabError, match=f"^a: .*{line}") as caught:
        on_base(made.base, made.adapter, where="a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("build", [small.mixtral, small.gpt_oss])
def test_forms_that_cannot_hold_them_name_the_one_that_can(
    build: Any, tmp_path: Path, mergelab_command: Callable[..., Outcome]
) -> None:
    made = small.made(tmp_path, build(), lora(**EXPERTS), dtype=torch.float32)
    for form in ("save.form=lora_cat", "save.form=lora_svd save.energy=1.0"):
        outcome = mergelab_command(
            f"models.base={made.base}",
            f"models.experts={{a: {made.adapter}}}",
            *("task=rte", "evaluate=false", "method=task_arithmetic", "output=out", "tracking=none"),
            *form.split(),
        )
        assert outcome.code == 2, form
        assert "save.form=dense" in outcome.err
        assert not Path("out").exists()
