"""Steps of a study, each a command of mergelab: run in this process, recorded, and not run again."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Record = Mapping[str, Any]
Measure = Callable[[Path], Mapping[str, Any]]
_PAUSE = 2.0  # seconds
RECORD = "record.json"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        part: the part of the study that it belongs to.
        of: what it is of: a task, or several.
        name: its name there.
        arguments: of ``python -m mergelab``.
        keeps: whether the merged model is written, so that it can be measured further; it is removed afterwards.
        needs: steps that make what this one takes.
    """

    part: str
    of: str
    name: str
    arguments: tuple[str, ...]
    keeps: bool = False
    needs: tuple[Step, ...] = ()

    @property
    def key(self) -> str:
        """The name of its folder."""
        return f"{self.part}-{self.of}-{self.name}".replace(" ", "-")

    @property
    def command(self) -> str:
        """The command as it is typed."""
        return " ".join(["python -m mergelab", *map(shlex.quote, self.arguments)])

    @property
    def kind(self) -> str:
        """``finetune``, ``analyze``, ``-m`` (a grid) or ``merge``."""
        first = self.arguments[0]
        return first if first in ("finetune", "analyze", "-m") else "merge"


def recorded(work: Path, step: Step) -> Record | None:
    """Return what came of a step before, None where it was not finished.

    Raises:
        SystemExit: it was another command.
    """
    file = work / "steps" / step.key / RECORD
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["command"] != step.command:
        sys.exit(f"error: {file} is of another command; give another --work: {found['command']}")
    return found


def run_all(
    work: Path,
    every: Sequence[Step],
    measure: Measure | None = None,
    done: Callable[[Step, Record], Any] = lambda *_: None,
) -> dict[Step, Record]:
    """Run all steps that have no record yet, in their order. Several processes may do so at once in one folder.

    Args:
        work: the study's folder, which is the current one.
        every: the steps.
        measure: see `run`.
        done: called with each step that was run here, and its record.

    Returns:
        The records of all steps, those of other processes too.
    """
    records: dict[Step, Record] = {}
    while len(records) < len(every):
        before = len(records)
        for step in every:
            if step in records or any(_is_claimed(work, need) for need in step.needs):
                continue
            with _claim(work, step) as mine:
                if not mine:
                    continue
                if (found := recorded(work, step)) is None:
                    found = run(work, step, measure)
                    done(step, found)
                records[step] = found
        if len(records) == before:
            time.sleep(_PAUSE)  # other processes have what is left
    return records


@contextlib.contextmanager
def _claim(work: Path, step: Step) -> Iterator[bool]:
    """Hold a step's lock, which a process that is killed gives up; False where another process has it."""
    folder = work / "steps" / step.key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _is_claimed(work: Path, step: Step) -> bool:
    with _claim(work, step) as mine:
        return not mine


def run(work: Path, step: Step, measure: Measure | None = None) -> Record:
    """Run a step that has no record yet, and record it; one that fails is tried again the next time.

    Args:
        work: the study's folder, which is the current one.
        step: what to run.
        measure: measures the merged model's folder where the step keeps it; what it returns joins the record.
    """
    import shutil

    folder = Path("steps", step.key)
    folder.mkdir(parents=True, exist_ok=True)
    merged = folder / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of an interrupted run
    started = time.perf_counter()
    error = mergelab(*step.arguments, *_places(step, folder), *([f"output={merged}"] if step.keeps else []))
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {"command": step.command, "seconds": seconds, "error": error}
    if error is None:
        if step.kind == "merge":
            record["models"] = _models(folder)
        if step.kind == "-m":
            jobs = sorted(folder.glob("*/result.json"), key=lambda file: int(file.parent.name))
            record["models"] = _models(jobs[0].parent)[:-1]
            record["points"] = [{"settings": _settings(job.parent), **_models(job.parent)[-1]} for job in jobs]
        if step.keeps and measure is not None:
            record |= measure(merged)
        shutil.rmtree(merged, ignore_errors=True)
        save(work / folder / RECORD, record)
    return record


def _models(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "result.json").read_text(encoding="utf-8"))["models"]
    return found


def _settings(job: Path) -> dict[str, float]:
    """Return the numbers that a job of a grid was given for its method."""
    import yaml

    given = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    found = (override.removeprefix("method.").partition("=") for override in given if override.startswith("method."))
    return {name: float(value) for name, _, value in found}


def save(file: Path, record: Record) -> None:
    """Write a record so that it is there whole or not at all."""
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")  # another process may be writing the same
    unfinished.write_text(json.dumps(record), encoding="utf-8")
    unfinished.replace(file)


def _places(step: Step, folder: Path) -> tuple[str, ...]:
    """Return the settings that say where a step's results go."""
    if step.kind == "finetune":
        return ()
    if step.kind == "-m":
        return (f"hydra.sweep.dir={folder}",)
    return (f"hydra.run.dir={folder}",)


def mergelab(*arguments: str) -> str | None:
    """Run a command of mergelab in this process; return its error's line, None without one."""
    from hydra.core.global_hydra import GlobalHydra

    from mergelab.__main__ import main

    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, ["mergelab", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stop:
        if stop.code == 130:
            raise KeyboardInterrupt from None
        if stop.code:
            return (said.getvalue().strip().splitlines() or ["failed"])[-1]
    finally:
        sys.argv = before
    return None
