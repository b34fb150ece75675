"""A merge written as an adapter loads in PEFT with its defaults, and is the dense merge, or its best approximation."""

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
from torch import Tensor

from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
KINDS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "bert": (
        small.bert,
        {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"},
        transformers.AutoModelForSequenceClassification,
    ),
    "gpt2": (small.gpt2, {"target_modules": ["c_attn", "c_proj"]}, transformers.AutoModelForCausalLM),
    "llama": (small.llama, {"target_modules": ["embed_tokens", "q_proj"]}, transformers.AutoModelForCausalLM),
    "t5": (small.t5, {"target_modules": ["q", "wo"]}, transformers.AutoModelForSeq2SeqLM),
}


def experts(folder: Path, kind: str, *, ranks: tuple[int, int] = (2, 3), **settings: Any) -> dict[str, Path]:
    build, targets, _ = KINDS[kind]
    found: dict[str, Path] = {}
    for seed, (name, rank) in enumerate(zip("ab", ranks, strict=True)):
        config = peft.LoraConfig(**{"r": rank, "lora_alpha": 5 + seed, "use_rslora": bool(seed)} | targets | settings)
        made = small.made(folder, build(), config, dtype=torch.float32, seed=seed)
        found |= {"base": made.base, name: made.adapter}
    return found


def merged(command: Command, models: dict[str, Path], out: str, *arguments: str) -> Path:
    experts = ", ".join(f"{name}: {path}" for name, path in models.items() if name != "base")
    outcome = command(
        f"models.base={models['base']}",
        f"models.experts={{{experts}}}",
        *("task=rte", "evaluate=false", "tracking=none", f"output={out}"),
        *arguments,
    )
    assert outcome.code == 0, outcome.err
    return Path(out)


def through_peft(kind: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """Load the adapter as a user would, and merge it."""
    model = KINDS[kind][2].from_pretrained(base, dtype=torch.float64)
    wrapped = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
    return dict(wrapped.merge_and_unload().state_dict())


def assert_equal(dense: Path, found: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, tensor in load_file(dense / "model.safetensors").items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-5, atol=atol, msg=lambda text, n=name: n + text)


ARITHMETIC = ("method=task_arithmetic", "method.lambda=0.6", "method.weights=[1.0,-0.5]")


SUMS = [*((kind, ("lora_cat",)) for kind in KINDS), ("bert", ("lora_svd", "save.energy=1.0"))]
SUMS += [(kind, ("lora_svd", "save.rank=5")) for kind in ("gpt2", "llama")]


@pytest.mark.parametrize(("kind", "form"), SUMS)
def test_a_sum_of_adapters_is_the_dense_sum(
    kind: str, form: tuple[str, ...], tmp_path: Path, mergelab_command: Command
) -> None:
    models = experts(tmp_path, kind)
    dense = merged(mergelab_command, models, "dense", *ARITHMETIC)
    adapter = merged(mergelab_command, models, "adapter", *ARITHMETIC, f"save.form={form[0]}", *form[1:])
    assert_equal(dense, through_peft(kind, models["base"], adapter))
    own = open_model(on_base(models["base"], adapter, where="a"))
    assert_equal(dense, {name: own.get(name) for name in [*own.keys(), *own.aliases()]})
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (False, 5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == str(models["base"])
    ranks = {
        tensor.shape[0] for name, tensor in load_file(adapter / "adapter_model.safetensors").items() if "lora_A" in name
    }
    assert ranks <= {5}


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_rank_is_the_best_approximation_of_each_layers_change(
    adapters: bool, kind: str, tmp_path: Path, mergelab_command: Command
) -> None:
    models = experts(tmp_path, kind)
    method = ARITHMETIC if adapters else ("method=ties", "method.density=0.5")
    dense = merged(mergelab_command, models, "dense", *method)
    adapter = merged(mergelab_command, models, "adapter", *method, "save.form=lora_svd", "save.rank=2")
    found, base = through_peft(kind, models["base"], adapter), load_file(models["base"] / "model.safetensors")
    sites = json.loads((adapter / "mergelab_sites.json").read_text())
    for name, tensor in load_file(dense / "model.safetensors").items():
        change = (tensor.double() - base[name].double()).numpy()
        if (layer := name.removesuffix(".weight")) not in sites:
            torch.testing.assert_close(found[name].float(), tensor, rtol=1e-5, atol=1e-6)
            continue
        u, s, vh = np.linalg.svd(change)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        kept = (found[name].double() - base[name].double()).numpy()
        np.testing.assert_allclose(kept, best, atol=1e-5)
        assert sites[layer]["energy"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-5)
        assert sites[layer]["rank"] == 2


@pytest.mark.parametrize("method", ["ties", "dare", "soup"])
def test_any_merge_is_an_adapter_of_full_energy(method: str, tmp_path: Path, mergelab_command: Command) -> None:
    models = experts(tmp_path, "bert", bias="all")
    dense = merged(mergelab_command, models, "dense", f"method={method}")
    adapter = merged(mergelab_command, models, "adapter", f"method={method}", "save.form=lora_svd", "save.energy=1.0")
    assert_equal(dense, through_peft("bert", models["base"], adapter), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_dense_expert_is_extracted(kind: str, tmp_path: Path, mergelab_command: Command) -> None:
    build: Any = KINDS[kind][0]
    model = build()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (kind == "gpt2" and "wte" in name):  # tied
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "expert")
    models = {"base": tmp_path / "base", "a": tmp_path / "expert"}
    one = ("method=task_arithmetic", "method.lambda=1", "save.form=lora_svd")
    adapter = merged(mergelab_command, models, "whole", *one, "save.energy=1.0")
    assert_equal(models["a"], through_peft(kind, models["base"], adapter), atol=1e-5)
    half = merged(mergelab_command, models, "half", *one, "save.energy=0.5")
    sites = json.loads((half / "mergelab_sites.json").read_text())
    assert all(site["energy"] >= 0.5 for site in sites.values())
    assert len({site["rank"] for site in sites.values()}) > 1
    found, base = through_peft(kind, models["base"], half), load_file(models["base"] / "model.safetensors")
    for name, tensor in load_file(models["a"] / "model.safetensors").items():
        if (layer := name.removesuffix(".weight")) in sites:
            change, kept = (each.double() - base[name].double() for each in (tensor, found[name]))
            share = 1 - float((change - kept).square().sum() / change.square().sum())
            assert share == pytest.approx(sites[layer]["energy"], abs=1e-5)


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "lora of weights": (("save.form=lora",), {}, "save.form=lora: is for methods that combine factors, such as"),
    "cat of factors": (
        ("save.form=lora_cat", "method=peft_linear"),
        {},
        "save.form=lora_cat: peft_linear makes factors of its own, which save.form=lora writes",
    ),
    "dora in factors": (("method=peft_linear",), {"use_dora": True}, "by DoRA, and peft_linear combines LoRA factors"),
    "ranks in factors": (("method=peft_ties",), {}, "the ranks of bert.encoder"),
    "no rank": (("save.form=lora_svd",), {}, "save.form=lora_svd: give one of save.rank and save.energy"),
    "both": (("save.form=lora_svd", "save.rank=2", "save.energy=0.9"), {}, "give one of save.rank and save.energy"),
    "rank of a dense model": (("save.rank=2",), {}, "save.rank: belongs to save.form=lora_svd"),
    "another method": (("save.form=lora_cat", "method=ties"), {}, "save.form=lora_svd takes any merge"),
    "dora": (("save.form=lora_cat",), {"use_dora": True}, "is changed by more than LoRA"),
    "not the base": (
        ("save.form=lora_cat", "method.normalize=false"),
        {},
        "with weights that keep the base; save.form=lora_svd takes any merge",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_adapter_cannot_hold_is_refused(what: str, tmp_path: Path, mergelab_command: Command) -> None:
    arguments, settings, line = REFUSED[what]
    models = experts(tmp_path, "bert", **settings)
    outcome = mergelab_command(
        f"models.base={models['base']}",
        f"models.experts={{a: {models['a']}, b: {models['b']}}}",
        *("method=soup", "task=rte", "evaluate=false", "tracking=none", "output=out"),
        *arguments,
    )
    assert outcome.code == 2
    (found,) = [each for each in outcome.err.splitlines() if each.strip() and "Writing model" not in each]
    assert line in found
    assert len(found) <= 400
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))
