"""Small models with adapters of the Adapters library, saved by the library, and what it computes with them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.adapters import made as small

REPOSITORY = Path(__file__).parents[2]
TEXT = {"input_ids": small.INPUTS}
BOTH = {"input_ids": small.INPUTS, "decoder_input_ids": small.INPUTS.flip(0)}


def roberta(cls: str = "RobertaForSequenceClassification", **settings: Any) -> Any:
    config = transformers.RobertaConfig(**small.SIZES, intermediate_size=24, max_position_embeddings=40, **settings)
    return small._drawn(getattr(transformers, cls), config)


def distilbert(cls: str = "DistilBertForSequenceClassification", **settings: Any) -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=48, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32, **settings
    )
    return small._drawn(getattr(transformers, cls), config)


def with_adapter(model: Any, config: Any, name: str = "a", seed: int = 0, *, head: bool = True) -> Any:
    """Give a model an adapter with random weights, and its head too, in double precision."""
    import adapters

    adapters.init(model)
    torch.manual_seed(seed)
    model.add_adapter(name, config=config)
    model.double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key or (head and is_head(key)):
                parameter.copy_((parameter + torch.randn_like(parameter) * 0.3).float())
    model.set_active_adapters(name)
    return model


def is_head(key: str) -> bool:
    return key.startswith(("classifier.", "score.", "heads.", "pre_classifier."))


def outputs(model: Any, inputs: dict[str, Tensor] = TEXT) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def in_main(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a module in the environment that merges, which has neither this library nor this transformers."""
    python = Path(os.environ.get("MERGELAB_PYTHON", REPOSITORY / ".venv/bin/python"))
    settings = {"PYTHONPATH": str(REPOSITORY), "MERGELAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(python), "-m", *arguments], cwd=folder, env=inherited | settings, capture_output=True, text=True
    )


def densely(jobs: Sequence[tuple[Path, Path, str | None, Path]], folder: Path) -> None:
    """Have the models with these adapters written as folders of transformers."""
    given = json.dumps([[str(base), str(adapter), part, str(out)] for base, adapter, part, out in jobs])
    done = in_main("tests.adapterhub.dense", given, folder=folder)
    assert done.returncode == 0, done.stderr


def merged(folder: Path, jobs: Mapping[str, tuple[Path, Mapping[str, Any], tuple[str, ...]]]) -> dict[str, Path]:
    """Merge adapters from the command line: for each output a base, adapters by name and further arguments."""
    commands = []
    for out, (base, adapters, arguments) in jobs.items():
        experts = ", ".join(f"{name}: {path}" for name, path in adapters.items())
        given = [f"models.base={base}", f"models.experts={{{experts}}}", "task=rte", "evaluate=false", "tracking=none"]
        commands.append([*given, f"output={folder / out}", *arguments])
    done = in_main("tests.adapterhub.commands", json.dumps(commands), folder=folder)
    assert done.returncode == 0, done.stderr
    return {out: folder / out for out in jobs}
