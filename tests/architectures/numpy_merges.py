"""Merges computed with NumPy alone from the saved files, to compare with mergelab's: soup, TIES, DARE's masks."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]

_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "?", "U8": "u1"}


def read_tensors(folder: Path) -> dict[str, Array]:
    """Read the tensors of a folder's safetensors files; bfloat16 becomes float32, which has all of its values."""
    found: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        header.pop("__metadata__", None)
        for name, about in header.items():
            part = data[slice(*about["data_offsets"])]
            if about["dtype"] == "BF16":
                numbers = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
            else:
                numbers = np.frombuffer(part, _NUMBERS[about["dtype"]])
            found[name] = numbers.reshape(about["shape"])
    return found


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Return how each tensor of a folder is stored: F32, BF16, …"""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        found |= {name: about["dtype"] for name, about in header.items() if name != "__metadata__"}
    return found


def soup(experts: Sequence[Tensors], names: Iterable[str]) -> dict[str, Array]:
    """Return the mean: Σ θ_t / T."""
    return {name: np.mean([expert[name].astype(np.float64) for expert in experts], axis=0) for name in names}


def ties(base: Tensors, experts: Sequence[Tensors], names: Sequence[str], density: float) -> dict[str, Array]:
    """Return θ0 + τ_m (Yadav et al. 2023): trim each model's task vector, elect signs, average what agrees.

    The task vectors are float32 differences. Of the n entries of a model's task vector all those stay whose magnitude
    is at least that of the int(density · n)-th largest. Where votes cancel, the sign that more entries elect counts.
    """
    sizes = [base[name].size for name in names]
    start = np.concatenate([base[name].astype(np.float32).ravel() for name in names])
    trimmed = []
    for expert in experts:
        task_vector = np.concatenate([expert[name].astype(np.float32).ravel() for name in names]) - start
        keep = max(1, int(density * len(task_vector)))
        threshold = np.sort(np.abs(task_vector))[-keep]
        trimmed.append(np.where(np.abs(task_vector) >= threshold, task_vector, 0).astype(np.float64))
    votes = np.sign(np.sum(trimmed, axis=0))
    signs = np.where(votes == 0, np.sign(votes.sum()), votes)
    agreeing = [vector * (np.sign(vector) == signs) for vector in trimmed]
    counts = np.sum([vector != 0 for vector in agreeing], axis=0)
    merged = start.astype(np.float64) + np.sum(agreeing, axis=0) / np.maximum(counts, 1)
    parts = np.split(merged, np.cumsum(sizes)[:-1])
    return {name: part.reshape(base[name].shape) for name, part in zip(names, parts, strict=True)}


def dare_masks(base: Array, experts: Sequence[Array], merged: Array, density: float) -> tuple[Array, Array]:
    """Find which entries of two experts' task vectors are in θ0 + Σ m_t τ_t / density, and how far it is from that.

    Returns:
        The masks (2, …) that explain ``merged`` best, and the distance of each entry (…) from their merge.
    """
    first, second = (expert.astype(np.float64) - base for expert in experts)
    choices = [(0, 0), (1, 0), (0, 1), (1, 1)]
    results = np.stack([base + (one * first + other * second) / density for one, other in choices])
    distances = np.abs(results - merged)
    best = distances.argmin(axis=0)
    return np.moveaxis(np.array(choices, dtype=bool)[best], -1, 0), distances.min(axis=0)
