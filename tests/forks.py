"""Python processes that start as forks of one that has imported what they need, so that imports are paid once."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.sweep.servers import end

ROOT = Path(__file__).resolve().parents[1]
# What takes long to import, but for the Hugging Face libraries: these read the environment when they are imported.
LIBRARIES = (
    "aiohttp", "alembic.config", "hydra.main", "mlflow.store.tracking.sqlalchemy_store", "optuna.storages", "pandas",
    "pyarrow.dataset", "pyarrow.parquet", "requests", "rich.console", "scipy.stats", "sklearn.metrics",
    "sqlalchemy.orm", "torch",
)  # fmt: skip
# A line of JSON is a process to start: arguments as Python's own, folder, environment, and files for its output.
SERVER = """
import atexit, gc, importlib, json, os, runpy, sys, threading, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)
assert ("huggingface_hub" in sys.modules) == ("transformers" in sys.argv)
gc.collect()
gc.freeze()  # else collections in the forks would copy every page
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)

os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["environment"])
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(file, number)
    os.close(file)
program, *sys.argv[1:] = job["arguments"]
is_file = program not in ("-c", "-m")
sys.path[:1] = [
    os.path.dirname(os.path.abspath(program)) if is_file else job["folder"],
    *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
]
code = 0
try:
    if is_file:
        sys.argv[0] = program
        runpy.run_path(program, run_name="__main__")
    elif program == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
except BaseException:
    traceback.print_exc()
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # to take apart what was imported would take long
"""


class Forks:
    """Start Python processes, one after the other, as forks of one that has imported the libraries and modules."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Do what ``python ARGUMENTS`` does in a folder, and wait for its end."""
        server = self._server = self._server or self._start()
        assert server.stdin is not None
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as outputs:
            out, err = (Path(outputs, name) for name in ("out", "err"))
            job = {"arguments": arguments, "folder": str(folder), "environment": dict(environment or os.environ)}
            server.stdin.write(json.dumps({**job, "out": str(out), "err": str(err)}) + "\n")
            server.stdin.flush()
            if not select.select([server.stdout], [], [], timeout)[0]:
                self.end()
                raise subprocess.TimeoutExpired(arguments, timeout)
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-c", SERVER, *LIBRARIES, *self._modules]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def end(self) -> None:
        """End the process that the others are forks of, and a fork that has not ended."""
        if self._server is not None:
            end(self._server)
            self._server = None


@contextmanager
def start_forks(*modules: str) -> Iterator[Forks]:
    """Start Python processes that need not import the libraries and further modules."""
    forks = Forks(modules)
    try:
        yield forks
    finally:
        forks.end()
