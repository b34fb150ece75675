"""Models that are stored in lower precision or in several files are merged as those of one float32 file are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.architectures.building import save_models
from tests.architectures.loading import by_label, labels, load, tied_groups
from tests.architectures.numpy_merges import read_tensors, soup, stored_dtypes
from tests.architectures.workshop import models, run
from tests.architectures.zoo import BY_NAME, head_names

NAMES = ("deberta_v2", "llama_tied", "mixtral", "qwen3_moe", "t5", "bart", "bert2gpt2", "llava")
# Half a unit in the last place: 8 bits of mantissa, or 11.
PRECISION = {"BF16": 2.0**-8, "F16": 2.0**-11}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_lower_precision_in_shards_is_rounded_once(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kind, output = BY_NAME[name], tmp_path / "merged"
    save_models(kind, tmp_path, dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    what = ("method=soup", "evaluate=false", "tracking=none", "save.max_shard_size=30kB", f"output={output}")
    run(tmp_path, *models(tmp_path), *what)
    experts = [read_tensors(tmp_path / expert) for expert in ("a", "b")]
    merged, dtypes = read_tensors(output), stored_dtypes(output)
    assert dtypes == stored_dtypes(tmp_path / "a")
    head = head_names(kind, merged)
    for key, value in soup(experts, experts[0]).items():
        found = merged[key]
        if key in head:
            found, value = by_label(found, labels(output)), by_label(value, labels(tmp_path / "a"))
        assert (np.abs(found - value) <= PRECISION[dtypes[key]] * np.abs(value) + 1e-7).all(), key
    assert tied_groups(load(kind, output)) == tied_groups(load(kind, tmp_path / "a"))


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_lower_precision_than_their_base(tmp_path: Path, name: str) -> None:
    kind, output = BY_NAME[name], tmp_path / "merged"
    save_models(kind, tmp_path / "whole")
    save_models(kind, tmp_path / "half", torch.bfloat16)
    what = ("method=task_arithmetic", "method.lambda=0.5", "evaluate=false", "tracking=none", f"output={output}")
    base, experts = tmp_path / "whole" / "base", [tmp_path / "half" / expert for expert in ("a", "b")]
    run(tmp_path, f"models.base={base}", f"models.experts=[{experts[0]},{experts[1]}]", *what)
    start, ends = read_tensors(base), [read_tensors(expert) for expert in experts]
    merged = read_tensors(output)
    for key in start.keys() - set(head_names(kind, start)):
        expected = start[key] + 0.5 * sum(end[key].astype(np.float64) - start[key] for end in ends)
        np.testing.assert_allclose(merged[key], expected, rtol=2e-6, atol=5e-7, err_msg=key)
    load(kind, output)
