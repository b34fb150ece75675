"""Write adapters as PEFT reads them with its defaults: LoRA, each layer's rank its α, so that every scale is 1; IA³."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.adapters.changes import Change, Factor, LowRank, Replacement, apply_all, joined
from mergelab.errors import ModelError, listed
from mergelab.weights.adapters import ADAPTER_CONFIG, PEFT_WEIGHTS
from mergelab.weights.companions import companion_files, copy_files
from mergelab.weights.shards import WeightFiles
from mergelab.weights.source import TensorInfo
from mergelab.weights.unfinished import unfinished_folder
from mergelab.weights.writer import check_target, write_texts

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
        sums: by layer, weighted changes that are joined exactly when they are written.
        biases: trained biases, by the tensor's name.
        modules: whole modules beside the adapted layers, such as norms; their tensors by name.
        heads: the tensors of a classifier's head, by name.
        energy: by layer, the share of the change's squared length that is kept.
    """

    module: nn.Module
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sums: dict[str, list[tuple[float, LowRank]]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The adapted layers."""
        return list(self.ranks)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted layer."""
        joined_ranks = {layer: sum(change.rank for _, change in changes) for layer, changes in self.sums.items()}
        return {layer: left.shape[1] for layer, (left, _) in self.factors.items()} | joined_ranks

    def others(self) -> list[str]:
        """Return the names of what is stored whole beside the layers, but for the head."""
        return [*self.biases, *self.modules]

    def sites(self) -> dict[str, dict[str, Any]]:
        """Return rank and kept energy of each layer."""
        return {layer: {"rank": rank, "energy": self.energy[layer]} for layer, rank in self.ranks.items()}

    def applied(self, place: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the base as the adapter makes it."""
        layer, _, leaf = place.rpartition(".")
        whole = self.biases.get(place, self.modules.get(place))
        changes: list[Change] = [] if whole is None else [Replacement(whole)]
        if leaf == "weight" and layer in self.factors:
            changes.append(LowRank(*self.factors[layer], 1.0))
        if leaf == "weight" and layer in self.sums:
            changes.append(LowRank(*joined(self.sums[layer], torch.float32), 1.0))
        return apply_all(changes, tensor) if changes else tensor

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (r, inputs) and B (outputs, r) of each layer but embeddings, however its weight is stored."""
        found = dict(self.factors)
        found |= {layer: joined(changes, torch.float32) for layer, changes in self.sums.items()}
        kinds = {layer: self.module.get_submodule(layer) for layer in found}
        return {
            layer: (left.T, right.T) if type(kinds[layer]).__name__ == "Conv1D" else (right, left)
            for layer, (left, right) in found.items()
            if not isinstance(kinds[layer], nn.Embedding)
        }

    def tensors(self, *, stand_ins: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors under PEFT's names; with ``stand_ins`` nothing is joined, and only the shapes are right."""
        for layer, (left, right) in self.factors.items():
            yield from self._named(layer, left, right)
        ranks = self.ranks
        for layer, changes in self.sums.items():
            rows, columns = changes[0][1].product_shape
            rank = ranks[layer]
            stand_in = torch.empty(rows, rank, device="meta"), torch.empty(rank, columns, device="meta")
            yield from self._named(layer, *(stand_in if stand_ins else joined(changes, torch.float32)))
        for name, tensor in self.biases.items():
            layer = name.removesuffix(".bias")
            yield f"{_START}{layer}{'.base_layer' if layer in ranks else ''}.bias", tensor
        for name, tensor in {**self.modules, **self.heads}.items():
            yield f"{_START}{name}", tensor

    def _named(self, layer: str, left: Tensor, right: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield a layer's factors as A and B of its kind of layer."""
        kind = self.module.get_submodule(layer)
        if isinstance(kind, nn.Embedding):
            yield f"{_START}{layer}.lora_embedding_A", left.T
            yield f"{_START}{layer}.lora_embedding_B", right.T
            return
        a, b = (left.T, right.T) if type(kind).__name__ == "Conv1D" else (right, left)
        if isinstance(kind, nn.Conv2d):
            a, b = a.reshape(-1, *kind.weight.shape[1:]), b[:, :, None, None]
        yield f"{_START}{layer}.lora_A.weight", a
        yield f"{_START}{layer}.lora_B.weight", b

    def _whole_modules(self) -> set[str]:
        """Return the names of the modules that are stored whole; PEFT takes a head as one module."""
        heads = {name.partition(".")[0] for name in self.heads}
        return heads | {name.rpartition(".")[0] for name in self.modules}

    def config(self, base: str, revision: str | None) -> dict[str, Any]:
        """Return an ``adapter_config.json`` that needs no default of PEFT's."""
        ranks = self.ranks
        counts = sorted(ranks.values(), key=list(ranks.values()).count)
        usual = counts[-1]
        patterns = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
        layers = {type(self.module.get_submodule(layer)).__name__ for layer in ranks}
        return {
            "peft_type": "LORA",
            **_common_config(self.module, base, revision),
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


@dataclass
class Ia3Folder:
    """An IA³ adapter that is about to be written.

    Attributes:
        module: the model that it is for, without weights.
        vectors: by layer, the factors of its outputs, or of its inputs.
        of_inputs: the layers whose inputs are multiplied.
        heads: the tensors of a classifier's head, by name.
    """

    module: nn.Module
    vectors: dict[str, Tensor] = field(default_factory=dict)
    of_inputs: set[str] = field(default_factory=set)
    heads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The adapted layers."""
        return list(self.vectors)

    def others(self) -> list[str]:
        """Return nothing: IA³ has no more than its vectors."""
        return []

    def sites(self) -> dict[str, dict[str, Any]]:
        """Return nothing: a merge of IA³ is exact, and has no rank."""
        return {}

    def tensors(self, *, stand_ins: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors under PEFT's names; ``stand_ins`` is for adapters that are joined as they are written."""
        for layer, vector in self.vectors.items():
            yield f"{_START}{layer}.ia3_l", vector.view((1, -1) if layer in self.of_inputs else (-1, 1))
        for name, tensor in self.heads.items():
            yield f"{_START}{name}", tensor

    def config(self, base: str, revision: str | None) -> dict[str, Any]:
        """Return an ``adapter_config.json`` that needs no default of PEFT's."""
        layers = {type(self.module.get_submodule(layer)).__name__ for layer in self.vectors}
        return {
            "peft_type": "IA3",
            **_common_config(self.module, base, revision),
            "fan_in_fan_out": "Conv1D" in layers,
            "init_ia3_weights": True,
            "target_modules": sorted(self.vectors),
            "feedforward_modules": sorted(self.of_inputs),
            "modules_to_save": sorted({name.partition(".")[0] for name in self.heads}) or None,
        }

    def applied(self, place: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the base as the adapter makes it."""
        layer, _, leaf = place.rpartition(".")
        vector = self.vectors.get(layer)
        if vector is None or (leaf == "bias" and layer in self.of_inputs):
            return tensor
        transposed = type(self.module.get_submodule(layer)).__name__ == "Conv1D"
        axis = 0 if leaf == "bias" else int((layer in self.of_inputs) != transposed)
        return apply_all([Factor(vector, axis)], tensor)


def _common_config(module: nn.Module, base: str, revision: str | None) -> dict[str, Any]:
    name = type(module).__name__
    return {
        "task_type": next((task for end, task in _TASKS.items() if name.endswith(end)), None),
        "auto_mapping": {"base_model_class": name, "parent_library": type(module).__module__},
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
    }


def write_adapter(
    folder: Path,
    adapter: LoraFolder | Ia3Folder,
    *,
    base: str,
    revision: str | None,
    config: Mapping[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write an adapter's folder; it exists once it is complete.

    Args:
        folder: does not exist, or is empty.
        adapter: what is written.
        base, revision: of the base that it is for.
        config: a ``config.json`` to put beside it, for the names of a head's outputs.
        documents: the texts of further files, by their names.
        tokenizer: a folder with the files of the tokenizer, where its tokens are not the base's.

    Raises:
        ModelError: no layer changes, or the folder is in use or cannot be written.
    """
    if not adapter.layers:
        if others := adapter.others():
            raise ModelError(
                f"{folder}: an adapter adapts layers, and only {listed(others, 3)} change, which are stored whole; "
                "save.form=dense can hold them"
            )
        raise ModelError(f"{folder}: the merged model is its base, so that there is nothing to write as an adapter")
    with whole_folder(folder) as making:
        _write_weights(adapter, making)
        write_texts(making, documents or {})
        if sites := adapter.sites():
            write_json_file(making / SITES, sites)
        if config is not None:
            write_json_file(making / "config.json", config)
        if tokenizer is not None:
            copy_files(tokenizer, companion_files(tokenizer), making)
        write_json_file(making / ADAPTER_CONFIG, adapter.config(base, revision))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder, which becomes ``folder`` when the block ends without an error.

    What a killed process left of the same folder is removed.

    Raises:
        ModelError: the folder is in use or cannot be written.
    """
    check_target(folder, [])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(folder) as making:
            yield making
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _write_weights(adapter: LoraFolder | Ia3Folder, folder: Path) -> None:
    """Write the tensors one after the other; none but those of one layer are in memory at once."""
    layout = [TensorInfo(name, tuple(each.shape), each.dtype) for name, each in adapter.tensors(stand_ins=True)]
    files = WeightFiles(folder, layout, sys.maxsize, {})
    try:
        for name, tensor in adapter.tensors():
            files.write(name, tensor)
        files.finish()
    finally:
        files.close()
    os.replace(folder / "model.safetensors", folder / PEFT_WEIGHTS[0])


def write_json_file(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
