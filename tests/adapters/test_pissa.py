"""A PiSSA adapter is read on the base that is stored, of which the library takes what the adapter begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergelab.adapters.pissa import leading
from mergelab.errors import ModelError
from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.adapters.test_dense import BOTH, TEXT
from tests.adapters.test_outputs import assert_equal, merged, through_peft
from tests.conftest import Outcome

peft = pytest.importorskip("peft")


def pissa(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"} | settings))


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (small.bert, pissa(target_modules=["query", "intermediate.dense", "output.dense"]), TEXT),
    "conv1d": (small.gpt2, pissa(target_modules=["c_attn", "c_proj"]), TEXT),
    "t5, rslora": (small.t5, pissa(target_modules=["q", "wo"], use_rslora=True), BOTH),
    "patterns": (
        small.llama,
        pissa(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 3}),
        TEXT,
    ),
    "whole": (small.bert, pissa(target_modules=["query"], r=16), TEXT),
    "dora": (small.bert, pissa(target_modules=["query", "output.dense"], use_dora=True), TEXT),
    "beside an embedding": (small.llama, pissa(target_modules=["embed_tokens", "q_proj"]), TEXT),
}


def made(folder: Path, build: Any, config: Any, seed: int = 0) -> tuple[Path, Path, Any]:
    """Save a base in float32, and an adapter on it as the library makes it: PiSSA needs float32."""
    base, folder = folder / "base", folder / f"adapter{seed}"
    build().float().save_pretrained(base)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(build().float(), config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    wrapped.save_pretrained(folder)
    return base, folder, wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_what_the_library_leaves_of_it(tmp_path: Path, kind: str) -> None:
    build, config, inputs = KINDS[kind]
    base, folder, wrapped = made(tmp_path, build, config)
    opened = open_model(on_base(base, folder, where="a"))
    expected = small.outputs(wrapped, **inputs)
    found = small.outputs(small.loaded(opened).float(), **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = small.outputs(build().float(), **inputs)
    assert not torch.allclose(expected, plain, atol=1e-3), "the adapter does nothing"
    library = wrapped.merge_and_unload().state_dict()
    for name in list(opened.keys()):
        torch.testing.assert_close(opened.get(name), library[name], rtol=1e-5, atol=1e-5, msg=f"{kind}: {name}")


def test_a_base_in_half_precision_is_equal_within_its_rounding(tmp_path: Path) -> None:
    config = pissa(target_modules=["q_proj", "up_proj"])
    base, folder, _ = made(tmp_path, small.llama, config)
    small.llama().to(torch.bfloat16).save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    library = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    opened = open_model(on_base(base, folder, where="a"))
    for name in list(opened.keys()):
        torch.testing.assert_close(opened.get(name).float(), library[name].float(), rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (11, 11)])
def test_the_leading_part_is_that_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    left, right = leading(matrix, 3, "a")
    u, s, vh = np.linalg.svd(matrix.double().numpy())
    np.testing.assert_allclose((left @ right).numpy(), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5)


def spectrum(base: Path, values: torch.Tensor) -> None:
    """Give all query weights of a base these singular values."""
    file = base / "model.safetensors"
    held = load_file(file)
    for name in held:
        if name.endswith("query.weight"):
            u, _, vh = torch.linalg.svd(held[name].double())
            held[name] = ((u * values.double()) @ vh).float().contiguous()
    save_file(held, file, {"format": "pt"})


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-3])
def test_equal_singular_values_at_the_rank_are_refused(gap: float, tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path, small.bert, pissa(target_modules=["query"]))
    values = torch.linspace(2, 0.5, 16)
    values[4] = values[3] - gap
    spectrum(base, values)
    opened, name = open_model(on_base(base, folder, where="a"), "a"), "bert.encoder.layer.0.attention.self.query.weight"
    if gap == 1e-3:
        model = transformers.BertForSequenceClassification.from_pretrained(base)
        library = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
        torch.testing.assert_close(opened.get(name), library[name], rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ModelError, match=r"^a: bert.*query: .*singular values 4 and 5 .* too near to tell") as caught:
        opened.get(name)
    assert len(str(caught.value)) <= 400


def test_a_base_that_holds_nan_is_named(tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path, small.bert, pissa(target_modules=["query"]))
    spectrum(base, torch.full((16,), float("nan")))
    opened = open_model(on_base(base, folder, where="a"), "a")
    with pytest.raises(ModelError, match=r"^a: bert.*query: the base's weight holds NaN or infinity"):
        opened.get("bert.encoder.layer.0.attention.self.query.weight")


def test_small_singular_values_do_not_matter(tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path, small.bert, pissa(target_modules=["query"]))
    spectrum(base, torch.tensor([1.0, 0.5, 0.2, *[0.0] * 13]))
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    library = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    opened = open_model(on_base(base, folder, where="a"))
    for name in list(opened.keys()):
        torch.testing.assert_close(opened.get(name), library[name], rtol=1e-5, atol=1e-5)


def test_a_converted_adapter_is_the_same_model(tmp_path: Path) -> None:
    """The library converts it to LoRA of twice the rank, with what it began with."""
    base = tmp_path / "base"
    small.bert().float().save_pretrained(base)
    wrapped = peft.get_peft_model(small.bert().float(), pissa(target_modules=["query"]))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "pissa")
    wrapped.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["init_lora_weights"] is True
    opened = [open_model(on_base(base, tmp_path / name, where="a")) for name in ("pissa", "lora")]
    for name in list(opened[0].keys()):
        torch.testing.assert_close(opened[0].get(name), opened[1].get(name), rtol=1e-5, atol=1e-5)


def test_it_merges_and_is_written_as_lora(tmp_path: Path, mergelab_command: Callable[..., Outcome]) -> None:
    config = pissa(target_modules=["query"], task_type="SEQ_CLS")
    base, a, _ = made(tmp_path, small.bert, config, seed=1)
    models = {"base": base, "a": a, "b": made(tmp_path, small.bert, config, seed=2)[1]}
    method = ("method=task_arithmetic", "method.lambda=0.6")
    dense = merged(mergelab_command, models, "dense", *method)
    adapter = merged(mergelab_command, models, "adapter", *method, "save.form=lora_svd", "save.energy=1.0")
    assert_equal(dense, through_peft("bert", base, adapter), atol=1e-5)


def test_what_it_cannot_be_computed_for_writes_nothing(
    tmp_path: Path, mergelab_command: Callable[..., Outcome]
) -> None:
    base, folder, _ = made(tmp_path, small.bert, pissa(target_modules=["query"], task_type="SEQ_CLS"))
    spectrum(base, torch.ones(16))
    outcome = mergelab_command(
        f"models.base={base}",
        f"models.experts={{a: {folder}}}",
        *("task=rte", "method=task_arithmetic", "evaluate=false", "tracking=none", "output=out"),
    )
    assert outcome.code == 2
    assert "too near to tell apart" in outcome.err
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_a_tied_weight_that_it_changed_is_refused(tmp_path: Path) -> None:
    config = pissa(target_modules=["lm_head", "q_proj"])
    base, folder, _ = made(tmp_path, lambda: small.llama(tie_word_embeddings=True), config)
    with pytest.raises(ModelError, match=r"changed lm_head together with model.embed_tokens.weight, which is tied"):
        on_base(base, folder, where="a")


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "PISSA", "pissa_", "mica", 1])
def test_other_changes_of_the_base_are_refused_by_name(init: Any, tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path, small.bert, pissa(target_modules=["query"]))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(ModelError, match=f"init_lora_weights={init!r} .*path_initial_model_for_weight_conversion"):
        on_base(base, folder, where="a")
