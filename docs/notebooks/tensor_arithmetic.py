# %% [markdown]
# # Tensor arithmetic on models
#
# A model as one flat tensor, and models as dictionaries with `+ - * /`. It runs without network.
#
# Three GPT-2 of the miniature are saved first: a base, a model of legal text and a model of recipes. With models from
# the hub, use their ids in place of the folders.

# %%
from pathlib import Path

from transformers import pipeline

import mergelab as ml

folder = Path("models")
for name in ("legal", "recipes"):
    other = "recipes" if name == "legal" else "legal"
    ml.run(
        "models.base=null", f"models.experts.{other}=null",
        task="law_recipes", source="mini", method="soup", evaluate=False, output=folder / name, tracking="none",
    )  # fmt: skip
ml.run(
    task="law_recipes", source="mini", method={"name": "task_arithmetic", "lambda": 0.0},
    evaluate=False, output=folder / "base", tracking="none",
)  # fmt: skip

# %% [markdown]
# ## A model as one tensor
#
# `ModelTensorMapper` maps a model to a flat tensor and back. It holds every parameter once, in the module's order.

# %%
gpt2 = pipeline("text-generation", model=str(folder / "base"))
mapper = ml.ModelTensorMapper(gpt2.model)
base = mapper.to_tensor(gpt2.model)
legal = mapper.from_hf(folder / "legal", "text-generation")
recipes = mapper.from_hf(folder / "recipes", "text-generation")
print(f"{len(mapper)} parameters")

# %% [markdown]
# Differences from the base are task vectors. Those of two skills are almost orthogonal, so that their sum keeps both:

# %%
law, cooking = legal - base, recipes - base
cosine = float(law @ cooking / (law.norm() * cooking.norm()))
print(f"norms {law.norm():.1f} and {cooking.norm():.1f}, cosine {cosine:.2f}")

# %%
merged = mapper.to_pipeline(base + 0.8 * (law + cooking), base_pipeline=gpt2)
for prompt in ("For a healthy breakfast, start with", "Section 51 of the Australian Constitution provides that"):
    print(merged(prompt, max_new_tokens=12, do_sample=False)[0]["generated_text"])

# %% [markdown]
# Taking a task vector away forgets a skill. Here cooking is negated:

# %%
forgetful = mapper.to_pipeline(base - 0.5 * cooking, base_pipeline=gpt2)
print(forgetful("For a healthy breakfast, start with", max_new_tokens=12, do_sample=False)[0]["generated_text"])

# %% [markdown]
# ## Models as dictionaries
#
# `StateDict` has the same arithmetic, tensor by tensor, with names. It takes models, dictionaries and numbers.

# %%
a, b, c = (ml.StateDict.from_hf(folder / name, "text-generation") for name in ("base", "legal", "recipes"))
difference = b - a
largest = max(difference, key=lambda name: float(difference[name].abs().mean()))
print("changed most:", largest)

# %%
by_dict = (a + 0.8 * (b - a) + 0.8 * (c - a)).to_model(gpt2)
apart = (mapper.to_tensor(by_dict.model) - mapper.to_tensor(merged.model)).abs().max()
assert float(apart) < 1e-5
