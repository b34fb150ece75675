"""DOGE TA against FusionBench's recorded values and an autograd transcription."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.methods import doge_ta as module
from tests.methods.authors import SHAPES, authors_models, recorded, source
from tests.methods.toy import aligned, merged, one_tensor, task_vector, toy_models
from tests.parity import FORMULA, compared

AUTOGRAD = f"{FORMULA}, gradients by autograd"
NAME = "layer.0.weight"


def transcribed(
    vectors: Sequence[Tensor], *, eta: float = 0.07, density: float = 0.3, subspace: int = 6, steps: int = 400
) -> Tensor:
    """The formula for models of one matrix, with outputs along the rows."""
    shares = [eta / vector.norm() for vector in vectors]
    least = min(vectors[0].shape)
    left = torch.cat([torch.linalg.svd(vector).U[:, : least // len(vectors)] for vector in vectors], dim=1)
    basis = torch.linalg.svd(left, full_matrices=False).U[:, : least // subspace]
    change = torch.zeros_like(vectors[0]).requires_grad_()
    adam = torch.optim.Adam([change], lr=1e-4)
    for _ in range(steps):
        merged_vector = sum(share * (vector + change) for share, vector in zip(shares, vectors, strict=True))
        loss = sum((vector * (vector - merged_vector)).sum(1).square().sum() for vector in vectors)
        (change.grad,) = torch.autograd.grad(loss, change)
        change.grad -= basis @ basis.T @ change.grad
        adam.step()
    result = torch.zeros_like(vectors[0])
    for share, vector in zip(shares, vectors, strict=True):
        kept = vector.abs() >= vector.abs().flatten().sort(descending=True).values[int(density * vector.numel()) - 1]
        result += share * kept * (vector + change.detach())
    return result


def drawn(shape: tuple[int, int], count: int, size: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merged_matrices(vectors: Sequence[Tensor], name: str = NAME, **options: object) -> Tensor:
    models = aligned({name: torch.zeros_like(vectors[0])}, [{name: vector} for vector in vectors])
    return merged("doge_ta", models, **options)[name]


@pytest.mark.parametrize("subspace", [2, 6])
def test_it_makes_what_the_authors_code_makes(subspace: int) -> None:
    name = f"doge_ta subspace={subspace}"
    result, theirs = merged("doge_ta", authors_models(size=0.3), subspace=subspace), recorded(name)
    note = "density such that as many entries are kept: theirs keeps one more"
    options = f"subspace={subspace}"
    compared(
        "doge_ta", source(name), [result[key] for key in theirs], list(theirs.values()), options=options, note=note
    )
    for key, expected in theirs.items():
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 14), (12, 30), (16, 16)])
@pytest.mark.parametrize("subspace", [1, 3])
def test_it_is_the_papers_formula(shape: tuple[int, int], subspace: int) -> None:
    vectors = drawn(shape, 3)
    options = {"eta": 0.2, "density": 0.5, "subspace": subspace, "steps": 60}
    result, expected = merged_matrices(vectors, **options), transcribed(vectors, **options)  # type: ignore[arg-type]
    compared("doge_ta", AUTOGRAD, result, expected, options=options)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    plain = merged_matrices(vectors, **(options | {"steps": 0}))
    assert subspace == 1 or (result - plain).abs().max() > 1e-4


def test_float32_follows_float64() -> None:
    vectors = [vector.float() for vector in drawn((24, 16), 3)]
    expected = transcribed([vector.double() for vector in vectors], steps=50)
    result = merged_matrices(vectors, steps=50)
    compared("doge_ta", AUTOGRAD, result, expected, options={"steps": 50})
    assert (result.double() - expected).abs().max() < 1e-5


def test_the_density_is_of_all_layers_matrices_together() -> None:
    models = authors_models()
    for expert in models.experts:
        assert models.base is not None
        for key in SHAPES:
            base = models.base.get(key)
            expert.get(key).copy_(base + (expert.get(key) - base) * (0.001 if key == "layer.1.up.weight" else 1))
    result = merged("doge_ta", models, density=0.5, steps=0)
    assert torch.equal(result["layer.1.up.weight"], models.base.get("layer.1.up.weight"))
    assert not torch.equal(result["layer.0.up.weight"], models.base.get("layer.0.up.weight"))


@pytest.mark.parametrize("key", ["embed", "layer.bias", "gate"])
def test_embeddings_and_tensors_that_are_no_matrices_get_the_mean_task_vector(key: str) -> None:
    models = toy_models(3, dtype=torch.float64)
    assert models.base is not None
    expected = models.base.get(key) + torch.stack([task_vector(models, expert, key) for expert in range(3)]).mean(0)
    torch.testing.assert_close(merged("doge_ta", models, steps=2)[key], expected, rtol=1e-12, atol=1e-12)


def test_a_matrix_changed_in_parts_of_its_columns_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = drawn((20, 14), 3)
    whole = merged_matrices(vectors, steps=30, subspace=3)
    monkeypatch.setattr(module, "ENTRIES", 100)
    monkeypatch.setattr(module, "ROWS", 6)
    torch.testing.assert_close(merged_matrices(vectors, steps=30, subspace=3), whole, rtol=0, atol=1e-10)


def test_an_expert_equal_to_the_base_has_no_part() -> None:
    vectors = [*drawn((12, 9), 2), torch.zeros(12, 9, dtype=torch.float64)]
    assert merged_matrices(vectors, steps=3).isfinite().all()
    kept = merged_matrices(vectors, steps=0, density=1.0)
    torch.testing.assert_close(kept, sum(0.07 * vector / vector.norm() for vector in vectors[:2]))


def test_conv1d_matrices_are_turned_so_that_rows_are_outputs() -> None:
    shapes = {"h.0.attn.c_attn.weight": (10, 30), "h.0.mlp.c_fc.weight": (10, 40)}
    vectors = {name: drawn(shape, 3) for name, shape in shapes.items()}
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    models = aligned(base, [{name: vectors[name][i] for name in shapes} for i in range(3)])
    result = merged("doge_ta", models, steps=30, density=1.0, subspace=3)
    for name in shapes:
        expected = transcribed([vector.T for vector in vectors[name]], steps=30, density=1.0, subspace=3)
        torch.testing.assert_close(result[name].T, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("key", "value"), [("eta", 0.0), ("density", 0.0), ("subspace", 0), ("steps", -1), ("lr", 0.0)]
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key}="):
        merge(get_method("doge_ta"), {key: value}, one_tensor([[0.0]], [[1.0]]))
