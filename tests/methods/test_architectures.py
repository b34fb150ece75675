"""Every registered method on models as they are: BERT, GPT-2, Llama, T5, and an encoder joined with a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge_to_dict
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.module import copy_module, load_into
from mergelab.weights.source import DictSource
from tests.methods.tiny_classifiers import classifier, padded_batches
from tests.methods.tiny_writers import COUNT, is_pair, padded_texts, writer
from tests.methods.toy import OF_WEIGHTS, few_steps, output_of

KINDS = ["bert", "gpt2", "llama", "t5", "bert2gpt2"]
NAMES = ("first", "second", "third")


@cache
def network(kind: str) -> nn.Module:
    return classifier(kind).float() if kind == "bert" else writer(kind)


@dataclass(frozen=True)
class Configured(DictSource):
    """Tensors with the model's configuration, as a checkpoint has it."""

    config: Mapping[str, Any] = field(default_factory=dict)


@cache
def models_of(kind: str, spread: float = 0.02) -> AlignedModels:
    """A model and three experts that went from it the same way and each its own; tied tensors are tied in all."""
    config = network(kind).config.to_dict()  # type: ignore[operator, union-attr]

    def expert(seed: int) -> Configured:
        module, together, apart = copy_module(network(kind)), *(torch.Generator().manual_seed(s) for s in (9, seed))
        with torch.no_grad():
            for parameter in module.parameters():
                for generator in (together, apart):
                    parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        return Configured(NAMES[seed], dict(module.named_parameters(remove_duplicate=False)), config)

    base = Configured("base", dict(network(kind).named_parameters(remove_duplicate=False)), config)
    return align(base, [expert(seed) for seed in range(3)])


@dataclass(frozen=True)
class OwnExamples:
    """An expert's own module, and examples that all experts share."""

    kind: str
    models: AlignedModels
    expert: str
    key: str = ""
    count: int = COUNT

    padding_side = "right"

    @property
    def parameter_names(self) -> Mapping[str, str]:
        return {**{name: name for name in self.models.names}, **self.models.aliases}

    def module(self) -> nn.Module:
        (source,) = (each for each in self.models.experts if each.name == self.expert)
        return load_into(copy_module(network(self.kind)), {name: source.get(name) for name in self.models.names})

    def batches(self) -> Any:
        return padded_batches() if self.kind == "bert" else padded_texts(self.kind)


@dataclass(frozen=True)
class AllExamples:
    """Examples for every expert."""

    kind: str
    models: AlignedModels
    folder: Path | None = None

    def of(self, expert: str, **_settings: Any) -> OwnExamples:
        return OwnExamples(self.kind, self.models, expert)

    def score(self, experts: Sequence[str]) -> float:
        return -float(len(experts))

    def progress(self, message: str, done: float) -> None:
        """Show nothing."""

    def settle(self, found: Any) -> None:
        """Take note of nothing."""


def merged(name: str, kind: str, models: AlignedModels) -> dict[str, Tensor]:
    method = get_method(name)
    count = max(method.min_experts, min(3, method.max_experts or 3))
    models = align(models.base, models.experts[:count])
    parameters = few_steps(method)
    if "steps" in method.parameters.model_fields:
        parameters["steps"] = 3
    if name == "localize_stitch":
        parameters["density"] = 0.5  # by default it changes few entries
    examples = AllExamples(kind, models) if method.needs else None
    return merge_to_dict(method, parameters, models, examples=examples, output=output_of(method, models))


ENTROPY = [(name, kind) for name in ("adamerging", "adarank") for kind in KINDS[1:]]
NO_SENSE = ENTROPY + [("zipit", kind) for kind in KINDS if is_pair(kind)]
MAKE_SENSE = [(name, kind) for name in OF_WEIGHTS for kind in KINDS if (name, kind) not in NO_SENSE]


@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
@pytest.mark.parametrize(("name", "kind"), MAKE_SENSE)
def test_what_is_merged_is_a_whole_model_that_runs(name: str, kind: str) -> None:
    models = models_of(kind)
    result = merged(name, kind, models)
    module = copy_module(network(kind))
    before = {key: value.clone() for key, value in module.named_parameters()}
    load_into(module, result)  # every parameter is there, tied ones alike under all their names
    changed = [key for key, value in module.named_parameters() if not torch.equal(value, before[key])]
    assert len(changed) > 0.9 * len(before), "most tensors are left as they were"
    limit = 50 * 0.02 * 3
    assert all(bool(((value - before[key]).abs() < limit).all()) for key, value in module.named_parameters())
    batch = next(iter(padded_batches() if kind == "bert" else padded_texts(kind)))
    with torch.no_grad():
        logits = module(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert logits.isfinite().all()
    assert len(logits) == len(batch["input_ids"])


@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in MAKE_SENSE if is_pair(kind)])
def test_experts_equal_to_the_base_give_the_base(name: str, kind: str) -> None:
    models = models_of(kind, 0.0)
    assert models.base is not None
    for key, value in merged(name, kind, models).items():
        torch.testing.assert_close(value, models.base.get(key), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), NO_SENSE)
def test_what_makes_no_sense_says_so(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"method={name}: (minimises the entropy|knows the hidden units)"):
        merged(name, kind, models_of(kind))


@pytest.mark.parametrize("name", ["fisher", "gradient_matching"])
def test_an_estimator_that_would_take_a_pass_for_each_token_says_which_do_not(name: str) -> None:
    models = models_of("gpt2")
    with pytest.raises(ConfigError, match=r"method\.estimator=expected: .* take sampled .* or empirical"):
        merge_to_dict(get_method(name), {"estimator": "expected"}, models, examples=AllExamples("gpt2", models))


def test_tied_and_shared_tensors_are_merged_once() -> None:
    assert models_of("t5").aliases.keys() == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    assert set(models_of("t5").aliases.values()) == {"shared.weight"}
    assert models_of("gpt2").aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert models_of("bert2gpt2").aliases == {"decoder.lm_head.weight": "decoder.transformer.wte.weight"}
    assert "enc_to_dec_proj.weight" in models_of("bert2gpt2").names
    assert [kind for kind in KINDS[1:] if is_pair(kind)] == ["t5", "bert2gpt2"]
