"""Write adapters as PEFT reads them with its defaults: each layer's rank is its α, so that every scale is 1."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergelab.errors import ModelError
from mergelab.weights.adapters import ADAPTER_CONFIG, PEFT_WEIGHTS
from mergelab.weights.writer import check_target

SITES = "mergelab_sites.json"  # rank and kept energy of each layer
_START = "base_model.model."
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass
class LoraFolder:
    """A LoRA adapter that is about to be written.

    Attributes:
        module: the model that it is for, without weights: it says which layers are stored transposed.
        factors: by layer, A (r, inputs) and B (outputs, r), in the layout of the stored weight: left and right.
        biases: trained biases, by the tensor's name.
        modules: whole modules beside the adapted layers, such as norms; their tensors by name.
        heads: the tensors of a classifier's head, by name.
        energy: by layer, the share of the change's squared length that is kept.
    """

    module: nn.Module
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (r, inputs) and B (outputs, r) of each layer but embeddings, however its weight is stored."""
        found = {}
        for layer, (left, right) in self.factors.items():
            kind = self.module.get_submodule(layer)
            if not isinstance(kind, nn.Embedding):
                found[layer] = (left.T, right.T) if type(kind).__name__ == "Conv1D" else (right, left)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names."""
        found: dict[str, Tensor] = {}
        matrices = self.matrices()
        for layer, (left, right) in self.factors.items():
            kind = self.module.get_submodule(layer)
            if layer not in matrices:
                found[f"{_START}{layer}.lora_embedding_A"] = left.T
                found[f"{_START}{layer}.lora_embedding_B"] = right.T
                continue
            a, b = matrices[layer]
            if isinstance(kind, nn.Conv2d):
                a, b = a.reshape(-1, *kind.weight.shape[1:]), b[:, :, None, None]
            found[f"{_START}{layer}.lora_A.weight"], found[f"{_START}{layer}.lora_B.weight"] = a, b
        for name, tensor in self.biases.items():
            layer = name.removesuffix(".bias")
            found[f"{_START}{layer}{'.base_layer' if layer in self.factors else ''}.bias"] = tensor
        found |= {f"{_START}{name}": tensor for name, tensor in {**self.modules, **self.heads}.items()}
        return {name: tensor.contiguous().clone() for name, tensor in found.items()}

    def _whole_modules(self) -> set[str]:
        """Return the names of the modules that are stored whole; PEFT takes a head as one module."""
        heads = {name.partition(".")[0] for name in self.heads}
        return heads | {name.rpartition(".")[0] for name in self.modules}

    def config(self, base: str, revision: str | None) -> dict[str, Any]:
        """Return an ``adapter_config.json`` that needs no default of PEFT's."""
        ranks = {layer: int(left.shape[1]) for layer, (left, _) in self.factors.items()}
        counts = sorted(ranks.values(), key=list(ranks.values()).count)
        usual = counts[-1]
        patterns = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
        name = type(self.module).__name__
        layers = {type(self.module.get_submodule(layer)).__name__ for layer in ranks}
        return {
            "peft_type": "LORA",
            "task_type": next((task for end, task in _TASKS.items() if name.endswith(end)), None),
            "auto_mapping": {"base_model_class": name, "parent_library": type(self.module).__module__},
            "base_model_name_or_path": base,
            "revision": revision,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "use_rslora": False,
            "use_dora": False,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": "Conv1D" in layers,
            "init_lora_weights": True,
            "target_modules": sorted(ranks),
            "modules_to_save": sorted(self._whole_modules()) or None,
        }


def write_lora(
    folder: Path, adapter: LoraFolder, *, base: str, revision: str | None, config: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter's folder; it exists once it is complete.

    Args:
        folder: does not exist, or is empty.
        adapter: what is written.
        base, revision: of the base that it is for.
        config: a ``config.json`` to put beside it, for the names of a head's outputs.

    Raises:
        ModelError: there is nothing that changes, or the folder is in use or cannot be written.
    """
    from safetensors.torch import save_file

    with new_folder(folder, adapter) as making:
        save_file(adapter.tensors(), making / PEFT_WEIGHTS[0], {"format": "pt"})
        write_json_file(making / SITES, sites(adapter))
        if config is not None:
            write_json_file(making / "config.json", config)
        write_json_file(making / ADAPTER_CONFIG, adapter.config(base, revision))


def sites(adapter: LoraFolder) -> dict[str, dict[str, Any]]:
    """Return the rank and the kept energy of each layer."""
    ranks = {layer: int(left.shape[1]) for layer, (left, _) in adapter.factors.items()}
    return {layer: {"rank": rank, "energy": adapter.energy[layer]} for layer, rank in ranks.items()}


@contextmanager
def new_folder(folder: Path, adapter: LoraFolder) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``folder`` when the block ends without an error.

    Raises:
        ModelError: there is nothing that changes, or the folder is in use or cannot be written.
    """
    if not adapter.factors:
        raise ModelError(f"{folder}: the merged model is its base, so that there is nothing to write as an adapter")
    with whole_folder(folder) as making:
        yield making


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``folder`` when the block ends without an error.

    Raises:
        ModelError: the folder is in use or cannot be written.
    """
    check_target(folder, [])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            yield making
            making.chmod(0o755)
            os.rename(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error.strerror or error}") from error


def write_json_file(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
