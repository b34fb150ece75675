"""Where a test compares a merge with another implementation, how far apart the two are is written down.

``python experiments/parity.py`` runs the tests with the environment variable MERGELAB_PARITY naming a file and makes
experiments/PARITY.md of its lines. Without the variable nothing is written or computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VARIABLE = "MERGELAB_PARITY"
FORMULA = "float64 transcription of the formula"
RECORDED_MERGEKIT = "mergekit 0.1.5, recorded values"

ADARANK, C2M3, FUSEAI, LINES, LOCALIZE, MODEL_MERGING, PCB_MERGING, UNCERTAINTY, ZIPIT = (
    f"float64 transcription of {project}"
    for project in (
        "AdaRank dfa5358 (david3684/AdaRank)",
        "cycle-consistent-model-merging ea1eca7 (crisostomi/cycle-consistent-model-merging)",
        "FuseAI 7d9a307 (18907305772/FuseAI)",
        "LiNeS 43a7bdd (wang-kee/LiNeS)",
        "Localize-and-Stitch 109d206 (uiuctml/Localize-and-Stitch)",
        "model_merging f2d1677 (mmatena/model_merging)",
        "pcb-merging 5897888 (duguodong7/pcb-merging)",
        "iclr2024-model-merging c6e4114 (UKPLab/iclr2024-model-merging)",
        "ZipIt 1b6ca40 (gstoica27/ZipIt)",
    )
)

Values = Tensor | np.ndarray[Any, Any] | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Record:
    """How far a method's tensors are from another implementation's."""

    method: str
    compared_with: str
    options: str
    dtype: str
    difference: float
    largest: float  # magnitude among the other's values
    shapes: tuple[tuple[int, ...], ...]
    note: str = ""


def compared(
    method: str,
    with_: str,
    ours: Values,
    theirs: Values,
    *,
    options: str | Mapping[str, object] = "",
    note: str = "",
) -> None:
    """Append the largest absolute difference to the file that MERGELAB_PARITY names; do nothing where it names none.

    Args:
        method: the method's name.
        with_: the other implementation; `FORMULA` where the test transcribes the paper's.
        ours: a tensor, or several; dtype and shapes are theirs.
        theirs: the other's values, several in the same order, or all of them in one flat array.
        options: what the method was asked for beside its defaults, as far as rows of the table are to differ by it.
        note: what differs by design, or was left out of the comparison.
    """
    if os.environ.get(VARIABLE):
        record = measured(method, with_, ours, theirs, options=options, note=note)
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def measured(
    method: str, with_: str, ours: Values, theirs: Values, *, options: str | Mapping[str, object] = "", note: str = ""
) -> Record:
    """Compare all values in float64.

    Raises:
        ValueError: they are not equally many, there are none, or one is not finite.
    """
    mine = arrays(ours)
    flat, other = (np.concatenate([each.ravel() for each in values]) for values in (mine, arrays(theirs)))
    if flat.shape != other.shape or not flat.size:
        raise ValueError(f"{method}, {with_}: {flat.size} values cannot be compared with {other.size}")
    if not (np.isfinite(flat).all() and np.isfinite(other).all()):
        raise ValueError(f"{method}, {with_}: values are not finite")
    if not isinstance(options, str):
        options = ", ".join(f"{key.removesuffix('_')}={written(value)}" for key, value in options.items())
    return Record(
        method=method,
        compared_with=with_,
        options=options,
        dtype=dtype_of(ours),
        difference=float(np.abs(flat - other).max()),
        largest=float(np.abs(other).max()),
        shapes=tuple(dict.fromkeys(each.shape for each in mine)),
        note=note,
    )


def written(value: object) -> str:
    """A value as a configuration has it: 1.0 and 1 are the same."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parts(values: Values) -> list[Any]:
    if isinstance(values, Mapping):
        return list(values.values())
    several = isinstance(values, list | tuple) and len(values) and not np.isscalar(values[0])
    return list(values) if several else [values]


def arrays(values: Values) -> list[np.ndarray[Any, Any]]:
    return [
        part.detach().double().numpy() if isinstance(part, Tensor) else np.asarray(part, dtype=np.float64)
        for part in parts(values)
    ]


def dtype_of(values: Values) -> str:
    """The dtypes of the tensors, such as ``float32``."""
    names = {str(torch.as_tensor(part).dtype).removeprefix("torch.") for part in parts(values)}
    return ", ".join(sorted(names))


def read(path: str | Path) -> list[Record]:
    """The records of a file."""
    found = (json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [Record(**{**each, "shapes": tuple(tuple(shape) for shape in each["shapes"])}) for each in found]


def merge_records(records: Iterable[Record]) -> list[Record]:
    """One record for each method, other implementation, options and dtype: the largest difference, all the shapes."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = (record.method, record.compared_with, record.options, record.dtype)
        groups.setdefault(key, []).append(record)
    return [
        Record(
            *key,
            difference=max(each.difference for each in group),
            largest=max(each.largest for each in group),
            shapes=tuple(sorted({shape for each in group for shape in each.shapes})),
            note="; ".join(sorted({each.note for each in group} - {""})),
        )
        for key, group in sorted(groups.items())
    ]
