"""Bottleneck and prefix-tuning adapters are averaged to what the library's own average computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapterhub import library
from tests.adapterhub.library import BOTH, TEXT
from tests.adapters import made as small

adapters = pytest.importorskip("adapters", reason="needs the Adapters library: make test-adapters")
from adapters import (  # noqa: E402
    ConfigUnion,
    DoubleSeqBnConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
)

PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=5)
KINDS: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {
    "sequential": (small.bert, SeqBnConfig(reduction_factor=4), TEXT),
    "double": (library.roberta, DoubleSeqBnConfig(reduction_factor=4), TEXT),
    "parallel": (small.gpt2, ParBnConfig(reduction_factor=4, scaling="learned"), TEXT),
    "invertible": (small.bert, SeqBnInvConfig(reduction_factor=4), TEXT),
    "prefix": (small.bert, PREFIX, TEXT),
    "union": (small.bert2bert, ConfigUnion(PREFIX, ParBnConfig(reduction_factor=4)), BOTH),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Tensor]]:
    """A base, the average of two adapters, and the outputs of the library's own average."""
    folder, found, jobs = tmp_path_factory.mktemp("modules"), {}, {}
    for number, (kind, (build, config, inputs)) in enumerate(KINDS.items()):
        base, saved = folder / f"{number}-base", {}
        build().save_pretrained(base)
        model = build()
        for seed, name in enumerate("ab"):
            library.with_adapter(model, config, name, seed=seed, head=False)
            saved[name] = folder / f"{number}-{name}"
            model.save_adapter(str(saved[name]), name, with_head=False)
        # Of a model with a head the library leaves invertible modules out.
        model.base_model.average_adapter("mean", ["a", "b"], weights=[3, 1])
        model.set_active_adapters("mean")
        found[kind] = (base, folder / f"{number}-out", library.outputs(model.double().eval(), inputs))
        weights = zip(saved, (3, 1), strict=True)
        weighted = {name: f"{{reference: {saved[name]}, weight: {weight}}}" for name, weight in weights}
        jobs[f"{number}-out"] = (base, weighted, ("method=soup", "save.form=module_average"))
    library.merged(folder, jobs)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_loads_with_the_defaults_and_is_the_librarys(
    kind: str, made: dict[str, tuple[Path, Path, Tensor]]
) -> None:
    build, _, inputs = KINDS[kind]
    base, out, expected = made[kind]
    model = type(build()).from_pretrained(base)
    adapters.init(model)
    model.load_adapter(str(out), set_active=True)
    model.double().eval()
    torch.testing.assert_close(library.outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.set_active_adapters(None)
    assert not torch.allclose(library.outputs(model, inputs), expected, atol=1e-3)
