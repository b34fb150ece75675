"""What a command imports, and garbage collection: off while modules are imported, on while anything works."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mergelab.errors import TrackingError
from mergelab.tracking import TrackingConfig, open_tracking
from mergelab.tracking.store import connect, locate
from tests.conftest import Outcome

Command = Callable[..., Outcome]

MODULE = """
import gc
from pathlib import Path

def first(models):
    with Path("collecting").open("a") as file:
        print(gc.isenabled(), gc.get_freeze_count() > 0, file=file)
    return models[0]
"""
MERGE = ("method=custom", "method.function=watching_collection.first", "evaluate=false", "tracking=none")
# Of evaluation, tracking and sweeps.
NOT_FOR_A_MERGE = {
    "alembic", "datasets", "evaluate", "matplotlib", "mlflow", "optuna", "pandas", "pyarrow", "ray", "requests",
    "scipy", "sklearn", "sqlalchemy", "sympy", "transformers",
}  # fmt: skip


@pytest.fixture
def watched(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A method that notes, for each tensor that it merges, whether garbage is collected and imports are left out."""
    (workplace / "watching_collection.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(workplace))
    gc.unfreeze()
    yield lambda: (workplace / "collecting").read_text().splitlines()
    sys.modules.pop("watching_collection", None)
    gc.unfreeze()


def test_garbage_is_collected_while_a_merge_works(
    mergelab_command: Command, arguments: list[str], watched: Callable[[], list[str]]
) -> None:
    outcome = mergelab_command(*arguments, *MERGE, "output=out")
    assert outcome.code == 0, outcome.err
    assert set(watched()) == {"True True"}
    assert gc.isenabled()


def test_garbage_is_collected_in_every_job_of_a_grid(
    mergelab_command: Command, arguments: list[str], watched: Callable[[], list[str]]
) -> None:
    outcome = mergelab_command("-m", *arguments, *MERGE, "seed=1,2", "output='out${hydra:job.num}'")
    assert outcome.code == 0, outcome.err
    assert set(watched()) == {"True True"}


@pytest.mark.parametrize("override", ["seed=many", "models.base=./nowhere", "metod=soup", "method=", "--cfg=nothing"])
def test_garbage_is_collected_again_after_an_error(
    override: str, mergelab_command: Command, arguments: list[str]
) -> None:
    assert mergelab_command(*arguments, *MERGE, "output=out", override).code != 0
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_opening_a_store_leaves_garbage_collection_as_it_was(enabled: bool, tmp_path: Path) -> None:
    good = TrackingConfig(uri=f"sqlite:///{tmp_path}/good.db")
    bad = TrackingConfig(uri=f"sqlite:///{tmp_path}/bad.db")
    (tmp_path / "bad.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    try:
        if not enabled:
            gc.disable()
        connect(locate(good))
        assert gc.isenabled() is enabled
        with pytest.raises(TrackingError):
            open_tracking(bad)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_merge_imports_nothing_of_evaluation_tracking_and_sweeps(arguments: list[str], workplace: Path) -> None:
    command = ["mergelab", *arguments, "method=ties", "evaluate=false", "output=out", "tracking=none"]
    code = (
        f"import sys, json; sys.argv = {command!r}\n"
        "from mergelab.__main__ import main; main()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" in imported
    assert not imported & NOT_FOR_A_MERGE


def test_what_ends_with_the_process_still_ends(workplace: Path) -> None:
    """Left out of the last collection, not out of what modules do when a process ends."""
    code = (
        "import atexit, sys, tempfile; atexit.register(lambda: print('left'))\n"
        "folder = tempfile.TemporaryDirectory(); print(folder.name)\n"
        "file = open('written', 'w'); file.write('whole')\n"
        "sys.argv = ['mergelab', '--version']\n"
        "from mergelab.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, *_, last = done.stdout.splitlines()
    assert last == "left"
    assert not Path(folder).exists()
    assert (workplace / "written").read_text() == "whole"
