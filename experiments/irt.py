"""MERGE³'s estimate of a merge's score from a subset of the examples (Mencattini et al. 2025, arXiv:2502.10436).

An item response model of base and experts gives each example its parameters. The ability of a merge is taken for a
combination of the experts' abilities, fitted to its answers on the subset; the other answers are predicted from that
(their mp-IRT). What the paper leaves open is set here: two dimensions, and normal priors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

Array = np.ndarray[Any, Any]
_DIMENSIONS = 2
_DIFFICULTY = 0.1  # precision of the prior of difficulties; that of abilities and discriminations is 1


@dataclass(frozen=True)
class ItemResponse:
    """P(right) = σ(ability · discrimination - difficulty): (e, d) of models, (n, d) and (n,) of examples."""

    abilities: Array
    discriminations: Array
    difficulties: Array


def fit(scores: Array) -> ItemResponse:
    """Fit the model to scores (e, n) between 0 and 1 of models that were measured on all examples."""
    models, count = scores.shape
    sizes = np.cumsum([models * _DIMENSIONS, count * _DIMENSIONS])

    def parts(flat: Array) -> tuple[Array, Array, Array]:
        abilities, discriminations, difficulties = np.split(flat, sizes)
        return abilities.reshape(models, -1), discriminations.reshape(count, -1), difficulties

    def loss(flat: Array) -> tuple[float, Array]:
        abilities, discriminations, difficulties = parts(flat)
        logits = abilities @ discriminations.T - difficulties
        wrong = expit(logits) - scores
        of_abilities, of_discriminations = wrong @ discriminations + abilities, wrong.T @ abilities + discriminations
        of_difficulties = -wrong.sum(axis=0) + _DIFFICULTY * difficulties
        prior = (abilities**2).sum() + (discriminations**2).sum() + _DIFFICULTY * (difficulties**2).sum()
        value = float((np.logaddexp(0, logits) - scores * logits).sum() + prior / 2)
        return value, np.concatenate([of_abilities.ravel(), of_discriminations.ravel(), of_difficulties])

    start = np.random.default_rng(0).normal(scale=0.5, size=sizes[-1] + count)
    return ItemResponse(*parts(minimize(loss, start, jac=True, method="L-BFGS-B").x))


def estimate(model: ItemResponse, experts: Array, seen: Array, scores: Array) -> float:
    """Return the mean over all examples of a merge with ``scores`` (k,) on those at ``seen`` (k,).

    Args:
        model: the item response model.
        experts: rows of its abilities that are combined.
        seen: positions of the examples that were measured.
        scores: the merge's.
    """
    abilities = model.abilities[experts]

    def loss(weights: Array) -> tuple[float, Array]:
        logits = model.discriminations[seen] @ (weights @ abilities) - model.difficulties[seen]
        gradient = abilities @ (model.discriminations[seen].T @ (expit(logits) - scores))
        off = weights - 1 / len(experts)
        value = float((np.logaddexp(0, logits) - scores * logits).sum() + (off**2).sum() / 2)
        return value, gradient + off

    weights = minimize(loss, np.full(len(experts), 1 / len(experts)), jac=True, method="L-BFGS-B").x
    predicted = expit(model.discriminations @ (weights @ abilities) - model.difficulties)
    predicted[seen] = scores
    return float(predicted.mean())
