"""Weight matching on small real transformers: a copy with its hidden units in another order is brought back exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import mergelab as ml
from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError, MergeWarning, NonFinite
from mergelab.methods.rebasin import PermutedSource, axis_indices, match
from mergelab.ops.permutations import find_permutations
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.source import DictSource
from tests.methods.toy import merged
from tests.parity import FORMULA, compared
from tests.standins import NAMED_LABELS

WIDTH, HEADS, KV_HEADS, FFN, LAYERS, WORDS = 32, 4, 2, 48, 2, 300
State = dict[str, Tensor]


class Orders:
    """Random orders of units, drawn when they are first used."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[str, Tensor] = {}

    def __call__(self, unit: str, count: int, block: int = 1) -> Tensor:
        if unit not in self.drawn:
            self.drawn[unit] = torch.randperm(count, generator=self.generator)
        return (self.drawn[unit][:, None] * block + torch.arange(block)).reshape(-1)


def shuffled_bert(state: State, order: Orders) -> State:
    stream = order("residual", WIDTH)
    new = dict(state)

    def put(name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        tensor = new[name] if rows is None else new[name][rows]
        new[name] = tensor if columns is None else tensor[:, columns]

    for table in ("word", "position", "token_type"):
        put(f"bert.embeddings.{table}_embeddings.weight", None, stream)
    for end in ("weight", "bias"):
        put(f"bert.embeddings.LayerNorm.{end}", stream)
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        heads, ffn = order(f"heads{layer}", HEADS, WIDTH // HEADS), order(f"ffn{layer}", FFN)
        for part in ("query", "key", "value"):
            put(f"{at}.attention.self.{part}.weight", heads, stream)
            put(f"{at}.attention.self.{part}.bias", heads)
        put(f"{at}.attention.output.dense.weight", stream, heads)
        put(f"{at}.intermediate.dense.weight", ffn, stream)
        put(f"{at}.intermediate.dense.bias", ffn)
        put(f"{at}.output.dense.weight", stream, ffn)
        for block in ("attention.output", "output"):
            for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
                put(f"{at}.{block}.{name}", stream)
    pooled = order("pooled", WIDTH)
    put("bert.pooler.dense.weight", pooled, stream)
    put("bert.pooler.dense.bias", pooled)
    put("classifier.weight", None, pooled)
    return new


def shuffled_gpt2(state: State, order: Orders) -> State:
    stream = order("residual", WIDTH)
    new = dict(state)
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"):
        new[name] = new[name][:, stream]
    new["lm_head.weight"] = new["transformer.wte.weight"]
    for end in ("weight", "bias"):
        new[f"transformer.ln_f.{end}"] = new[f"transformer.ln_f.{end}"][stream]
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        heads, ffn = order(f"heads{layer}", HEADS, WIDTH // HEADS), order(f"ffn{layer}", FFN)
        fused = torch.cat([heads, heads + WIDTH, heads + 2 * WIDTH])
        for norm in ("ln_1", "ln_2"):
            for end in ("weight", "bias"):
                new[f"{at}.{norm}.{end}"] = new[f"{at}.{norm}.{end}"][stream]
        new[f"{at}.attn.c_attn.weight"] = new[f"{at}.attn.c_attn.weight"][stream][:, fused]
        new[f"{at}.attn.c_attn.bias"] = new[f"{at}.attn.c_attn.bias"][fused]
        new[f"{at}.attn.c_proj.weight"] = new[f"{at}.attn.c_proj.weight"][heads][:, stream]
        new[f"{at}.mlp.c_fc.weight"] = new[f"{at}.mlp.c_fc.weight"][stream][:, ffn]
        new[f"{at}.mlp.c_fc.bias"] = new[f"{at}.mlp.c_fc.bias"][ffn]
        new[f"{at}.mlp.c_proj.weight"] = new[f"{at}.mlp.c_proj.weight"][ffn][:, stream]
        for block in ("attn", "mlp"):
            new[f"{at}.{block}.c_proj.bias"] = new[f"{at}.{block}.c_proj.bias"][stream]
    return new


def shuffled_llama(state: State, order: Orders) -> State:
    stream = order("residual", WIDTH)
    new = dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new[name] = new[name][:, stream]
    new["model.norm.weight"] = new["model.norm.weight"][stream]
    width = WIDTH // HEADS
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        groups, ffn = f"groups{layer}", order(f"ffn{layer}", FFN)
        queries, keys = order(groups, KV_HEADS, width * HEADS // KV_HEADS), order(groups, KV_HEADS, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            new[f"{at}.{name}.weight"] = new[f"{at}.{name}.weight"][stream]
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            new[f"{at}.self_attn.{part}_proj.weight"] = new[f"{at}.self_attn.{part}_proj.weight"][rows][:, stream]
            new[f"{at}.self_attn.{part}_proj.bias"] = new[f"{at}.self_attn.{part}_proj.bias"][rows]
        new[f"{at}.self_attn.o_proj.weight"] = new[f"{at}.self_attn.o_proj.weight"][stream][:, queries]
        new[f"{at}.self_attn.o_proj.bias"] = new[f"{at}.self_attn.o_proj.bias"][stream]
        for part in ("gate", "up"):
            new[f"{at}.mlp.{part}_proj.weight"] = new[f"{at}.mlp.{part}_proj.weight"][ffn][:, stream]
        new[f"{at}.mlp.down_proj.weight"] = new[f"{at}.mlp.down_proj.weight"][stream][:, ffn]
    return new


@dataclass(frozen=True)
class Family:
    make: Callable[[], nn.Module]
    shuffled: Callable[[State, Orders], State]
    heads: dict[str, int]
    units: int  # permutations per layer and besides
    accuracy: float = 1e-12  # of logits

    def model(self, seed: int = 0) -> nn.Module:
        """A model with every parameter drawn, biases and norms too."""
        module = self.make().double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                around = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
                parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return module


BERT = BertConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=FFN,
    max_position_embeddings=20,
    num_labels=3,
)
GPT2 = GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=FFN, n_positions=20)
LLAMA = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=20,
    attention_bias=True,
    tie_word_embeddings=False,
)
FAMILIES = {
    "bert": Family(lambda: BertForSequenceClassification(BERT), shuffled_bert, {"heads": HEADS}, 2 * LAYERS + 2),
    "gpt2": Family(lambda: GPT2LMHeadModel(GPT2), shuffled_gpt2, {"heads": HEADS}, 2 * LAYERS + 1),
    "llama": Family(
        lambda: LlamaForCausalLM(LLAMA),
        shuffled_llama,
        {"heads": HEADS, "kv_heads": KV_HEADS},
        2 * LAYERS + 1,
        accuracy=5e-6,  # its norms compute in float32 whatever the model's dtype
    ),
}
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def state_of(module: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}


def logits(family: Family, state: State) -> Tensor:
    module = family.make().double().eval()
    module.load_state_dict(state)
    words = torch.arange(2 * 11).reshape(2, 11) * 13 % WORDS
    with torch.no_grad():
        answer: Tensor = module(words).logits
    return answer


def aligned(*states: State, base: State | None = None, **options: Any) -> AlignedModels:
    names = ("a", "b", "c")
    experts = [DictSource(name, state) for name, state in zip(names, states, strict=False)]
    return align(DictSource("base", base) if base is not None else None, experts, **options)


@EACH
@pytest.mark.parametrize("seed", range(5))
def test_a_shuffled_copy_computes_the_same_and_is_recovered_exactly(family: Family, seed: int) -> None:
    state = state_of(family.model())
    copy = family.shuffled(state, Orders(seed))
    torch.testing.assert_close(logits(family, copy), logits(family, state), rtol=0, atol=family.accuracy)
    assert sum(not torch.equal(copy[name], state[name]) for name in state) > 20
    result = merged("rebasin", aligned(state, copy), seed=seed, **family.heads)
    theirs, note = [state[name] for name in result], "units shuffled at random and matched to the model itself"
    compared("rebasin", "the model before it was shuffled", result, theirs, note=note)
    assert all(torch.equal(result[name], state[name]) for name in state)


@EACH
def test_the_unaligned_mean_of_the_two_is_another_model(family: Family) -> None:
    state = state_of(family.model())
    result = merged("soup", aligned(state, family.shuffled(state, Orders(0))))
    assert (logits(family, result) - logits(family, state)).abs().max() > 0.1


@EACH
def test_any_orders_that_are_found_leave_each_experts_function_as_it_is(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    reference, other = aligned(*states).experts
    names = aligned(*states).names
    shapes = {name: reference.shape(name) for name in names}
    found = find_permutations(shapes, heads=family.heads.get("kv_heads", HEADS))
    assert len(found) == family.units
    orders = match(reference, other, found, key=0, max_sweeps=100)
    moved = PermutedSource(other, axis_indices(found, orders, shapes))
    state = {name: moved.get(name) for name in names}
    state = {name: state.get(name, state.get("transformer.wte.weight", tensor)) for name, tensor in states[1].items()}
    assert any(not torch.equal(state[name], states[1][name]) for name in names)
    torch.testing.assert_close(logits(family, state), logits(family, states[1]), rtol=0, atol=family.accuracy)


@EACH
def test_matching_brings_unlike_models_nearer(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    names = aligned(*states).names

    def distance(mean: State) -> float:
        return sum(float((mean[name] - states[0][name]).square().sum()) for name in names)

    models = aligned(*states)
    assert distance(merged("rebasin", models, **family.heads)) < 0.99 * distance(merged("soup", models))


def test_ffn_units_alone_are_in_the_order_of_the_best_assignment() -> None:
    states = [state_of(FAMILIES["bert"].model(seed)) for seed in (0, 1)]
    at = "bert.encoder.layer.0"
    names = [f"{at}.intermediate.dense.weight", f"{at}.intermediate.dense.bias", f"{at}.output.dense.weight"]
    merges = [*names, f"{at}.attention.output.dense.weight"]  # of whose heads the others keep the order
    models = aligned(*states, ignore=[name for name in states[0] if name not in merges])
    result = merged("rebasin", models, heads=HEADS)
    (w, b, v), (w2, b2, v2) = ([state[name].numpy() for name in names] for state in states)
    likeness = w @ w2.T + np.outer(b, b2) + v.T @ v2  # of each unit to each
    _, best = min_weight_full_bipartite_matching(csr_array(likeness.max() - likeness + 1))
    expected = [(w + w2[best]) / 2, (b + b2[best]) / 2, (v + v2[:, best]) / 2]
    assert (best != np.arange(FFN)).any()
    theirs = f"{FORMULA}, with SciPy's min_weight_full_bipartite_matching"
    compared("rebasin", theirs, [result[name] for name in names], expected, note="the units of one FFN alone")
    for name, value in zip(names, expected, strict=True):
        np.testing.assert_allclose(result[name].numpy(), value, rtol=1e-15)


@EACH
def test_every_sweep_raises_the_similarity_and_the_last_finds_nothing_to_improve(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    reference, other = aligned(*states).experts
    names = aligned(*states).names
    shapes = {name: reference.shape(name) for name in names}
    found = find_permutations(shapes, heads=family.heads.get("kv_heads", HEADS))

    def likeness(sweeps: int) -> float:
        moved = PermutedSource(other, axis_indices(found, match(reference, other, found, 0, sweeps), shapes))
        return sum(float((reference.get(name) * moved.get(name)).sum()) for name in names)

    reached = [likeness(sweeps) for sweeps in (1, 2, 3, 99, 100)]
    assert sorted(reached) == reached
    assert reached[0] > sum(float((reference.get(name) * other.get(name)).sum()) for name in names)
    assert reached[-2] == reached[-1]


@EACH
def test_with_a_base_the_experts_are_matched_to_it(family: Family) -> None:
    base = state_of(family.model())
    experts = [{name: tensor + 0.01 * torch.sign(tensor) * seed for name, tensor in base.items()} for seed in (1, 2)]
    plain = merged("task_arithmetic", aligned(*experts, base=base))
    copies = [family.shuffled(expert, Orders(seed)) for seed, expert in enumerate(experts)]
    models = aligned(*copies, base=base)
    result = merged("rebasin", models, then="task_arithmetic", **family.heads)
    assert all(torch.equal(result[name], plain[name]) for name in plain)


def test_the_method_that_follows_has_its_parameters_and_the_models_weights() -> None:
    family = FAMILIES["gpt2"]
    base = state_of(family.model())
    experts = [{k: v + 0.01 * s * torch.sin(37 * v) for k, v in base.items()} for s in (1, 2, 3)]
    copies = [family.shuffled(expert, Orders(seed)) for seed, expert in enumerate(experts)]
    parameters = {"density": 0.4, "lambda": 0.7}
    plain = merged("ties", aligned(*experts, base=base), model_weights=[1, 2, 3], **parameters)
    models = aligned(*copies, base=base)
    result = merged("rebasin", models, model_weights=[1, 2, 3], then={"name": "ties", **parameters}, heads=HEADS)
    assert all(torch.equal(result[name], plain[name]) for name in plain)


@EACH
def test_the_number_of_heads_comes_from_the_checkpoints_config(family: Family, tmp_path: Path) -> None:
    module = family.model().float()
    state = state_of(module)
    module.save_pretrained(tmp_path / "a")
    module.load_state_dict(family.shuffled(state, Orders(1)))
    module.save_pretrained(tmp_path / "b")
    models = align(None, [open_checkpoint(tmp_path / name, name) for name in ("a", "b")])
    result = merged("rebasin", models)
    assert all(torch.equal(result[name], state[name]) for name in result)
    assert set(result) >= set(models.names)


@EACH
def test_the_number_of_heads_comes_from_a_modules_own_config(family: Family) -> None:
    first, second = family.model().float(), family.model().float()
    state = state_of(first)
    second.load_state_dict(family.shuffled(state, Orders(1)))
    for method in (ml.rebasin, functools.partial(ml.c2m3, max_iterations=1)):
        result = method([first, second])
        assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(result).items())


def test_pipelines_are_matched_as_their_modules_are(bert_checkpoints: Mapping[str, Path]) -> None:
    family, folder = FAMILIES["bert"], str(bert_checkpoints[NAMED_LABELS])
    modules = [family.model().float() for _ in range(2)]
    state = state_of(modules[0])
    modules[1].load_state_dict(family.shuffled(state, Orders(1)))
    pipes = [pipeline("text-classification", model=module, tokenizer=folder) for module in modules]
    for method in (ml.rebasin, functools.partial(ml.c2m3, max_iterations=1)):
        result = method(pipes)
        assert type(result) is type(pipes[0])
        assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(result.model).items())


def test_without_a_config_the_number_of_heads_must_be_given() -> None:
    state = state_of(FAMILIES["llama"].model())
    with pytest.raises(ConfigError, match=r"method\.heads: rebasin needs the number of attention heads"):
        merged("rebasin", aligned(state, state))


def test_heads_that_do_not_divide_the_projections_are_an_error() -> None:
    state = state_of(FAMILIES["llama"].model())
    with pytest.raises(ConfigError, match=r"method\.heads: 5 heads or groups"):
        merged("rebasin", aligned(state, state), heads=5)
    with pytest.raises(ConfigError, match=r"method\.kv_heads=3: must divide the number of heads, 4"):
        merged("rebasin", aligned(state, state), heads=4, kv_heads=3)


def test_units_that_a_head_kept_apart_reads_stay_in_their_order() -> None:
    family = FAMILIES["bert"]
    state = state_of(family.model())
    units = {p.name for p in find_permutations({k: tuple(v.shape) for k, v in state.items()}, heads=HEADS)}
    assert units == {"residual", "pooled", "heads.0", "heads.1", "ffn.0", "ffn.1"}
    inner = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("classifier")}
    outside = [name for name in state if name.startswith("classifier")]
    assert {p.name for p in find_permutations(inner, outside, heads=HEADS)} == units - {"pooled"}
    lm = {k: tuple(v.shape) for k, v in state_of(FAMILIES["llama"].model()).items() if k != "lm_head.weight"}
    names = {p.name for p in find_permutations(lm, ["score.weight"], heads=KV_HEADS)}
    assert names == units - {"pooled", "residual"}


def test_a_head_that_is_not_merged_still_fits_its_expert() -> None:
    family = FAMILIES["bert"]
    state = state_of(family.model())
    copy = family.shuffled(state, Orders(1))
    result = merged("rebasin", aligned(state, copy, ignore=["classifier.*"]), heads=HEADS)
    pooler = "bert.pooler.dense.bias"
    assert torch.equal(result[pooler], (state[pooler] + copy[pooler]) / 2)
    assert not torch.equal(copy[pooler], state[pooler])
    assert all(torch.equal(result[name], state[name]) for name in result if "pooler" not in name)


def test_a_passed_through_layer_keeps_the_order_of_what_it_reads() -> None:
    family = FAMILIES["gpt2"]
    state = state_of(family.model())
    copy = family.shuffled(state, Orders(3))
    models = aligned(state, copy, ignore=["transformer.h.0.*"])
    found = find_permutations(
        {name: models.experts[0].shape(name) for name in models.names}, models.ignored, heads=HEADS
    )
    assert {each.name for each in found} == {"heads.1", "ffn.1"}
    result = merged("rebasin", models, heads=HEADS)
    for name in ("transformer.ln_f.weight", "transformer.wte.weight", "transformer.h.1.ln_1.bias"):
        assert torch.equal(result[name], (state[name] + copy[name]) / 2)
        assert not torch.equal(result[name], state[name])


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", {"residual", "heads.1", "ffn.1"}),
        ("model.visual.weight", {"residual"}),
        ("model.layers.0.self_attn.q_norm.weight", {"heads.0"}),
    ],
)
def test_units_that_an_unknown_tensor_may_read_stay_in_their_order(name: str, kept: set[str]) -> None:
    shapes = {k: tuple(v.shape) for k, v in state_of(FAMILIES["llama"].model()).items()}
    units = {each.name for each in find_permutations(shapes, heads=KV_HEADS)}
    assert {each.name for each in find_permutations({**shapes, name: (WIDTH,)}, heads=KV_HEADS)} == units - kept
    per_head = {**shapes, "model.layers.0.self_attn.q_norm.weight": (WIDTH // HEADS,)}
    assert {each.name for each in find_permutations(per_head, heads=KV_HEADS)} == units


def test_models_of_no_known_family_are_merged_as_they_are_and_it_says_so() -> None:
    state = {"embed.weight": torch.randn(9, 4), "block.0.weight": torch.randn(4, 4)}
    other = {name: torch.randn(tensor.shape) for name, tensor in state.items()}
    with pytest.warns(MergeWarning, match="rebasin: knows no hidden units of these models"):
        result = merged("rebasin", aligned(state, other))
    assert all(torch.equal(result[name], (state[name] + other[name]) / 2) for name in state)


@pytest.mark.parametrize("then", ["rebasin", "sup", "mergelab.nothing", {"density": 0.2}, "custom", ""])
def test_what_cannot_follow_is_an_error_before_a_tensor_is_read(then: Any) -> None:
    state = state_of(FAMILIES["gpt2"].model())
    with pytest.raises(ConfigError, match=r"^method\.then=.*: must be "):
        merge(get_method("rebasin"), {"then": then, "heads": HEADS}, aligned(state, state))


def test_what_the_following_method_lacks_is_an_error_before_a_tensor_is_read() -> None:
    models = aligned(*[state_of(FAMILIES["gpt2"].model())] * 2)
    with pytest.raises(ConfigError, match="method=ties: needs a base"):
        merge(get_method("rebasin"), {"then": "ties"}, models)
    with pytest.raises(ConfigError, match=r"method\.denisty: ties has no such parameter"):
        merge(get_method("rebasin"), {"then": {"name": "ties", "denisty": 0.1}}, models)
    with pytest.raises(ConfigError, match="method=median: takes no weights"):
        merge(get_method("rebasin"), {"then": "median"}, models, weights=[1, 2])


def test_rules_by_tensor_belong_to_the_method_that_follows() -> None:
    family = FAMILIES["gpt2"]
    base = state_of(family.model())
    expert = {name: tensor + 0.01 * torch.sign(tensor) for name, tensor in base.items()}
    models = aligned(family.shuffled(expert, Orders(0)), base=base)
    rules = [{"match": "*.mlp.*", "lambda": 0.5}]
    with pytest.raises(ConfigError, match="method=rebasin: its parameters hold for whole models"):
        merge(get_method("rebasin"), {"rules": [{"match": "*.mlp.*", "heads": 2}]}, models)
    plain = merged("task_arithmetic", aligned(expert, base=base), rules=rules)
    result = merged("rebasin", models, then={"name": "task_arithmetic", "rules": rules}, heads=HEADS)
    assert all(torch.equal(result[name], plain[name]) for name in plain)


@EACH
def test_a_value_that_is_not_finite_is_named(family: Family) -> None:
    state = state_of(family.model())
    name = next(name for name in state if "0.mlp" in name or "0.intermediate" in name)
    broken = {**state, name: torch.full_like(state[name], np.nan)}
    with pytest.raises(NonFinite, match=f"b: {name}"):
        merged("rebasin", aligned(state, broken), **family.heads)


@EACH
def test_the_number_of_threads_and_the_order_of_the_experts_change_no_bit(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in range(3)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(merged("rebasin", aligned(*states), **family.heads))
    finally:
        torch.set_num_threads(before)
    experts = aligned(*states).experts
    turned = align(None, [experts[2], experts[0], experts[1]])
    results.append(merged("rebasin", turned, **family.heads))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])
