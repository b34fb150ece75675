"""Small models made of numbers, for tests of methods: a matrix longer than a block, a tied one, a scalar, integers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergelab.engine.method import MergeMethod
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.run import merge, merge_to_dict
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource
from tests.methods.toy_data import ToyExamples

SHAPES = {"embed": (300, 257), "layer.weight": (17, 33), "layer.bias": (33,), "gate": (), "head": (3, 33)}
NAMES = ("pear", "apple", "quince", "fig", "medlar")
# The methods that merge any models; those that combine adapters' factors have tests/adapters/test_modes.py.
OF_WEIGHTS = tuple(name for name in method_names() if not get_method(name).takes_adapters)


def tensors(make: Callable[[tuple[int, ...]], Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model's tensors, with ``tied`` as a second name of ``embed`` and an integer tensor."""
    model: dict[str, Tensor] = {name: make(shape).to(dtype) for name, shape in SHAPES.items()}
    return {**model, "ids": torch.arange(5), "tied": model["embed"]}


def toy_models(
    count: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.05
) -> AlignedModels:
    """A base and ``count`` experts around it."""
    generator = torch.Generator().manual_seed(seed)
    base = tensors(lambda shape: torch.randn(shape, generator=generator))
    experts = []
    for _ in range(count):
        expert = {k: v + spread * torch.randn(v.shape, generator=generator) for k, v in base.items() if k in SHAPES}
        experts.append(expert)
    return aligned(
        of_dtype(base, dtype), [of_dtype({**e, "ids": base["ids"], "tied": e["embed"]}, dtype) for e in experts]
    )


def distinct_models(count: int = 3, *, seed: int = 0) -> AlignedModels:
    """Models in float64 whose task vectors have no two equal magnitudes and no sums that cancel."""
    models = toy_models(count, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for expert in models.experts:
        for name in SHAPES:
            tensor = expert.get(name)
            tensor.add_(1e-6 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return models


def of_dtype(model: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    made = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.items()}
    return made | {"tied": made["embed"]} if "tied" in made else made


def aligned(
    base: Mapping[str, Tensor] | None, experts: Sequence[Mapping[str, Tensor]], names: Sequence[str] = NAMES
) -> AlignedModels:
    """Models from dicts; experts are called by ``names``."""
    sources = [DictSource(name, expert) for name, expert in zip(names, experts, strict=False)]
    return align(DictSource("base", base) if base is not None else None, sources, backbone_prefix="")


def one_tensor(base: Any, *experts: Any, dtype: torch.dtype = torch.float32) -> AlignedModels:
    """Models of one tensor, ``x``."""
    start = None if base is None else {"x": torch.as_tensor(base, dtype=dtype)}
    return aligned(start, [{"x": torch.as_tensor(expert, dtype=dtype)} for expert in experts])


def output_of(method: MergeMethod, models: AlignedModels) -> str | None:
    """The expert whose model is tested, of a method that makes one for each: the first by name."""
    return min(expert.name for expert in models.experts) if method.one_model_per_expert and models.experts else None


def few_steps(method: MergeMethod) -> dict[str, Any]:
    """Let methods that learn step by step from data take few steps: each one runs the experts."""
    return {"steps": 3} if "data" in method.needs and "steps" in method.parameters.model_fields else {}


def merged(
    method: str | MergeMethod,
    models: AlignedModels,
    *,
    model_weights: Any = None,
    seed: int = 0,
    output: str | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge with a method by name."""
    chosen = get_method(method) if isinstance(method, str) else method
    output = output or output_of(chosen, models)
    examples = ToyExamples(models) if chosen.needs else None
    parameters = few_steps(chosen) | parameters
    return merge_to_dict(chosen, parameters, models, weights=model_weights, seed=seed, output=output, examples=examples)


def merged_x(method: str, models: AlignedModels, **options: Any) -> Tensor:
    """Merge models of one tensor and return it."""
    return merged(method, models, **options)["x"]


def streamed(method: str, models: AlignedModels, block: int | None = None, **parameters: Any) -> dict[str, Tensor]:
    """Merge in blocks of a chosen size."""
    chosen = get_method(method)
    examples = ToyExamples(models) if chosen.needs else None
    parameters = few_steps(chosen) | parameters
    return dict(merge(chosen, parameters, models, block=block, output=output_of(chosen, models), examples=examples))


def mask_key(values: Tensor, tensor: str, seed: int = 0) -> int:
    """The key of an expert's random numbers in a tensor where it has these values, not by mergelab's code."""
    numbers = values.detach().double().numpy()
    single = numbers.astype("<f4")
    exact = bool((single.astype("<f8") == numbers).all())
    content = xxhash.xxh3_128_hexdigest(b"float32" + single.tobytes() if exact else b"float64" + numbers.tobytes())
    parts = [part.encode() for part in (str(seed), content, tensor)]
    text = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return int.from_bytes(hashlib.blake2b(text, digest_size=16, person=b"mergelab").digest(), "little")


def task_vector(models: AlignedModels, expert: int, name: str) -> Tensor:
    """τ in float64."""
    assert models.base is not None
    return models.experts[expert].get(name).double() - models.base.get(name).double()
