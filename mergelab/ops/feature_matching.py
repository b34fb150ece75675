"""Which features of several models stand for the same thing, found greedily by how they correlate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Likeness = NDArray[np.floating]
Places = NDArray[np.intp]

SAME_PLACE = 1e-5  # what decides between equal likenesses: features of one place in their models go together


def zip_greedily(likeness: Likeness, model_of: Places, keep: int, *, alpha: float, beta: float) -> Places:
    """Put the two likest groups of features together until ``keep`` are left, each feature a group at first.

    Two groups are as like as their unlikest members; where these are like at all, times ``alpha`` for each feature that
    the groups have together beyond the number of models.

    Args:
        likeness: (N, N), symmetric; the diagonal is not looked at. It is written over.
        model_of: (N,) the model that each feature is of, from 0 on.
        keep: how many groups to end with.
        alpha: see above.
        beta: budget of each model, a share of the N − keep steps over the models: when it has been used up by groups
            that both had features of the model, such groups stay apart. Where nothing else is left, budgets are void.

    Returns:
        (N,) the group of each feature: the number of its first member.
    """
    state = _Zipping(likeness, model_of, keep, alpha, beta)
    for _ in range(len(likeness) - keep):
        state.step()
    return state.group


class _Zipping:
    """Groups on their way; each alive row knows its likest other group, or (stale) a bound of how like that is."""

    def __init__(self, likeness: Likeness, model_of: Places, keep: int, alpha: float, beta: float) -> None:
        count = len(likeness)
        self.likeness = likeness
        self.penalty = alpha ** np.arange(2 * count, dtype=likeness.dtype)  # of so many features more than models
        np.fill_diagonal(self.likeness, -np.inf)
        self.size = np.ones(count, dtype=np.intp)
        self.group = np.arange(count)
        self.alive = np.ones(count, dtype=bool)
        self.members = model_of[:, None] == np.arange(model_of.max(initial=0) + 1)
        self.budget = np.full(self.members.shape[1], int((count - keep) // self.members.shape[1] * beta + 1e-4))
        self.spent = self.budget <= 0
        self.likest = np.zeros(count, dtype=np.intp)
        self.bound = np.full(count, np.inf)
        self.stale = self.alive.copy()

    def step(self) -> None:
        """Put two groups together; the group of the lower number is the one that stays."""
        first, second = self._likest_pair()
        shared = self.members[first] & self.members[second]
        row = np.minimum(self.likeness[first], self.likeness[second])
        self.likeness[first], self.likeness[:, first] = row, row
        self.likeness[second] = self.likeness[:, second] = -np.inf
        self.alive[second], self.bound[second], self.stale[second] = False, -np.inf, False
        self.members[first] |= self.members[second]
        self.size[first] += self.size[second]
        self.group[self.group == second] = first
        self.stale |= ((self.likest == first) | (self.likest == second)) & self.alive
        self._scan(first)
        self.budget[shared] -= 1
        if (shared & ~self.spent & (self.budget <= 0)).any():
            self.spent |= shared & (self.budget <= 0)
            self._forget()

    def _likest_pair(self) -> tuple[int, int]:
        while True:
            row = int(self.bound.argmax())
            if self.stale[row]:
                self._scan(row)
            elif self.bound[row] > -np.inf:
                other = int(self.likest[row])
                return min(row, other), max(row, other)
            else:
                self.spent[:], self.budget[:] = False, len(self.alive)
                self._forget()

    def _scan(self, row: int) -> None:
        entries = self.likeness[row]
        excess = self.size + (self.size[row] - self.members.shape[1])
        if excess.max() > 0:
            entries = entries * np.where(entries > 0, self.penalty[np.maximum(excess, 0)], 1)
        barred = self._barred(row)
        entries = np.where(barred, -np.inf, entries) if barred.any() else entries
        self.likest[row] = entries.argmax()
        self.bound[row], self.stale[row] = entries[self.likest[row]], False

    def _barred(self, row: int) -> NDArray[np.bool_]:
        barred: NDArray[np.bool_] = self.members[:, self.spent & self.members[row]].any(1)
        return barred

    def _forget(self) -> None:
        self.bound[self.alive], self.stale[self.alive] = np.inf, True


def match_in_turn(likeness: Likeness, models: int) -> Places:
    """Match each model's features to the first's, one of each model to each, the likest pair first.

    A feature is as like a group of earlier models' features as the unlikest of them.

    Args:
        likeness: (T·n, T·n), model after model.
        models: T.

    Returns:
        (T, n) for each feature its mate in the first model.
    """
    size = len(likeness) // models
    members = [np.arange(size)]  # by model, the feature that each feature of the first is matched with
    for model in range(1, models):
        own = slice(model * size, (model + 1) * size)
        rows = [likeness[earlier * size + found, own] for earlier, found in enumerate(members)]
        members.append(_greedy_pairs(np.minimum.reduce(rows)))
    return np.stack([np.argsort(found) for found in members])


def _greedy_pairs(likeness: Likeness) -> Places:
    """Return for each row the column that it is paired with, the likest pair first."""
    open_rows, taken = np.ones(len(likeness), dtype=bool), np.zeros(len(likeness), dtype=bool)
    likest: Places = likeness.argmax(1)
    bound = likeness.max(1)
    while open_rows.any():
        row = int(np.where(open_rows, bound, -np.inf).argmax())
        if taken[likest[row]]:
            entries = np.where(taken, -np.inf, likeness[row])
            likest[row] = entries.argmax()
            bound[row] = entries[likest[row]]
            continue
        open_rows[row], taken[likest[row]] = False, True
    return likest


def places_of_groups(group: Places, models: int) -> Places:
    """Give each of n groups one of n places: that of its first model's first feature where it has one, else a free one.

    Args:
        group: (T·n,) the number of each feature's group, its first member's.
        models: T.

    Returns:
        (T, n) the place of each feature.
    """
    size = len(group) // models
    numbers = np.unique(group)
    place = {int(number): int(number) for number in numbers if number < size}
    free = iter(sorted(set(range(size)) - set(place)))
    place |= {int(number): next(free) for number in numbers if number >= size}
    return np.array([place[int(number)] for number in group], dtype=np.intp).reshape(models, size)


def zipped(likeness: Likeness, models: int, count: int, *, one_of_each: bool, alpha: float, beta: float) -> Places:
    """Give the features of T models a place each: as many places as one model has features.

    Args:
        likeness: (T·n, T·n), model after model.
        models: T.
        count: how many places are filled by zipping; the others keep the features of that place, those that are
            likest each other.
        one_of_each: whether a place takes one feature of each model.
        alpha, beta: as for `zip_greedily`.

    Returns:
        (T, n) the place of each feature.
    """
    size = len(likeness) // models
    offsets = np.arange(models)[:, None] * size
    in_place = np.array([likeness[np.ix_(each, each)].min() for each in (offsets + np.arange(size)).T])
    open_ = np.sort(np.argsort(in_place, kind="stable")[:count])
    places = np.tile(np.arange(size), (models, 1))
    if len(open_):
        chosen = (offsets + open_).reshape(-1)
        among = likeness[np.ix_(chosen, chosen)]
        for shift in range(1, models):  # the same place in two models
            along = np.arange(len(chosen) - shift * len(open_))
            among[along, along + shift * len(open_)] += SAME_PLACE
            among[along + shift * len(open_), along] += SAME_PLACE
        if one_of_each:
            found = match_in_turn(among, models)
        else:
            model_of = np.repeat(np.arange(models), len(open_))
            group = zip_greedily(among, model_of, len(open_), alpha=alpha, beta=beta)
            found = places_of_groups(group, models)
        places[:, open_] = open_[found]
    return places
