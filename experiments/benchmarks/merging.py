"""Time merges from safetensors on disk to a merged folder, against peers, as whole processes in turn.

Usage:
    python experiments/benchmarks/merging.py                                  # what needs nothing but mergelab's own
    python experiments/benchmarks/merging.py --mergekit /path/to/env/bin/mergekit-yaml --runs 3
    python experiments/benchmarks/merging.py --set llama-1.1b --methods ties --runs 1
    python experiments/benchmarks/merging.py --set llama-1.1b --memory plot.png    # peak memory for 2 to 5 experts

Builds (once, under --folder) a set of models: see model_sets.py. Every contender reads the same folders and writes one
merged folder. Runs are interleaved (A B C A B C ...); the figures are medians of the finished processes' wall seconds
and of their peak anonymous memory, which leaves out mapped input files. "floor" reads every input file and writes one
model's bytes; "merge alone" is mergelab without its imports, timed inside the process, so that it compares with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from model_sets import SETS, build

DENSITY = 0.2
LARGE = 4e9  # bytes of a model
# A method here, its settings on mergelab's command line, its name in mergekit and that one's parameters.
METHODS: dict[str, tuple[list[str], str, str]] = {
    "soup": ([], "linear", "{weight: 1.0}"),
    "task_arithmetic": ([], "task_arithmetic", "{weight: 0.3}"),
    "slerp": ([], "slerp", ""),
    "ties": ([f"method.density={DENSITY}"], "ties", f"{{density: {DENSITY}, weight: 1.0}}"),
    "dare": (["method.density=0.5"], "dare_linear", "{density: 0.5, weight: 0.2}"),
    "dare_ties": (["method.density=0.5"], "dare_ties", "{density: 0.5, weight: 0.2}"),
}

ALONE = """
import sys, time
from mergelab.engine.run import merge_in_parts
from mergelab.engine.request import checked_job
from mergelab.engine.registry import get_method
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.source import layout_of
from mergelab.weights.writer import writing_folder
name, density, out, base, *experts = sys.argv[1:]
method = get_method(name)
parameters = {} if density == "-" else {"density": float(density)}
started = time.perf_counter()
models = align(open_checkpoint(base, "base"), [open_checkpoint(folder) for folder in experts])
layout = layout_of(models.base, models.names)
with writing_folder(out, layout=layout, like=base, aliases=models.aliases) as writer:
    for part in merge_in_parts(checked_job(method, parameters, models), models.names):
        writer.write_part(part)
print(time.perf_counter() - started)
"""

FLOOR = """
import sys, time
from pathlib import Path
out, *folders = sys.argv[1:]
started = time.perf_counter()
buffer = bytearray(1 << 24)
for folder in folders:
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
size = sum(file.stat().st_size for file in Path(folders[0]).glob("*.safetensors"))
with open(out, "wb", buffering=0) as opened:
    while size > 0:
        size -= opened.write(memoryview(buffer)[:min(size, len(buffer))])
print(time.perf_counter() - started)
"""

QUANTILES = """
import sys
import numpy as np, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
density, out, base, *experts = float(sys.argv[1]), *sys.argv[2:]
def load(folder):
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
models = [load(folder) for folder in (base, *experts)]
merged = {}
for name, pretrained in models[0].items():
    tasks = torch.stack([model[name].float() - pretrained.float() for model in models[1:]])
    magnitudes = np.abs(tasks.numpy())
    threshold = np.quantile(magnitudes.reshape(len(experts), -1), 1 - density, axis=1)
    kept = tasks * (tasks.abs() >= torch.from_numpy(threshold).float().view(-1, *[1] * pretrained.dim()))
    agreed = kept * (kept.sign() == kept.sum(0).sign())
    merged[name] = (pretrained + agreed.sum(0) / (agreed != 0).sum(0).clamp(min=1)).to(pretrained.dtype)
save_file(merged, f"{out}/model.safetensors", metadata={"format": "pt"})
"""

PEFT = """
import sys
import torch
from pathlib import Path
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from safetensors.torch import load_file, save_file
method, density, out, base, *experts = sys.argv[1], float(sys.argv[2]), *sys.argv[3:]
def load(folder):
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
models = [load(folder) for folder in (base, *experts)]
weights = torch.ones(len(experts))
merged = {}
for name, start in models[0].items():
    tasks = [model[name].float() - start.float() for model in models[1:]]
    change = {
        "task_arithmetic": lambda: task_arithmetic(tasks, weights * 0.3),
        "ties": lambda: ties(tasks, weights, density),
        "dare": lambda: dare_linear(tasks, weights, density),
        "dare_ties": lambda: dare_ties(tasks, weights, density),
    }[method]()
    merged[name] = (start + change).to(start.dtype)
save_file(merged, f"{out}/model.safetensors", metadata={"format": "pt"})
"""


def run(command: list[str]) -> tuple[float, float, str]:
    """Run a command to its end; answer wall seconds, peak anonymous memory in MB, and the last line it wrote."""
    started = time.perf_counter()
    peak = 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        said.seek(0)
        text = said.read().decode()
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}\n{text[-2000:]}")
    return seconds, peak, (text.strip().splitlines() or [""])[-1]


def anonymous_memory(pid: int | str) -> float:
    """Return the anonymous memory of a process (or of "self") in MB; it leaves out mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def mergelab_command(method: str, settings: list[str], folders: list[Path], out: Path) -> list[str]:
    """Spell a merge to disk on the command line."""
    base, *experts = (str(folder) for folder in folders)
    return [
        sys.executable, "-m", "mergelab", f"method={method}", *settings, "evaluate=false", "tracking=none",
        f"models.base={base}", f"models.experts=[{','.join(experts)}]", f"output={out}",
        f"hydra.run.dir={out.parent / 'hydra'}",
    ]  # fmt: skip


def contenders(method: str, args: argparse.Namespace, folders: list[Path], work: Path) -> dict[str, list[str]]:
    """Name each contender's command; each writes to a folder of its own under ``work``."""
    settings, theirs, parameters = METHODS[method]
    density = settings[0].rpartition("=")[2] if settings else "-"
    names = [str(folder) for folder in folders]
    commands = {
        "mergelab": mergelab_command(method, settings, folders, work / "mergelab"),
        "merge alone": [sys.executable, "-c", ALONE, method, density, str(work / "alone"), *names],
        "floor": [sys.executable, "-c", FLOOR, str(work / "floor"), *names],
    }
    (work / "numpy").mkdir()
    (work / "peft").mkdir()
    size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    if method == "ties" and size < LARGE:  # it holds all models in memory, as float32
        commands["NumPy quantiles"] = [sys.executable, "-c", QUANTILES, density, str(work / "numpy"), *names]
    if args.peft and method in ("task_arithmetic", "ties", "dare", "dare_ties"):
        share = "1" if density == "-" else density
        commands["PEFT functions"] = [sys.executable, "-c", PEFT, method, share, str(work / "peft"), *names]
    if args.mergekit:
        config = work / "mergekit.yaml"
        config.write_text(mergekit_config(method, theirs, parameters, folders))
        commands["mergekit-yaml"] = [args.mergekit, str(config), str(work / "mergekit")]
    return commands


def mergekit_config(method: str, theirs: str, parameters: str, folders: list[Path]) -> str:
    """Write the same merge for mergekit."""
    base, *experts = folders
    dtype = "bfloat16" if "llama" in str(base) else "float32"
    entries = "".join(
        f"  - model: {expert}\n" + (f"    parameters: {parameters}\n" if parameters else "") for expert in experts
    )
    start = "" if method == "soup" else f"base_model: {experts[0] if method == 'slerp' else base}\n"
    extra = "parameters: {t: 0.5}\n" if method == "slerp" else ""
    return f"models:\n{entries}merge_method: {theirs}\n{start}{extra}dtype: {dtype}\n"


def compare(method: str, args: argparse.Namespace, folders: list[Path]) -> None:
    """Run every contender in turn and print medians and ratios."""
    if method == "slerp":
        folders = folders[:3]
    figures: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory(dir=args.folder) as work:
            for name, command in contenders(method, args, folders, Path(work).absolute()).items():
                seconds, memory, last = run(command)
                if name in ("merge alone", "floor"):
                    seconds = float(last)
                figures.setdefault(name, []).append((seconds, memory))
                for made in ("mergelab", "alone", "mergekit"):
                    shutil.rmtree(Path(work) / made, ignore_errors=True)
    medians = {n: tuple(statistics.median(column) for column in zip(*v, strict=True)) for n, v in figures.items()}
    own, alone = medians["mergelab"][0], medians["merge alone"][0]
    title = f"{method}, {args.set}, base + {len(folders) - 1} experts, {args.runs} runs"
    print(f"\n{title}\n{'':18}{'wall s':>9}{'anon MB':>10}{'mergelab / this':>18}{'alone / this':>15}")
    for name, (seconds, memory) in medians.items():
        print(f"{name:18}{seconds:9.2f}{memory:10.0f}{own / seconds:18.3f}{alone / seconds:15.2f}", flush=True)


def plot_memory(args: argparse.Namespace, build_set: Callable[[int], list[Path]]) -> None:
    """Measure the peak anonymous memory of TIES to disk for 2 to 5 experts, print it and plot it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts, peaks = [2, 3, 4, 5], []
    for count in counts:
        folders, found = build_set(count), []
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory(dir=args.folder) as work:
                command = mergelab_command("ties", METHODS["ties"][0], folders, Path(work).absolute() / "out")
                found.append(run(command)[1])
        peaks.append(statistics.median(found))
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{count} experts: {peaks[-1]:.0f} MB ({spread}), {peaks[-1] / peaks[0]:.3f} of that with 2", flush=True)
    sizes = [
        sum(file.stat().st_size for folder in build_set(n) for file in folder.glob("*.safetensors")) for n in counts
    ]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(counts, [size / 1e6 for size in sizes], "--", color="0.6", label="size of the input files")
    axes.plot(counts, peaks, "o-", label="peak anonymous memory of the merge")
    axes.set(xlabel="experts", ylabel="MB", ylim=(0, None), xticks=counts, title=f"TIES to disk, {args.set}")
    axes.legend()
    figure.savefig(args.memory, dpi=120)


def main() -> None:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="bert-base")
    parser.add_argument("--folder", type=Path, default=None, help="default: outputs/benchmarks/<set>")
    parser.add_argument("--experts", type=int, help="default: as many as the set has")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-yaml in an environment of its own")
    parser.add_argument("--peft", action="store_true", help="also PEFT's functions, in this environment")
    parser.add_argument("--memory", type=Path, help="measure and plot memory against the number of experts instead")
    args = parser.parse_args()
    args.folder = (args.folder or Path("outputs/benchmarks") / args.set).absolute()
    if args.memory:
        plot_memory(args, lambda count: build(args.set, args.folder, count))
        return
    folders = build(args.set, args.folder, args.experts)
    size = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    print(f"{os.cpu_count()} cores; inputs {size / 1e9:.2f} GB")
    for method in args.methods.split(","):
        compare(method, args, folders)


if __name__ == "__main__":
    main()
