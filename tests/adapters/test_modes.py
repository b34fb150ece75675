"""The libraries' own combinations of factors: equal to the libraries, and to their formulas in NumPy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergelab.adapters.changes import LowRank
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.request import checked_job, merged_adapter, prepared_job
from mergelab.engine.run import merge
from mergelab.engine.warm_session import MergeSession
from mergelab.errors import ConfigError
from tests.adapters import made as small
from tests.adapters import merging
from tests.parity import compared

peft = pytest.importorskip("peft")

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (small.llama, {"target_modules": ["q_proj", "down_proj"]}),
    "conv1d": (small.gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "embedding": (small.llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv2d": (small.convnet, {"target_modules": ["convolution"]}),
}


def loras(count: int, kind: str = "llama", **settings: Any) -> list[Any]:
    return [peft.LoraConfig(**{"r": 3, "lora_alpha": 4 + 2 * at} | KINDS[kind][1] | settings) for at in range(count)]


def assert_same_factors(own: dict[str, LowRank], theirs: Any) -> None:
    assert own.keys() == theirs.keys()
    for name, change in own.items():
        assert change.scale == theirs[name].scale == 1
        for own_factor, factor in ((change.a, theirs[name].a), (change.b, theirs[name].b)):
            rounding = 3e-7 * float(factor.abs().max())  # PEFT has its weights in float32
            torch.testing.assert_close(own_factor, factor, rtol=0, atol=rounding)
            assert torch.equal(own_factor == 0, factor == 0)


MODES: list[tuple[str, str, Sequence[float], dict[str, Any]]] = [
    ("peft_linear", "linear", (1.0, 1.0), {}),
    ("peft_linear", "linear", (0.7, -1.5, 0.2), {}),
    ("peft_linear", "linear", (-1.0,), {}),
    ("peft_ties", "ties", (1.0, 1.0, 1.0), {"density": 0.5}),
    ("peft_ties", "ties", (0.3, -2.0, 1.0), {"density": 0.23}),
    ("peft_ties", "ties", (0.3, 2.0, 1.0), {"density": 0.6, "majority_sign": "frequency"}),
    ("peft_ties", "ties", (0.3, 2.0), {"density": 1.0}),
    ("peft_ties", "ties", (0.5,), {"density": 0.1}),
    ("peft_magnitude_prune", "magnitude_prune", (1.0, -0.5), {"density": 0.31}),
    ("peft_magnitude_prune", "magnitude_prune", (2.0,), {"density": 0.1}),
    ("peft_dare_linear", "dare_linear", (0.7, -1.5), {"density": 1.0}),
    ("peft_dare_ties", "dare_ties", (0.3, -2.0, 1.0), {"density": 1.0}),
]


@pytest.mark.parametrize(("method", "kind", "weights", "settings"), MODES)
def test_a_mode_gives_the_factors_that_peft_gives(
    method: str, kind: str, weights: Sequence[float], settings: dict[str, Any], tmp_path: Path
) -> None:
    adapters = merging.several(tmp_path, small.llama, loras(len(weights)))
    own = merging.factors(merging.opened(adapters), method, weights=list(weights), **settings)
    others = {{"majority_sign": "majority_sign_method"}.get(key, key): value for key, value in settings.items()}
    theirs = merging.combined(merging.in_peft(adapters, small.llama()), weights, kind, **others)
    assert_same_factors(own, theirs)
    masks = "no entry is dropped: random masks agree in distribution only" if "dare" in method else ""
    options = {"weights": list(weights), **settings}
    mine, its = ([factor for name in own for factor in (of[name].a, of[name].b)] for of in (own, theirs))
    compared(method, f"peft {peft.__version__}", mine, its, options=options, note=masks)


@pytest.mark.parametrize("kind", ["conv1d", "embedding", "conv2d"])
@pytest.mark.parametrize(("method", "mode"), [("peft_linear", "linear"), ("peft_ties", "ties")])
def test_a_mode_gives_what_peft_gives_for_every_kind_of_layer(
    kind: str, method: str, mode: str, tmp_path: Path
) -> None:
    build, _ = KINDS[kind]
    adapters = merging.several(tmp_path, build, loras(2, kind))
    models = merging.opened(adapters)
    settings = {} if mode == "linear" else {"density": 0.4}
    theirs = merging.combined(merging.in_peft(adapters, build()), (0.8, -0.6), mode, **settings)
    assert_same_factors(merging.factors(models, method, weights=[0.8, -0.6], **settings), theirs)
    changes = merging.changes(models, method, weights=[0.8, -0.6], **settings)
    assert changes.keys() == theirs.keys()
    for name, change in changes.items():
        product = (theirs[name].left @ theirs[name].right).reshape(change.shape)
        torch.testing.assert_close(change, product, rtol=0, atol=1e-6 * float(product.abs().max()))


def test_a_layer_that_some_adapt_is_merged_of_those(tmp_path: Path) -> None:
    configs = [
        peft.LoraConfig(r=3, target_modules=["q_proj"]),
        peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    ]
    adapters = merging.several(tmp_path, small.llama, configs)
    for method, mode, settings in (("peft_linear", "linear", {}), ("peft_ties", "ties", {"density": 0.5})):
        theirs = merging.combined(merging.in_peft(adapters, small.llama()), (0.9, 0.4), mode, **settings)
        own = merging.factors(merging.opened(adapters), method, weights=[0.9, 0.4], **settings)
        assert_same_factors(own, theirs)
        assert any("v_proj" in name for name in own)


@pytest.mark.parametrize("method", ["peft_dare_linear", "peft_dare_ties"])
def test_random_masks_keep_the_share_that_density_says_and_depend_on_the_seed_alone(
    method: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    adapters = merging.several(tmp_path, lambda: small.llama(**sizes), loras(2, r=16))
    models = merging.opened(adapters)
    whole = merging.factors(models, "peft_linear", weights=[1.0, 0.0])
    sparse = merging.factors(models, method, weights=[1.0, 0.0], density=0.25)
    again = merging.factors(models, method, weights=[1.0, 0.0], density=0.25)
    for name, change in sparse.items():
        assert torch.equal(change.a, again[name].a)
        for own, full in ((change.a, whole[name].a), (change.b, whole[name].b)):
            kept = own != 0
            if method == "peft_dare_linear":
                torch.testing.assert_close(own[kept], full[kept] / 0.25)
                assert abs(float(kept.double().mean()) - 0.25) < 6 * math.sqrt(0.25 * 0.75 / own.numel())
            assert not torch.equal(kept, torch.ones_like(kept))
        a, b = change.a.flatten() != 0, change.b.flatten() != 0
        assert not torch.equal(a, b)  # their masks are not the same numbers again


# ------------------------------------------------------------------------ Adapters' modes, from their formulas in NumPy


def average_in_numpy(
    factors: list[list[tuple[np.ndarray, np.ndarray]]],
    scale: float,
    weights: Sequence[float],
    *,
    normalize: bool,
    negate_b: bool,
) -> list[np.ndarray]:
    """Adapters 1.3: weights over their sum; each factor's weighted sum; the product of the averages, times α/r."""
    shares = [weight / sum(weights) if normalize else weight for weight in weights]
    products = []
    for layer in factors:
        a: Any = sum((abs(w) if negate_b else w) * a for w, (a, _) in zip(shares, layer, strict=True))
        b: Any = sum(w * b for w, (_, b) in zip(shares, layer, strict=True))
        products.append(scale * (b @ a))
    return products


@pytest.mark.parametrize("negate_b", [False, True])
@pytest.mark.parametrize(
    ("weights", "normalize"),
    [((1.0, 1.0), True), ((0.5, 2.0), True), ((3.0, -1.0), True), ((0.5, -0.25), False), ((-1.0,), False)],
)
def test_adapters_modes_are_their_formulas(
    negate_b: bool, weights: Sequence[float], normalize: bool, tmp_path: Path
) -> None:
    adapters = merging.several(tmp_path, small.llama, loras(len(weights), lora_alpha=5))
    models = merging.opened(adapters)
    files = [load_file(each.adapter / "adapter_model.safetensors") for each in adapters]
    layers = [key.removesuffix(".lora_A.weight") for key in sorted(files[0]) if key.endswith("lora_A.weight")]
    names = [f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers]
    trained = [
        [(file[f"{layer}.lora_A.weight"].numpy(), file[f"{layer}.lora_B.weight"].numpy()) for file in files]
        for layer in layers
    ]
    wanted = average_in_numpy(trained, 5 / 3, weights, normalize=normalize, negate_b=negate_b)
    method = "adapters_linear_negate_b" if negate_b else "adapters_linear"
    found = merging.changes(models, method, weights=list(weights), normalize=normalize)
    assert sorted(found) == names
    for name, product in zip(names, wanted, strict=True):
        np.testing.assert_allclose(found[name].numpy(), product, rtol=1e-9, atol=1e-10)
    note = "the library itself is compared in the tests that run in its own environment (`make test-adapters`)"
    theirs = "float64 transcription of Adapters 1.3.0 (adapter-hub/adapters)"
    compared(method, theirs, [found[name] for name in names], wanted, options={"normalize": normalize}, note=note)


# ---------------------------------------------------------------------------------------- what their documentation says


def factor_of(one: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> float:
    """Return c where one change is c times another in every tensor."""
    assert one.keys() == adapter.keys()
    (c,) = {round(float((one[name] * adapter[name]).sum() / adapter[name].square().sum()), 9) for name in one}
    for name in one:
        torch.testing.assert_close(one[name], c * adapter[name], rtol=1e-9, atol=1e-9)
    return c


@pytest.mark.parametrize(
    ("method", "weight", "times"),
    [
        ("peft_linear", 0.5, 0.5),
        ("peft_linear", -1.0, -1.0),
        ("adapters_linear", 0.5, 0.25),
        ("adapters_linear", -1.0, 1.0),
        ("adapters_linear_negate_b", 0.5, 0.25),
        ("adapters_linear_negate_b", -1.0, -1.0),
        ("task_arithmetic", 0.5, 0.5),
        ("task_arithmetic", -1.0, -1.0),
    ],
)
def test_a_weight_scales_one_adapter_as_documented(method: str, weight: float, times: float, tmp_path: Path) -> None:
    models = merging.opened(merging.several(tmp_path, small.llama, loras(1)))
    settings = {"normalize": False} if method.startswith("adapters") else {}
    settings |= {"lambda": 1.0} if method == "task_arithmetic" else {}
    whole = merging.changes(models, "task_arithmetic", **{"lambda": 1.0})
    assert factor_of(merging.changes(models, method, weights=[weight], **settings), whole) == times


@pytest.mark.parametrize(
    ("method", "times"), [("peft_linear", 2.0), ("adapters_linear", 1.0), ("task_arithmetic", 1.0)]
)
def test_two_equal_adapters_of_weight_one_half_give_what_is_documented(
    method: str, times: float, tmp_path: Path
) -> None:
    (one,) = merging.several(tmp_path, small.llama, loras(1))
    two = small.Made(one.base, tmp_path / "twin", one.peft)
    two.adapter.mkdir()
    for file in one.adapter.iterdir():
        (two.adapter / file.name).write_bytes(file.read_bytes())
    settings = {"lambda": 1.0} if method == "task_arithmetic" else {}
    whole = merging.changes(merging.opened([one]), "task_arithmetic", **{"lambda": 1.0})
    found = merging.changes(merging.opened([one, two]), method, weights=[0.5, 0.5], **settings)
    assert factor_of(found, whole) == times


def test_one_adapter_of_weight_one_is_itself_in_every_mode(tmp_path: Path) -> None:
    models = merging.opened(merging.several(tmp_path, small.gpt2, loras(1, "conv1d", use_rslora=True)))
    whole = merging.changes(models, "task_arithmetic", **{"lambda": 1.0})
    for method in ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"):
        assert factor_of(merging.changes(models, f"peft_{method}"), whole) == 1
    for method in ("adapters_linear", "adapters_linear_negate_b"):
        assert factor_of(merging.changes(models, method), whole) == 1


# ------------------------------------------------------------------------------------------------------------ bad input


MODES_OF = [name for name in method_names() if get_method(name).takes_adapters]
REFUSED: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any], str]] = {
    "ranks": ([{"r": 3}, {"r": 4}], "peft_linear", {}, "ranks of .* differ: 3 in .*adapter0 and 4 in .*adapter1"),
    "dora": ([{}, {"use_dora": True}], "peft_ties", {}, "adapter1 changes .* by DoRA, and peft_ties combines LoRA"),
    "bias": (
        [{}, {"bias": "lora_only", "target_modules": ["c_attn"]}],
        "peft_linear",
        {},
        "by a whole tensor .a trained bias, or modules_to_save.",
    ),
    "bias of B": ([{"lora_bias": True}, {}], "peft_linear", {}, "adapter0 changes .*bias by a bias of B"),
    "token rows": ([{"trainable_token_indices": [3]}, {}], "peft_linear", {}, "by token rows"),
    "weights cancel": ([{}, {}], "adapters_linear", {"weights": [1.0, -1.0]}, "add up to 0"),
    "too few weights": ([{}, {}], "peft_linear", {"weights": [1.0]}, "one number per expert, 2, not 1"),
    "scales": ([{}, {"lora_alpha": 9}], "adapters_linear", {}, r"the scales .α/r. of .* differ"),
    "layers": (
        [{}, {"target_modules": ["c_attn"]}],
        "adapters_linear_negate_b",
        {},
        "adapter1 does not adapt .*c_proj.*, and others do",
    ),
    "density": ([{}, {}], "peft_ties", {"density": 0}, "method.density=0: must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_mode_cannot_combine_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    settings, method, parameters, line = REFUSED[what]
    build = (lambda: small.gpt2(tie_word_embeddings=False)) if what == "token rows" else small.gpt2
    common = {"r": 3, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"]}
    adapters = merging.several(tmp_path, build, [peft.LoraConfig(**common | own) for own in settings])
    with pytest.raises(ConfigError, match=line) as caught:  # when the settings are checked, before anything is merged
        checked_job(get_method(method), parameters, merging.opened(adapters).aligned)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400 + 2 * len(str(tmp_path))


CHANGED_BY: dict[str, tuple[Any, Callable[[], Any], str]] = {
    "adalora": (
        small.bert,
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["query"]),
        "ADALORA",
    ),
    "vera": (small.bert, lambda: peft.VeraConfig(r=4, target_modules=["query"]), "VERA"),
    "vera drawn": (
        small.bert,
        lambda: peft.VeraConfig(r=4, target_modules=["query"], save_projection=False),
        "VERA",
    ),
    "loha": (small.bert, lambda: peft.LoHaConfig(r=2, target_modules=["query"]), "LoHa or LoKr"),
    "lokr": (small.bert, lambda: peft.LoKrConfig(r=2, target_modules=["query"]), "LoHa or LoKr"),
    "ia3": (
        small.bert,
        lambda: peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
        "IA³",
    ),
    "norms": (
        small.bert,
        lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
        "a whole tensor (a trained bias, or modules_to_save)",
    ),
    "tokens": (
        lambda: small.llama(tie_word_embeddings=False),
        lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 7]),
        "token rows",
    ),
    "parameters of stacked experts": (
        small.gpt_oss,
        lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]),
        "LoRA of parameters (target_parameters)",
    ),
    "parameters of experts that are stored one by one": (
        small.mixtral,
        lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]),
        "LORA of parameters (target_parameters)",
    ),
    "layers beside parameters": (
        small.mixtral,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
        "LORA of parameters (target_parameters)",
    ),
}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("kind", CHANGED_BY)
def test_a_type_whose_factors_peft_does_not_combine_is_refused_by_every_mode(kind: str, tmp_path: Path) -> None:
    build, config, what = CHANGED_BY[kind]
    adapters = merging.several(tmp_path, build, [config(), config()])
    models = merging.opened(adapters)
    for method in MODES_OF:
        with pytest.raises(
            ConfigError, match=rf"changes .* by {re.escape(what)}, and {method} combines LoRA"
        ) as caught:
            checked_job(get_method(method), {}, models.aligned)
        ways = re.search(r"task_arithmetic holds it with save\.form=(\w+) or (\w+)", str(caught.value))
        assert ways is not None
        assert ways.groups() == ("dense", "ia3" if kind == "ia3" else "lora_svd")
        assert len(str(caught.value)) <= 400 + 2 * len(str(tmp_path))
    assert merging.changes(models, "task_arithmetic")  # what the line says can hold it
    if kind != "ia3":  # PEFT has a sum of these alone: of the vectors l, not of l − 1
        tuner = adapters[0].peft.base_model
        with pytest.raises((AttributeError, TypeError, ValueError)):
            tuner.add_weighted_adapter(["default"], [1.0], "merged", "linear")


def test_a_mode_merges_no_models_that_are_not_adapters(tmp_path: Path) -> None:
    (one,) = merging.several(tmp_path, small.llama, loras(1))
    small.llama().save_pretrained(tmp_path / "dense")
    models = merging.opened([one, small.Made(one.base, tmp_path / "dense", None)])
    with pytest.raises(ConfigError, match=r"dense is no LoRA adapter, .*task_arithmetic merges any models"):
        merging.factors(models, "peft_linear")


# ------------------------------------------------------------------------------- what holds for every method of weights


def in_bfloat16(folder: Path, count: int = 2) -> list[small.Made]:
    build = small.llama
    return [
        small.made(folder, build(), config, dtype=torch.bfloat16, seed=seed)
        for seed, config in enumerate(loras(count, lora_alpha=5))
    ]


@pytest.mark.parametrize("method", MODES_OF)
def test_a_merge_is_rounded_once_and_the_same_however_it_is_done(method: str, tmp_path: Path) -> None:
    models = merging.opened(in_bfloat16(tmp_path)).aligned
    assert models.base is not None
    merged = dict(merge(get_method(method), {}, models))
    job = prepared_job(checked_job(get_method(method), {}, models))
    for name in models.names:
        base, change = models.base.get(name), merged_adapter(job, job.site(name))
        assert merged[name].dtype == torch.bfloat16
        if change is None:
            assert torch.equal(merged[name], base), name
            continue
        product = change.left.float() @ change.right.float()
        assert torch.equal(merged[name], (product + base.float()).bfloat16()), name
    targets = {name: torch.empty_like(merged[name]) for name in models.names}
    session = MergeSession(models, targets)
    for parameters in ({"weights": [0.3, 1.0]}, {}):  # nothing of the first merge stays in the second
        session.merge(get_method(method), parameters)
    backwards = dict(merge(get_method(method), {}, replace(models, names=models.names[::-1])))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = dict(merge(get_method(method), {}, models))
    torch.set_num_threads(before)
    for name, tensor in merged.items():
        for other in (targets, backwards, threaded):
            assert torch.equal(tensor, other.get(name, tensor)), name


@pytest.mark.parametrize("method", MODES_OF)
def test_weights_of_the_models_are_those_of_the_method(method: str, tmp_path: Path) -> None:
    models = merging.opened(merging.several(tmp_path, small.llama, loras(2, lora_alpha=5))).aligned
    given = dict(merge(get_method(method), {"weights": [2.0, 0.5]}, models))
    own = dict(merge(get_method(method), {}, models, weights=[2.0, 0.5]))
    plain = dict(merge(get_method(method), {}, models))
    assert all(torch.equal(given[name], own[name]) for name in models.names)
    assert any(not torch.equal(given[name], plain[name]) for name in models.names)
