"""The tutorial of the library that mergelab grew from runs with only the import changed, from a hub on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub_server import HubServer
from tests.standins import GPT2_BASE

pytestmark = pytest.mark.slow

LEGAL, RECIPES = "umarbutler/open-australian-legal-gpt2", "mrm8488/gpt2-finetuned-recipes-cooking"

MODELS = """
import torch
from torch import Tensor
from typing import List
from transformers import pipeline
from mergelab import layer_merge, StateDict, dict_map, model_merge, ModelTensorMapper, evaluate_glue_pipeline
import mergelab as ml

models = ['textattack/bert-base-uncased-RTE', 'yoshitomo-matsubara/bert-base-uncased-rte',
          'Ruizhou/bert-base-uncased-finetuned-rte', 'howey/bert-base-uncased-rte',
          'anirudh21/bert-base-uncased-finetuned-rte']
base = 'google-bert/bert-base-uncased'
"""


@pytest.fixture
def language_hub(empty_hub: HubServer, gpt2_checkpoints: Mapping[str, Path], tmp_path: Path) -> HubServer:
    """A hub with a GPT-2-like base and two models of domains, under their real names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config.from_pretrained(gpt2_checkpoints[GPT2_BASE], n_positions=256)
    for seed, repository in enumerate((GPT2_BASE, LEGAL, RECIPES)):
        folder = tmp_path / "domains" / repository
        shutil.copytree(gpt2_checkpoints[GPT2_BASE], folder)
        (folder / "model.safetensors").unlink()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            GPT2LMHeadModel(config).save_pretrained(folder)
        empty_hub.add_model(repository, folder)
    return empty_hub


def test_a_median_by_layer_merge_and_by_dict_map_and_model_merge_is_the_same(
    hub: HubServer, client: Callable[..., Any]
) -> None:
    answer = client(
        MODELS
        + """
@dict_map
def median_layer_merging(models: List[Tensor], **kw) -> Tensor:
    return torch.median(torch.stack(models), dim=0).values

@model_merge
def median(models: List[StateDict], **kw) -> StateDict:
    return median_layer_merging(models)

@layer_merge
def median_in_one(models: List[Tensor], **kw) -> Tensor:
    return torch.median(torch.stack(models), dim=0).values

merged = median(models, task='text-classification')
in_one = median_in_one(models, task='text-classification')
built_in = ml.median(models, task='text-classification')
states = [pipe.model.state_dict().values() for pipe in (merged, in_one, built_in)]
result = {'same': all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*states)),
          'score': evaluate_glue_pipeline(merged, 'rte'),
          'said': merged('The king calls. The king never calls.')[0]['label']}
"""
    )
    assert "error" not in answer, answer
    assert answer["same"]
    assert 0.0 < answer["score"]["accuracy"] < 1.0
    assert answer["said"]


def test_max_magnitude_takes_a_base_from_the_list(hub: HubServer, client: Callable[..., Any]) -> None:
    answer = client(
        MODELS
        + """
@layer_merge
def max_magnitude(models: List[Tensor], base_index: int = 0, **kw) -> Tensor:
    base = models.pop(base_index)
    tasks = torch.stack([model - base for model in models])
    return base + tasks.gather(0, tasks.abs().argmax(dim=0, keepdim=True)).squeeze(0)

own = max_magnitude([base, *models[1:3]], task='text-classification', base_index=0)
built_in = ml.magmax([base, *models[1:3]], task='text-classification', base_index=0, lambda_=1.0)
pairs = list(zip(own.model.parameters(), built_in.model.parameters()))
result = {'largest': max(float((a - b).abs().max()) for a, b in pairs), 'score': evaluate_glue_pipeline(own, 'rte')}
"""
    )
    assert "error" not in answer, answer
    assert answer["largest"] < 1e-6
    assert 0.0 < answer["score"]["accuracy"] <= 1.0


def test_ties_takes_the_old_spellings_with_the_right_mathematics(hub: HubServer, client: Callable[..., Any]) -> None:
    answer = client(
        MODELS
        + """
head = ['classifier.weight', 'classifier.bias']
old = ml.ties([base, *models], task='text-classification', base_index=0, k=0.2, passthrough_layers=head)
new = ml.ties([base, *models], task='text-classification', base_index=0, density=0.2, passthrough=head)
experts = [pipeline('text-classification', model=name).model.state_dict() for name in models]
turned = models.index('howey/bert-base-uncased-rte')  # its labels stand in the other order
heads = [e['classifier.weight'].flip(0) if at == turned else e['classifier.weight'] for at, e in enumerate(experts)]
mean = torch.stack(heads).mean(0)
task = ml.task([base, *models], task='text-classification', lambda_=0.3, passthrough=head).model.state_dict()
name = 'bert.encoder.layer.0.output.dense.weight'
start = pipeline('fill-mask', model=base).model.state_dict()[name]
expected = start + 0.3 * sum(expert[name] - start for expert in experts)
pairs = zip(old.model.parameters(), new.model.parameters())
dare = ml.dare([base, *models[:2]], task='text-classification', p=0.4, passthrough=head).model.state_dict()[name]
same = ml.dare([base, *models[:2]], task='text-classification', density=0.6, passthrough=head).model.state_dict()[name]
slerp = ml.slerp(models[:2], task='text-classification', tau=0.0).model.state_dict()[name]
result = {'same': all(torch.equal(a, b) for a, b in pairs),
          'head': float((new.model.state_dict()['classifier.weight'] - mean).abs().max()),
          'sum': float((task[name] - expected).abs().max()), 'dare': torch.equal(dare, same),
          'slerp': float((slerp - experts[0][name]).abs().max()),
          'score': evaluate_glue_pipeline(new, 'rte')}
"""
    )
    assert "error" not in answer, answer
    assert answer["same"]
    assert answer["head"] < 1e-6
    assert answer["sum"] < 1e-5
    assert answer["dare"]
    assert answer["slerp"] < 1e-6
    assert 0.4 < answer["score"]["accuracy"] <= 1.0


def test_state_dicts_and_flat_tensors_of_language_models_are_arithmetic(
    language_hub: HubServer, client: Callable[..., Any]
) -> None:
    answer = client(
        """
import torch
from transformers import pipeline, set_seed
from mergelab import ModelTensorMapper, StateDict

gpt2 = pipeline('text-generation', model='openai-community/gpt2', device='cpu')
before = {name: value.clone() for name, value in gpt2.model.named_parameters()}
mapper = ModelTensorMapper(gpt2.model)
base = mapper.to_tensor(gpt2.model)
legal = mapper.from_hf('umarbutler/open-australian-legal-gpt2', 'text-generation')
recipe = mapper.from_hf('mrm8488/gpt2-finetuned-recipes-cooking', 'text-generation')
recipe + legal, base - recipe, base * legal, base / legal, base - 2*(legal - recipe)
legal_delta = legal - base
recipe_delta = recipe - base
LAMBDA = 0.5
multilingual = base + LAMBDA*(legal_delta + recipe_delta)/2
multilingual_pipe = mapper.to_pipeline(multilingual, base_pipeline=gpt2)
set_seed(1789)
prompt = 'Section 51 of the Australian Constitution provides that'
text = multilingual_pipe(prompt, max_new_tokens=5, num_return_sequences=1)[0]['generated_text']

dicts = [StateDict.from_hf(name, 'text-generation') for name in
         ('openai-community/gpt2', 'umarbutler/open-australian-legal-gpt2', 'mrm8488/gpt2-finetuned-recipes-cooking')]
start, law, cooking = dicts
both = start + LAMBDA * ((law - start) + (cooking - start)) / 2
module = both.to_model(gpt2.model)
flat = mapper.to_tensor(module)
result = {'text': text.startswith(prompt), 'largest': float((flat - multilingual).abs().max()),
          'untouched': all(torch.equal(before[name], value) for name, value in gpt2.model.named_parameters()),
          'size': base.numel() == sum(p.numel() for p in gpt2.model.parameters())}
"""
    )
    assert "error" not in answer, answer
    assert answer["text"]
    assert answer["largest"] < 1e-6
    assert answer["untouched"]
    assert answer["size"]
