# %% [markdown]
# # Merging LoRA adapters
#
# Adapters are experts like any other, and a merge can be an adapter again. It runs without network.
#
# ## Adapters to merge
#
# With adapters of your own, use their folders or hub ids. Here adapters are extracted from two experts of the
# miniature: the difference of each from the base, cut to rank 8 in every layer.

# %%
import json
from pathlib import Path

import mergelab as ml

folder = Path("models")
experts = ("howey", "textattack", "yoshitomo-matsubara", "Ruizhou", "anirudh21")  # of models=bert_base_rte
plain = {"name": "task_arithmetic", "lambda": 1.0}
for name in experts[:2]:
    others = [f"models.experts.{other}=null" for other in experts if other != name]
    ml.run(
        *others, method=plain, task="rte", source="mini", evaluate=False, tracking="none",
        output=folder / f"{name}-lora", save={"form": "lora_svd", "rank": 8},
    )  # fmt: skip
ml.run(
    method={"name": "task_arithmetic", "lambda": 0.0}, task="rte", source="mini",
    evaluate=False, output=folder / "base", tracking="none",
)  # fmt: skip
print(json.loads((folder / "howey-lora" / "adapter_config.json").read_text())["r"])

# %% [markdown]
# ## An exact sum
#
# `lora_cat` puts the factors side by side: the sum of the adapters, exactly, at the sum of their ranks.

# %%
adapters = {"base": str(folder / "base"), "experts": {name: str(folder / f"{name}-lora") for name in experts[:2]}}
halves = {"name": "task_arithmetic", "lambda": 0.5}
ml.run(
    models=adapters, method=halves, task="rte",
    evaluate=False, output=folder / "joined", save={"form": "lora_cat"}, tracking="none",
)  # fmt: skip
print(json.loads((folder / "joined" / "adapter_config.json").read_text())["r"])

# %% [markdown]
# ## Any method, at a rank of your choice
#
# `lora_svd` fits an adapter to any merge. `mergelab_sites.json` says for every layer how much of the change it keeps.

# %%
ml.run(
    models=adapters, method={"name": "ties", "density": 0.5}, task="rte",
    evaluate=False, output=folder / "ties-rank-4", save={"form": "lora_svd", "rank": 4}, tracking="none",
)  # fmt: skip
sites = json.loads((folder / "ties-rank-4" / "mergelab_sites.json").read_text())
print(next(iter(sites)))

# %% [markdown]
# ## PEFT loads it
#
# The result has PEFT's layout and needs nothing of mergelab. With `pip install peft`:

# %%
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
model = PeftModel.from_pretrained(base, str(folder / "joined"))
print(type(model).__name__, sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name))
