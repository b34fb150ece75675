"""A merge that is written for the Adapters library loads there with its defaults, and is the sum of the adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapterhub import library
from tests.adapterhub.library import BOTH, TEXT
from tests.adapters import made as small

adapters = pytest.importorskip("adapters", reason="needs the Adapters library: make test-adapters")
from adapters import IA3Config, LoRAConfig  # noqa: E402

WEIGHTS = {"a": 0.6, "b": -0.3}
SUM = ("method=task_arithmetic", "method.lambda=0.6", "method.weights=[1.0,-0.5]")
EVERYWHERE = {"intermediate_lora": True, "output_lora": True}
CAT, SVD, IA3 = (("save.form=lora_cat",), ("save.form=lora_svd", "save.energy=1.0"), ("save.form=ia3",))

KINDS: dict[str, tuple[Any, tuple[Any, Any], tuple[str, ...], dict[str, Tensor]]] = {
    "roberta": (library.roberta, (LoRAConfig(r=2, alpha=6), LoRAConfig(r=3, alpha=5, **EVERYWHERE)), CAT, TEXT),
    "fused": (
        small.gpt2,
        (LoRAConfig(r=2, alpha=6, attn_matrices=["q"]), LoRAConfig(r=3, alpha=5, attn_matrices=["q", "v"])),
        CAT,
        TEXT,
    ),
    "at full energy": (small.t5, (LoRAConfig(r=2, alpha=6, leave_out=[0]), LoRAConfig(r=3, **EVERYWHERE)), SVD, BOTH),
    "pair": (small.bert2bert, (LoRAConfig(r=2, alpha=6, leave_out=[0]), LoRAConfig(r=3, **EVERYWHERE)), CAT, BOTH),
    "layers left out at the merge": (
        small.bert2bert,
        (LoRAConfig(r=2, alpha=6), LoRAConfig(r=3)),
        (*CAT, "models.leave_out=[1]"),
        BOTH,
    ),
    "fused ia3": (small.gpt2, (IA3Config(alpha=2), IA3Config(attn_matrices=["q"], output_lora=True)), IA3, TEXT),
}


SOUP = ("method=soup", "models.head=average", "save.form=lora_cat")
LORAS = (LoRAConfig(r=2, alpha=6), LoRAConfig(r=3, alpha=5))


@dataclass
class Made:
    """A base, two adapters on it, and the base with their weighted sum, by the library's own merges into the base."""

    base: Path
    adapters: dict[str, Path]
    total: dict[str, Tensor]
    out: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """What is merged, and the merges."""
    folder, found, jobs = tmp_path_factory.mktemp("writing"), {}, {}
    for number, kind in enumerate([*KINDS, "soup"]):
        build, configs, form, _ = KINDS.get(kind) or (small.bert, LORAS, (), TEXT)
        weights = WEIGHTS if kind in KINDS else {"a": 0.5, "b": 0.5}
        found[kind] = prepared(folder / str(number), kind, build, configs, weights)
        method = (*SUM, *form, "models.head=base") if kind in KINDS else SOUP
        jobs[f"{number}/out"] = (found[kind].base, found[kind].adapters, (*method, "save.library=adapters"))
    library.merged(folder, jobs)
    return found


def prepared(folder: Path, kind: str, build: Any, configs: Any, weights: dict[str, float]) -> Made:
    with_head = kind == "soup"
    build().save_pretrained(folder / "base")
    base, total = build().double().state_dict(), build().double().state_dict()
    found = {}
    for seed, (name, config) in enumerate(zip(weights, configs, strict=True)):
        model = library.with_adapter(build(), config, name, seed=seed)
        found[name] = folder / name
        model.save_adapter(str(found[name]), name)
        for key, change in changes(model, name, base).items():
            left_out = kind.startswith("layers left out") and ".layer.1." in key
            if (with_head or not library.is_head(key)) and not left_out:
                total[key] += weights[name] * change
    return Made(folder / "base", found, total, folder / "out")


def changes(model: Any, name: str, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter changes, by the library; the bias of IA³ too, which the library's own merge leaves out."""
    biases = {}
    for layer, module in model.named_modules():
        added = getattr(module, "loras", {})
        if name in added and type(added[name]).__name__ == "IA3" and module.bias is not None:
            nothing = torch.zeros(1, 1, model.config.hidden_size, dtype=torch.float64)
            nothing = nothing.repeat(1, 1, module.weight.numel() // len(module.bias) // nothing.shape[-1])
            with torch.no_grad():  # the output for no input is the bias
                biases[f"{layer}.bias"] = module(nothing)[0, 0] - module.bias
    model.merge_adapter(name)
    after = {key: tensor for key, tensor in model.state_dict().items() if key in base}
    return {key: tensor.double() - base[key] for key, tensor in after.items()} | biases


def loaded(build: Any, base: Path, adapter: Path) -> Any:
    """Load an adapter as a user would."""
    model = type(build()).from_pretrained(base)
    adapters.init(model)
    model.load_adapter(str(adapter), set_active=True)
    return model.double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_loads_with_the_defaults_and_is_the_sum(kind: str, made: dict[str, Made]) -> None:
    build, _, _, inputs = KINDS[kind]
    reference = build().double()
    reference.load_state_dict(made[kind].total)
    model = loaded(build, made[kind].base, made[kind].out)
    expected = library.outputs(reference, inputs)
    torch.testing.assert_close(library.outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(library.outputs(build().double(), inputs), expected, atol=1e-3)
    if kind == "pair":
        written = [each.generate(small.INPUTS, max_length=8, num_beams=2) for each in (model, reference)]
        assert torch.equal(*written)


def test_a_soup_has_the_mean_of_adapters_and_of_heads(made: dict[str, Made]) -> None:
    reference: Any = small.bert().double()
    reference.load_state_dict(made["soup"].total)
    model = loaded(small.bert, made["soup"].base, made["soup"].out)
    torch.testing.assert_close(model.classifier.weight, reference.classifier.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(library.outputs(model), library.outputs(reference), rtol=1e-5, atol=1e-5)
