"""From the command line: what no method can take is one line and exit code 2, before any model is looked for."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.conftest import Outcome

MODELS = ["task=rte", "models.base=./nowhere", "models.experts={a: ./a, b: ./b, c: ./c}"]
WEIGHTED = "models.experts={a: {reference: ./a, weight: -1}, b: ./b, c: ./c}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=ties", "method.weights=[1,-1,0.5]"], "method.weights: must be at least 0 for a weighted mean"),
        (["method=knots", "method.weights={b: -1}"], "method.weights: must be at least 0 .* that of b is -1 "),
        (["method=della", WEIGHTED], r"models\.experts\.\*\.weight: must be at least 0 .* that of a is -1 "),
        (["method=soup", "method.weights=[0.1,0.2,-0.3]"], r"method\.weights: \[0\.1, 0\.2, -0\.3\] add up to 0"),
        (["method=fisher", "method.weights=[0,0,0]"], "method.weights: at least one must be above 0"),
        (["method=lines", "method.then=ties", "method.weights=[1,-1,1]"], "method.weights: must be at least 0"),
        (["method=rebasin", "method.weights=[1,-1,0]"], r"method\.weights: \[1\.0, -1\.0, 0\.0\] add up to 0"),
        (["method=c2m3", "method.weights=[1,-1,0]"], r"method\.weights: \[1\.0, -1\.0, 0\.0\] add up to 0"),
        (["method=c2m3", "method.start=uniform"], r"method\.start='uniform': must be 'best', 'identity' or 'matched'"),
        (
            ["method=dare_ties", "method.rules=[{match: '*bias', weights: [1,-1,1]}]"],
            r"method\.rules\[0\]\.weights: must be at least 0",
        ),
        (
            ["method=ties", "method.scope=pooled", "method.density={a: 0.1, b: 0.2, c: 0.3}"],
            "method.density: must be one number for all experts where scope=pooled",
        ),
    ],
    ids=str,
)
def test_it_is_one_line_and_exit_code_2(
    mergelab_command: Callable[..., Outcome], arguments: list[str], said: str
) -> None:
    outcome = mergelab_command(*MODELS, *arguments)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.strip()]
    assert "nowhere" not in line
    assert re.search(said, line), line
