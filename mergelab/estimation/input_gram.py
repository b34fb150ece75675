"""What goes into an expert's linear layers: the products of the inputs' features, summed over all real tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mergelab.estimation.disk_cache import disk_cached
from mergelab.estimation.examples import Batch, Examples, ExpertExamples
from mergelab.estimation.forward import frozen, groups, on_one_thread, split_labels
from mergelab.estimation.hooks import Kind, Recorder, Use, kind_of
from mergelab.ops.svd import self_product
from mergelab.ops.threads import in_order, thread_count


@dataclass(frozen=True)
class InputGram:
    """XᵀX/n of linear layers' inputs X (n, d).

    Attributes:
        products: (d, d) float32, by the name of a layer's weight; layers with the same input share one.
        shared: for the name of each layer's weight, the one that its product stands under.
        input_first: names of the weights that are (in, out), as GPT-2 has them; the others are (out, in).
    """

    products: Mapping[str, Tensor]
    shared: Mapping[str, str]
    input_first: frozenset[str]

    def of(self, name: str) -> Tensor | None:
        """Return the product for a layer's weight; None for other tensors and for layers that did not run."""
        return self.products.get(self.shared.get(name, name))


def input_gram(examples: Examples, expert: str, samples: int, seed: int) -> InputGram:
    """Compute, or find again, the input products of an expert's linear layers on its own examples."""
    drawn = examples.of(expert, samples=samples, seed=seed)
    parts = {
        "statistic": "input products",
        "names": sorted(drawn.parameter_names.items()),
        "examples": drawn.key,
    }

    def compute() -> tuple[Mapping[str, Tensor], dict[str, str]]:
        found = run_for_gram(drawn)
        return found.products, {"shared": json.dumps(found.shared), "input_first": json.dumps([*found.input_first])}

    products, notes = disk_cached(examples.folder, parts if drawn.key else None, compute)
    return InputGram(products, json.loads(notes["shared"]), frozenset(json.loads(notes["input_first"])))


def run_for_gram(examples: ExpertExamples) -> InputGram:
    """Run the expert once over its examples."""
    sums = InputSums(examples.module(), examples.parameter_names)
    sums.add(examples.batches())
    return sums.mean()


class InputSums:
    """Sums of input products over batches.

    Up to `mergelab.estimation.forward.GROUP` batches are multiplied at once in float32; their sums are added up in
    float64, so that rounding does not grow with the number of examples. Needs one (d, d) matrix for each input.

    Args:
        module: what runs.
        names: the common names of the weights that are looked at, by their names in the module.
        until: path of the submodule where a forward pass may stop; "" for none.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str], *, until: str = "") -> None:
        self._module = module
        self._names, kinds = linear_kinds(module, names)
        self._recorder = Recorder(module, kinds, module.get_submodule(until) if until else None)
        self._input_first = frozenset(self._names[layer] for layer, kind in kinds.items() if kind == "conv1d")
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._shared: dict[str, str] = {}

    def add(self, batches: Iterable[Batch]) -> None:
        """Run the module over batches."""
        device = next((parameter.device for parameter in self._module.parameters()), torch.device("cpu"))
        threads = thread_count() if device.type == "cpu" else 1
        with frozen(self._module), on_one_thread(device), self._recorder.watching():
            for group in groups(batches) if self._names else ():
                seen = list(in_order(partial(self._inputs, device), group, threads=threads))
                for name in seen[0]:
                    if name not in self._sums:
                        width = seen[0][name].shape[1]
                        self._sums[name] = torch.zeros(width, width, dtype=torch.float64, device=device)
                for _ in in_order(partial(self._multiply, seen), list(self._sums), threads=threads):
                    pass
                for name in self._sums:
                    self._tokens[name] = self._tokens.get(name, 0) + sum(len(inputs[name]) for inputs in seen)

    def mean(self) -> InputGram:
        """Divide the sums by the number of tokens, and let go of them."""
        products = {name: self._sums.pop(name).div_(self._tokens[name]).float().cpu() for name in list(self._sums)}
        return InputGram(products, dict(sorted(self._shared.items())), self._input_first)

    @torch.no_grad()
    def _inputs(self, device: torch.device, batch: Batch) -> dict[str, Tensor]:
        """Return the real tokens (n, d) that go into the layers, once for layers that have the same input."""
        inputs, _ = split_labels(batch, device)
        _, uses = self._recorder.run(inputs)
        found: dict[str, list[Tensor]] = {}
        first: dict[tuple[int, torch.Size], str] = {}
        counted: set[tuple[str, int]] = set()
        for use in uses:
            name = self._names[use.layer]
            holder = first.setdefault((use.input.data_ptr(), use.input.shape), name)
            self._shared.setdefault(name, holder)
            holder = self._shared[name]
            if (holder, use.input.data_ptr()) not in counted:
                counted.add((holder, use.input.data_ptr()))
                found.setdefault(holder, []).append(real_tokens(use, inputs))
        return {name: torch.cat(parts) for name, parts in found.items()}

    @torch.no_grad()
    def _multiply(self, seen: Sequence[Mapping[str, Tensor]], name: str) -> None:
        tokens = torch.cat([inputs[name] for inputs in seen])
        self._sums[name] += self_product(tokens)


def linear_layers(module: nn.Module, names: Mapping[str, str], batch: Batch) -> list[str]:
    """Return the module's names of those linear weights that take part, in the order in which their layers run."""
    own, kinds = linear_kinds(module, {name: name for name in names})
    recorder = Recorder(module, kinds)
    inputs, _ = split_labels(batch, next(module.parameters()).device) if own else ({}, None)
    with torch.no_grad(), recorder.watching():
        uses = recorder.run(inputs)[1] if own else []
    return list(dict.fromkeys(own[use.layer] for use in uses))


def linear_kinds(module: nn.Module, names: Mapping[str, str]) -> tuple[dict[nn.Module, str], dict[nn.Module, Kind]]:
    """Find the linear layers whose weights take part: the weight's name, and the layer's kind.

    An output layer that has an embedding for its weight is none of them: embeddings are averaged.
    """
    own: dict[nn.Module, str] = {}
    kinds: dict[nn.Module, Kind] = {}
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for path, layer in module.named_modules():
        name = names.get(f"{path}.weight" if path else "weight")
        kind = kind_of(layer)
        if name is not None and kind in ("linear", "conv1d") and id(layer.weight) not in embeddings:
            own[layer], kinds[layer] = name, kind
    return own, kinds


def real_tokens(use: Use, inputs: Mapping[str, Tensor]) -> Tensor:
    """Pick the rows of a layer's input that stand for real tokens: (n, d).

    An input (b, l, d) is masked by the attention mask of that shape, the decoder's tokens by the decoder's mask, if
    they are not made of the encoder's inputs; (b·l, d) likewise; an input of one row for each example, or of another
    shape, counts whole.
    """
    rows = use.input.reshape(-1, use.input.shape[-1])
    own = use.in_decoder and "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if own else "attention_mask")
    if mask is None or mask.dim() != 2:
        return rows
    if use.input.shape[:-1] == mask.shape or (use.input.dim() == 2 and len(rows) == mask.numel() != len(mask)):
        return rows[mask.reshape(-1).bool()]
    return rows
