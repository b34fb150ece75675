"""WUDI v2 against the authors' recorded values and step-by-step gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.authors import authors_models, recorded, source
from tests.methods.toy import aligned, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared

STEPS = f"{FORMULA}, step by step with autograd"


def transcribed(vectors: Sequence[Tensor], steps: int = 300, lr: float = 1e-4, momentum: float = 0.9) -> Tensor:
    """Every step of torch's SGD, of the loss as the paper writes it."""
    rank = min(vectors[0].shape) // len(vectors)
    parts = [torch.linalg.svd(vector, full_matrices=False) for vector in vectors]
    low = [(u[:, :rank] * s[:rank]) @ v[:rank] for u, s, v in parts]
    inputs = [s[:rank, None] * v[:rank] for _, s, v in parts]
    merged_vector = torch.stack(list(vectors)).mean(0).requires_grad_()
    optimizer = torch.optim.SGD([merged_vector], lr=lr, momentum=momentum)
    for _ in range(steps):
        terms = [
            ((merged_vector - each) @ rows.T).square().sum() / vector.square().sum()
            for each, rows, vector in zip(low, inputs, vectors, strict=True)
        ]
        optimizer.zero_grad()
        sum(terms[1:], terms[0]).backward()
        optimizer.step()
    return merged_vector.detach()


def drawn(shape: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merged_matrices(vectors: Sequence[Tensor], **options: object) -> Tensor:
    return merged_x("wudi_v2", one_tensor(torch.zeros_like(vectors[0]), *vectors, dtype=vectors[0].dtype), **options)


@pytest.mark.parametrize(("name", "size"), [("wudi_v2", 0.05), ("wudi_v2 large", 2.0)])
def test_it_makes_what_the_authors_code_makes(name: str, size: float) -> None:
    result, theirs = merged("wudi_v2", authors_models(size=size)), recorded(name)
    compared("wudi_v2", source(name), [result[key] for key in theirs], list(theirs.values()))
    for key, expected in theirs.items():
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(20, 20), (31, 12), (9, 40)])
@pytest.mark.parametrize(("steps", "lr", "momentum"), [(300, 1e-4, 0.9), (40, 0.05, 0.9), (7, 0.2, 0.0)])
def test_the_closed_form_is_every_step(shape: tuple[int, int], steps: int, lr: float, momentum: float) -> None:
    vectors = drawn(shape, 3)
    result = merged_matrices(vectors, steps=steps, lr=lr, momentum=momentum)
    expected = transcribed(vectors, steps, lr, momentum)
    compared("wudi_v2", STEPS, result, expected, options=f"steps={steps}, lr={lr}, momentum={momentum}")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
    assert (expected - torch.stack(vectors).mean(0)).abs().max() > 1e-3


def test_float32_follows_float64() -> None:
    vectors = [vector.float() for vector in drawn((40, 24), 3)]
    expected = transcribed([vector.double() for vector in vectors], 100, 0.01)
    result = merged_matrices(vectors, steps=100, lr=0.01)
    compared("wudi_v2", STEPS, result, expected, options="steps=100, lr=0.01, momentum=0.9")
    assert (result.double() - expected).abs().max() < 1e-6


def test_no_steps_is_the_mean_and_so_are_matrices_smaller_than_the_number_of_experts() -> None:
    vectors = drawn((2, 9), 3)
    torch.testing.assert_close(merged_matrices(vectors), torch.stack(vectors).mean(0))
    vectors = drawn((12, 9), 3)
    torch.testing.assert_close(merged_matrices(vectors, steps=0), torch.stack(vectors).mean(0))


def test_an_expert_equal_to_the_base_adds_nothing_to_the_loss() -> None:
    vectors = [*drawn((12, 9), 2), torch.zeros(12, 9, dtype=torch.float64)]
    result = merged_matrices(vectors, steps=50, lr=0.05)
    start = (vectors[0] + vectors[1]) / 3
    assert result.isfinite().all()
    assert (result - start).abs().max() > 1e-3


def test_conv1d_matrices_are_turned_so_that_rows_are_outputs() -> None:
    shapes = {"h.0.attn.c_attn.weight": (10, 30), "h.0.mlp.c_fc.weight": (10, 40)}
    vectors = {name: drawn(shape, 3) for name, shape in shapes.items()}
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    models = aligned(base, [{name: vectors[name][i] for name in shapes} for i in range(3)])
    result = merged("wudi_v2", models, steps=50, lr=0.05)
    for name in shapes:
        expected = transcribed([vector.T for vector in vectors[name]], 50, 0.05)
        torch.testing.assert_close(result[name].T, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("key", ["embed", "layer.bias", "gate"])
def test_embeddings_and_tensors_that_are_no_matrices_get_the_mean_task_vector(key: str) -> None:
    models = toy_models(3, dtype=torch.float64)
    assert models.base is not None
    expected = models.base.get(key) + torch.stack([task_vector(models, expert, key) for expert in range(3)]).mean(0)
    torch.testing.assert_close(merged("wudi_v2", models)[key], expected, rtol=1e-12, atol=1e-12)
