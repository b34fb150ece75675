"""ZipIt! on small real transformers: shuffled copies are brought back, and what is zipped computes as it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge, merge_to_dict
from mergelab.engine.warm_session import MergeSession
from mergelab.errors import ConfigError, MergeWarning
from mergelab.estimation.features import layer_inputs, spread_tokens
from mergelab.methods.zipit import ZippedSource, standardised, units_of, zipit
from mergelab.ops.feature_matching import zip_greedily
from mergelab.weights.align import AlignedModels
from tests.methods.test_fisher import Drawn
from tests.methods.test_rebasin import EACH, FAMILIES, FFN, HEADS, Family, Orders, State, aligned, logits, state_of
from tests.methods.tiny_classifiers import Expert, classifier, padded_batches, single_examples
from tests.methods.toy import merged, toy_models
from tests.ops.test_feature_matching import zipped_in_turn
from tests.parity import FORMULA, compared
from tests.parity import ZIPIT as AUTHORS

Matrix = np.ndarray[Any, np.dtype[np.float64]]
ZIPIT = get_method("zipit")
FIRST = "bert.encoder.layer.0"
INNER = [f"{FIRST}.intermediate.dense.weight", f"{FIRST}.intermediate.dense.bias", f"{FIRST}.output.dense.weight"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn_for(family: Family, *states: State, folder: Path | None = None) -> Drawn:
    """Experts with these weights, and examples."""
    experts = {}
    for name, state in zip("abc", states, strict=False):
        module = family.make().double().eval()
        module.load_state_dict(state)
        experts[name] = Expert(module, key=name)
    return Drawn(experts, folder)


def zipped(family: Family, *states: State, models: AlignedModels | None = None, **parameters: Any) -> State:
    examples = drawn_for(family, *states)
    return merge_to_dict(ZIPIT, parameters, models or aligned(*states), examples=examples)


def moved_experts(family: Family, *states: State, **parameters: Any) -> list[State]:
    """The experts with their features in common places, before they are averaged."""
    models = aligned(*states)
    substitute = zipit(models, drawn_for(family, *states), **parameters)
    assert all(isinstance(expert, ZippedSource) for expert in substitute.models.experts)
    found = [{name: expert.get(name) for name in models.names} for expert in substitute.models.experts]
    return [{name: each[models.aliases.get(name, name)] for name in states[0]} for each in found]


@EACH
@pytest.mark.parametrize("copies", [1, 2])
def test_shuffled_copies_are_recovered_with_all_features_zipped(family: Family, copies: int) -> None:
    state = state_of(family.model())
    shuffled = [family.shuffled(state, Orders(seed)) for seed in range(copies)]
    assert (logits(family, zipped(family, state, *shuffled, ratio=0.0)) - logits(family, state)).abs().max() > 0.1
    result = zipped(family, state, *shuffled, ratio=1.0, alpha=1.0)
    options = "ratio=1, alpha=1"
    compared("zipit", "the model before it was shuffled", result, [state[name] for name in result], options=options)
    torch.testing.assert_close(logits(family, result), logits(family, state), rtol=0, atol=family.accuracy)
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-15 if copies > 1 else 0, atol=0)


@EACH
def test_where_no_two_features_of_one_expert_go_together_each_expert_computes_what_it_did(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    moved = moved_experts(family, *states, ratio=1.0, beta=0.0)
    for state, new in zip(states, moved, strict=True):
        torch.testing.assert_close(logits(family, new), logits(family, state), rtol=0, atol=family.accuracy)
    assert sum(not torch.equal(moved[1][name], states[1][name]) for name in moved[1]) > 20
    result = zipped(family, *states, ratio=1.0, beta=0.0)
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, (moved[0][name] + moved[1][name]) / 2, rtol=1e-15, atol=0)


@EACH
def test_heads_and_the_residual_stream_keep_one_feature_of_each_expert_whatever_the_budget(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    models = aligned(*states)
    substitute = zipit(models, drawn_for(family, *states), ratio=1.0, alpha=1.0, beta=1.0)
    several: set[str] = set()
    for unit in units_of(models, heads=family.heads.get("kv_heads", HEADS)):
        for slot in unit.slots:
            for expert in substitute.models.experts:
                assert isinstance(expert, ZippedSource)
                axis = expert.axes[slot.tensor][slot.axis]
                if axis.index.unique().numel() < axis.index.numel():
                    several.add(unit.name.split(".")[0])
    assert several <= {"ffn", "pooled"}
    assert "ffn" in several


def ffn_alone(*states: State) -> AlignedModels:
    """Of the first layer; attention's output is there to tell the family, and what writes its heads is not merged."""
    merges = [*INNER, f"{FIRST}.attention.output.dense.weight"]
    return aligned(*states, ignore=[name for name in states[0] if name not in merges])


def test_features_that_an_expert_has_twice_make_room_for_anothers() -> None:
    family = FAMILIES["bert"]
    a, b = state_of(family.model(0)), state_of(family.model(0))
    generator = torch.Generator().manual_seed(1)
    for state in (a, b):
        twins = torch.randperm(FFN, generator=generator) // 2
        for name in INNER[:2]:
            state[name] = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)[twins]
        state[INNER[2]] = torch.randn(state[INNER[2]].shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(100, 32, generator=generator, dtype=torch.float64)

    def outputs(state: Mapping[str, Tensor]) -> Tensor:
        w, bias, v = (state[name] for name in INNER)
        return torch.nn.functional.gelu(inputs @ w.T + bias) @ v.T

    both = (outputs(a) + outputs(b)) / 2
    # Each group is a pair of twins: the merged layer has all features of both experts, and returns their outputs' mean.
    models = ffn_alone(a, b)
    torch.testing.assert_close(outputs(zipped(family, a, b, models=models, beta=1.0)), both, rtol=0, atol=1e-12)
    assert (outputs(zipped(family, a, b, models=models, beta=0.0)) - both).abs().max() > 0.1


def zip_transcribed(correlation: Matrix, alpha: float, beta: float) -> tuple[Matrix, Matrix]:
    """The paper's matrices for two models: merge (d, 2d), each row a mean, and unmerge (2d, d), by trying all pairs."""
    count = len(correlation)
    size = count // 2
    like = correlation.copy()
    unmerge = np.eye(count)
    budget = [int(size // 2 * beta + 1e-4)] * 2
    alive = list(range(count))
    np.fill_diagonal(like, -np.inf)
    for _ in range(size):
        has = np.stack([unmerge[:size].any(0), unmerge[size:].any(0)])  # of each model
        value = like.copy()
        for m in (0, 1):
            value[(budget[m] <= 0) & has[m][:, None] & has[m]] = -np.inf
        i, j = sorted(np.unravel_index(value.argmax(), value.shape))
        for m in (0, 1):
            budget[m] -= bool(has[m, i] and has[m, j])
        unmerge[:, i] += unmerge[:, j]
        least = np.minimum(like[i], like[j])
        like[i] = like[:, i] = np.where(least > 0, least * alpha, least)
        like[i, i] = -np.inf
        like[j] = like[:, j] = -np.inf
        alive.remove(j)
    unmerge = unmerge[:, alive]
    return (unmerge / unmerge.sum(0)).T, unmerge


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_groups_of_any_number_of_experts_are_those_of_the_authors_loop(models: int, beta: float) -> None:
    similarity = np.abs(np.corrcoef(np.random.default_rng(0).normal(size=(models * 12, 15))))
    expected = zipped_in_turn(similarity, models, 12, 0.3, beta)
    found = zip_greedily(similarity, np.repeat(np.arange(models), 12), 12, alpha=0.3, beta=beta, budget="first")
    options = f"budget=first, alpha=0.3, beta={beta}, {models} models"
    note = "groups; ZipIt multiplies negative correlations by alpha, too, and doubles features where no pair is left"
    compared("zipit", AUTHORS, torch.from_numpy(found), expected, options=options, note=note)
    assert found.tolist() == expected


def hidden_features(state: State) -> Matrix:
    """What the first layer's FFN units are on all real tokens of both experts' examples: (tokens, units)."""
    module: Any = FAMILIES["bert"].make().double().eval()
    module.load_state_dict(state)
    rows: list[Tensor] = []
    layer = module.get_submodule(f"{FIRST}.output.dense")
    handle = layer.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0][0]))
    with torch.no_grad():
        for inputs, _ in single_examples():
            module(**inputs)
    handle.remove()
    return np.concatenate([row.numpy() for row in rows * 2])


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.125), (1.0, 1.0), (0.5, 0.0)])
def test_a_two_layer_mlp_is_zipped_by_the_papers_matrices(alpha: float, beta: float) -> None:
    family = FAMILIES["bert"]
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    result = zipped(family, *states, models=ffn_alone(*states), alpha=alpha, beta=beta)
    features = np.concatenate([hidden_features(state) for state in states], axis=1)
    merge_, unmerge = zip_transcribed(np.corrcoef(features.T), alpha, beta)
    w, bias, v = ([state[name].numpy() for state in states] for name in INNER)
    expected = [
        merge_ @ np.concatenate(w),
        merge_ @ np.concatenate(bias),
        np.concatenate(v, axis=1) @ unmerge / 2,
    ]
    order = [int(np.abs(expected[0] - row).sum(1).argmin()) for row in result[INNER[0]].numpy()]  # of the groups
    assert sorted(order) == list(range(FFN))
    expected = [expected[0][order], expected[1][order], expected[2][:, order]]
    options = {"alpha": alpha, "beta": beta}
    compared("zipit", FORMULA, [result[name] for name in INNER], expected, options=options, note="one FFN alone")
    for name, value in zip(INNER, expected, strict=True):
        np.testing.assert_allclose(result[name].numpy(), value, rtol=1e-12, atol=1e-15)
    within = [int((unmerge[part].sum(0) > 1).any()) for part in (slice(FFN), slice(FFN, None))]
    assert within == ([0, 0] if beta == 0 else [1, 1])


@EACH
def test_at_ratio_0_it_is_the_mean(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in range(3)]
    result, mean = zipped(family, *states, ratio=0.0), merged("soup", aligned(*states))
    assert all(torch.equal(result[name], mean[name]) for name in mean)


def test_a_smaller_ratio_leaves_places_as_they_are() -> None:
    family = FAMILIES["bert"]
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    mean = merged("soup", aligned(*states))[INNER[1]]
    kept = [int((zipped(family, *states, ratio=r)[INNER[1]] == mean).sum()) for r in (0.0, 0.125, 0.25, 0.5, 1.0)]
    assert kept[:3] == sorted(kept[:3], reverse=True)
    assert [kept[0], kept[1] >= 36, kept[2] >= 24, kept[3] < 10] == [FFN, True, True, True]
    assert kept[3] == kept[4]  # of two experts' features, half is all that can be taken away


@EACH
def test_identical_experts_are_that_expert(family: Family) -> None:
    state = state_of(family.model())
    for count in (1, 2, 3):
        result = zipped(family, *[state] * count, **({"alpha": 1.0} if count > 2 else {}))
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-15 if count > 2 else 0, atol=0)


def test_features_of_dead_units_stay_in_their_places() -> None:
    family = FAMILIES["bert"]
    state = state_of(family.model())
    state[INNER[1]][5:20] = -1e6  # gelu gives 0 for all inputs
    result = zipped(family, state, state)
    assert all(torch.equal(result[name], state[name]) for name in result)


def test_the_heads_that_are_matched_have_the_highest_correlations() -> None:
    family = FAMILIES["gpt2"]
    state = state_of(family.model())
    noisy = {k: v + 0.01 * torch.randn(v.shape, generator=torch.Generator().manual_seed(3)) for k, v in state.items()}
    noisy["lm_head.weight"] = noisy["transformer.wte.weight"]
    shuffled = family.shuffled(noisy, Orders(2))
    result, plain = zipped(family, state, shuffled, ratio=1.0, beta=0.0), merged("soup", aligned(state, noisy))
    for name in plain:
        torch.testing.assert_close(result[name], plain[name], rtol=1e-14, atol=0)


def test_the_base_takes_no_part_and_gives_its_dtype() -> None:
    family = FAMILIES["bert"]
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    base = {name: 0 * tensor.to(torch.bfloat16) for name, tensor in states[0].items()}
    wide, half = zipped(family, *states), zipped(family, *states, models=aligned(*states, base=base))
    assert all(torch.equal(half[name], wide[name].to(torch.bfloat16)) for name in wide)


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    family = FAMILIES["gpt2"]
    states = [{k: v.bfloat16() for k, v in state_of(family.model(seed)).items()} for seed in (0, 1)]
    for state in states:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    examples = drawn_for(family, *states)
    half = merge_to_dict(ZIPIT, {"heads": HEADS}, aligned(*states), examples=examples)
    floats = [{k: v.float() for k, v in state.items()} for state in states]
    for state in floats:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    wide = merge_to_dict(ZIPIT, {"heads": HEADS}, aligned(*floats), examples=examples)
    assert all(torch.equal(half[name], wide[name].bfloat16()) for name in wide)


@EACH
def test_threads_the_order_of_experts_and_a_warm_session_change_no_bit(family: Family) -> None:
    states = [state_of(family.model(seed)) for seed in range(3)]
    models, examples = aligned(*states), drawn_for(family, *states)
    results = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        results.append(merge_to_dict(ZIPIT, {}, models, examples=examples))
    turned = replace(models, experts=(models.experts[2], models.experts[0], models.experts[1]))
    results.append(merge_to_dict(ZIPIT, {}, turned, examples=examples))
    targets = {name: torch.empty_like(states[0][name]) for name in models.names}
    session = MergeSession(models, targets)
    session.merge(ZIPIT, {"ratio": 0.25}, examples=examples)
    session.merge(ZIPIT, {}, examples=examples)
    for other in (*results[1:], targets):
        assert all(torch.equal(results[0][name], other[name]) for name in models.names)


def test_every_expert_runs_on_the_examples_of_all() -> None:
    family = FAMILIES["bert"]
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    examples = drawn_for(family, *states)
    seen: dict[str, int] = {}
    for name, expert in examples.experts.items():
        expert.network.register_forward_hook(lambda _, __, ___, n=name: seen.update({n: seen.get(n, 0) + 1}))  # type: ignore[misc]
    merge_to_dict(ZIPIT, {"samples": 7}, aligned(*states), examples=examples, seed=5)
    assert seen == dict.fromkeys("ab", 2 * len(list(padded_batches())))
    assert examples.asked == [("a", 7, 5, False), ("b", 7, 5, False)]


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    states = [state_of(family.model(seed)) for seed in (0, 1)]
    examples = drawn_for(family, *states, folder=tmp_path)
    first = merge_to_dict(ZIPIT, {"heads": HEADS}, aligned(*states), examples=examples)
    assert [expert.asked for expert in examples.experts.values()] == [1, 1]
    again = merge_to_dict(ZIPIT, {"heads": HEADS}, aligned(*states), examples=examples)
    other = merge_to_dict(ZIPIT, {"heads": HEADS, "ratio": 0.1}, aligned(*states), examples=examples)
    assert [expert.asked for expert in examples.experts.values()] == [1, 1]
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())
    examples.experts["b"].key = "changed"
    merge_to_dict(ZIPIT, {"heads": HEADS}, aligned(*states), examples=examples)
    assert [expert.asked for expert in examples.experts.values()] == [2, 2]


@pytest.mark.parametrize(("kind", "padding"), [("bert", 4), ("gpt2", 3), ("llama", 0)])
def test_layer_inputs_are_those_of_real_tokens(kind: str, padding: int) -> None:
    network = classifier(kind)
    names = {name: name for name, _ in network.named_parameters()}
    found = layer_inputs(network, names, set(names), list(padded_batches(padding=padding)), 100)
    assert len(found) >= 2 * 4  # an attention's projections have one input
    rows: dict[str, list[Tensor]] = {name: [] for name in found}
    for name, seen in rows.items():
        layer = network.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))  # type: ignore[misc]
    with torch.no_grad():
        for inputs, _ in single_examples():  # without padding
            network(**inputs)
    for name, values in found.items():
        expected = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows[name]])
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def few_of_each(count: int) -> Iterator[list[int]]:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    yield from spread_tokens(mask, count).tolist()


def test_tokens_are_spread_over_the_real_ones() -> None:
    assert [sum(row) for row in few_of_each(4)] == [4, 3, 4]
    assert next(few_of_each(2)) == [0, 0, 0, 1, 0, 0, 0, 1]
    assert list(few_of_each(1)) == [[0] * 7 + [1], [0, 0, 1, 0, 0, 0, 0, 0], [0] * 7 + [1]]


def test_correlations_are_pearsons() -> None:
    generator = np.random.default_rng(0)
    values = 3 + generator.normal(size=(50, 6)) * [1, 2, 3, 4, 5, 0]
    rows = standardised(torch.from_numpy(values).float(), 6).numpy()
    np.testing.assert_allclose((rows @ rows.T)[:5, :5], np.corrcoef(values[:, :5].T), atol=1e-6)
    assert (rows @ rows.T)[5].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["t5", "albert"])
def test_models_of_another_family_are_an_error_before_a_tensor_is_read(kind: str) -> None:
    state = state_of(classifier(kind))
    with pytest.raises(ConfigError, match="method=zipit: knows the hidden units of BERT-, GPT-2- and Llama-like"):
        merge(ZIPIT, {}, aligned(state, state), examples=object())


def test_models_without_layers_are_averaged_and_it_says_so() -> None:
    with pytest.warns(MergeWarning, match="zipit: these models have no hidden units"):
        result = merged("zipit", toy_models(2))
    mean = merged("soup", toy_models(2))
    assert all(torch.equal(result[name], mean[name]) for name in mean)


def test_heads_that_do_not_divide_the_projections_are_an_error() -> None:
    family = FAMILIES["llama"]
    state = state_of(family.model())
    with pytest.raises(ConfigError, match=r"method\.heads: 5 heads or groups"):
        zipped(family, state, state, heads=5)


def test_units_that_a_head_kept_apart_reads_are_averaged_as_they_are() -> None:
    family = FAMILIES["bert"]
    state = state_of(family.model())
    copy = family.shuffled(state, Orders(1))
    result = zipped(family, state, copy, models=aligned(state, copy, ignore=["classifier.*"]), ratio=1.0)
    pooler = "bert.pooler.dense.bias"
    assert torch.equal(result[pooler], (state[pooler] + copy[pooler]) / 2)
    assert all(torch.equal(result[name], state[name]) for name in result if "pooler" not in name)
