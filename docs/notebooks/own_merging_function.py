# %% [markdown]
# # A merging function of your own
#
# A function of tensors becomes a function of models by a decorator. It runs without network.

# %%
from pathlib import Path

import torch
from torch import Tensor

import mergelab as ml

folder = Path("models")
experts = ("howey", "textattack", "yoshitomo-matsubara", "Ruizhou", "anirudh21")  # of models=bert_base_rte
names = experts[:3]
for name in names:
    others = [f"models.experts.{other}=null" for other in experts if other != name]
    ml.run(
        "models.base=null", *others,
        task="rte", source="mini", method="soup", evaluate=False, output=folder / name, tracking="none",
    )  # fmt: skip
models = [folder / name for name in names]

# %% [markdown]
# ## One tensor at a time
#
# `layer_merge` calls the function for every tensor, with a list of the models' tensors. The models may be hub ids,
# folders, modules, pipelines or dictionaries. What is returned is of the last one's kind, for ids and folders a
# pipeline.


# %%
@ml.layer_merge
def median(models: list[Tensor], **kw) -> Tensor:
    return torch.stack(models).median(dim=0).values


merged = median(models, task="text-classification")
print(merged("The king calls. [SEP] The king never calls."))

# %% [markdown]
# The same is a method of mergelab, so that the two can be compared:

# %%
built_in = ml.median(models, task="text-classification")
ours, theirs = merged.model.state_dict(), built_in.model.state_dict()
assert all(torch.equal(ours[name], theirs[name]) for name in ours)

# %% [markdown]
# ## Whole state dicts
#
# `model_merge` calls the function once, with a list of `StateDict`s: for what looks at several tensors at once.
# `dict_map` makes a function of tensors one of dictionaries, to be called inside.


# %%
@ml.dict_map
def spread(models: list[Tensor]) -> Tensor:
    return torch.stack(models).std(dim=0)


@ml.model_merge
def cautious(models: list[ml.StateDict], limit: float = 0.02) -> ml.StateDict:
    """The mean where the models agree, else the first model."""
    differ, mean = spread(models), sum(models) / len(models)
    return ml.StateDict({name: torch.where(differ[name] < limit, mean[name], models[0][name]) for name in mean})


careful = cautious(models, task="text-classification", limit=0.01)

# %% [markdown]
# ## In an experiment
#
# In a module of its own, the same function can be measured, tracked and swept. Its keyword parameters are settings:

# %%
Path("my_merge.py").write_text('''
import torch


def between(models: list[torch.Tensor], share: float = 0.5) -> torch.Tensor:
    """A point between the smallest and the largest value of each entry."""
    stacked = torch.stack(models)
    return stacked.amin(dim=0).lerp(stacked.amax(dim=0), share)
''')
method = {"name": "custom", "function": "my_merge.between", "share": 0.4}
found = ml.run("task.limit=100", method=method, task="rte", source="mini")
found.table
