"""Time a merge from safetensors on disk to a merged folder, against peers, as whole processes in turn.

Usage:
    python experiments/benchmarks/merging.py                                  # mergelab and the NumPy-quantile baseline
    python experiments/benchmarks/merging.py --mergekit /path/to/env/bin/mergekit-yaml --runs 3

Builds (once, under --folder) a BERT-base-size base and experts in float32: the base random, each expert the base plus
a small normal change. Every contender reads those folders and writes one merged folder; runs are interleaved
(A B C A B C ...), and wall time and peak memory are those of the finished process.
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
from pathlib import Path

BASELINE = """
import json, shutil, sys
import numpy as np, torch
from safetensors.torch import load_file, save_file
density, out, base, *experts = float(sys.argv[1]), *sys.argv[2:]
models = [load_file(f"{folder}/model.safetensors") for folder in (base, *experts)]
merged = {}
for name, pretrained in models[0].items():
    tasks = torch.stack([model[name] - pretrained for model in models[1:]])
    magnitudes = np.abs(tasks.numpy())
    threshold = np.quantile(magnitudes.reshape(len(experts), -1), 1 - density, axis=1)
    kept = tasks * (tasks.abs() >= torch.from_numpy(threshold).float().view(-1, *[1] * pretrained.dim()))
    agreed = kept * (kept.sign() == kept.sum(0).sign())
    merged[name] = pretrained + agreed.sum(0) / (agreed != 0).sum(0).clamp(min=1)
save_file(merged, f"{out}/model.safetensors", metadata={"format": "pt"})
"""


def build_set(folder: Path, experts: int) -> list[Path]:
    """Make a random BERT-base and ``experts`` neighbours of it, once; answer their folders, base first."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folders = [folder / "base", *(folder / f"expert-{index}" for index in range(1, experts + 1))]
    if all((made / "model.safetensors").exists() for made in folders):
        return folders
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2))
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for index, made in enumerate(folders):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                change = torch.randn(parameter.shape, generator=generator) * 0.002 if index else 0.0
                parameter.copy_(base[name] + change)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return folders


def run(command: list[str]) -> tuple[float, float]:
    """Run a command to its end; answer wall seconds and the peak memory of its process in MB."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status != 0:
            said.seek(0)
            sys.exit(f"failed: {' '.join(command)}\n{said.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def contenders(args: argparse.Namespace, folders: list[Path], work: Path) -> dict[str, list[str]]:
    """Name each contender's command; each writes to a folder of its own under ``work``."""
    base, *experts = (str(folder) for folder in folders)
    commands = {
        "mergelab": [
            sys.executable, "-m", "mergelab", "method=ties", f"method.density={args.density}", "evaluate=false",
            "tracking=none", f"models.base={base}", f"models.experts={list(experts)}".replace("'", ""),
            f"output={work / 'mergelab'}", f"hydra.run.dir={work / 'hydra'}",
        ],
        "NumPy quantiles": [sys.executable, "-c", BASELINE, str(args.density), str(work / "numpy"), base, *experts],
    }  # fmt: skip
    (work / "numpy").mkdir()
    if args.mergekit:
        entries = "".join(
            f"  - model: {expert}\n    parameters: {{density: {args.density}, weight: 1.0}}\n" for expert in experts
        )
        config = work / "mergekit.yaml"
        config.write_text(f"models:\n{entries}merge_method: ties\nbase_model: {base}\ndtype: float32\n")
        commands["mergekit-yaml"] = [args.mergekit, str(config), str(work / "mergekit")]
    return commands


def main() -> None:
    """Build, run, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/bert-base"))
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-yaml in an environment of its own")
    args = parser.parse_args()
    folders = build_set(args.folder.absolute(), args.experts)
    figures: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory(dir=args.folder) as work:
            for name, command in contenders(args, folders, Path(work).absolute()).items():
                figures.setdefault(name, []).append(run(command))
                shutil.rmtree(Path(work) / name, ignore_errors=True)
    own = statistics.median(seconds for seconds, _ in figures["mergelab"])
    print(f"TIES, density {args.density}, base + {args.experts} experts, float32, medians of {args.runs} runs")
    print(f"{'':18}{'wall s':>9}{'peak MB':>10}{'mergelab / this':>18}")
    for name, values in figures.items():
        seconds, memory = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:18}{seconds:9.2f}{memory:10.0f}{own / seconds:18.3f}")


if __name__ == "__main__":
    main()
