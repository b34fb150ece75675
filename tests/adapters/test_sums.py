"""Sums of adapters from their factors are the float64 sums, rounded once, and need no dense expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergelab.adapters import changes
from mergelab.adapters.changes import LowRank, apply_all
from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.engine.registry import get_method
from mergelab.engine.request import checked_job
from mergelab.engine.run import merge_to_dict
from mergelab.errors import NonFinite
from mergelab.models.adapted import on_base, open_model
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.checkpoint import open_checkpoint
from tests.adapters import made as small

peft = pytest.importorskip("peft")

CASES: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "task arithmetic": ("task_arithmetic", {"weights": [1.5, -0.5], "lambda": 0.7}, [1.05, -0.35]),
    "soup": ("soup", {"weights": [3.0, 1.0]}, [0.75, 0.25]),
    "soup, not normalised": ("soup", {"weights": [0.25, 0.75], "normalize": False}, [0.25, 0.75]),
}


Products = dict[str, list[np.ndarray]]


def opened(folder: Path, dtype: torch.dtype) -> tuple[AlignedModels, Products, Products]:
    """Two adapters on a base of this dtype, what they add to each layer in float64, and the same of magnitudes."""
    experts: list[AdaptedCheckpoint] = []
    deltas: Products = {}
    sizes: Products = {}
    for seed in (0, 1):
        config = peft.LoraConfig(r=2 + seed, lora_alpha=5, target_modules=["query", "output.dense"])
        made = small.made(folder, small.bert(), config, dtype=dtype, seed=seed)
        expert = open_model(on_base(made.base, made.adapter, where="a"), f"e{seed}")
        assert isinstance(expert, AdaptedCheckpoint)
        experts.append(expert)
        factors = load_file(made.adapter / "adapter_model.safetensors")
        for name, a in factors.items():
            if ".lora_A." in name:
                b = factors[name.replace("lora_A", "lora_B")]
                key = name.removeprefix("base_model.model.").replace("lora_A.", "")
                scale = 5 / (2 + seed)
                deltas.setdefault(key, []).append(scale * (b.double() @ a.double()).numpy())
                sizes.setdefault(key, []).append(scale * (b.double().abs() @ a.double().abs()).numpy())
    return align(open_checkpoint(folder / "base", "base"), experts, ignore=["classifier.*"]), deltas, sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_sum_is_the_float64_sum_rounded_once(
    case: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, parameters, factors = CASES[case]
    models, deltas, sizes = opened(tmp_path, dtype)

    def refuse(*_: object) -> None:
        raise AssertionError("an expert was computed")

    # What the order of the experts is decided by is read; the sum itself needs no expert.
    merge_to_dict(get_method(method), parameters, models)
    for expert in models.experts:
        monkeypatch.setattr(expert.source, "get", refuse)
    order_kept = get_method(method)
    monkeypatch.setattr("mergelab.engine.request.content_order", lambda experts, names: list(range(len(experts))))
    merged = merge_to_dict(order_kept, parameters, models)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert len(deltas) == 6
    for name in models.names:
        if name not in deltas:
            assert torch.equal(merged[name], base[name]), name
            continue
        exact = base[name].double().numpy() + sum(f * d for f, d in zip(factors, deltas[name], strict=True))
        terms = np.abs(base[name].double().numpy())
        terms += sum(abs(f) * size for f, size in zip(factors, sizes[name], strict=True))
        computed, last = {torch.float64: (2.0**-53, 0.0), torch.float32: (2.0**-24, 0.0)}.get(
            dtype, (2.0**-24, 2.0**-8)
        )
        error = np.abs(merged[name].double().numpy() - exact)
        assert (
            error <= (5 + 4) * computed * terms + 1.01 * last * np.abs(exact)
        ).all()  # of rank 5, and four roundings
        assert merged[name].dtype == dtype


def test_weights_that_do_not_keep_the_base_are_merged_as_dense_experts_are(tmp_path: Path) -> None:
    models, deltas, _ = opened(tmp_path, torch.float64)
    merged = merge_to_dict(get_method("soup"), {"weights": [0.5, 0.25], "normalize": False}, models)
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name in models.names:
        exact = 0.75 * base[name].numpy()
        if name in deltas:
            exact = exact + 0.5 * deltas[name][0] + 0.25 * deltas[name][1]
        np.testing.assert_allclose(merged[name].numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_no_value_depends_on_how_many_rows_are_computed_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(changes, "ROWS", rows * 30)
    tensor = torch.randn(23, 30).bfloat16()
    own = [LowRank(torch.randn(23, 4), torch.randn(4, 30), 0.3), LowRank(torch.randn(23, 2), torch.randn(2, 30), 2.0)]
    exact = tensor.double() + sum(each.scale * (each.left.double() @ each.right.double()) for each in own)
    found = apply_all(own, tensor)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-8, atol=1e-6)


def test_an_adapter_is_opened_once_and_again_once_its_files_change(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"])
    made = small.made(tmp_path, small.bert(), config, dtype=torch.float32)
    before = open_model(on_base(made.base, made.adapter, where="a"))
    overlay = on_base(made.base, made.adapter, where="a")
    small.adapter(tmp_path / "adapter0", small.bert().float(), config, seed=5)
    after = open_model(overlay)
    assert isinstance(after, AdaptedCheckpoint)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before.get(name), after.get(name))
    fresh = open_model(on_base(made.base, made.adapter, where="a"))
    assert torch.equal(after.get(name), fresh.get(name))


def test_no_entry_exceeds_the_bound_by_which_overflow_is_ruled_out(tmp_path: Path) -> None:
    models, _, _ = opened(tmp_path, torch.float16)
    method = get_method("task_arithmetic")
    job = checked_job(method, {"lambda": 1.0}, models)
    bounds: dict[str, tuple[float, float]] = {}
    for name in models.names:
        summed = job.factored(name)
        assert summed is not None
        if summed.changes:
            left, right = summed.factors
            change = left.double() @ right.double()
            assert float((summed.base.double() + change).abs().max()) <= summed.reach
            bounds[name] = float(change.abs().max()), summed.reach
    name, (largest, reach) = max(bounds.items(), key=lambda each: each[1][1] / each[1][0])
    assert reach > 1.5 * largest
    most = torch.finfo(torch.float16).max
    merged = merge_to_dict(method, {"lambda": 0.9 * most / max(top for top, _ in bounds.values())}, models)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())  # though the bound is above the limit
    with pytest.raises(NonFinite, match="gives NaN or infinity in float16"):
        merge_to_dict(method, {"lambda": 1.1 * most / min(top for top, _ in bounds.values())}, models)
