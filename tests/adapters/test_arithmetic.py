"""Sums, negations and A − B + C of adapters and of dense experts, from Python and from the command line, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergelab as ml
from mergelab.errors import ConfigError, ModelError
from tests.adapters import made as small
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
Values = Mapping[str, np.ndarray]
COMBINATIONS: dict[str, tuple[float, ...]] = {
    "negation": (-1.0,),
    "half": (0.5,),
    "sum": (1.0, 1.0),
    "analogy": (1.0, -1.0, 1.0),
    "weighted": (0.3, -2.0, 0.0),
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base, three adapters of different ranks and scales, and their dense forms as PEFT makes them, in float64."""
    found: dict[str, Path] = {}
    for seed, name in enumerate("abc"):
        config = peft.LoraConfig(
            r=2 + seed, lora_alpha=5, use_rslora=seed == 1, target_modules=["q_proj", "v_proj"][: 1 + seed % 2]
        )
        made = small.made(tmp_path, small.llama(), config, seed=seed)
        found |= {"base": made.base, name: made.adapter, f"dense {name}": tmp_path / f"dense_{name}"}
        made.peft.merge_and_unload().save_pretrained(found[f"dense {name}"])
    small.tokenizer(found["base"])
    for name in "abc":
        small.tokenizer(found[f"dense {name}"])
    return found


def values(folder: Path) -> Values:
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def expected(models: Mapping[str, Path], weights: Sequence[float]) -> Values:
    """θ0 + Σ w (θ_t − θ0), in float64."""
    base = values(models["base"])
    experts = [values(models[f"dense {name}"]) for name in "abc"[: len(weights)]]
    return {
        name: start + sum(w * (expert[name] - start) for w, expert in zip(weights, experts, strict=True))
        for name, start in base.items()
    }


def assert_equal(found: Mapping[str, Any], wanted: Values, atol: float) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(torch.as_tensor(found[name]).double().numpy(), value, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["", "dense "])
@pytest.mark.parametrize("what", COMBINATIONS)
def test_arithmetic_from_python(what: str, kind: str, models: dict[str, Path]) -> None:
    weights = COMBINATIONS[what]
    given = [str(models["base"]), *(str(models[kind + name]) for name in "abc"[: len(weights)])]
    merged = ml.task_arithmetic(given, task="text-generation", weights=list(weights), lambda_=1.0)
    assert_equal(merged.model.state_dict(), expected(models, weights), 1e-10)
    by_name = dict(zip(given[1:], weights, strict=True))
    named = ml.task_arithmetic(given, task="text-generation", weights=by_name, lambda_=1.0)
    assert_equal(named.model.state_dict(), expected(models, weights), 1e-10)


@pytest.mark.parametrize(
    "case",
    [
        ((-1.0,), ("method.weights=[-1]",)),
        ((1.0, -1.0, 1.0), ("method.weights={c: 1, b: -1, a: 1}",)),
        ((1.0, -1.0, 1.0), ("models.experts.a.weight=1", "models.experts.b.weight=-1", "models.experts.c.weight=1")),
        ((1.0, -1.0, 1.0), ("method.weights=[1,-1,1]", "save.form=lora_cat")),
    ],
)
@pytest.mark.parametrize("kind", ["", "dense "])
def test_arithmetic_from_the_command_line(
    kind: str,
    case: tuple[tuple[float, ...], tuple[str, ...]],
    models: dict[str, Path],
    mergelab_command: Command,
) -> None:
    weights, arguments = case
    form = next((argument for argument in arguments if argument.startswith("save.form")), None)
    if form and kind:
        arguments = (arguments[0], "save.form=lora_svd", "save.energy=1.0")
    names = "abc"[: len(weights)]
    experts = ", ".join(f"{name}: {{reference: {models[kind + name]}}}" for name in names)
    outcome = mergelab_command(
        f"models.base={models['base']}",
        f"models.experts={{{experts}}}",
        *("method=task_arithmetic", "method.lambda=1", "task=wikitext", "evaluate=false"),
        *("tracking=none", "output=out", *arguments),
    )
    assert outcome.code == 0, outcome.err
    wanted = expected(models, weights)
    if form is None:
        assert_equal(load_file("out/model.safetensors"), wanted, 1e-10)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float64)
    merged = peft.PeftModel.from_pretrained(model, "out", autocast_adapter_dtype=False).merge_and_unload()
    assert_equal(merged.state_dict(), wanted, 1e-5)


def test_an_unknown_name_of_a_weight_is_an_error(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"method.weights: no expert is called 'legal'"):
        ml.task_arithmetic([str(models["base"]), str(models["a"])], task="text-generation", weights={"legal": 1.0})


# --------------------------------------------------------------------------------------------- models of PEFT in memory


def test_a_peft_model_is_the_adapter_that_it_would_save(models: dict[str, Path]) -> None:
    loaded = [
        peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float64),
            models[name],
            adapter_name=called,
            autocast_adapter_dtype=False,
        )
        for name, called in (("a", "default"), ("b", "other"))
    ]
    merged = ml.task_arithmetic(
        [str(models["base"]), *loaded], task="text-generation", weights=[1.0, -1.0], lambda_=1.0
    )
    assert_equal(merged.model.state_dict(), expected(models, (1.0, -1.0)), 1e-10)
    alone = ml.soup([loaded[1]], task="text-generation")  # on the base that it names
    assert_equal(alone.model.state_dict(), values(models["dense b"]), 1e-10)
    with torch.no_grad():
        for name, parameter in loaded[1].named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    doubled = ml.soup([loaded[1]], task="text-generation")
    base, once = values(models["base"]), values(models["dense b"])
    assert_equal(doubled.model.state_dict(), {name: base[name] + 2 * (once[name] - base[name]) for name in base}, 1e-10)


def test_a_peft_model_is_no_base_and_needs_one_that_is_saved(models: dict[str, Path]) -> None:
    model = small.llama().double()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"is a PeftModel.*, which can be an expert"):
        ml.soup([wrapped, str(models["a"])], task="text-generation", base_index=0)
    with pytest.raises(ModelError, match="does not name its base"):
        ml.soup([wrapped], task="text-generation")
    with pytest.raises(ModelError, match="is an adapter, and the base is a model in memory"):
        ml.task_arithmetic([small.llama(), wrapped], task="text-generation")
