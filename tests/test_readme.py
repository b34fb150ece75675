"""The README stays true: every command and every piece of code in it is run."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mergelab.methods.__main__ import main as catalogue
from mergelab.report.__main__ import main as report
from tests.conftest import ROOT, Outcome
from tests.models import pairs
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
RUNS = [line for line in COMMANDS if line.startswith("python -m mergelab ")]
REPORT = "python -m mergelab.report"
CATALOGUE = [line for line in COMMANDS if line.startswith("python -m mergelab.methods")]
FIRST = "python -m mergelab method=ties task=rte"


@pytest.fixture
def own_models(workplace: Path) -> None:
    """The folders that the README takes an encoder and a decoder from."""
    pairs.bert(workplace / "bert")
    pairs.bert(workplace / "other-bert", seed=1)
    pairs.gpt2(workplace / "gpt2")
    for seed, name in enumerate(("legal-lora", "medical-lora", "recipes-lora")):
        pairs.lora(workplace / name, workplace / "bert", seed)
    pairs.changed(workplace / "legal-bert", workplace / "bert")
    for seed in (1, 2, 3):
        pairs.lora(workplace / f"rte-lora-{seed}", workplace / "bert", seed, classes=2)
    (workplace / "data").mkdir()
    pq.write_table(glue_table("rte", 60, 1), workplace / "data" / "validation.parquet")
    pairs.bert2bert(workplace / "bert2bert")
    for seed, name in enumerate(("reports-lora", "dialogues-lora")):
        pairs.lora(workplace / name, workplace / "bert2bert", seed)


@pytest.fixture
def own_method(workplace: Path) -> None:
    """The module that the README has the user write."""
    (code,) = (block for block in blocks("python") if "def trimmed_mean" in block)
    (workplace / "my_module.py").write_text(code)
    sys.modules.pop("my_module", None)


def shortened(line: str) -> str:
    """Sweep with three trials; measure a grid of all methods on few examples, and of a suite only a few methods.

    Adapters that are drawn at random are not asked to know their task.
    """
    few = re.sub(r"sweep\.n_trials=\d+", "sweep.n_trials=3", line)
    if "method=glob" in few and "task=suite" in few:
        few = re.sub(r"glob\(\*,", "glob([ma*,me*,so*,t*],", few)
    few = f"{few} task.limit=100" if "method=glob" in few else few
    return f"{few} eval.preflight=false" if "rte-lora" in few else few


def test_every_command_is_of_a_kind_that_a_test_below_runs() -> None:
    others = [line for line in COMMANDS if line not in RUNS and line not in (*CATALOGUE, REPORT)]
    assert [line.split()[0] for line in others] == ["make", "make", "mlflow"]
    assert FIRST in RUNS
    assert len(RUNS) > 8


@pytest.mark.parametrize("line", [line for line in RUNS if "joblib" not in line and line != FIRST])
@pytest.mark.usefixtures("own_method", "own_models")
def test_a_command_works(mergelab_command: Callable[..., Outcome], line: str) -> None:
    outcome = mergelab_command(*shlex.split(shortened(line))[3:])
    assert outcome.code == 0, outcome.err
    assert outcome.out
    if "--" not in line and "evaluate=false" not in line:
        assert re.search("accuracy|matthews|perplexity|rougeL|omelette", outcome.out)


@pytest.mark.parametrize("line", CATALOGUE)
def test_the_catalogue_is_printed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert catalogue(shlex.split(line)[3:]) == 0
    assert "Yadav et al. 2023" in capsys.readouterr().out


def test_a_report_on_the_newest_runs_is_a_page(mergelab_command: Callable[..., Outcome], workplace: Path) -> None:
    assert REPORT in COMMANDS
    assert mergelab_command("-m", "method=soup,ties", "task=rte", "source=mini", "task.limit=100").code == 0
    assert report([]) == 0
    (page,) = workplace.glob("outputs/reports/*/report.html")
    assert "method=ties" in page.read_text(encoding="utf-8")


def real_command(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *shlex.split(line)[1:]]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_first_command_runs_in_a_process_of_its_own_and_prints_what_the_readme_shows(tmp_path: Path) -> None:
    done = real_command(FIRST, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "miniature" in done.stderr
    shown = blocks("text")[0]
    pattern = r"│ (\S[^│]*?) +│ +(\d\.\d{4})"
    assert [name for name, _ in re.findall(pattern, shown)] == [name for name, _ in re.findall(pattern, done.stdout)]
    assert "mini/rte" in done.stdout
    assert "mlflow ui" in done.stdout


def test_a_grid_on_joblib_is_one_parent_with_its_children(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    (line,) = (line for line in RUNS if "joblib" in line and "sweep=" not in line)
    done = real_command(line, tmp_path)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mini/rte").experiment_id])
    (parent,) = (run for run in runs if run.data.tags["mergelab.kind"] == "grid")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.params["method.name"] for run in children) == ["soup", "ties"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "method=soup" in done.stdout
    assert "method=ties" in done.stdout


def test_a_sweep_on_joblib_has_all_its_trials(tmp_path: Path) -> None:
    (line,) = (line for line in RUNS if "joblib" in line and "sweep=" in line)
    done = real_command(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 trials:" in done.stdout


def test_the_ui_opens_on_the_store_that_a_run_made(mergelab_command: Callable[..., Outcome], workplace: Path) -> None:
    assert mergelab_command("method=soup", "source=mini").code == 0
    (line,) = (line for line in COMMANDS if line.startswith("mlflow"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "mlflow"
    server = subprocess.Popen(
        [str(program), *shlex.split(line)[1:], "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert answers(f"http://127.0.0.1:{port}/health") == b"OK"
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str) -> bytes:
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bytes(answer.read())
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")


def test_the_python_code_works(bert_checkpoints: Mapping[str, Path], workplace: Path) -> None:
    (code,) = (block for block in blocks("python") if "import mergelab" in block)
    pq.write_table(glue_table("rte", 60, 1), workplace / "validation.parquet")
    names: dict[str, Any] = {
        "base": str(bert_checkpoints[BERT_BASE]),
        "expert_a": str(bert_checkpoints[BERT_RTE_EXPERTS[1]]),
        "expert_b": str(bert_checkpoints[BERT_RTE_EXPERTS[2]]),
        "data": workplace,
    }
    exec(code, names)
    assert 0 <= names["ml"].evaluate_glue_pipeline(names["merged"], "rte", data_dir=workplace)["accuracy"] <= 1
    assert names["pipe"]("The king calls.")[0]["label"]


@pytest.mark.usefixtures("own_models")
def test_a_merged_adapter_of_an_encoder_decoder_writes_as_the_readme_shows(
    mergelab_command: Callable[..., Outcome],
) -> None:
    (line,) = (line for line in RUNS if "output=merged-pair" in line)
    outcome = mergelab_command(*shlex.split(line)[3:])
    assert outcome.code == 0, outcome.err
    (code,) = (block for block in blocks("python") if '"merged-pair"' in block)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["ids"].shape[1] > 1


def test_the_python_runs_work(workplace: Path) -> None:
    import mergelab as ml

    (code,) = (block for block in blocks("python") if "ml.sweep(" in block)
    names: dict[str, Any] = {"ml": ml}
    exec(code.replace("n_trials=20", "n_trials=2"), names)
    assert names["found"].scores["accuracy"] > 0.5
    assert len(names["search"].table) == 2


def test_the_two_commands_do_their_own_set_up() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    for target, does in (("demo", FIRST.removeprefix("python ")), ("test", "-m pytest")):
        said = subprocess.run(
            [make, "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "-m venv .venv" in said.stdout
        assert "--constraint constraints.txt" in said.stdout
        assert does in said.stdout
