"""PEFT's exact combinations are what is merged here; where PEFT's are wrong, what is merged here is the dense sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergelab.adapters.changes import LowRank
from tests.adapters import made as small
from tests.adapters import merging
from tests.conftest import Outcome
from tests.parity import compared

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
LAYERS = ["q_proj", "down_proj"]
WEIGHTS = (0.8, -0.5)
SUM = {"lambda": 1.0, "weights": list(WEIGHTS)}


def loras(count: int = 2, **settings: Any) -> list[Any]:
    return [
        peft.LoraConfig(**{"r": 4, "lora_alpha": 6 + at, "target_modules": LAYERS} | settings) for at in range(count)
    ]


def product(change: LowRank) -> np.ndarray:
    return np.asarray(change.scale * (change.left.numpy() @ change.right.numpy()))


def summed(adapters: Sequence[small.Made], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """Σ w ΔW, of PEFT's own dense forms, in float64."""
    base = {name: value.double().numpy() for name, value in small.llama().state_dict().items()}
    total: dict[str, Any] = {}
    for weight, each in zip(weights, adapters, strict=True):
        for name, value in each.dense().items():
            total[name] = total.get(name, 0) + weight * (value.numpy() - base[name])
    return {name: change for name, change in total.items() if np.abs(change).max() > 1e-9}


def truncated(change: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(change)
    return np.asarray((u[:, :rank] * s[:rank]) @ vh[:rank])


# ------------------------------------------------------------------------------------------------- equal to PEFT


@pytest.mark.parametrize(
    ("kind", "settings", "form"),
    [
        ("cat", {}, ("save.form=lora_cat",)),
        ("svd", {"svd_rank": 3}, ("save.form=lora_svd", "save.rank=3")),
    ],
)
def test_a_joined_adapter_is_that_of_peft(
    kind: str, settings: dict[str, Any], form: tuple[str, ...], tmp_path: Path, mergelab_command: Command
) -> None:
    adapters = merging.several(tmp_path, small.llama, loras())
    outcome = mergelab_command(
        f"models.base={adapters[0].base}",
        f"models.experts={{a: {adapters[0].adapter}, b: {adapters[1].adapter}}}",
        *("method=task_arithmetic", "method.lambda=1", "method.weights=[0.8,-0.5]", "task=rte"),
        *("evaluate=false", "tracking=none", "output=out", *form),
    )
    assert outcome.code == 0, outcome.err
    own = merging.factors(merging.opened([small.Made(adapters[0].base, Path("out"), None)]), "peft_linear")
    theirs = merging.combined(merging.in_peft(adapters, small.llama()), WEIGHTS, kind, **settings)
    assert own.keys() == theirs.keys()
    for name, change in own.items():
        assert change.rank == theirs[name].rank
        np.testing.assert_allclose(product(change), product(theirs[name]), rtol=0, atol=2e-6)


def rows_kept_by_int(adapters: Sequence[small.Made], density: float) -> None:
    """PEFT keeps int(density · n) entries of a matrix; so does a trim of each tensor here."""
    sizes = {value.numel() for value in adapters[0].dense().values() if value.dim() == 2}
    assert all(float(density * size).is_integer() for size in sizes)


SPARSE: list[tuple[str, str, dict[str, Any], dict[str, Any], tuple[float, ...]]] = [
    (
        "ties_svd",
        "ties",
        {"scope": "tensor", "tie_break": "positive", "lambda": 0.7},
        {"majority_sign_method": "total"},
        (0.7, 0.7, 0.7),
    ),
    (
        "ties_svd",
        "ties",
        {"scope": "tensor", "tie_break": "positive", "majority_sign": "frequency", "lambda": 1.0},
        {"majority_sign_method": "frequency"},
        (1.0, 1.0, 1.0),
    ),
    (
        "magnitude_prune_svd",
        "breadcrumbs",
        {"scope": "tensor", "gamma": 0.0, "lambda": 1.0, "weights": [0.5, -1.0, 2.0]},
        {},
        (0.5, -1.0, 2.0),
    ),
]


@pytest.mark.parametrize(("kind", "method", "parameters", "settings", "weights"), SPARSE)
def test_sparse_combinations_of_changes_are_the_methods_with_pefts_options(
    kind: str,
    method: str,
    parameters: dict[str, Any],
    settings: dict[str, Any],
    weights: tuple[float, ...],
    tmp_path: Path,
) -> None:
    density = 0.5
    adapters = merging.several(tmp_path, small.llama, loras(3))
    rows_kept_by_int(adapters, density)
    own = merging.changes(merging.opened(adapters), method, density=density, **parameters)
    wrapped = merging.in_peft(adapters, small.llama())
    theirs = merging.combined(wrapped, weights, kind, density=density, svd_rank=5, **settings)
    assert own.keys() == theirs.keys()
    for name, change in own.items():
        np.testing.assert_allclose(truncated(change.numpy(), 5), product(theirs[name]), rtol=0, atol=1e-6)
    options = {key: value for key, value in parameters.items() if key != "lambda"} | {"of": "LoRA adapters", "rank": 5}
    mine = [truncated(change.numpy(), 5) for change in own.values()]
    its = [product(theirs[name]) for name in own]
    compared(method, f"peft {peft.__version__} `{kind}`", mine, its, options=options)


def test_ties_with_unequal_weights_is_another_mean_than_pefts(tmp_path: Path) -> None:
    """PEFT divides Σ w τ by the number of experts that agree, TIES here by the sum of their weights."""
    adapters = merging.several(tmp_path, small.llama, loras(2))
    options = {"scope": "tensor", "tie_break": "positive", "lambda": 1.0, "density": 1.0}
    own = merging.changes(merging.opened(adapters), "ties", weights=[1.0, 3.0], **options)
    deltas = [merging.changes(merging.opened([each]), "task_arithmetic", **{"lambda": 1.0}) for each in adapters]
    wrapped = merging.in_peft(adapters, small.llama())
    theirs = merging.combined(wrapped, (1.0, 3.0), "ties_svd", density=1.0, svd_rank=16)
    for name, change in own.items():
        agree = np.stack([np.sign(delta[name].numpy()) for delta in deltas])
        elected = np.where(sum(delta[name].numpy() for delta in deltas) >= 0, 1, -1)
        shares = np.array([1.0, 3.0])[:, None, None] * (agree == elected)
        ratio = shares.sum(axis=0) / np.maximum((agree == elected).sum(axis=0), 1)
        np.testing.assert_allclose(product(theirs[name]), change.numpy() * ratio, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- where PEFT is wrong


@pytest.mark.parametrize(("kind", "rank", "settings"), [("cat", 8, {}), ("svd", 8, {"svd_rank": 8})])
def test_peft_runs_sums_of_rslora_with_the_root_of_the_rank_too_much(
    kind: str, rank: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapters = merging.several(tmp_path, small.llama, loras(use_rslora=True))
    wanted = summed(adapters, WEIGHTS)
    own = merging.changes(merging.opened(adapters), "task_arithmetic", **SUM)
    theirs = merging.combined(merging.in_peft(adapters, small.llama()), WEIGHTS, kind, **settings)
    assert own.keys() == theirs.keys() == wanted.keys()
    for name, change in wanted.items():
        np.testing.assert_allclose(own[name].numpy(), change, rtol=0, atol=1e-12)
        np.testing.assert_allclose(product(theirs[name]), math.sqrt(rank) * change, rtol=0, atol=1e-6)


def test_peft_runs_linear_combinations_of_rslora_with_the_root_of_the_rank_too_much(tmp_path: Path) -> None:
    adapters = merging.several(tmp_path, small.llama, loras(use_rslora=True))
    own = merging.factors(merging.opened(adapters), "peft_linear", weights=list(WEIGHTS))
    theirs = merging.combined(merging.in_peft(adapters, small.llama()), WEIGHTS, "linear")
    for name, change in own.items():
        np.testing.assert_allclose(product(theirs[name]), 2 * product(change), rtol=0, atol=1e-6)
    one = merging.changes(merging.opened(adapters[:1]), "peft_linear")
    for name, change in summed(adapters[:1], (1.0,)).items():
        np.testing.assert_allclose(one[name].numpy(), change, rtol=0, atol=1e-9)


def test_peft_saves_a_combination_of_rank_patterns_that_does_not_load(
    tmp_path: Path, mergelab_command: Command
) -> None:
    settings = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    adapters = merging.several(tmp_path, small.llama, loras(**settings))
    wrapped = merging.in_peft(adapters, small.llama())
    merging.combined(wrapped, WEIGHTS, "linear")
    wrapped.save_pretrained(tmp_path / "theirs", selected_adapters=["merged"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(small.llama(), tmp_path / "theirs" / "merged")
    outcome = mergelab_command(
        f"models.base={adapters[0].base}",
        f"models.experts={{a: {adapters[0].adapter}, b: {adapters[1].adapter}}}",
        *("method=peft_linear", "method.weights={a: 0.8, b: -0.5}", "task=rte"),
        *("evaluate=false", "tracking=none", "output=out"),
    )
    assert outcome.code == 0, outcome.err
    loaded = peft.PeftModel.from_pretrained(small.llama().double(), "out", autocast_adapter_dtype=False)
    dense = dict(loaded.merge_and_unload().state_dict())
    base = small.llama().double().state_dict()
    expected = merging.changes(merging.opened(adapters), "peft_linear", weights=list(WEIGHTS))
    assert {name for name in dense if not torch.equal(dense[name], base[name])} == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(dense[name] - base[name], change, rtol=0, atol=1e-5)


def dense_in_peft(adapters: Sequence[small.Made], model: Any) -> dict[str, Tensor]:
    wrapped = merging.in_peft(adapters, model)
    wrapped.add_weighted_adapter(["a"], [1.0], "merged", "svd", svd_rank=4)
    wrapped.set_adapter("merged")
    return dict(wrapped.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("build", "settings", "part"),
    [
        (small.llama, {"use_dora": True}, "weight"),
        (small.gpt2, {"lora_bias": True, "target_modules": ["c_attn"]}, "bias"),
    ],
)
def test_peft_drops_what_is_no_low_rank_change(build: Any, settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    adapters = merging.several(tmp_path, build, loras(1, **settings))
    wanted, base = adapters[0].dense(), build().double().state_dict()
    theirs = dense_in_peft(adapters, build())
    own = merging.changes(merging.opened(adapters), "task_arithmetic", **{"lambda": 1.0})
    assert any(name.endswith(part) for name in own)
    for name, change in own.items():
        torch.testing.assert_close(base[name] + change, wanted[name], rtol=0, atol=1e-12)
        lost = float((theirs[name] - wanted[name]).norm() / change.norm())
        assert lost > 0.2 if name.endswith(part) else lost < 1e-5, name
        if part == "bias" and name.endswith("bias"):
            assert torch.equal(theirs[name], base[name])
