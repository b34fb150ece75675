"""The guide's command does what the guide says, on the miniature."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome

GUIDE = ROOT / "docs" / "guides" / "finetuning.md"


@pytest.mark.slow
@pytest.mark.skipif(not GUIDE.is_file(), reason="the documentation is not part of this copy")
def test_the_guides_command_trains_the_miniature(mergelab_command: Callable[..., Outcome], workplace: Path) -> None:
    command, shown = re.findall(r"```(?:bash|text)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[:2]
    program, module, name, *arguments = shlex.split(command)
    assert (program, module, name) == ("python", "-m", "mergelab.finetune")
    outcome = mergelab_command("finetune", *arguments, "tracking=none")
    assert outcome.code == 0, outcome
    assert outcome.out.splitlines()[:5] == shown.splitlines()[:5]
    for seed in (0, 1):
        folder = workplace / "outputs" / "experts" / "mini" / "rte" / f"seed-{seed}"
        assert "**Miniature.**" in (folder / "README.md").read_text()
    assert "models.experts=[./outputs/experts/mini/rte/seed-0,./outputs/experts/mini/rte/seed-1]" in outcome.out
