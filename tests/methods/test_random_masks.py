"""What random methods draw follows from the seed and the models' values: not from names, places, order or container."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergelab.api import method_function
from mergelab.engine import finite_check
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.warm_session import MergeSession
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.content import content_digest
from tests.conftest import Outcome
from tests.methods.toy import SHAPES, aligned, merged, merged_x, one_tensor, toy_models

Command = Callable[..., Outcome]
RANDOM = ["dare", "dare_ties", "della", "della_linear"]
SYMMETRIC = [n for n in method_names() if not get_method(n).order_matters and not get_method(n).needs]
EXPERTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three experts around it: tiny Llamas whose embedding is their output layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=1, vocab_size=60, tie_word_embeddings=True))
    place = tmp_path_factory.mktemp("masks")
    for name in ("base", *EXPERTS):
        model.save_pretrained(place / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return {name: place / name for name in ("base", *EXPERTS)}


def module(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def state(folder: Path) -> dict[str, Tensor]:
    source = open_checkpoint(folder)
    return {key: source.get(key).clone() for key in source.keys()}  # noqa: SIM118


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    names = first.keys() & second.keys()  # an embedding that is the output layer is stored once or twice
    return len(names) > 15 and all(torch.equal(first[name], second[name]) for name in names)


def as_bin(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    torch.save(state(folder), to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


def as_shards(folder: Path, to: Path) -> Path:
    module(folder).save_pretrained(to, max_shard_size="10KB")
    assert len(list(to.glob("*.safetensors"))) > 2
    return to


def as_reversed_file(folder: Path, to: Path) -> Path:
    """The same tensors in another order in the file, beside a tensor that is not merged."""
    shutil.copytree(folder, to)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    tensors = extra | dict(reversed(state(folder).items()))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_command_line_library_modules_and_dicts_merge_to_the_same_bits(
    folders: dict[str, Path], workplace: Path, mergelab_command: Command
) -> None:
    for method in RANDOM:
        merge = method_function(method)
        expected = merge([state(folder) for folder in folders.values()], seed=3)
        modules = merge([module(folder) for folder in folders.values()], seed=3)
        assert same(expected, modules.state_dict())
        last = state(folders["c"])
        assert same(expected, merge([str(folders["base"]), folders["a"], str(folders["b"]), last], seed=3))
        assert same(expected, merge([module(folders["base"]), folders["b"], module(folders["a"]), last], seed=3))
        assert same(expected, merge([folders["a"], folders["base"], folders["b"], last], base_index=1, seed=3))
        experts = ["{" + f"one: {folders['b']}, two: {folders['c']}, three: {folders['a']}" + "}"]
        experts += ["[" + ",".join(str(folders[name]) for name in EXPERTS) + "]"]
        for number, given in enumerate(experts):
            options = [f"models.base={folders['base']}", f"models.experts={given}", f"method={method}", "seed=3"]
            out = workplace / f"{method}-{number}"
            assert mergelab_command(*options, "evaluate=false", "tracking=none", f"output={out}").code == 0
            assert same(expected, state(out))
        assert not same(expected, merge([state(folder) for folder in folders.values()], seed=4))


@pytest.mark.parametrize("method", RANDOM)
def test_shards_bin_files_and_other_layouts_merge_to_the_same_bits(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    merge = method_function(method)
    expected = merge([state(folder) for folder in folders.values()])
    for store in (as_bin, as_shards, as_reversed_file):
        stored = [store(folders[name], tmp_path / store.__name__ / name) for name in ("a", "b")]
        assert same(expected, merge([state(folders["base"]), *stored, state(folders["c"])]))


@pytest.mark.parametrize("method", SYMMETRIC)
def test_neither_the_experts_names_nor_their_order_change_a_bit(method: str) -> None:
    models = toy_models(min(4, get_method(method).max_experts or 4))
    assert models.base is not None
    count = len(models.experts)
    weights = [1.0 + i / 7 for i in range(count)] if get_method(method).takes_weights else None
    dicts = [{name: expert.get(name) for name in SHAPES} for expert in models.experts]
    base = {name: models.base.get(name) for name in SHAPES}
    results = []
    for order in list(itertools.permutations(range(count)))[:: 7 if count == 4 else 1]:
        for names in (["p", "q", "r", "s"], ["s", "r", "q", "p"]):
            renamed = aligned(base, [dicts[i] for i in order], names)
            turned = weights and [weights[i] for i in order]
            of = renamed.experts[order.index(0)].name if get_method(method).one_model_per_expert else None
            results.append(merged(method, renamed, model_weights=turned, output=of))
    assert len(results) >= (4 if count > 1 else 2)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in SHAPES)


def test_equal_experts_with_other_weights_change_no_bit_by_their_order() -> None:
    model, other = torch.randn(2, 999, generator=torch.Generator().manual_seed(0)).unbind()
    pairs = [(model, 0.1), (model, 0.7), (model, 1.3), (other, 1.0)]
    found = []
    for order in itertools.permutations(pairs):
        models = one_tensor(torch.zeros(999), *(expert for expert, _ in order))
        found.append(merged_x("dare", models, weights=[weight for _, weight in order]))
    assert all(torch.equal(each, found[0]) for each in found)


def kept(method: str, experts: Sequence[Tensor], density: float, seed: int = 0) -> list[Tensor]:
    """Which entries of each expert a merge keeps, one expert at a time, as the others have no weight."""
    found = []
    for chosen in range(len(experts)):
        weights = [float(i == chosen) for i in range(len(experts))]
        models = one_tensor(torch.zeros_like(experts[0]), *experts)
        options = {"epsilon": 0.0} if method.startswith("della") else {}
        found.append(merged_x(method, models, weights=weights, density=density, seed=seed, **options) != 0)
    return found


@pytest.mark.parametrize("method", ["dare", "della_linear"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_masks_of_experts_that_differ_in_one_entry_are_independent(method: str, density: float) -> None:
    count = 40_000
    first = torch.ones(count)
    experts = [first, first.clone(), torch.full((count,), 2.0), -first]
    experts[1][count - 1] = 1.0000001
    masks = [*kept(method, experts, density), *kept(method, experts, density, seed=1)]
    for one, other in itertools.combinations(masks, 2):
        share = density**2
        bound = 5 * (share * (1 - share) / count) ** 0.5
        assert abs((one & other).double().mean() - share) < bound
    assert all(abs(mask.double().mean() - density) < 5 * (density * (1 - density) / count) ** 0.5 for mask in masks)


def test_equal_values_have_the_same_mask_in_tensors_of_one_name_alone() -> None:
    count = 10_000
    one, other = kept("dare", [torch.ones(count), torch.ones(count)], 0.5)
    assert torch.equal(one, other)
    models = aligned({n: torch.zeros(count) for n in "xy"}, [{n: torch.ones(count) for n in "xy"}])
    result = merged("dare", models)
    both = ((result["x"] != 0) & (result["y"] != 0)).double().mean()
    assert abs(both - 0.25) < 0.02


def test_values_read_in_a_wider_dtype_have_the_same_mask() -> None:
    experts = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = [kept("dare", list(experts.to(dtype)), 0.5) for dtype in (torch.bfloat16, torch.float32)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("method", RANDOM)
def test_a_session_computes_each_digest_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(tensor: Tensor) -> str:
        computed.append(tensor.shape)
        return content_digest(tensor)

    monkeypatch.setattr(finite_check, "content_digest", counted)
    models = toy_models(3)
    targets = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    session = MergeSession(models, targets)
    for density in (0.3, 0.4, 0.5):
        session.merge(get_method(method), {"density": density})
        assert len(computed) == 3 * len(SHAPES)
        expected = {name: tensor.clone() for name, tensor in targets.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(method, models).items() if name in SHAPES)
