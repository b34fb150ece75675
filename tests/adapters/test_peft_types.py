"""PEFT's types beside LoRA are the library's own models: AdaLoRA, LoHa, LoKr, VeRA and tuned norms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergelab as ml
from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.adapters.test_dense import BOTH, IMAGE, TEXT
from tests.adapters.test_experts import dense
from tests.adapters.test_outputs import assert_equal, merged, through_peft
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
ATTENTION = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
MLP = {"target_modules": ["query", "intermediate.dense", "output.dense"], "task_type": "SEQ_CLS"}


def adalora(**settings: Any) -> Any:
    return peft.AdaLoraConfig(**({"init_r": 5, "target_r": 2, "total_step": 10, "lora_alpha": 7} | settings))


def loha(**settings: Any) -> Any:
    return peft.LoHaConfig(**({"r": 4, "alpha": 5} | settings))  # of an exact quotient: PEFT rounds it to float32


def lokr(**settings: Any) -> Any:
    return peft.LoKrConfig(**({"r": 2, "alpha": 5} | settings))


def vera(**settings: Any) -> Any:
    return peft.VeraConfig(**({"r": 6, "projection_prng_key": 4} | settings))


SOUND = {"input_values": torch.linspace(-1, 1, 2 * 40).double().view(2, 40).sin()}
CONVOLUTIONS = r".*conv_layers\.\d\.conv"

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adalora": (small.bert, adalora(**MLP), TEXT),
    "adalora conv1d": (small.gpt2, adalora(target_modules=["c_attn", "c_proj"]), TEXT),
    "adalora conv2d": (small.convnet, adalora(target_modules=["convolution"]), IMAGE),
    "adalora t5": (small.t5, adalora(target_modules=["q", "wo"]), BOTH),
    "adalora without alpha": (small.bert, adalora(lora_alpha=0, **ATTENTION), TEXT),
    "adalora settings that it does not use": (
        small.bert,
        adalora(use_rslora=True, alpha_pattern={"query": 30}, **ATTENTION),
        TEXT,
    ),
    "adalora token rows": (small.llama, adalora(target_modules=["q_proj"], trainable_token_indices=[3, 7]), TEXT),
    "loha": (small.bert, loha(**MLP), TEXT),
    "loha patterns": (
        small.llama,
        loha(
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            alpha_pattern={r"layers\.1\.self_attn\..*": 11, "q_proj": 3},
            rank_dropout=0.2,
            module_dropout=0.1,
        ),
        TEXT,
    ),
    "loha t5": (small.t5, loha(target_modules=["q", "v", "wi"]), BOTH),
    "loha conv2d": (small.convnet, loha(target_modules=["convolution"]), IMAGE),
    "loha effective conv2d": (small.convnet, loha(target_modules=["convolution"], use_effective_conv2d=True), IMAGE),
    "loha effective conv of one dimension": (
        small.speech,
        loha(target_modules=CONVOLUTIONS, use_effective_conv2d=True),
        SOUND,
    ),
    "loha conv of one dimension": (small.speech, loha(target_modules=CONVOLUTIONS), SOUND),
    "lokr": (small.bert, lokr(**MLP), TEXT),
    "lokr whole": (small.bert, lokr(r=30, **MLP), TEXT),
    "lokr whole with patterns": (
        small.llama,
        lokr(
            r=30,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 25},
            alpha_pattern={"q_proj": 3},
        ),
        TEXT,
    ),
    "lokr both": (
        lambda: small.bert(hidden_act="relu"),
        lokr(r=1, decompose_both=True, decompose_factor=8, rank_dropout=0.1, rank_dropout_scale=True, **MLP),
        TEXT,
    ),
    "lokr t5": (small.t5, lokr(target_modules=["k", "wo"], init_weights="lycoris"), BOTH),
    "lokr conv2d": (small.convnet, lokr(r=1, target_modules=["convolution"]), IMAGE),
    "lokr whole conv2d": (small.convnet, lokr(r=9, target_modules=["convolution"]), IMAGE),
    "lokr effective conv2d": (
        small.convnet,
        lokr(r=1, decompose_both=True, target_modules=["convolution"], use_effective_conv2d=True),
        IMAGE,
    ),
    "lokr conv of one dimension": (small.speech, lokr(r=1, target_modules=CONVOLUTIONS), SOUND),
    "lokr whole conv of one dimension": (small.speech, lokr(r=9, target_modules=CONVOLUTIONS), SOUND),
    "vera": (small.bert, vera(**MLP), TEXT),
    "vera drawn": (small.bert, vera(save_projection=False, **MLP), TEXT),
    "vera conv1d": (small.gpt2, vera(target_modules=["c_attn", "c_fc"]), TEXT),
    "vera conv1d drawn": (small.gpt2, vera(target_modules=["c_attn", "c_fc"], save_projection=False), TEXT),
    "vera t5": (small.t5, vera(target_modules=["q", "wo"], d_initial=0.3), BOTH),
    "vera biases": (small.bert, vera(bias="vera_only", **ATTENTION), TEXT),
    "norms": (small.bert, peft.LNTuningConfig(target_modules=["LayerNorm"]), TEXT),
    "norms of llama": (small.llama, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), TEXT),
}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_the_library_does(tmp_path: Path, kind: str) -> None:
    build, config, inputs = KINDS[kind]
    made = small.made(tmp_path, build(), config)
    checkpoint = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(made.peft, **inputs)
    torch.testing.assert_close(small.outputs(small.loaded(checkpoint), **inputs), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, small.outputs(build().double(), **inputs), atol=1e-3), (
        "the adapter does nothing"
    )
    library = made.dense()
    for name in list(checkpoint.keys()):
        torch.testing.assert_close(checkpoint.get(name), library[name], rtol=1e-10, atol=1e-10, msg=f"{kind}: {name}")
        assert tuple(checkpoint.get(name).shape) == checkpoint.shape(name)


def test_a_pruned_adapter_is_what_the_library_loads(tmp_path: Path) -> None:
    """AdaLoRA stores the ranks that are left, and divides by those of the start."""
    made = small.made(tmp_path, small.bert(), adalora(**MLP))
    sites = [name for name, _ in made.peft.base_model.model.named_modules() if name.endswith("lora_E")]
    kept = [[True, False, True, True, False], [False] * 5, [True] * 5]
    made.peft.peft_config["default"].rank_pattern = {f"{site}.default": kept[at % 3] for at, site in enumerate(sites)}
    made.peft.save_pretrained(made.adapter)
    shapes = {tuple(tensor.shape) for name, tensor in stored(made.adapter).items() if name.endswith("lora_E")}
    assert shapes == {(3, 1), (0, 1), (5, 1)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made.base, dtype=torch.float64)
    library = peft.PeftModel.from_pretrained(model, made.adapter, autocast_adapter_dtype=False).double().eval()
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(library, **TEXT)
    torch.testing.assert_close(small.outputs(small.loaded(opened), **TEXT), expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the papers' formulas


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


QUERY = "bert.encoder.layer.1.attention.self.query"


def reference(kind: str, p: dict[str, np.ndarray]) -> np.ndarray:
    """The change of a layer, in float64, entry by entry."""
    if kind == "adalora":
        ranks = range(len(p["lora_E"]))
        change = sum(np.outer(p["lora_B"][:, r], p["lora_A"][r]) * p["lora_E"][r, 0] for r in ranks)
        return np.asarray(change * 7 / (5 + 1e-5))
    if kind == "loha":
        products = [sum(np.outer(p[f"hada_w{i}_a"][:, r], p[f"hada_w{i}_b"][r]) for r in range(4)) for i in (1, 2)]
        return np.asarray(products[0] * products[1] * 5 / 4)
    if kind == "lokr":
        second = p["lokr_w2_a"] @ p["lokr_w2_b"]
        rows, columns = second.shape
        change = np.empty((16, 16))
        for i in range(16):
            for j in range(16):
                change[i, j] = p["lokr_w1"][i // rows, j // columns] * second[i % rows, j % columns]
        return change * 5
    a, b = p["vera_A"][:, :16], p["vera_B"][:16]
    return np.asarray(np.diag(p["vera_lambda_b"]) @ b @ np.diag(p["vera_lambda_d"]) @ a)


FORMULAS = {"adalora": adalora(**MLP), "loha": loha(**MLP), "lokr": lokr(r=1, **MLP), "vera": vera(**MLP)}


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_change_is_its_papers_formula(kind: str, tmp_path: Path) -> None:
    made = small.made(tmp_path, small.bert(), FORMULAS[kind])
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    parts = {
        name.rpartition(".")[2]: tensor.double().numpy()
        for name, tensor in stored(made.adapter).items()
        if f".{QUERY}." in name or name.startswith("base_model.vera_")
    }
    base = load_file(made.base / "model.safetensors")[f"{QUERY}.weight"].numpy()
    change = opened.get(f"{QUERY}.weight").numpy() - base
    assert np.abs(change).max() > 1e-2
    np.testing.assert_allclose(change, reference(kind, parts), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ merged, written


def experts(folder: Path, config: Any, build: Any = small.bert) -> dict[str, Path]:
    """A base in float32 and two adapters on it."""
    found: dict[str, Path] = {}
    for seed, name in enumerate("ab"):
        made = small.made(folder, build(), config, dtype=torch.float32, seed=seed)
        found |= {"base": made.base, name: made.adapter}
    small.tokenizer(found["base"])
    return found


PLAIN: dict[str, Any] = {**FORMULAS, "norms": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS")}


@pytest.mark.parametrize("method", ["ties", "dare", "task_arithmetic"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_method_gives_what_it_gives_on_the_dense_experts(kind: str, method: str, tmp_path: Path) -> None:
    models = experts(tmp_path, PLAIN[kind])
    results = []
    for form in ("adapters", "dense"):
        given = [models["base"], models["a"], models["b"]]
        if form == "dense":
            given[1:] = [dense(tmp_path / f"dense{at}", given[0], given[at]) for at in (1, 2)]
        function = getattr(ml, method)
        results.append(function([str(path) for path in given], task="text-classification", base_index=0).model)
    own, reference = (result.state_dict() for result in results)
    base = load_file(models["base"] / "model.safetensors")
    for name, tensor in own.items():
        if method == "task_arithmetic":  # made of the factors, so that the experts' own rounding is not in it
            torch.testing.assert_close(tensor, reference[name], rtol=0, atol=5e-7)
        else:
            assert torch.equal(tensor, reference[name]), name
    assert any(not torch.equal(tensor, base[name]) for name, tensor in own.items() if name.startswith("bert."))


ARITHMETIC = ("method=task_arithmetic", "method.lambda=0.6", "method.weights=[1.0,-0.5]")
FORMS = [
    *((kind, ARITHMETIC, ("save.form=lora_cat",)) for kind in ("adalora", "vera")),
    *((kind, ARITHMETIC, ("save.form=lora_svd", "save.energy=1.0")) for kind in ("loha", "vera")),
    ("lokr", ("method=ties",), ("save.form=lora_svd", "save.energy=1.0")),
]


@pytest.mark.parametrize(("kind", "method", "form"), FORMS)
def test_a_merge_is_written_as_lora_that_the_library_loads(
    kind: str, method: tuple[str, ...], form: tuple[str, ...], tmp_path: Path, mergelab_command: Command
) -> None:
    models = experts(tmp_path, PLAIN[kind])
    whole = merged(mergelab_command, models, "dense", *method)
    adapter = merged(mergelab_command, models, "adapter", *method, *form)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert_equal(whole, through_peft("bert", models["base"], adapter), atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_has_no_low_rank_factors_is_not_joined(kind: str, tmp_path: Path, mergelab_command: Command) -> None:
    models = experts(tmp_path, PLAIN[kind])
    outcome = mergelab_command(
        f"models.base={models['base']}",
        f"models.experts={{a: {models['a']}, b: {models['b']}}}",
        *("task=rte", "evaluate=false", "tracking=none", "output=out", "method=soup", "save.form=lora_cat"),
    )
    assert outcome.code == 2
    assert "save.form=dense and save.form=lora_svd can hold it" in outcome.err
    assert not Path("out").exists()
