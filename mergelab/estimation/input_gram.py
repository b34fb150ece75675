"""Compute Gram matrices of the inputs of an expert's linear layers, averaged over all real tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import Batch, ExampleSource, ExpertExamples
from mergelab.estimation.forward import frozen, groups, split_labels
from mergelab.estimation.hooks import LayerCall, LayerKind, Recorder, layer_kind
from mergelab.ops.svd import self_product
from mergelab.ops.threads import in_order, on_one_thread, thread_count


@dataclass(frozen=True)
class InputGram:
    """Gram matrices XᵀX/n of linear layers' inputs X (n, d).

    Attributes:
        matrices: (d, d) float32, by the name of a layer's weight; layers with the same input share one.
        shared: for the name of each layer's weight, the name that its Gram matrix is stored under.
        input_first: names of weights of shape (in, out), as GPT-2 has them; the others are (out, in).
    """

    matrices: Mapping[str, Tensor]
    shared: Mapping[str, str]
    input_first: frozenset[str]

    def of(self, name: str) -> Tensor | None:
        """Return the Gram matrix for a layer's weight; None for other tensors and for layers that did not run."""
        return self.matrices.get(self.shared.get(name, name))


def input_gram(examples: ExampleSource, expert: str, samples: int, seed: int) -> InputGram:
    """Compute the input Gram matrices of an expert's linear layers on its own examples, or read them from the cache."""
    drawn = examples.of(expert, samples=samples, seed=seed)
    key = {
        "statistic": "input products",
        "names": sorted(drawn.parameter_names.items()),
        "examples": drawn.key,
    }

    def compute() -> tuple[Mapping[str, Tensor], dict[str, str]]:
        gram = run_for_gram(drawn)
        return gram.matrices, {"shared": json.dumps(gram.shared), "input_first": json.dumps([*gram.input_first])}

    matrices, metadata = disk_cached(examples.folder, key if drawn.key else None, compute)
    return InputGram(matrices, json.loads(metadata["shared"]), frozenset(json.loads(metadata["input_first"])))


def run_for_gram(examples: ExpertExamples) -> InputGram:
    """Run the expert once over its examples and return the Gram matrices."""
    sums = InputGramSums(examples.module(), examples.parameter_names)
    sums.add(examples.batches())
    return sums.mean()


class InputGramSums:
    """Sums XᵀX of linear layers' inputs over batches.

    Up to `mergelab.estimation.forward.GROUP` batches are multiplied at once in float32. Their products are added in
    float64, so that rounding does not grow with the number of examples. Memory: one (d, d) matrix per distinct input.

    Args:
        module: the module to run.
        names: the common names of the layers' weights, by their names in the module.
        until: path of the submodule before which a forward pass stops; "" for none.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str], *, until: str = "") -> None:
        self._module = module
        self._names, kinds = linear_layers_of(module, names)
        self._recorder = Recorder(module, kinds, module.get_submodule(until) if until else None)
        self._input_first = frozenset(self._names[layer] for layer, kind in kinds.items() if kind == "conv1d")
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._shared: dict[str, str] = {}

    def add(self, batches: Iterable[Batch]) -> None:
        """Run the module over batches and add their products."""
        device = next((parameter.device for parameter in self._module.parameters()), torch.device("cpu"))
        threads = thread_count() if device.type == "cpu" else 1
        with frozen(self._module), on_one_thread(device), self._recorder.watching():
            for group in groups(batches) if self._names else ():
                inputs = list(in_order(partial(self._inputs, device), group, threads=threads))
                for name in inputs[0]:
                    if name not in self._sums:
                        width = inputs[0][name].shape[1]
                        self._sums[name] = torch.zeros(width, width, dtype=torch.float64, device=device)
                for _ in in_order(partial(self._multiply, inputs), list(self._sums), threads=threads):
                    pass
                for name in self._sums:
                    self._tokens[name] = self._tokens.get(name, 0) + sum(len(each[name]) for each in inputs)

    def mean(self) -> InputGram:
        """Return the sums divided by the number of tokens, and release the sums."""
        matrices = {name: self._sums.pop(name).div_(self._tokens[name]).float().cpu() for name in list(self._sums)}
        return InputGram(matrices, dict(sorted(self._shared.items())), self._input_first)

    @torch.no_grad()
    def _inputs(self, device: torch.device, batch: Batch) -> dict[str, Tensor]:
        """Return the layers' inputs at real tokens (n, d), once for layers that have the same input."""
        inputs, _ = split_labels(batch, device)
        _, calls = self._recorder.run(inputs)
        rows: dict[str, list[Tensor]] = {}
        first: dict[tuple[int, torch.Size], str] = {}
        counted: set[tuple[str, int]] = set()
        for call in calls:
            name = self._names[call.layer]
            holder = first.setdefault((call.input.data_ptr(), call.input.shape), name)
            self._shared.setdefault(name, holder)
            holder = self._shared[name]
            if (holder, call.input.data_ptr()) not in counted:
                counted.add((holder, call.input.data_ptr()))
                rows.setdefault(holder, []).append(real_tokens(call, inputs))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    @torch.no_grad()
    def _multiply(self, inputs: Sequence[Mapping[str, Tensor]], name: str) -> None:
        tokens = torch.cat([each[name] for each in inputs])
        self._sums[name] += self_product(tokens)


def linear_layers(module: nn.Module, names: Mapping[str, str], batch: Batch) -> list[str]:
    """Return the module's names of its merged linear weights, in the order in which their layers run."""
    weights, kinds = linear_layers_of(module, {name: name for name in names})
    recorder = Recorder(module, kinds)
    inputs, _ = split_labels(batch, next(module.parameters()).device) if weights else ({}, None)
    with torch.no_grad(), recorder.watching():
        calls = recorder.run(inputs)[1] if weights else []
    return list(dict.fromkeys(weights[call.layer] for call in calls))


def linear_layers_of(
    module: nn.Module, names: Mapping[str, str]
) -> tuple[dict[nn.Module, str], dict[nn.Module, LayerKind]]:
    """Find the linear layers whose weights are merged.

    An output layer whose weight is an embedding is not among them, as embeddings are averaged.

    Args:
        module: the module.
        names: the common names of the merged parameters, by their names in the module.

    Returns:
        The common name of each layer's weight, and each layer's kind.
    """
    weights: dict[nn.Module, str] = {}
    kinds: dict[nn.Module, LayerKind] = {}
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for path, layer in module.named_modules():
        name = names.get(f"{path}.weight" if path else "weight")
        kind = layer_kind(layer)
        if name is not None and kind in ("linear", "conv1d") and id(layer.weight) not in embeddings:
            weights[layer], kinds[layer] = name, kind
    return weights, kinds


def real_tokens(call: LayerCall, inputs: Mapping[str, Tensor]) -> Tensor:
    """Select the rows of a layer's input that belong to real (unpadded) tokens: (n, d).

    An input (b, l, d) or (b·l, d) is masked by the attention mask (b, l); in the decoder by the decoder's mask, when
    the inputs have ``decoder_input_ids``. Of inputs with one row per example, or of another shape, all rows count.
    """
    rows = call.input.reshape(-1, call.input.shape[-1])
    by_decoder = call.in_decoder and "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if by_decoder else "attention_mask")
    if mask is None or mask.dim() != 2:
        return rows
    if call.input.shape[:-1] == mask.shape or (call.input.dim() == 2 and len(rows) == mask.numel() != len(mask)):
        return rows[mask.reshape(-1).bool()]
    return rows
