"""``mergelab analyze``: what it prints, writes and records; the ends of its lines are the models themselves."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergelab.console.progress import silenced
from tests.conftest import Outcome

Analyze = Callable[..., Outcome]


@pytest.fixture
def analyze(mergelab_command: Analyze) -> Analyze:
    """``mergelab analyze ARGUMENTS`` in a fresh folder, in this process."""
    return partial(mergelab_command, "analyze")


def folder_of(workplace: Path) -> Path:
    (file,) = (workplace / "outputs" / "analyses").glob("*/*/analysis.json")
    return file.parent


def figures(workplace: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder_of(workplace) / "analysis.json").read_text(), parse_constant=str)
    return found


def made(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome
    return outcome.out


def checked_models(workplace: Path) -> tuple[np.ndarray, list[str]]:
    """The experts' task vectors in the encoder, read with safetensors alone."""
    base = load_file(workplace / "base" / "model.safetensors")
    names = sorted(name for name in base if ".encoder." in f".{name}")
    rows = []
    for expert in "ab":
        own = load_file(workplace / expert / "model.safetensors")
        rows.append(np.concatenate([(own[modern(n)] - base[n]).double().numpy().ravel() for n in names]))
    return np.stack(rows), names


def modern(name: str) -> str:
    """A name as the experts store it: with the prefix, and today's spelling of LayerNorm's parameters."""
    name = name if name.startswith("bert.") else f"bert.{name}"
    return re.sub(r"beta$", "bias", re.sub(r"gamma$", "weight", name))


def test_figures_are_those_of_the_files(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    made(analyze(*arguments[:1], "models.experts=[./a,./b]", "tracking=none"))
    found = figures(workplace)
    tau, _ = checked_models(workplace)
    layers = [layer for layer in found["layers"] if layer["layer"].startswith("layer ")]
    squares = np.sum([[layer["norm"][name] ** 2 for name in ("a", "b")] for layer in layers], axis=0)
    assert np.sqrt(squares) == pytest.approx(np.linalg.norm(tau, axis=1), rel=1e-6)
    assert found["experts"] == {"a": "./a", "b": "./b"}
    assert "heads" in found["note"]


def test_everything_is_written_and_recorded(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    from mergelab.tracking import TrackingConfig, names, open_tracking

    out = made(analyze(*arguments))
    folder = folder_of(workplace)
    page = (folder / "analysis.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert len(page) < 10e6
    assert "Plotly.newPlot" in page
    assert "mergelab.analyze models.base=./base" in page
    assert (folder / "analysis.png").read_bytes().startswith(b"\x89PNG")
    rows = pq.read_table(folder / "analysis.parquet").to_pylist()
    assert {row["scope"] for row in rows} == {"model", "layer", "tensor"}
    tracker = open_tracking(TrackingConfig(uri=f"sqlite:///{workplace}/outputs/mlflow.db"))
    (run,) = tracker.runs({names.KIND: "analysis"})
    assert run.status == "FINISHED"
    assert f"run {run.id}" in out
    found = figures(workplace)
    assert run.metrics["analysis/norm/a"] == pytest.approx(found["whole"]["norm"]["a"])
    assert run.metrics["analysis/cosine/a/b"] == pytest.approx(found["whole"]["cosine"][0][1])
    assert names.METHOD not in run.tags
    assert names.TASK not in run.tags
    artifacts = {file.path for file in tracker.client.list_artifacts(run.id, "analysis")}
    assert artifacts == {f"analysis/analysis.{end}" for end in ("html", "png", "json", "parquet")}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_and_name_every_expert(
    width: int, analyze: Analyze, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = made(analyze(*arguments, "tracking=none"))
    table = [line for line in out.splitlines() if line.startswith(("│", "┃", "┡", "└", "┏"))]
    assert max(map(len, table)) <= width
    for number, expert in enumerate("abc", 1):
        assert any(re.match(rf"│ {number} \./{expert} ", line) for line in table)


@pytest.mark.parametrize("form", ["csv", "json", "markdown", "latex"])
def test_formats_are_for_programs_and_pages(form: str, analyze: Analyze, arguments: list[str]) -> None:
    out = made(analyze(*arguments, "tracking=none", f"--format={form}"))
    if form == "json":
        assert {"scope", "place", "quantity", "expert", "other", "value"} == set(json.loads(out)["rows"][0])
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert {row["quantity"] for row in rows} >= {"norm", "cosine", "conflict", "overlap", "kept_conflict"}
    else:
        assert "2 ./b" in out


def test_the_ends_of_a_line_score_as_the_models_do(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    from mergelab.notebook.calls import run

    made(analyze(*arguments, "analyze.line=[a,b]", "analyze.points=3", "tracking=none"))
    points = figures(workplace)["line"]["points"]
    assert [point["place"] for point in points] == [[0.0], [0.5], [1.0]]
    assert [point["model"] for point in points] == ["a", "", "b"]
    measured = run(*arguments, method="soup", tracking="none").table.set_index("model")
    assert points[0]["score"][0] == measured.accuracy["./a"]
    assert points[2]["score"][0] == measured.accuracy["./b"]
    # Half-way is the soup of the two, with the heads' mean.
    soup = run(*arguments[::2], "models.experts=[./a,./b]", method="soup", tracking="none")
    assert points[1]["score"][0] == soup.scores["accuracy"]


def test_loss_is_the_cross_entropy_of_the_librarys_own_forward_pass(
    analyze: Analyze, arguments: list[str], workplace: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    made(analyze(*arguments, "analyze.line=[base,b]", "analyze.points=2", "tracking=none"))
    loss = figures(workplace)["line"]["points"][1]["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(workplace / "b").eval()
    tokenizer = AutoTokenizer.from_pretrained(workplace / "b")
    rows = pq.read_table(workplace / "data" / "validation.parquet").to_pylist()
    order = [model.config.label2id[name] for name in ("entailment", "not_entailment")]
    losses = []
    with torch.inference_mode():
        for row in rows:
            encoded = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
            logits = model(**encoded).logits[0, order]
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["label"]))))
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_plane_has_its_models_at_their_distances(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    made(analyze(*arguments, "analyze.plane=[base,a,b]", "analyze.points=2", "analyze.margin=0", "tracking=none"))
    found = figures(workplace)
    plane, whole = found["plane"], found["whole"]
    base, first, second = (np.array(corner) for corner in plane["corners"])
    assert np.linalg.norm(first - base) == pytest.approx(whole["norm"]["a"], rel=1e-6)
    assert np.linalg.norm(second - base) == pytest.approx(whole["norm"]["b"], rel=1e-6)
    assert [point["model"] for point in plane["points"]] == ["base", "a", "b", "", "", "", ""]
    for point in plane["points"]:
        shares = np.array(point["coefficients"])
        assert shares.sum() == pytest.approx(1)
        assert shares @ np.stack([base, first, second]) == pytest.approx(np.array(point["place"]), abs=1e-9)


def test_effective_ranks_are_by_layer(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    out = made(analyze(*arguments, "analyze.rank=true", "tracking=none"))
    assert re.search(r"effective .*\n.* rank ", out)
    layers = figures(workplace)["layers"]
    assert all(value is None or value >= 1 for layer in layers for value in layer["effective_rank"].values())


def test_an_expert_that_is_the_base_is_shown_as_undefined(
    analyze: Analyze, arguments: list[str], workplace: Path
) -> None:
    base, same = load_file(workplace / "base" / "model.safetensors"), load_file(workplace / "a" / "model.safetensors")
    stored = {modern(name): tensor for name, tensor in base.items()}
    save_file(
        {name: stored.get(name, tensor).clone() for name, tensor in same.items()},
        workplace / "a" / "model.safetensors",
        {"format": "pt"},
    )
    out = made(analyze(*arguments, "tracking=none"))
    found = figures(workplace)["whole"]
    assert found["norm"]["a"] == 0
    assert found["cosine"][0] == [None, None, None]
    assert found["cosine"][1][0] is None
    assert "–" in next(line for line in out.splitlines() if line.startswith("│ 1 ./a "))
    assert "NaN" not in (folder_of(workplace) / "analysis.json").read_text()


def test_one_expert_is_an_analysis_without_pairs(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    out = made(analyze(*arguments[::2], "models.experts=[./b]", "tracking=none"))
    assert "cosine" not in out
    assert figures(workplace)["whole"]["conflict"] is None
    assert (folder_of(workplace) / "analysis.png").is_file()


def test_the_embedded_miniature_is_analysed_offline(
    analyze: Analyze, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    outcome = analyze("tracking=none")
    assert "embedded miniature" in made(outcome)
    assert "miniature" in outcome.err


BAD = {
    "analyze.density=0": "analyze.density=0: must be greater than 0",
    "analyze.densty=0.1": "did you mean 'analyze.density'",
    "analyze.line=[base,d]": "analyze.line=[base,d]: must be 2 different models of base, a, b, c",
    "analyze.line=[a,a]": "must be 2 different models",
    "analyze.plane=[a,b]": "must be 3 different models",
    "models.base=null": "models.base: task vectors are",
    "method=ties": "method=ties: an analysis merges nothing",
    "output=there": "output: no such key",
    "sweep=ties": "sweep: no such group",
    "models.base=./nowhere": "nowhere",
    "-m": "leave -m out",
}


@pytest.mark.parametrize(("override", "said"), BAD.items())
def test_bad_input_is_one_line_and_nothing_is_made(
    override: str, said: str, analyze: Analyze, arguments: list[str], workplace: Path
) -> None:
    outcome = analyze(*arguments, "tracking=none", override)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert said in line
    assert len(line) <= 407
    assert not (workplace / "outputs").exists()


def test_what_is_not_finite_is_one_line(analyze: Analyze, arguments: list[str], workplace: Path) -> None:
    tensors = load_file(workplace / "b" / "model.safetensors")
    name = next(name for name in tensors if "attention" in name)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, workplace / "b" / "model.safetensors", {"format": "pt"})
    outcome = analyze(*arguments, "tracking=none")
    assert outcome.code == 2
    assert f"{name} holds NaN or infinity" in outcome.err


def test_silence_is_for_the_library_alone(analyze: Analyze, arguments: list[str]) -> None:
    with silenced():
        assert made(analyze(*arguments, "tracking=none")) == ""


def test_it_is_a_command_of_either_name(workplace: Path) -> None:
    for command in (["mergelab", "analyze"], ["mergelab.analyze"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, check=True, cwd=workplace
        )
        assert "analyze.density=0.2" in done.stdout


def test_adapters_are_experts(
    analyze: Analyze, arguments: list[str], workplace: Path, bert_checkpoints: Mapping[str, Path]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(workplace / "b")
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(workplace / "adapter")
    changes = [
        module.get_delta_weight("default").detach()
        for module in adapted.modules()
        if hasattr(module, "get_delta_weight")
    ]
    made(
        analyze(
            "models.base=./b",
            "models.experts={lora: ./adapter, c: ./c}",
            arguments[2],
            "tracking=none",
            "analyze.rank=true",
        )
    )
    found = figures(workplace)
    expected = float(torch.stack([change.double().square().sum() for change in changes]).sum().sqrt())
    assert found["whole"]["norm"]["lora"] == pytest.approx(expected, rel=1e-4)
    ranks = [layer["effective_rank"]["lora"] for layer in found["layers"] if layer["effective_rank"]["lora"]]
    assert ranks
    assert max(ranks) < 2.1  # of rank 2, up to rounding
