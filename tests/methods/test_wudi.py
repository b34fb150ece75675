"""WUDI against autograd on the paper's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.methods import wudi as module
from mergelab.ops.layout import is_embedding
from tests.methods.toy import aligned, merged, merged_x, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared

AUTOGRAD = f"{FORMULA}, with torch's autograd"


def loss(merged_vector: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Σ_t ‖(τ_m − τ_t)τ_tᵀ‖² / ‖τ_t‖²."""
    terms = [((merged_vector - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors]
    return torch.stack(terms).sum()


def transcribed(vectors: Sequence[Tensor], steps: int = 300, lr: float = 1e-5) -> Tensor:
    """Autograd's gradient of the loss, and Adam as Kingma and Ba 2015 (arXiv:1412.6980) state it."""
    point, first, second = sum(vectors[1:], vectors[0]).clone(), torch.zeros(()), torch.zeros(())
    for step in range(1, steps + 1):
        leaf = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, vectors), leaf)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
        point = point - lr * (first / (1 - 0.9**step)) / corrected
    return point


def drawn(shape: tuple[int, int], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.02 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def merged_matrices(vectors: Sequence[Tensor], **options: Any) -> Tensor:
    return merged_x("wudi", one_tensor(torch.zeros_like(vectors[0]), *vectors, dtype=vectors[0].dtype), **options)


@pytest.mark.parametrize("shape", [(40, 40), (50, 20), (20, 50), (1, 9), (9, 1)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_descent_is_adams_on_the_papers_loss(shape: tuple[int, int], count: int) -> None:
    vectors = drawn(shape, count)
    result, expected = merged_matrices(vectors), transcribed(vectors)
    compared("wudi", AUTOGRAD, result, expected)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


def test_steps_and_learning_rate_count() -> None:
    vectors = drawn((30, 20), 3)
    expected = transcribed(vectors, steps=20, lr=3e-4)
    result = merged_matrices(vectors, steps=20, lr=3e-4)
    compared("wudi", AUTOGRAD, result, expected, options="steps=20, lr=3e-4")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
    assert loss(expected, vectors) < 0.9 * loss(sum(vectors), vectors)


def test_no_step_gives_the_sum() -> None:
    vectors = drawn((30, 20), 3)
    torch.testing.assert_close(merged_matrices(vectors, steps=0), vectors[0] + vectors[1] + vectors[2])


def test_float32_follows_float64() -> None:
    vectors = drawn((64, 64), 3, torch.float32)
    expected = transcribed([vector.double() for vector in vectors])
    result = merged_matrices(vectors)
    compared("wudi", AUTOGRAD, result, expected)
    assert (result.double() - expected).abs().max() < 1e-6


def test_lambda_scales_the_merged_task_vector() -> None:
    vectors = drawn((30, 20), 3)
    torch.testing.assert_close(merged_matrices(vectors, **{"lambda": 0.5}), 0.5 * merged_matrices(vectors))


def test_rows_optimised_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = drawn((50, 20), 3)
    whole = merged_matrices(vectors)
    monkeypatch.setattr(module, "ROWS", 7)
    torch.testing.assert_close(merged_matrices(vectors), whole, rtol=0, atol=1e-11)


def test_an_expert_equal_to_the_base_takes_no_part_in_the_loss() -> None:
    vectors = drawn((30, 20), 2)
    with_it = merged_matrices([*vectors, torch.zeros(30, 20, dtype=torch.float64)])
    torch.testing.assert_close(with_it, merged_matrices(vectors), rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [1e-15, 1e-25])
def test_task_vectors_whose_squares_underflow_in_float32_are_merged(size: float) -> None:
    vectors = [size * vector for vector in drawn((8, 8), 2, torch.float32)]
    assert merged_matrices(vectors).isfinite().all()


@pytest.mark.parametrize("key", ["embed", "layer.bias", "gate"])
def test_embeddings_and_tensors_that_are_no_matrices_get_the_mean_task_vector(key: str) -> None:
    models = toy_models(3, dtype=torch.float64)
    expected = models.base.get(key) + torch.stack([task_vector(models, expert, key) for expert in range(3)]).mean(0)
    torch.testing.assert_close(merged("wudi", models)[key], expected, rtol=1e-12, atol=1e-12)


def test_conv1d_matrices_are_turned_so_that_rows_are_outputs() -> None:
    names = ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.0.attn.c_proj.weight")
    shapes = ((10, 30), (10, 40), (10, 10))
    vectors = {name: drawn(shape, 3) for name, shape in zip(names, shapes, strict=True)}
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zip(names, shapes, strict=True)}
    result = merged("wudi", aligned(base, [{name: vectors[name][i] for name in names} for i in range(3)]))
    for name in names:
        expected = transcribed([vector.T for vector in vectors[name]])
        torch.testing.assert_close(result[name].T, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert.embeddings.word_embeddings.weight", True),
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("shared.weight", True),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True),
        ("encoder.embedding_hidden_mapping_in.weight", False),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", False),
        ("bert.encoder.layer.0.attention.self.query.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_embeddings_are_known_by_their_names(name: str, expected: bool) -> None:
    assert is_embedding(name) == expected
