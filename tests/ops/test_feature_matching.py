"""Merge groups of features, against the definition step by step; match one feature of each model."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from mergelab.ops.feature_matching import assign_positions, match_in_turn, positions_of_groups, zip_greedily

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def by_definition(
    similarity: Matrix, model_of: Matrix, keep: int, alpha: float, beta: float, budget_of: str = "members"
) -> list[int]:
    """All pairs of groups are looked at in every step."""
    groups = {i: [i] for i in range(len(similarity))}
    models = int(max(model_of)) + 1
    budget = [int((len(similarity) - keep) // models * beta + 1e-4)] * models
    spent = [budget_of == "members" and each <= 0 for each in budget]
    void = False

    def shared(a: int, b: int) -> set[int]:
        return counted[a] & counted[b]

    counted = {i: {int(model)} for i, model in enumerate(model_of)}
    near = {pair: float(similarity[pair]) for pair in combinations(range(len(similarity)), 2)}

    while len(groups) > keep:
        pairs = list(combinations(sorted(groups), 2))
        allowed = [pair for pair in pairs if void or not any(spent[m] for m in shared(*pair))]
        void = void or not allowed
        a, b = max(allowed or pairs, key=near.__getitem__)
        for model in shared(a, b):
            budget[model] -= 1
            spent[model] = spent[model] or budget[model] <= 0
        groups[a] += groups.pop(b)
        counted[a] |= {model for model in counted.pop(b) if budget_of == "members" or spent[model]}
        for other in groups.keys() - {a}:
            ends = [tuple(sorted((each, other))) for each in (a, b)]
            least = min(near[ends[0]], near[ends[1]])
            near[ends[0]] = least * alpha if least > 0 else least
    number = {i: first for first, found in groups.items() for i in found}
    return [number[i] for i in range(len(similarity))]


def drawn(models: int, size: int, seed: int = 0) -> Matrix:
    return np.corrcoef(np.random.default_rng(seed).normal(size=(models * size, 15)))


@pytest.mark.parametrize(("models", "size"), [(1, 8), (2, 12), (3, 8), (5, 4)])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.125), (0.3, 0.5), (1.0, 1.0), (0.9, 0.0), (0.0, 0.2), (0.5, 0.9)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", ["members", "first"])
def test_groups_are_those_of_the_definition(
    models: int, size: int, alpha: float, beta: float, seed: int, budget: Any
) -> None:
    similarity, model_of = drawn(models, size, seed), np.repeat(np.arange(models), size)
    for keep in (size, size // 2):
        expected = by_definition(similarity, model_of, keep, alpha, beta, budget)
        found = zip_greedily(similarity.copy(), model_of, keep, alpha=alpha, beta=beta, budget=budget)
        assert found.tolist() == expected
        assert len(set(expected)) == keep


def test_a_budget_of_none_keeps_each_models_features_apart() -> None:
    groups = zip_greedily(drawn(2, 20), np.repeat([0, 1], 20), 20, alpha=0.3, beta=0.0)
    assert sorted(groups[:20]) == sorted(groups[20:]) == list(range(20))


def test_groups_of_more_features_than_models_wait_for_the_others_where_alpha_is_small() -> None:
    similarity = np.full((6, 6), 0.5)
    similarity[:3, :3] = 0.9  # three features of one kind
    twos, threes = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 1, 2, 0, 1, 2])
    assert zip_greedily(similarity.copy(), twos, 4, alpha=1.0, beta=1.0).tolist() == [0, 0, 0, 3, 4, 5]
    assert zip_greedily(similarity.copy(), twos, 4, alpha=0.1, beta=1.0).tolist() == [0, 0, 2, 2, 4, 5]
    assert zip_greedily(similarity.copy(), threes, 4, alpha=0.1, beta=1.0).tolist() == [0, 0, 2, 2, 4, 5]


def zipped_in_turn(similarity: Matrix, models: int, keep: int, alpha: float, beta: float) -> list[int]:
    """Rows and columns are multiplied by α whenever a group grows, and a group's model is its first feature's."""
    like, count = similarity.copy(), len(similarity)
    np.fill_diagonal(like, -np.inf)
    first, model = list(range(count)), list(np.repeat(np.arange(models), count // models))
    group = np.arange(count)
    budget = [int((count - keep) // models * beta + 1e-4)] * models
    while len(first) > keep:
        a, b = sorted(divmod(int(like.argmax()), len(first)))
        least = np.minimum(like[a], like[b]) * alpha
        like[a] = like[:, a] = least
        like[a, a] = -np.inf
        like = np.delete(np.delete(like, b, 0), b, 1)
        group[group == first[b]] = first[a]
        of_one, own = model[a] == model[b], model[a]
        del first[b], model[b]
        if of_one:
            budget[own] -= 1
            if budget[own] <= 0:
                like[np.ix_(np.equal(model, own), np.equal(model, own))] = -np.inf
    return group.tolist()


@pytest.mark.parametrize(("models", "size"), [(2, 12), (3, 8), (4, 6)])
@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_the_budget_of_the_first_feature_groups_are_those_of_the_authors_loop(
    models: int, size: int, beta: float, seed: int
) -> None:
    similarity = np.abs(drawn(models, size, seed))  # their loop multiplies negative correlations by α, too
    expected = zipped_in_turn(similarity, models, size, 0.5, beta)
    model_of = np.repeat(np.arange(models), size)
    found = zip_greedily(similarity.copy(), model_of, size, alpha=0.5, beta=beta, budget="first")
    assert found.tolist() == expected


def test_one_feature_of_each_model_is_matched_the_most_similar_pair_first() -> None:
    similarity = np.eye(6)
    similarity[np.ix_([0, 1], [2, 3])] = [[0.8, 0.9], [0.1, 0.7]]
    similarity[np.ix_([0, 1], [4, 5])] = [[0.9, 0.8], [0.9, 0.1]]
    similarity[np.ix_([2, 3], [4, 5])] = [[0.2, 0.6], [0.1, 0.9]]
    # The second model: 0.9 pairs the first's feature 0 with its feature 1, which leaves 1 to 0. The third, by the
    # smaller similarity to the pair (0, 1): 0.1 and 0.8; to the pair (1, 0): 0.2 and 0.1.
    assert match_in_turn(similarity, 3).tolist() == [[0, 1], [1, 0], [1, 0]]


def test_positions_are_the_first_models_where_it_has_a_feature_in_the_group() -> None:
    group = np.array([0, 1, 1, 3, 0, 5, 5, 3])
    assert positions_of_groups(group, 2).tolist() == [[0, 1, 1, 3], [0, 2, 2, 3]]


def test_of_equally_similar_features_those_of_the_same_position_go_together() -> None:
    for one_per_model in (True, False):
        positions = assign_positions(np.ones((12, 12)), 3, 4, one_per_model=one_per_model, alpha=1.0, beta=0.0)
        assert positions.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("one_per_model", [True, False])
def test_the_positions_that_agree_best_keep_their_features(one_per_model: bool) -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(6, 40))
    second = first[[0, 2, 1, 3, 5, 4]] + 0.1 * generator.normal(size=(6, 40))
    similarity = np.corrcoef(np.concatenate([first, second]))
    positions = [
        assign_positions(similarity, 2, n, one_per_model=one_per_model, alpha=0.3, beta=0.0).tolist() for n in (0, 4, 6)
    ]
    assert positions[0] == [list(range(6))] * 2
    assert positions[1] == positions[2] == [list(range(6)), [0, 2, 1, 3, 5, 4]]
