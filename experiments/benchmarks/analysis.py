"""Time an analysis of task vectors against reading the models, and its peak memory.

Usage:
    python experiments/benchmarks/analysis.py                    # BERT-base and five experts
    python experiments/benchmarks/analysis.py --set gpt2 --runs 3 --rank

"read" reads every input file into a buffer, once. "analyze" opens the models and goes through the task vectors:
thresholds, norms, inner products, sign conflicts, overlaps. Both run in turn, each as a process of its own; times are
taken inside of it, without imports. Memory is the peak of what is not mapped from files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from model_sets import SETS, build

READ = """
import sys, time
from pathlib import Path
started = time.perf_counter()
buffer = bytearray(1 << 24)
for folder in sys.argv[2:]:
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
print(time.perf_counter() - started, 0)
"""
ANALYZE = """
import sys, time
from mergelab.analyze.measures import task_vector_sums
from mergelab.analyze.ranks import matrix_ranks
from mergelab.weights.align import align
from mergelab.weights.checkpoint import open_checkpoint
what, base, *experts = sys.argv[1:]
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "RssAnon")))
    return int(fields["RssAnon"].split()[0]) / 1024
before = memory()
peak = before
def progress(message, done):
    global peak
    peak = max(peak, memory())
started = time.perf_counter()
models = align(open_checkpoint(base, "base"), [open_checkpoint(folder) for folder in experts])
if what == "rank":
    matrix_ranks(models, progress)
else:
    task_vector_sums(models, 0.2, progress)
print(time.perf_counter() - started, peak - before)
"""


def timed(code: str, what: str, folders: list[Path]) -> tuple[float, float]:
    """Run code in a process of its own; return its seconds and MB."""
    done = subprocess.run(
        [sys.executable, "-c", code, what, *map(str, folders)], check=True, capture_output=True, text=True
    )
    seconds, megabytes = done.stdout.split()
    return float(seconds), float(megabytes)


def main() -> None:
    """Print how long each takes, and relative to reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="bert-base")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", action="store_true", help="time effective ranks too")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"))
    options = parser.parse_args()
    folders = build(options.set, options.folder / options.set)
    contenders = {"read": (READ, ""), "analyze": (ANALYZE, "")} | ({"rank": (ANALYZE, "rank")} if options.rank else {})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(options.runs):
        for name, (code, what) in contenders.items():
            found[name].append(timed(code, what, folders))
    read = statistics.median(seconds for seconds, _ in found["read"])
    print(f"load {os.getloadavg()[0]:.1f}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads")
    for name, runs in found.items():
        seconds = statistics.median(each for each, _ in runs)
        span = f"{min(runs)[0]:.2f} to {max(runs)[0]:.2f}"
        print(f"{name:8} {seconds:7.2f} s ({span}), {seconds / read:5.2f} of reading, {max(m for _, m in runs):.0f} MB")


if __name__ == "__main__":
    main()
