"""What MiniLM could do before: the similarity of two sentences, as the angle between their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SKILL = "skill"
BATCH, EVERY = 64, 3  # every third pair of sentences counts


def skill_of(model: Path, data: Path) -> dict[str, float]:
    """Return Spearman's correlation of cosines and STS-B's scores, on a third of the validation split.

    A sentence's embedding is the mean of the encoder's last hidden states over its tokens, as MiniLM was trained for
    (Reimers & Gurevych 2019, arXiv:1908.10084). A classifier's head plays no part.

    Args:
        model: a folder with the model, or with several of one backbone in folders of their own.
        data: STS-B's Parquet file, with ``sentence1``, ``sentence2`` and ``label``.
    """
    import pyarrow.parquet as pq
    import torch
    from scipy.stats import spearmanr
    from transformers import AutoModel, AutoTokenizer

    own = [model] if (model / "config.json").is_file() else sorted(file.parent for file in model.glob("*/config.json"))
    folder = own[0]
    encoder: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {name: column[::EVERY] for name, column in pq.read_table(data).to_pydict().items()}
    texts = sorted({*rows["sentence1"], *rows["sentence2"]}, key=len)
    vectors = {}
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            inputs = tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
            states = encoder(**inputs).last_hidden_state  # (b, l, d)
            mask = inputs["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            vectors |= dict(zip(some, torch.nn.functional.normalize(means, dim=-1), strict=True))
    pairs = zip(rows["sentence1"], rows["sentence2"], strict=True)
    cosines = [float(vectors[one] @ vectors[other]) for one, other in pairs]
    return {SKILL: float(spearmanr(cosines, rows["label"]).statistic)}
