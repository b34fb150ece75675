"""Run in the environment that merges: write models with adapters as transformers' folders.

python -m tests.adapterhub.dense '[["base", "adapter", null, "out"], …]'; the third is the part of an encoder-decoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mergelab.models.adapted import on_base, open_model
from mergelab.weights.writer import save_folder


def main() -> None:
    for base, adapter, part, out in json.loads(sys.argv[1]):
        opened = open_model(on_base(Path(base), Path(adapter), where="a", part=part))
        tensors = {name: opened.get(name).clone() for name in (*opened.keys(), *opened.aliases())}
        save_folder(tensors, Path(out), like=opened.folder, aliases=opened.aliases())


if __name__ == "__main__":
    main()
