"""Merges of the same models by mergekit, where MERGELAB_MERGEKIT names a Python interpreter that has it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergelab.ops.philox import words
from mergelab.weights.align import AlignedModels
from tests.methods.toy import SHAPES, distinct_models, mask_key, merged, merged_x, one_tensor, toy_models
from tests.parity import compared

INTERPRETER = os.environ.get("MERGELAB_MERGEKIT", "")
pytestmark = pytest.mark.skipif(not INTERPRETER, reason="MERGELAB_MERGEKIT names no interpreter that has mergekit")

# Reads requests and writes tensors. The random numbers that keep an entry are given, as no two generators agree, and
# what is kept is divided by its probability, except where mergekit restores the sum of magnitudes.
SCRIPT = """
import sys
from importlib.metadata import version
import torch
from mergekit.merge_methods.api import merge_tensors
requests, found = torch.load(sys.argv[1]), []
for request in requests:
    drawn, restores = iter(request.pop("drawn")), request.pop("restores")
    torch.bernoulli = lambda p: (next(drawn).reshape(p.shape) < p).to(p) / (1 if restores else p)
    found.append(merge_tensors(request.pop("tensors"), request.pop("method"), **request))
torch.save({"version": version("mergekit"), "found": found}, sys.argv[2])
"""

DROPPED = "by the same random numbers; mergekit drops in float32; its rescaling, to the same sum, is replaced"
UNSTABLE = f"{DROPPED}; it has equal magnitudes of a row in any order, and no scalars"
AS_THEIRS: dict[str, Any] = {"weights_stage": "elect", "tie_break": "positive"}
WEIGHTS = [1.0, 2.0, 0.5]


@dataclass(frozen=True)
class Case:
    """A method here with its options, and mergekit's with its own."""

    method: str
    options: dict[str, Any]
    theirs: str
    parameters: dict[str, Any] = field(default_factory=dict)
    base: str | None = "base"  # mergekit's: the base model, the first expert, or none
    experts: int = 3
    common: float = 0.0  # change that the experts have in common
    note: str = ""
    drops: bool = False  # entries at random
    restores: bool = False  # the sum of magnitudes of what is left
    scalar: bool = True  # whether the two agree on one
    alone: bool = False  # each tensor is a model
    distinct: bool = False  # no two changes of a row are of the same magnitude, which float64 alone can hold

    def compared_keys(self) -> list[str]:
        """The tensors that are compared."""
        return [key for key in SHAPES if key != "gate" or self.scalar]

    def __str__(self) -> str:
        return f"{self.method} {self.options}"


CASES = [
    Case("soup", {"weights": WEIGHTS}, "linear", {"weight": WEIGHTS}, base=None),
    Case("task_arithmetic", {"weights": [1, 2, -1]}, "task_arithmetic", {"weight": [1, 2, -1], "lambda": 0.3}),
    Case(
        "ties",
        {"density": 0.2, "weights": WEIGHTS, "scope": "tensor", **AS_THEIRS},
        "ties",
        {"density": 0.2, "weight": WEIGHTS},
        note="options are mergekit's way",
    ),
    Case(
        "dare",
        {"density": 0.3, "lambda": 0.7, "weights": WEIGHTS},
        "dare_linear",
        {"density": 0.3, "lambda": 0.7, "weight": WEIGHTS, "rescale": False},
        drops=True,
        note=DROPPED,
    ),
    Case(
        "dare_ties",
        {"density": 0.6, "weights": WEIGHTS, **AS_THEIRS},
        "dare_ties",
        {"density": 0.6, "weight": WEIGHTS, "rescale": False, "normalize": True},
        drops=True,
        note=DROPPED,
    ),
    Case(
        "della_linear",
        {"density": 0.5, "epsilon": 0.2, "weights": WEIGHTS},
        "della_linear",
        {"density": 0.5, "epsilon": 0.2, "weight": WEIGHTS, "rescale": False},
        drops=True,
        note=UNSTABLE,
        scalar=False,
        distinct=True,
    ),
    Case(
        "della",
        {"density": 0.5, "epsilon": 0.2, "weights": WEIGHTS, **AS_THEIRS},
        "della",
        {"density": 0.5, "epsilon": 0.2, "weight": WEIGHTS, "rescale": False},
        drops=True,
        note=UNSTABLE,
        scalar=False,
        distinct=True,
    ),
    Case(
        "breadcrumbs",
        {"density": 0.4, "gamma": 0.1, "scope": "tensor", "weights": WEIGHTS},
        "breadcrumbs",
        {"density": 0.4, "gamma": 0.1, "weight": WEIGHTS},
        note="mergekit ranks whole tensors, and keeps no entry of a scalar",
        scalar=False,
    ),
    Case(
        "breadcrumbs_ties",
        {"density": 0.4, "gamma": 0.1, "scope": "tensor", "weights": WEIGHTS, **AS_THEIRS},
        "breadcrumbs_ties",
        {"density": 0.4, "gamma": 0.1, "weight": WEIGHTS, "normalize": True},
        note="mergekit ranks whole tensors, and keeps no entry of a scalar",
        scalar=False,
    ),
    *(
        Case(
            ours,
            {"density": 0.6, "weights": WEIGHTS, "rescale": "magnitudes", **options, **spread},
            theirs,
            {"density": 0.6, "weight": WEIGHTS, "normalize": normalize, **spread},
            drops=True,
            restores=True,
            note="by the same random numbers; mergekit drops in float32",
            scalar=False,
            distinct=bool(spread),
        )
        for ours, theirs, options, spread, normalize in [
            ("dare", "dare_linear", {}, {}, False),
            ("dare_ties", "dare_ties", AS_THEIRS, {}, True),
            ("della", "della", AS_THEIRS, {"epsilon": 0.2}, True),
            ("della_linear", "della_linear", {"normalize": True}, {"epsilon": 0.2}, True),
        ]
    ),
    Case(
        "model_stock",
        {},
        "model_stock",
        common=0.05,
        note="mergekit goes away from the mean where the mean cosine is negative",
        scalar=False,  # it is of this one
    ),
    Case("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, base="first", experts=2),
    Case("nuslerp", {"weights": [1.0, 3.0]}, "nuslerp", {"weight": [1.0, 3.0]}, experts=2),
    Case(
        "nuslerp",
        {"weights": [1.0, 3.0], "flatten": False},
        "nuslerp",
        {"weight": [1.0, 3.0], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        experts=2,
        note="mergekit's nuslerp_row_wise goes along the first axis",
    ),
    Case("multislerp", {"weights": WEIGHTS}, "multislerp", {"weight": WEIGHTS}, note="mergekit adds 1e-8 to the norms"),
    Case("karcher", {}, "karcher", base=None),
    Case("sce", {}, "sce"),
    Case(
        "sce",
        {"select_topk": 0.4},
        "sce",
        {"select_topk": 0.4},
        note="mergekit selects no entry of a scalar",
        scalar=False,
    ),
    Case("nearswap", {"t": 0.05}, "nearswap", {"t": 0.05}, base="first", experts=2),
    Case("arcee_fusion", {}, "arcee_fusion", base="first", experts=2),
    Case("ram", {"epsilon": 0.05}, "ram", {"epsilon": 0.05}),
    Case(
        "ram_plus",
        {"epsilon": 0.05, "r": 0.3, "alpha": 1.5},
        "ramplus_tl",
        {"epsilon": 0.05, "r": 0.3, "alpha": 1.5},
        note="mergekit counts per tensor, so on models of one tensor",
        alone=True,
    ),
]


def models_of(case: Case, dtype: torch.dtype) -> AlignedModels:
    models = distinct_models(case.experts) if case.distinct else toy_models(case.experts, dtype=dtype)
    shared = toy_models(1, seed=9, dtype=dtype).experts[0]
    for expert in models.experts:
        for key in SHAPES:
            expert.get(key).add_(case.common * shared.get(key))
    return models


def request(case: Case, models: AlignedModels, key: str) -> dict[str, Any]:
    sources = [models.base, *models.experts] if case.base == "base" else list(models.experts)
    drawn = []
    if case.drops:
        count = models.experts[0].get(key).numel()
        kept = [words(mask_key(expert.get(key), key), 0, count) / 2**32 for expert in models.experts]
        drawn = [torch.from_numpy(numbers) for numbers in kept]
    return {
        "tensors": [source.get(key) for source in sources],
        "method": case.theirs,
        "parameters": case.parameters,
        "base_index": 0 if case.base else None,
        "drawn": drawn,
        "restores": case.restores,
    }


RUNS = [
    (number, dtype)
    for number, case in enumerate(CASES)
    for dtype in (torch.float32, torch.float64)
    if dtype == torch.float64 or not case.distinct
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, torch.dtype, str], tuple[str, Tensor]]:
    """mergekit's version and tensor for each case, dtype and key, all from one process."""
    asked = [(number, dtype, key) for number, dtype in RUNS for key in CASES[number].compared_keys()]
    folder: Path = tmp_path_factory.mktemp("mergekit")
    models = {(number, dtype): models_of(CASES[number], dtype) for number, dtype in RUNS}
    torch.save([request(CASES[n], models[n, dtype], key) for n, dtype, key in asked], folder / "requests.pt")
    command = [INTERPRETER, "-c", SCRIPT, str(folder / "requests.pt"), str(folder / "found.pt")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    answer = torch.load(folder / "found.pt")
    return {place: (answer["version"], found) for place, found in zip(asked, answer["found"], strict=True)}


@pytest.mark.parametrize(("number", "dtype"), RUNS, ids=[f"{CASES[number]} {dtype}" for number, dtype in RUNS])
def test_values_are_mergekits(number: int, dtype: torch.dtype, theirs: Any) -> None:
    case = CASES[number]
    models = models_of(case, dtype)
    if case.alone:
        sources = [models.base, *models.experts]
        lone = {key: one_tensor(*(source.get(key) for source in sources), dtype=dtype) for key in SHAPES}
        result = {key: merged_x(case.method, lone[key], **case.options) for key in SHAPES}
    else:
        result = merged(case.method, models, **case.options)
    for key in case.compared_keys():
        version, expected = theirs[number, dtype, key]
        compared(case.method, f"mergekit {version}", result[key], expected, options=case.options, note=case.note)
        assert result[key].dtype == expected.dtype == dtype
        np.testing.assert_allclose(result[key].numpy(), expected.numpy(), rtol=1e-6, atol=1e-6, err_msg=key)
