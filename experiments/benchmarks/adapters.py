"""Time merges of LoRA adapters, and extraction, beside plain loops over the sites: in one process, in turn.

Usage:
    OMP_NUM_THREADS=1 python experiments/benchmarks/adapters.py                 # TinyLlama's shape, 8 adapters, rank 16
    OMP_NUM_THREADS=1 python experiments/benchmarks/adapters.py --layers 4 --rounds 5 --only lora_cat,lora_svd

Weights are random and made once, in --folder; they are read before the first round, so that they are in the page cache.
What is timed of a merge begins when its settings are checked: it finds and opens the models, merges and writes; the
first is not counted. A loop reads the files, computes one site after the other and writes. The table has CPU seconds
(user and system) and wall seconds, each the least of the rounds, and the ratios of the rounds' CPU seconds: median,
least and greatest. "ties" is the merge of the adapters beside that of their dense forms, which are written first: with
22 layers these are 18 GB. "step" is one step of a sweep in memory, beside one product B·A of each site, which is
neither added to the base nor rounded.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergelab.config import CONF_DIR
from mergelab.engine.registry import get_method
from mergelab.engine.warm_session import MergeSession
from mergelab.experiment.adapter_output import AdapterOutput
from mergelab.experiment.locate import locate
from mergelab.experiment.merging import Merging
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.experiment.saving import Saving, merge_key
from mergelab.experiment.session import open_session
from mergelab.models.adapted import open_model
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint

HIDDEN, INNER, KEYS, TOKENS = 2048, 5632, 256, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
START = "base_model.model."


class Files:
    """The models of the benchmark, made once.

    Attributes:
        base: a folder in bfloat16.
        adapters: folders of PEFT adapters in float32.
        expert: the base in bfloat16 with another change of each site: of falling singular values, and noise.
        sites: the names of the adapted layers, with their shapes.
    """

    def __init__(self, folder: Path, layers: int, count: int, rank: int) -> None:
        self.base, self.expert = folder / "base", folder / "expert"
        self.adapters = [folder / f"adapter-{index}" for index in range(count)]
        self.sites = {f"model.layers.{at}.{name}": shape for at in range(layers) for name, shape in LINEAR.items()}
        self.rank, self._layers = rank, layers
        if not (folder / "made").exists():
            self._make()
            (folder / "made").touch()
        for file in folder.rglob("*.safetensors"):
            file.read_bytes()

    def experts(self, name: str) -> list[Path]:
        """Return what a line of the table merges."""
        return [self.expert] if name == "extraction" else self.adapters

    def dense(self) -> list[Path]:
        """Return the dense forms of the adapters, in bfloat16; written once."""
        folders = [folder.with_name(f"dense-{at}") for at, folder in enumerate(self.adapters)]
        for adapter, folder in zip(self.adapters, folders, strict=True):
            if not folder.exists():
                merge(planned(self, folder, "method=task_arithmetic", "method.lambda=1", experts=[adapter]))
            for file in folder.glob("*.safetensors"):
                file.read_bytes()
        return folders

    def _make(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, scale: float) -> Tensor:
            return torch.randn(shape, generator=generator) * scale

        tensors = {f"{site}.weight": drawn(*shape, scale=0.02) for site, shape in self.sites.items()}
        for at in range(self._layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{at}.{norm}.weight"] = torch.ones(HIDDEN)
        tensors |= {"model.norm.weight": torch.ones(HIDDEN)}
        tensors |= {f"{name}.weight": drawn(TOKENS, HIDDEN, scale=0.02) for name in ("model.embed_tokens", "lm_head")}
        self._model(self.base, tensors)
        for site, (outputs, inputs) in self.sites.items():
            left = drawn(outputs, 64, scale=0.02) * torch.logspace(0, -2, 64)
            tensors[f"{site}.weight"] += left @ drawn(64, inputs, scale=0.02) + drawn(outputs, inputs, scale=5e-4)
        self._model(self.expert, tensors)
        for folder in self.adapters:
            factors = {}
            for site, (outputs, inputs) in self.sites.items():
                factors[f"{START}{site}.lora_A.weight"] = drawn(self.rank, inputs, scale=0.02)
                factors[f"{START}{site}.lora_B.weight"] = drawn(outputs, self.rank, scale=0.02)
            folder.mkdir(parents=True)
            save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
            config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": 2 * self.rank, "task_type": "CAUSAL_LM"}
            (folder / "adapter_config.json").write_text(
                json.dumps({**config, "base_model_name_or_path": str(self.base), "target_modules": list(LINEAR)})
            )

    def _model(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=TOKENS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=self._layers,
            num_attention_heads=32, num_key_value_heads=4, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        )  # fmt: skip
        config.save_pretrained(folder)
        save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


# --------------------------------------------------------------------------------------------------------- plain loops


@contextlib.contextmanager
def opened(folders: list[Path]) -> Iterator[list[Callable[[str], Tensor]]]:
    """Open the weight files of folders."""
    with contextlib.ExitStack() as stack:
        files = [next(folder.glob("*.safetensors")) for folder in folders]
        yield [stack.enter_context(safe_open(file, "pt")).get_tensor for file in files]


def factors(readers: list[Callable[[str], Tensor]], site: str, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return the joined factors of a site."""
    left = torch.cat([read(f"{START}{site}.lora_B.weight") * scale for read in readers], dim=1)
    return left, torch.cat([read(f"{START}{site}.lora_A.weight") for read in readers])


def write_adapter(found: dict[str, tuple[Tensor, Tensor]], out: Path) -> None:
    """Write factors by site."""
    named = {f"{START}{site}.lora_B.weight": left.contiguous() for site, (left, _) in found.items()}
    named |= {f"{START}{site}.lora_A.weight": right.contiguous() for site, (_, right) in found.items()}
    out.mkdir()
    save_file(named, out / "adapter_model.safetensors")


def cat_loop(files: Files, out: Path) -> None:
    """Read, join, write."""
    with opened(files.adapters) as readers:
        write_adapter({site: factors(readers, site) for site in files.sites}, out)


def linear_loop(files: Files, out: Path) -> None:
    """Add up the adapters' A and their B, each times the root of weight and scale, and write."""
    found, root = {}, 0.25**0.5  # of a weight of 1/8 and a scale of 2
    with opened(files.adapters) as readers:
        for site in files.sites:
            sums = []
            for end in "BA":
                total = torch.zeros(())
                for read in readers:
                    total = total + root * read(f"{START}{site}.lora_{end}.weight")
                sums.append(total)
            found[site] = (sums[0], sums[1])
    write_adapter(found, out)


def svd_loop(files: Files, out: Path) -> None:
    """Take two QR decompositions and one SVD of each site, in float64."""
    found = {}
    with opened(files.adapters) as readers:
        for site in files.sites:
            left, right = (each.double() for each in factors(readers, site))
            ql, rl = torch.linalg.qr(left)
            qr, rr = torch.linalg.qr(right.T)
            u, values, vh = torch.linalg.svd(rl @ rr.T)
            root, kept = values[: files.rank].sqrt(), slice(files.rank)
            found[site] = ((ql @ (u[:, kept] * root)).float(), ((root[:, None] * vh[kept]) @ qr.T).float())
    write_adapter(found, out)


def dense_loop(files: Files, out: Path) -> None:
    """Read the base, add one product to each site, write."""
    made = {}
    with (
        opened([files.base]) as (base,),
        opened(files.adapters) as readers,
        safe_open(files.base / "model.safetensors", "pt") as stored,
    ):
        for name in sorted(stored.keys()):
            tensor = base(name)
            if (site := name.removesuffix(".weight")) in files.sites:
                left, right = factors(readers, site, 2.0 / len(readers))
                tensor = (tensor.float() + left @ right).bfloat16()
            made[name] = tensor
    out.mkdir()
    save_file(made, out / "model.safetensors")


def extraction_loop(files: Files, out: Path) -> None:
    """Take one randomised SVD of each site's difference, in float32."""
    found = {}
    with opened([files.base, files.expert]) as (base, expert):
        for site in files.sites:
            change = expert(f"{site}.weight").float() - base(f"{site}.weight").float()
            u, values, v = torch.svd_lowrank(change, q=files.rank + 8, niter=2)
            root, kept = values[: files.rank].sqrt(), slice(files.rank)
            found[site] = (u[:, kept] * root, (v[:, kept] * root).T)
    write_adapter(found, out)


# ------------------------------------------------------------------------------------------------------------ measured


def planned(files: Files, out: Path, *arguments: str, experts: Sequence[Path]) -> Plan:
    """Check the settings of a merge."""
    named = ", ".join(f"e{at}: {folder}" for at, folder in enumerate(experts))
    settings = [f"models.base={files.base}", f"models.experts={{{named}}}", "task=rte", "tracking=none"]
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        return plan_experiment(compose("config", [*settings, "evaluate=false", f"output={out}", *arguments]))


def merge(plan: Plan) -> None:
    """Merge into the plan's folder, as the command does."""
    config = plan.config
    assert config.output is not None
    assert config.models.base is not None
    session = open_session(locate(config.models, "local", []), plan.tasks, config)
    merging = Merging(plan.method, plan.parameters, session, config.seed, lambda *_: None)
    if config.save.form == "dense":
        merging.to_disk(Saving(session, config.save), Path(config.output), merge_key(plan, session))
    else:
        AdapterOutput(merging, config.save).write(Path(config.output), config.models.base, None)


SUM = ("method=task_arithmetic", "method.lambda=0.125")
ONE = ("method=task_arithmetic", "method.lambda=1", "save.form=lora_svd")
LOOPS: dict[str, tuple[tuple[str, ...], Callable[[Files, Path], None] | None]] = {
    "lora_svd": ((*SUM, "save.form=lora_svd", "save.rank=16"), svd_loop),
    "lora_cat": ((*SUM, "save.form=lora_cat"), cat_loop),
    "peft_linear": (("method=peft_linear", f"method.weights={[0.125] * 8}"), linear_loop),
    "dense": (SUM, dense_loop),
    "ties": (("method=ties", "method.density=0.2"), None),  # beside the same on dense experts
    "extraction": ((*ONE, "save.rank=16"), extraction_loop),
}


def step(files: Files) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a step of a sweep over the weights of task arithmetic, and its loop: one product B·A of each site."""
    located = locate(planned(files, files.base.with_name("out"), experts=files.adapters).config.models, "local", [])
    experts = [open_model(each.folder, each.name) for each in located.experts]
    models = align(open_checkpoint(files.base, "base"), experts)
    targets = {name: torch.empty(models.experts[0].shape(name), dtype=torch.bfloat16) for name in models.names}
    warm = MergeSession(models, targets)
    weights = itertools.count(1)
    with opened(files.adapters) as readers:
        pairs = [factors(readers, site) for site in files.sites]
    into = torch.empty(max(outputs * inputs for outputs, inputs in files.sites.values()))

    def merged() -> None:
        warm.merge(get_method("task_arithmetic"), {"weights": [next(weights) / 100] * len(experts), "lambda": 0.3})

    def products() -> None:
        for left, right in pairs:
            torch.mm(left, right, out=into[: len(left) * right.shape[1]].view(len(left), -1))

    print(f"base and experts of the session take {warm.held_bytes / 1e9:.2f} GB", flush=True)
    return merged, products


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of this process and the wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(name: str, files: Files, rounds: int) -> None:
    """Time a merge and its loop in turn, and print a line of the table."""
    figures: list[list[tuple[float, float]]] = [[], []]
    with tempfile.TemporaryDirectory(dir=files.base.parent) as scratch:
        out = Path(scratch) / "out"
        if name == "step":
            works = step(files)
        else:
            settings, loop = LOOPS[name]
            plans = [planned(files, out, *settings, experts=files.experts(name))]
            if loop is None:
                plans.append(planned(files, out, *settings, experts=files.dense()))
            works = partial(merge, plans[0]), partial(merge, plans[1]) if loop is None else partial(loop, files, out)
        works[0]()  # imports, and the digests that experts are ordered by
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(rounds):
            for work, found in zip(works, figures, strict=True):
                found.append(timed(work))
                shutil.rmtree(out, ignore_errors=True)
    report(name, *figures)


def report(name: str, own: list[tuple[float, float]], loop: list[tuple[float, float]]) -> None:
    """Print a line of the table."""
    ratios = [mine[0] / floor[0] for mine, floor in zip(own, loop, strict=True)]
    cpu, wall = ([min(each[kind] for each in side) for side in (own, loop)] for kind in (0, 1))
    span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| `{name}` | {cpu[0]:.2f} | {cpu[1]:.2f} | {span} | {wall[0]:.2f} | {wall[1]:.2f} |", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergelab-adapters")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="lora_svd,lora_cat,peft_linear,dense,step,extraction")
    args = parser.parse_args()
    files = Files(args.folder / f"{args.layers}-{args.adapters}-{args.rank}", args.layers, args.adapters, args.rank)
    print("| | CPU s | loop CPU s | ratio | wall s | loop wall s |\n| --- | --- | --- | --- | --- | --- |")
    for name in args.only.split(","):
        compare(name, files, args.rounds)


if __name__ == "__main__":
    main()
