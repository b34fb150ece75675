"""Small models for mergekit's configs, and their merges here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra import compose, initialize_config_dir
from torch import Tensor

from mergelab.config import CONF_DIR
from mergelab.experiment.exporting import as_mergekit
from mergelab.experiment.locate import locate
from mergelab.experiment.merging import Merging
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.experiment.saving import Saving
from mergelab.experiment.session import Session, open_session
from mergelab.mergekit.commands import expanded

LAYERS = {"llama": 4, "tied": 3, "bert": 3}
# mergekit's modules of models that have several; the second has two layers.
MODULES = {
    "t5": ("encoder", "decoder", "shared"),
    "bart": ("model.encoder.layers", "model.decoder.layers", "default"),
    "qwen2_5_vl": ("vision_tower", "text_decoder", "multi_modal_projector"),
}
_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def make_models(folder: Path, kind: str, layers: int | None = None) -> None:
    """Write ``base``, ``a``, ``b`` and ``c``, experts around the base."""
    base = _of_modules(kind) if kind in MODULES else _of_one_module(kind, layers or LAYERS[kind])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    base.save_pretrained(folder / "base")
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for name in "abc":
        with torch.no_grad():
            for key, parameter in base.named_parameters():
                parameter.copy_(start[key] + 0.05 * torch.randn(parameter.shape, generator=generator))
        base.save_pretrained(folder / name)


def _of_one_module(kind: str, layers: int) -> Any:
    sizes = {**_SIZES, "num_hidden_layers": layers}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes))
    tied = kind == "tied"
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def _of_modules(kind: str) -> Any:
    if kind == "t5":
        sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
        layers = {"num_layers": 3, "num_decoder_layers": 2}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, **layers, feed_forward_proj="gated-gelu")
        )
    if kind == "bart":
        each = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}
        sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in each.items()}
        sizes |= {"encoder_layers": 3, "d_model": 16, "vocab_size": 40, "max_position_embeddings": 32}
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    ids = {"image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}
    text = {**_SIZES, "num_hidden_layers": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    rotary = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rotary}, vision_config={**vision, "patch_size": 4}, **ids
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def planned(*arguments: str) -> Plan:
    """Plan what the command with these arguments would do."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return plan_experiment(compose("config", expanded([*arguments, "evaluate=false", "output=out"])))


def exported(*arguments: str) -> str:
    """Return the mergekit config that the command with these arguments would write."""
    plan, session = _opened(*arguments)
    return as_mergekit(plan, session.located, session.opened)


def merged(*arguments: str) -> Mapping[str, Tensor]:
    """Merge as the command with these arguments would, in memory."""
    return _merged(*_opened(*arguments))


def merged_and_exported(*arguments: str) -> tuple[Mapping[str, Tensor], str]:
    """Return what both `merged` and `exported` do."""
    plan, session = _opened(*arguments)
    return _merged(plan, session), as_mergekit(plan, session.located, session.opened)


def saved(folder: Path, *arguments: str) -> Path:
    """Merge as the command with these arguments would, and write the model to a folder."""
    plan, session = _opened(*arguments)
    Saving(session, plan.config.save).save({task.name: _merged(plan, session) for task in plan.tasks[:1]}, folder)
    return folder


def _merged(plan: Plan, session: Session) -> Mapping[str, Tensor]:
    backbones, _ = Merging(
        plan.method, plan.parameters, session, plan.config.seed, lambda _message, _done: None
    ).in_memory()
    return next(iter(backbones.values()))


def _opened(*arguments: str) -> tuple[Plan, Session]:
    plan = planned(*arguments)
    return plan, open_session(locate(plan.config.models, "local", []), plan.tasks, plan.config)
