"""FP8 checkpoints are read as the weights that they stand for; all other quantised ones are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergelab.errors import ModelError
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.module import mergeable
from mergelab.weights.pretrained import load_model
from mergelab.weights.state_dict import StateDict
from mergelab.weights.writer import save_folder

E4M3 = torch.float8_e4m3fn


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save tensors with a config."""

    def save(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **(config or {})}))
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return save


def fp8(shape: tuple[int, ...], dtype: torch.dtype = E4M3, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).add(0.1)


def by_block(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> np.ndarray:
    """Multiply entry by entry, each with the scale of the block that it lies in."""
    wide = weight.float().numpy().copy()
    for index in np.ndindex(*wide.shape):
        *lead, row, column = index
        wide[index] *= scale.float().numpy()[(*lead, row // block[0], column // block[1])]
    return wide


def method(quant_method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": quant_method, **more}}


@pytest.mark.parametrize(
    ("shape", "block", "said"),
    [
        ((8, 12), (4, 4), True),
        ((9, 14), (4, 4), True),
        ((5, 14), (4, 3), True),
        ((3, 5), (8, 8), True),
        ((3, 9, 6), (4, 4), True),
        ((8, 12), (2, 3), False),
        ((200, 150), (128, 128), False),
        ((2, 130, 6), (128, 128), False),
    ],
)
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_each_block_is_multiplied_with_its_scale_and_rounded_once(
    shape: tuple[int, ...], block: tuple[int, int], said: bool, dtype: torch.dtype, saved: Callable[..., Path]
) -> None:
    weight = fp8(shape, dtype)
    scale = positive(*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    name = "experts.gate_up_proj" if len(shape) == 3 else "q_proj.weight"
    config = method("fp8", weight_block_size=list(block)) if said else None
    model = open_checkpoint(saved({name: weight, f"{name}_scale_inv": scale}, config))
    assert model.keys() == [name]
    assert model.shape(name) == shape
    assert model.dtype(name) == torch.bfloat16
    assert torch.equal(model.get(name), torch.from_numpy(by_block(weight, scale, block)).bfloat16())


@pytest.mark.parametrize(
    ("shape", "scale", "ending", "config"),
    [
        ((6, 4), (), "_scale", method("compressed-tensors", format="float-quantized")),
        ((6, 4), (1,), "_scale", method("modelopt", quant_algo="FP8")),
        ((6, 4), (6, 1), "_scale", method("fbgemm_fp8")),
        ((4, 4), (4, 1), "_scale", method("compressed-tensors")),
        ((6, 4), (6,), "_scale", method("fbgemm_fp8")),
        ((6, 4), (), "_scale_inv", method("fp8", weight_block_size=None)),
        ((3, 6, 4), (3, 1, 4), "_scale", method("fbgemm_fp8")),
        ((3, 6, 4), (3, 6, 1), "_scale", method("fbgemm_fp8")),
        ((3, 6, 4), (3,), "_weight_scale", method("modelopt", quant_algo="FP8")),
        ((6, 4), (), ".scale", method("fp8")),
        ((6, 4), (1,), ".qscale_weight", method("fp8")),
        ((6, 4), (1, 1), ".scale_weight", {}),
    ],
)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_scales_of_tensors_rows_and_experts_are_multiplied_too(
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    ending: str,
    config: dict[str, Any],
    wide: torch.dtype,
    saved: Callable[..., Path],
) -> None:
    weight, factors = fp8(shape), positive(*scale).to(wide)
    name = "experts.down_proj" if len(shape) == 3 else "q_proj.weight"
    scale_name = f"{name.removesuffix('.weight') if ending.startswith('.') else name}{ending}"
    model = open_checkpoint(saved({name: weight, scale_name: factors}, {**config, "dtype": "float16"}))
    assert model.keys() == [name]
    spread = factors.float()
    if len(scale) == 1 and scale[0] > 1:
        spread = spread.reshape(-1, *[1] * (len(shape) - 1))
    expected = torch.from_numpy(weight.float().numpy() * spread.numpy()).half()
    assert model.dtype(name) == torch.float16
    assert torch.equal(model.get(name), expected)


def test_scales_that_are_exponents_are_powers_of_two(saved: Callable[..., Path]) -> None:
    weight, exponents = fp8((4, 64)), torch.tensor([[126, 127], [128, 120], [127, 127], [130, 125]], dtype=torch.uint8)
    model = open_checkpoint(saved({"w.weight": weight, "w.weight_scale_inv": exponents}, method("mxfp8")))
    factors = np.repeat(2.0 ** (exponents.numpy().astype(np.float32) - 127), 32, axis=1)
    assert torch.equal(model.get("w.weight"), torch.from_numpy(weight.float().numpy() * factors).bfloat16())


def test_what_only_a_quantised_model_has_is_left_out(saved: Callable[..., Path]) -> None:
    tensors = {
        "self_attn.q_proj.weight": fp8((4, 4)),
        "self_attn.q_proj.weight_scale": torch.tensor(0.5),
        "self_attn.q_proj.input_scale": torch.tensor(2.0),
        "self_attn.q_proj.bias": torch.ones(4),
        "self_attn.k_scale": torch.tensor(1.0),
        "self_attn.v_scale": torch.tensor(1.0),
        "self_attn.k_proj.k_scale": torch.tensor(1.0),
        "mlp.activation_scale": torch.tensor(1.0),
        "norm.weight": torch.ones(4),
        "vision.layer_scale": torch.ones(4),
    }
    model = open_checkpoint(saved(tensors, method("fp8")))
    left = {"self_attn.q_proj.weight", "self_attn.q_proj.bias", "norm.weight", "vision.layer_scale"}
    assert set(model.keys()) == left
    assert torch.equal(
        model.get("self_attn.q_proj.weight"), (tensors["self_attn.q_proj.weight"].float() / 2).bfloat16()
    )
    with pytest.raises(ModelError, match=r"has no tensor 'self_attn\.k_scale'"):
        model.get("self_attn.k_scale")


def test_a_scale_in_another_shard_is_found(saved: Callable[..., Path]) -> None:
    folder = saved({"a.weight": fp8((4, 4))}, method("fp8"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"a.weight_scale_inv": torch.full((1, 1), 0.25)}, folder / "model-00002-of-00002.safetensors")
    places = {"a.weight": "model-00001-of-00002.safetensors", "a.weight_scale_inv": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(open_checkpoint(folder).get("a.weight"), (fp8((4, 4)).float() / 4).bfloat16())


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"a.weight": fp8((4, 4)), "b.weight": fp8((4, 4)), "a.weight_scale": torch.ones(())}, "b.weight has no scale"),
        ({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(())}, "a.weight has a scale, but is float32"),
        ({"a.weight": fp8((5, 4)), "a.weight_scale": torch.ones(3, 1)}, "of shape .3, 1. is no scale of a.weight"),
        ({"a.weight": fp8((2, 5, 4)), "a.weight_scale": torch.ones(3, 1, 1)}, "is no scale of a.weight"),
        ({"a.weight": torch.ones(4, 4)}, "quantised with fp8: its tensors are not"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tensors: Mapping[str, Tensor], why: str, saved: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=why) as caught:
        open_checkpoint(saved(tensors, method("fp8")), "expert")
    assert "expert: " in str(caught.value)
    assert "merge the unquantised checkpoint" in str(caught.value)


BYTES = torch.zeros(8, 4, dtype=torch.uint8)
INTS = torch.zeros(8, 4, dtype=torch.int32)
HALF = torch.ones(4, 4).half()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"q.weight": BYTES, "q.weight.absmax": BYTES[0], "q.weight.quant_map": HALF}, "bitsandbytes"),
        ({"q.weight": BYTES, "q.weight.quant_state.bitsandbytes__nf4": BYTES[0]}, "bitsandbytes"),
        ({"q.weight": BYTES.to(torch.int8), "q.SCB": HALF}, "bitsandbytes"),
        ({"q.qweight": INTS, "q.qzeros": INTS, "q.scales": HALF, "q.g_idx": INTS[0]}, "gptq"),
        ({"q.qweight": INTS, "q.qzeros": INTS, "q.scales": HALF}, "gptq or awq"),
        (
            {"q.weight_packed": INTS, "q.weight_scale": HALF, "q.weight_shape": torch.tensor([4, 4])},
            "compressed-tensors",
        ),
        ({"q.weight": BYTES.to(torch.int8), "q.weight_scale": HALF}, "integers .q.weight is int8"),
        ({"mlp.down_proj_blocks": BYTES, "mlp.down_proj_scales": BYTES}, "mxfp4"),
        ({"q.W_q": BYTES, "q.scale": HALF, "q.zero": HALF}, "hqq"),
        ({"q.weight._data": BYTES.to(torch.int8), "q.weight._scale": HALF}, "quanto"),
        ({"q.codes": BYTES, "q.codebooks": HALF, "q.scales": HALF}, "aqlm"),
        ({"odd.matrix": BYTES}, "integers .odd.matrix is uint8"),
    ],
)
def test_other_quantised_tensors_are_refused_without_a_config_that_says_so(
    tensors: Mapping[str, Tensor], named: str, saved: Callable[..., Path]
) -> None:
    line = f"^expert: quantised with .*{named}.*merge the unquantised checkpoint"
    with pytest.raises(ModelError, match=line):
        open_checkpoint(saved(tensors), "expert")
    with pytest.raises(ModelError, match=line):
        mergeable("expert", dict(tensors))


@pytest.mark.parametrize(
    "name",
    [
        *("bitsandbytes", "gptq", "awq", "aqlm", "vptq", "spqr", "quanto", "eetq", "higgs", "hqq", "torchao", "bitnet"),
        *("fp_quant", "auto-round", "mxfp4", "nvfp4", "something new"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_names_another_method_is_enough(name: str, nested: bool, saved: Callable[..., Path]) -> None:
    said = method(name)
    folder = saved({"q.weight": HALF}, {"text_config": said} if nested else said)
    with pytest.raises(ModelError, match=f"^expert: quantised with {name}: merge the unquantised checkpoint") as caught:
        open_checkpoint(folder, "expert")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq or awq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4}, "gptq or awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
    ],
)
def test_a_file_that_says_so_is_enough(
    file: str, content: Mapping[str, Any], named: str, saved: Callable[..., Path]
) -> None:
    folder = saved({"q.weight": HALF})
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"quantised with {named}"):
        open_checkpoint(folder)


def test_masks_and_unquantised_models_are_read_as_ever(saved: Callable[..., Path]) -> None:
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "w.weight": HALF,
        "plain.weight": fp8((4, 4)),
        "layer_scale.scale": HALF,
        "block.scales": HALF,
        "position_ids": torch.arange(4)[None],
    }
    model = open_checkpoint(saved(tensors, {"quantization_config": None}))
    assert set(model.keys()) == tensors.keys()
    assert model.dtype("plain.weight") == E4M3


def test_a_module_with_quantised_parameters_is_refused() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised with 8-bit or packed integers \(weight is uint8\)"):
        StateDict.from_model(module)
    module.weight = nn.Parameter(fp8((4, 4)), requires_grad=False)
    module.weight_scale_inv = nn.Parameter(torch.ones(1, 1))
    with pytest.raises(ModelError, match="quantised with fp8"):
        StateDict.from_model(module)


@pytest.mark.parametrize("package", ["torchao.dtypes", "optimum.quanto.tensor"])
def test_a_tensor_that_is_quantised_inside_is_refused_though_it_shows_a_float(package: str) -> None:
    kind = type("PackedTensor", (torch.Tensor,), {"__module__": package})
    tensor = torch.ones(2, 2).as_subclass(kind)
    with pytest.raises(
        ModelError, match=r"^m: quantised with (torchao|quanto): w is a PackedTensor: merge the unquant"
    ):
        mergeable("m", {"w": tensor})


def llama_fp8(folder: Path, *, dequantised: bool = False) -> Checkpoint:
    """Save a Llama whose projections are FP8 in blocks of 32, or that model dequantised by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=24,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            stored[key] = tensor.bfloat16()
            continue
        scale = positive(-(-tensor.shape[0] // 32), -(-tensor.shape[1] // 32)) / 100
        weight = (tensor / scale.mean()).to(E4M3)
        if dequantised:
            stored[key] = torch.from_numpy(by_block(weight, scale, (32, 32))).bfloat16()
        else:
            stored |= {key: weight, f"{key}_scale_inv": scale}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if not dequantised:
        content |= method("fp8", activation_scheme="dynamic", weight_block_size=[32, 32])
    (folder / "config.json").write_text(json.dumps(content))
    return open_checkpoint(folder)


def test_an_fp8_model_is_loaded_and_saved_as_the_model_it_stands_for(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    quantised, plain = llama_fp8(tmp_path / "fp8"), llama_fp8(tmp_path / "plain", dequantised=True)
    reference = AutoModelForCausalLM.from_pretrained(plain.folder).state_dict()
    loaded = load_model(quantised.folder, "text-generation")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in reference.items())
    save_folder(((key, quantised.get(key)) for key in list(quantised.keys())), tmp_path / "out", like=quantised.folder)
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(saved.state_dict()[key], value) for key, value in reference.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (plain.folder / "config.json").read_text()
    )
