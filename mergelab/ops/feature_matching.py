"""Match features of several models greedily by their pairwise similarity."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Similarity = NDArray[np.floating]
Positions = NDArray[np.intp]
Budget = Literal["members", "first"]

SAME_POSITION = 1e-5  # added to the similarity of features with equal positions, to decide between equal similarities


def zip_greedily(
    similarity: Similarity,
    model_of: Positions,
    count: int,
    *,
    alpha: float,
    beta: float,
    budget: Budget = "members",
) -> Positions:
    """Merge the two most similar groups of features until ``count`` groups are left, starting with one per feature.

    The similarity of a group to another is the smaller one of the two groups that it was made of; when that is
    positive, times ``alpha``. So it is multiplied once for each feature that two groups have together beyond two.

    Args:
        similarity: (N, N), symmetric; the diagonal is ignored. It is overwritten.
        model_of: (N,) index of each feature's model.
        count: number of groups to end with.
        alpha: see above.
        beta: budget of each model, as a fraction of (N − count) / models steps. A step counts against the budgets of
            the models of which both groups have features. Groups that share a model without budget are not merged. When
            no other groups are left, all budgets are void.
        budget: "members": as above. "first": a group counts as its first feature's model's alone until a step has used
            up a budget, one step where it is 0; from then on also as that model's.

    Returns:
        (N,) the group of each feature: the index of the group's first feature.
    """
    state = _Zipping(similarity, model_of, count, alpha, beta, budget)
    for _ in range(len(similarity) - count):
        state.step()
    return state.group


class _Zipping:
    """Groups during merging; each alive row has its most similar other group, or (stale) a bound of its similarity."""

    def __init__(
        self, similarity: Similarity, model_of: Positions, groups: int, alpha: float, beta: float, budget: Budget
    ) -> None:
        count = len(similarity)
        self.similarity = similarity
        self.alpha = similarity.dtype.type(alpha)
        np.fill_diagonal(self.similarity, -np.inf)
        self.group = np.arange(count)
        self.alive = np.ones(count, dtype=bool)
        self.members = model_of[:, None] == np.arange(model_of.max(initial=0) + 1)
        self.budget = np.full(self.members.shape[1], int((count - groups) // self.members.shape[1] * beta + 1e-4))
        self.by_members = budget == "members"
        self.spent = (self.budget <= 0) & self.by_members
        self.nearest = np.zeros(count, dtype=np.intp)
        self.bound = np.full(count, np.inf)
        self.stale = self.alive.copy()

    def step(self) -> None:
        """Merge two groups; the result has the lower of their indices."""
        first, second = self._most_similar_pair()
        shared = self.members[first] & self.members[second]
        row = np.minimum(self.similarity[first], self.similarity[second])
        row *= np.where(row > 0, self.alpha, 1)
        self.similarity[first], self.similarity[:, first] = row, row
        self.similarity[second] = self.similarity[:, second] = -np.inf
        self.alive[second], self.bound[second], self.stale[second] = False, -np.inf, False
        self.members[first] |= self.members[second] & (self.spent | self.by_members)
        self.group[self.group == second] = first
        self.stale |= ((self.nearest == first) | (self.nearest == second)) & self.alive
        self._scan(first)
        self.budget[shared] -= 1
        if (shared & ~self.spent & (self.budget <= 0)).any():
            self.spent |= shared & (self.budget <= 0)
            self._invalidate()

    def _most_similar_pair(self) -> tuple[int, int]:
        while True:
            row = int(self.bound.argmax())
            if self.stale[row]:
                self._scan(row)
            elif self.bound[row] > -np.inf:
                other = int(self.nearest[row])
                return min(row, other), max(row, other)
            else:
                self.spent[:], self.budget[:] = False, len(self.alive)
                self._invalidate()

    def _scan(self, row: int) -> None:
        entries = self.similarity[row]
        excluded = self._excluded(row)
        entries = np.where(excluded, -np.inf, entries) if excluded.any() else entries
        self.nearest[row] = entries.argmax()
        self.bound[row], self.stale[row] = entries[self.nearest[row]], False

    def _excluded(self, row: int) -> NDArray[np.bool_]:
        excluded: NDArray[np.bool_] = self.members[:, self.spent & self.members[row]].any(1)
        return excluded

    def _invalidate(self) -> None:
        self.bound[self.alive], self.stale[self.alive] = np.inf, True


def match_in_turn(similarity: Similarity, models: int) -> Positions:
    """Match the features of each model one to one to those of the first model, the most similar pair first.

    The similarity of a feature to matched features of earlier models is the smallest of theirs.

    Args:
        similarity: (T·n, T·n), the features of one model after the other.
        models: T.

    Returns:
        (T, n) for each feature, the matched feature of the first model.
    """
    size = len(similarity) // models
    members = [np.arange(size)]  # by model, the feature that is matched with each feature of the first model
    for model in range(1, models):
        own = slice(model * size, (model + 1) * size)
        rows = [similarity[earlier * size + found, own] for earlier, found in enumerate(members)]
        members.append(_greedy_pairs(np.minimum.reduce(rows)))
    return np.stack([np.argsort(found) for found in members])


def _greedy_pairs(similarity: Similarity) -> Positions:
    """Match rows and columns one to one, the most similar pair first; return the column of each row."""
    unmatched, taken = np.ones(len(similarity), dtype=bool), np.zeros(len(similarity), dtype=bool)
    nearest: Positions = similarity.argmax(1)
    bound = similarity.max(1)
    while unmatched.any():
        row = int(np.where(unmatched, bound, -np.inf).argmax())
        if taken[nearest[row]]:
            entries = np.where(taken, -np.inf, similarity[row])
            nearest[row] = entries.argmax()
            bound[row] = entries[nearest[row]]
            continue
        unmatched[row], taken[nearest[row]] = False, True
    return nearest


def positions_of_groups(group: Positions, models: int) -> Positions:
    """Assign n groups to n positions: that of the group's first feature in the first model, or else a free one.

    Args:
        group: (T·n,) the group of each feature, as from `zip_greedily`.
        models: T.

    Returns:
        (T, n) the position of each feature.
    """
    size = len(group) // models
    numbers = np.unique(group)
    position = {int(number): int(number) for number in numbers if number < size}
    free = iter(sorted(set(range(size)) - set(position)))
    position |= {int(number): next(free) for number in numbers if number >= size}
    return np.array([position[int(number)] for number in group], dtype=np.intp).reshape(models, size)


def assign_positions(
    similarity: Similarity,
    models: int,
    count: int,
    *,
    one_per_model: bool,
    alpha: float,
    beta: float,
    budget: Budget = "members",
) -> Positions:
    """Assign the T·n features of T models to n positions.

    Args:
        similarity: (T·n, T·n), the features of one model after the other.
        models: T.
        count: number of positions whose features are reassigned; the features of the other positions, which are the
            most similar across models, keep theirs.
        one_per_model: whether a position gets exactly one feature of each model.
        alpha, beta, budget: as for `zip_greedily`.

    Returns:
        (T, n) the position of each feature.
    """
    size = len(similarity) // models
    offsets = np.arange(models)[:, None] * size
    unmoved = np.array([similarity[np.ix_(each, each)].min() for each in (offsets + np.arange(size)).T])
    open_ = np.sort(np.argsort(unmoved, kind="stable")[:count])
    positions = np.tile(np.arange(size), (models, 1))
    if len(open_):
        chosen = (offsets + open_).reshape(-1)
        among = similarity[np.ix_(chosen, chosen)]
        for shift in range(1, models):  # features with equal positions in two models
            along = np.arange(len(chosen) - shift * len(open_))
            among[along, along + shift * len(open_)] += SAME_POSITION
            among[along + shift * len(open_), along] += SAME_POSITION
        if one_per_model:
            found = match_in_turn(among, models)
        else:
            model_of = np.repeat(np.arange(models), len(open_))
            group = zip_greedily(among, model_of, len(open_), alpha=alpha, beta=beta, budget=budget)
            found = positions_of_groups(group, models)
        positions[:, open_] = open_[found]
    return positions
