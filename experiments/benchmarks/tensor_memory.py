"""Measure how many copies of the largest tensor each method holds while it merges models in memory.

Usage:
    python experiments/benchmarks/tensor_memory.py                          # all methods that need no data
    python experiments/benchmarks/tensor_memory.py --methods ties,tsv_m --rows 90000

The models are Llama-shaped, with one layer and an embedding that is far larger than all else, in float32. What counts
is by how much the process's peak (VmHWM) exceeds what it occupied before the merge, with the models loaded, over the
embedding's size. Every merged tensor is dropped once the next one is there. T experts may take T + 3 copies.
An embedding under 32 MB is too small: the allocator may retain what was freed.
Optimisers run for two steps, which takes as much memory as all of them.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from torch import Tensor

from mergelab.engine.method import MergeMethod
from mergelab.engine.registry import get_method, method_names
from mergelab.engine.run import merge
from mergelab.ops.threads import return_memory
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource

WIDTH, INNER, HEADS = 256, 512, 4
OPTIONS = {
    "rebasin": {"heads": HEADS},
    "c2m3": {"heads": HEADS, "max_iterations": 3},
    "wudi": {"steps": 2},
    "wudi_v2": {"steps": 2},
    "doge_ta": {"steps": 2},
    "nearswap": {"t": 0.01},
}
ROOM = 3  # copies besides one for each expert


def drawn(seed: int, rows: int) -> dict[str, Tensor]:
    """Draw a model."""
    generator = torch.Generator().manual_seed(seed)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (rows, WIDTH),
        **{f"{layer}self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"},
        **{f"{layer}mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (WIDTH, INNER),
        f"{layer}input_layernorm.weight": (WIDTH,),
        f"{layer}post_attention_layernorm.weight": (WIDTH,),
        "model.norm.weight": (WIDTH,),
    }
    return {name: torch.empty(shape).normal_(0, 0.02, generator=generator) for name, shape in shapes.items()}


def models_of(count: int, rows: int) -> AlignedModels:
    """Draw a base and experts near it."""
    base = drawn(0, rows)
    experts = []
    for seed in range(1, count + 1):
        change = drawn(seed, rows)
        for name, tensor in change.items():
            tensor.mul_(0.1).add_(base[name])
        experts.append(DictSource(f"expert{seed}", change))
    return align(DictSource("base", base), experts)


def occupied(what: str) -> int:
    """Read the process's memory from /proc, in bytes: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def peak_of(method: MergeMethod, models: AlignedModels) -> int:
    """Merge, and return by how many bytes memory rose at most."""
    gc.collect()
    return_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = occupied("VmRSS")
    output = models.experts[0].name if method.one_model_per_expert else None
    for _ in merge(method, OPTIONS.get(method.name, {}), models, output=output):
        pass
    return occupied("VmHWM") - before


def can_merge(method: MergeMethod) -> bool:
    """Return whether a method merges these models by itself."""
    return not method.needs and not method.takes_adapters and method.name != "passthrough"


def main() -> None:
    """Print a row for each method; exit with code 1 when one holds too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names, separated by commas")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=60_000, help="of the embedding")
    args = parser.parse_args()
    torch.manual_seed(0)
    named = args.methods.split(",") if args.methods else method_names()
    chosen = [method for method in map(get_method, named) if can_merge(method)]
    size = args.rows * WIDTH * 4
    excess = []
    print("| method | experts | copies | allowed |\n| --- | --- | --- | --- |")
    for method in chosen:
        count = min(args.experts, method.max_experts or args.experts)
        models = models_of(count, args.rows)
        copies = peak_of(method, models) / size
        print(f"| `{method.name}` | {count} | {copies:.2f} | {count + ROOM} |", flush=True)
        excess += [method.name] if copies > count + ROOM else []
    if excess:
        sys.exit(f"too many copies: {', '.join(excess)}")


if __name__ == "__main__":
    main()
