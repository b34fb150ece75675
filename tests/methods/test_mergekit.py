"""Values that mergekit 0.1.5 computed (``mergekit-yaml`` on one-layer Llama models, float32; ``model.norm.weight``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergelab.weights.align import AlignedModels
from tests.methods.toy import merged_x, one_tensor
from tests.parity import RECORDED_MERGEKIT, compared

GOLDEN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "soup": (
        {"weights": [1, 2, 0.5]},
        [-0.42433032, 0.1470982, 0.52879465, -0.2390625, 0.25647321, -0.54933035, -0.1296875, 0.36584824,
         -0.43995532, -0.020312503, 0.47522324, -0.33058032, 0.089062504, 0.58459824, -0.22120537, 0.19843748],
    ),
    "task_arithmetic": (
        {"weights": [1, 2, -1], "lambda": 0.3},
        [-0.45281249, 0.1675, 0.46906251, -0.25749999, 0.28312501, -0.60281253, -0.141875, 0.39875001,
         -0.4871875, -0.026250005, 0.51437503, -0.37156248, 0.089374997, 0.63, -0.25593752, 0.205],
    ),
    "ties": (  # mergekit trims each tensor, weighs before the election and counts zeros as positive
        {"weights": [1, 2, 0.5], "density": 0.4, "scope": "tensor", "weights_stage": "elect", "tie_break": "positive"},
        [-0.50468749, 0.1984375, 0.63593751, -0.1296875, 0.30781251, -0.44218749, -0.020312503, 0.41718751,
         -0.33281249, 0.089062497, 0.52656251, -0.41093749, 0.026562497, 0.46406251, -0.30156249, 0.1359375],
    ),
    "model_stock": (
        {},
        [-0.56244725, 0.076045141, 0.64025772, -0.32384282, 0.24036975, -0.38291764, -0.15951824, 0.40469435,
         -0.55940622, 0.0048063379, 0.56901896, -0.39508161, 0.16913095, 0.39253038, -0.23075704, 0.33345556],
    ),
    "slerp": (
        {"t": 0.3},
        [-0.48207936, 0.13454081, 0.48237786, -0.18367857, 0.24521624, -0.60856557, -0.073003158, 0.35589164,
         -0.49789011, 0.037672259, 0.46656707, -0.38721472, 0.14834768, 0.57724249, -0.2765393, 0.2590231],
    ),
}  # fmt: skip
NOTES = {
    "ties": "options are mergekit's way",
    "model_stock": "mergekit goes away from the mean where the mean cosine is negative",
}


def recipe(method: str) -> AlignedModels:
    base = [((7 * i + 3) % 19 - 9) / 16 for i in range(16)]
    common = 1 / 32 if method == "model_stock" else 0  # so that the task vectors' mean cosine is positive
    experts = [
        [x + ((11 * i + 5 * t) % 17 - 8.3 + t) / 64 + common * ((5 * i) % 13 - 6) for i, x in enumerate(base)]
        for t in range(3)
    ]
    return one_tensor(None, *experts[:2]) if method == "slerp" else one_tensor(base, *experts)


@pytest.mark.parametrize("method", GOLDEN)
def test_values_are_mergekits(method: str) -> None:
    parameters, values = GOLDEN[method]
    result = merged_x(method, recipe(method), **parameters)
    compared(method, RECORDED_MERGEKIT, result, values, options=parameters, note=NOTES.get(method, ""))
    torch.testing.assert_close(result, torch.tensor(values), rtol=1e-6, atol=1e-7)


def test_model_stock_differs_from_mergekits_where_task_vectors_oppose_on_average() -> None:
    # mergekit goes away from the experts' mean there: a cosine of -0.5 gives a ratio of -2 between two experts.
    result = merged_x("model_stock", one_tensor([0.0, 0.0], [1.0, 0.0], [-0.5, 3**0.5 / 2]))
    assert result.tolist() == [0.0, 0.0]
