"""IA³ adapters merge as 1 + Σ w (l − 1): as dense weights, and as one IA³ adapter that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.adapters import merging
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (
        small.bert,
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "conv1d": (small.gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "t5": (small.t5, {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
}


def experts(folder: Path, kind: str, count: int = 2, **settings: Any) -> list[small.Made]:
    build, layers = KINDS[kind]
    return merging.several(folder, build, [peft.IA3Config(**layers | settings) for _ in range(count)])


def vectors(adapter: Path) -> dict[str, np.ndarray]:
    stored = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l"): value.double().numpy()
        for name, value in stored.items()
        if name.endswith("ia3_l")
    }


def in_numpy(kind: str, adapters: Sequence[Path], weights: Sequence[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The merged vectors, and the tensors that they change, in float64."""
    base = {name: value.double().numpy() for name, value in KINDS[kind][0]().state_dict().items()}
    merged: dict[str, Any] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for layer, vector in vectors(adapter).items():
            merged[layer] = merged.get(layer, 1) + weight * (vector - 1)
    changed: dict[str, Any] = {}
    for layer, vector in merged.items():
        factor = vector.T if kind == "conv1d" else vector
        changed[f"{layer}.weight"] = base[f"{layer}.weight"] * factor
        if vector.shape[1] == 1 and f"{layer}.bias" in base:
            changed[f"{layer}.bias"] = base[f"{layer}.bias"] * vector[:, 0]
    return merged, changed


def written(command: Command, adapters: Sequence[small.Made], *arguments: str) -> Outcome:
    names = ", ".join(f"{name}: {each.adapter}" for name, each in zip("abc", adapters, strict=False))
    return command(
        f"models.base={adapters[0].base}",
        f"models.experts={{{names}}}",
        *("task=rte", "evaluate=false", "tracking=none", "output=out"),
        *arguments,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_merged_and_not_the_products(kind: str, tmp_path: Path) -> None:
    adapters = experts(tmp_path, kind, 3)
    weights = [0.7, -0.4, 1.1]
    models = merging.opened(adapters)
    changes = merging.changes(models, "task_arithmetic", weights=weights, **{"lambda": 1.0})
    _, wanted = in_numpy(kind, [each.adapter for each in adapters], weights)
    base = models.aligned.base
    assert base is not None
    assert changes.keys() == wanted.keys()
    for name, change in changes.items():
        np.testing.assert_allclose((base.get(name) + change).numpy(), wanted[name], rtol=1e-10, atol=1e-12)
    soup = merging.changes(models, "soup", weights=[1.0, 1.0, 2.0])
    _, wanted = in_numpy(kind, [each.adapter for each in adapters], [0.25, 0.25, 0.5])
    for name, change in soup.items():
        np.testing.assert_allclose((base.get(name) + change).numpy(), wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ia3_adapter_is_written_that_peft_loads(kind: str, tmp_path: Path, mergelab_command: Command) -> None:
    adapters = experts(tmp_path, kind)
    outcome = written(
        mergelab_command,
        adapters,
        *("method=task_arithmetic", "method.lambda=1", "method.weights={a: 0.7, b: -0.4}", "save.form=ia3"),
    )
    assert outcome.code == 0, outcome.err
    merged, changed = in_numpy(kind, [each.adapter for each in adapters], [0.7, -0.4])
    found = vectors(Path("out"))
    assert found.keys() == merged.keys()
    for layer, vector in merged.items():
        np.testing.assert_allclose(found[layer], vector, rtol=1e-6)
    model = KINDS[kind][0]().double()
    unchanged = {name: value.clone() for name, value in model.state_dict().items()}
    dense = peft.PeftModel.from_pretrained(model, "out", autocast_adapter_dtype=False).merge_and_unload().state_dict()
    own = open_model(on_base(adapters[0].base, Path("out"), where="a"))
    for name in own.keys():  # noqa: SIM118 (a source)
        wanted = torch.from_numpy(changed[name]) if name in changed else unchanged[name]
        torch.testing.assert_close(dense[name], wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(own.get(name), wanted, rtol=1e-6, atol=1e-7)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("IA3", str(adapters[0].base))


def test_experts_that_adapt_other_layers_have_ones_there(tmp_path: Path) -> None:
    build, _ = KINDS["bert"]
    configs = [
        peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
        peft.IA3Config(target_modules=["value"], feedforward_modules=[]),
    ]
    adapters = merging.several(tmp_path, build, configs)
    models = merging.opened(adapters)
    changes = merging.changes(models, "task_arithmetic", weights=[0.5, 2.0], **{"lambda": 1.0})
    _, wanted = in_numpy("bert", [each.adapter for each in adapters], [0.5, 2.0])
    base: Any = models.aligned.base
    for name, change in changes.items():
        np.testing.assert_allclose((base.get(name) + change).numpy(), wanted[name], rtol=1e-10, atol=1e-12)


def test_a_head_is_written_with_it(tmp_path: Path, mergelab_command: Command) -> None:
    adapters = experts(tmp_path, "bert", task_type="SEQ_CLS")
    outcome = written(mergelab_command, adapters, "method=soup", "save.form=ia3")
    assert outcome.code == 0, outcome.err
    own = open_model(on_base(adapters[0].base, Path("out"), where="a"))
    heads = [load_file(each.adapter / "adapter_model.safetensors") for each in adapters]
    name = "base_model.model.classifier.weight"
    mean: Tensor = sum(head[name].double() for head in heads) / 2  # type: ignore[assignment]
    torch.testing.assert_close(own.get("classifier.weight"), mean, rtol=1e-6, atol=1e-7)


REFUSED: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "another method": (None, ("method=ties",), "save.form=lora_svd takes any merge"),
    "lora": (
        lambda: peft.LoraConfig(r=2, target_modules=["query"]),
        ("method=soup",),
        "by more than IA³; save.form=dense can hold it",
    ),
    "inputs and outputs": (
        lambda: peft.IA3Config(target_modules=["key"], feedforward_modules=["key"]),
        ("method=soup",),
        "multiply the inputs and the outputs of bert.encoder.layer.0.attention.self.key.weight",
    ),
    "biases otherwise": (
        None,
        ("method=task_arithmetic", "+method.rules=[{match: '*key.bias', lambda: 0.1}]"),
        "are merged with different weights, and IA³ has one vector for both",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_ia3_cannot_hold_is_refused(what: str, tmp_path: Path, mergelab_command: Command) -> None:
    config, arguments, line = REFUSED[what]
    (first,) = experts(tmp_path, "bert", 1)
    second = small.made(tmp_path, small.bert(), config() if config else peft.IA3Config(**KINDS["bert"][1]), seed=1)
    outcome = written(mergelab_command, [first, second], *arguments, "save.form=ia3")
    assert outcome.code == 2
    (found,) = [each for each in outcome.err.splitlines() if each.strip() and "Writing model" not in each]
    assert line in found
    assert len(found) <= 400
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))
