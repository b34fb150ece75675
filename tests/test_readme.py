"""README.md and the pages of docs/ stay true: every command and every piece of code in them is run."""

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
from tests.docs import pages
from tests.models import pairs
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pages.pages(), reason="the documentation is not part of this copy"),
]

COMMANDS = pages.commands()
RUNS = [line for line in COMMANDS if line.startswith("python -m mergelab ")]
REPORT = "python -m mergelab.report"
CATALOGUE = [line for line in COMMANDS if line.startswith("python -m mergelab.methods")]
MAKE = [line for line in COMMANDS if line.startswith("make ")]
ELSEWHERE = {"pip install .": "tests/test_installed.py"}
FIRST = "python -m mergelab method=ties task=rte"
REAL = [FIRST, *(line for line in RUNS if "joblib" in line)]
PAIR = "output=merged-pair"
_NAME = re.compile(r"^│ (\S[^│]*?) +│", re.MULTILINE)


def code_with(part: str) -> str:
    """Return the block of Python code that has this part."""
    (found,) = (block for block in pages.code() if part in block)
    return found


def shown_names(line: str) -> set[str]:
    """Return the models in the tables that pages show of a command, but for names that a narrow table cuts."""
    from docs.scripts.printed import blocks

    shown = [each.shown for page in pages.pages() for each in blocks(page.text) if each.command == line]
    return {name for each in shown for name in _NAME.findall(each) if "…" not in name and name != "model"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, adapters, data and modules that the pages take for the user's own."""
    folder = tmp_path_factory.mktemp("own")
    pairs.bert(folder / "bert")
    pairs.bert(folder / "other-bert", seed=1)
    pairs.gpt2(folder / "gpt2")
    for seed, name in enumerate(("legal-lora", "medical-lora", "recipes-lora")):
        pairs.lora(folder / name, folder / "bert", seed)
    for name in ("legal-bert", "medical-bert"):
        pairs.changed(folder / name, folder / "bert")
    for seed in (1, 2, 3):
        pairs.lora(folder / f"rte-lora-{seed}", folder / "bert", seed, classes=2)
    (folder / "data").mkdir()
    pq.write_table(glue_table("rte", 60, 1), folder / "data" / "validation.parquet")
    pairs.bert2bert(folder / "bert2bert")
    for seed, name in enumerate(("reports-lora", "dialogues-lora")):
        pairs.lora(folder / name, folder / "bert2bert", seed)
    (folder / "my_module.py").write_text(code_with("def trimmed_mean"))
    (folder / "my_configs" / "models").mkdir(parents=True)
    (yaml,) = (block for page in pages.common() for block in page.blocks("yaml") if "name: mine" in block)
    (folder / "my_configs" / "models" / "mine.yaml").write_text(yaml)
    (folder / "my_prompts.txt").write_text("To bake bread, mix\nThe Court held that\n")
    return folder


@pytest.fixture
def own(made: Path, workplace: Path) -> None:
    """What the pages take for the user's own, in the current folder."""
    shutil.copytree(made, workplace, dirs_exist_ok=True)
    sys.modules.pop("my_module", None)


def shortened(line: str) -> str:
    """Sweep with three trials; measure grids of all methods with a few, on few examples.

    Adapters that are drawn at random are not asked to know their task.
    """
    few = re.sub(r"sweep\.n_trials=\d+", "sweep.n_trials=3", line)
    if "method=glob" in few:
        few = f"{re.sub(r'glob.[*],', 'glob([ma*,me*,so*,t*],', few)} task.limit=100"
    return f"{few} eval.preflight=false" if "rte-lora" in few else few


def test_every_command_is_of_a_kind_that_a_test_runs() -> None:
    ours = {*RUNS, *CATALOGUE, *MAKE, REPORT, *ELSEWHERE}
    others = [line for line in COMMANDS if line not in ours and not line.startswith("mlflow ui ")]
    assert others == []
    assert FIRST in RUNS
    assert len(RUNS) > 40


def test_a_page_with_a_test_of_its_own_names_one_that_reads_it() -> None:
    own_tests = {page.name: page.own_test for page in pages.pages() if page.own_test}
    assert "docs/adding.md" in own_tests
    for name, test in own_tests.items():
        assert Path(name).name in (ROOT / test).read_text(encoding="utf-8")


def test_every_block_of_code_is_run_by_a_test() -> None:
    parts = ("def trimmed_mean", "ml.layer_merge", '"merged-pair"', "ml.sweep(", "models:/ties-rte/1")
    assert [block for block in pages.code() if not any(part in block for part in parts)] == []


@pytest.mark.parametrize("line", [line for line in RUNS if line not in REAL and PAIR not in line])
@pytest.mark.usefixtures("own")
def test_a_command_works(mergelab_command: Callable[..., Outcome], line: str) -> None:
    outcome = mergelab_command(*shlex.split(shortened(line))[3:])
    assert outcome.code == 0, outcome.err
    assert outcome.out
    if "--" not in line and "evaluate=false" not in line:
        assert re.search("accuracy|matthews|perplexity|rougeL|omelette|bread|cosine", outcome.out)
    if shortened(line) == line:
        assert {name for name in shown_names(line) if name not in outcome.out} == set()
    if "tracking.register=ties-rte" in line:
        names: dict[str, Any] = {}
        exec(code_with("models:/ties-rte/1"), names)
        assert names["pipe"]("The king calls.")[0]["label"]


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


def test_the_first_command_runs_in_a_process_of_its_own_and_prints_what_the_pages_show(tmp_path: Path) -> None:
    done = real_command(FIRST, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "miniature" in done.stderr
    assert len(shown_names(FIRST)) >= 7
    assert {name for name in shown_names(FIRST) if name not in done.stdout} == set()
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
    (line,) = (line for line in COMMANDS if line.startswith("mlflow ui "))
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
    pq.write_table(glue_table("rte", 60, 1), workplace / "validation.parquet")
    names: dict[str, Any] = {
        "base": str(bert_checkpoints[BERT_BASE]),
        "expert_a": str(bert_checkpoints[BERT_RTE_EXPERTS[1]]),
        "expert_b": str(bert_checkpoints[BERT_RTE_EXPERTS[2]]),
        "data": workplace,
    }
    exec(code_with("ml.layer_merge"), names)
    assert 0 <= names["ml"].evaluate_glue_pipeline(names["merged"], "rte", data_dir=workplace)["accuracy"] <= 1
    assert names["pipe"]("The king calls.")[0]["label"]


@pytest.mark.usefixtures("own")
def test_a_merged_adapter_of_an_encoder_decoder_writes_as_the_page_shows(
    mergelab_command: Callable[..., Outcome],
) -> None:
    (line,) = (line for line in RUNS if PAIR in line)
    outcome = mergelab_command(*shlex.split(line)[3:])
    assert outcome.code == 0, outcome.err
    names: dict[str, Any] = {}
    exec(code_with('"merged-pair"'), names)
    assert names["ids"].shape[1] > 1


def test_the_python_runs_work(workplace: Path) -> None:
    import mergelab as ml

    blocks = [block for block in pages.code() if "ml.sweep(" in block]
    assert {block.partition("found = ")[2].split("# a pandas")[0] for block in blocks} == {
        blocks[0].partition("found = ")[2].split("# a pandas")[0]
    }, "the same calls on every page"
    names: dict[str, Any] = {"ml": ml}
    exec(blocks[0].replace("n_trials=20", "n_trials=2"), names)
    assert names["found"].scores["accuracy"] > 0.5
    assert len(names["search"].table) == 2


@pytest.mark.parametrize("line", MAKE)
def test_a_target_of_make_exists_and_does_its_own_set_up(line: str) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    said = subprocess.run(
        [make, "--dry-run", "--always-make", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "-m venv .venv" in said.stdout
    assert re.search(r"--constraint constraints(-\w+)?\.txt", said.stdout)
    for target, does in (("make demo", FIRST.removeprefix("python ")), ("make test", "-m pytest")):
        assert target != line or does in said.stdout
